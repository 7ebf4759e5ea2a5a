<#
.SYNOPSIS
Installs a Paris node inside WSL2 for the current Windows user. Not yet run on Windows by the project: see docs/limits.md.
.DESCRIPTION
It needs a WSL2 distribution that is already there (`wsl --install` makes one; this script does not), runs install.sh
inside it, and registers one scheduled task that starts the node at logon. It needs no administrator rights, makes no
service (a service cannot see the GPU), opens no firewall port and touches no driver.
.EXAMPLE
.\install.ps1 -Wheel C:\Downloads\paris_ddm-0.1.0-py3-none-any.whl
.EXAMPLE
.\install.ps1 -Wheel C:\Downloads\paris_ddm-0.1.0-py3-none-any.whl -DryRun
#>
[CmdletBinding()]
param(
    [Parameter(Mandatory = $true)][string]$Wheel,
    [string]$Sha256 = "",
    [string]$Distribution = "",
    [switch]$DryRun,
    [switch]$NoTask
)
Set-StrictMode -Version Latest
$ErrorActionPreference = "Stop"

function Invoke-Wsl([string[]]$Words) {
    $where = @()
    if ($Distribution) { $where = @("-d", $Distribution) }
    & wsl.exe @where -- @Words
    if ($LASTEXITCODE -ne 0) { throw "The command inside WSL ended with $LASTEXITCODE." }
}

function ConvertTo-WslPath([string]$Path) {
    return (Invoke-Wsl @("wslpath", "-a", $Path.Replace("\", "/"))).Trim()
}

function Main {
    if (-not (Get-Command wsl.exe -ErrorAction SilentlyContinue)) {
        throw "WSL2 is not installed. Run 'wsl --install' once, restart, and run this script again."
    }
    $file = (Resolve-Path -LiteralPath $Wheel).Path
    $words = @("sh", (ConvertTo-WslPath (Join-Path $PSScriptRoot "..\install.sh")), "--no-service",
        "--wheel", (ConvertTo-WslPath $file))
    if ($Sha256) { $words += @("--sha256", $Sha256) }
    if ($DryRun) { $words += "--dry-run" }
    Invoke-Wsl $words

    if ($NoTask) { return }
    Write-Output "  write the scheduled task 'Paris node' (at logon, this user only; it does nothing until a network was joined)"
    if ($DryRun) { return }
    $start = '[ -e "$HOME/.local/share/paris/node/genesis.json" ] || exit 0; exec "$HOME/.local/bin/paris-node" run'
    $arguments = "-- sh -c '$start'"
    if ($Distribution) { $arguments = "-d $Distribution $arguments" }
    $action = New-ScheduledTaskAction -Execute "wsl.exe" -Argument $arguments
    $trigger = New-ScheduledTaskTrigger -AtLogOn -User "$env:USERDOMAIN\$env:USERNAME"
    # The defaults already say: not on battery. A node that fails is started again after a minute.
    $settings = New-ScheduledTaskSettingsSet -RestartCount 5 -RestartInterval (New-TimeSpan -Minutes 1) `
        -ExecutionTimeLimit (New-TimeSpan -Seconds 0) -MultipleInstances IgnoreNew
    Register-ScheduledTask -TaskName "Paris node" -Action $action -Trigger $trigger -Settings $settings -Force | Out-Null
    Write-Output "Next: wsl -- ~/.local/bin/paris-node join paris://HOST/ID   To undo: .\uninstall.ps1"
}

Main
