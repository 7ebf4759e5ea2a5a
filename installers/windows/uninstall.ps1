<#
.SYNOPSIS
Takes a Paris node off this Windows user again: the scheduled task, and inside WSL2 everything that install.sh wrote.
.EXAMPLE
.\uninstall.ps1 -KeepIdentity
.EXAMPLE
.\uninstall.ps1 -Purge
#>
[CmdletBinding()]
param(
    [string]$Distribution = "",
    [switch]$KeepIdentity,
    [switch]$Purge,
    [switch]$DryRun
)
Set-StrictMode -Version Latest
$ErrorActionPreference = "Stop"

function Main {
    if ($KeepIdentity -and $Purge) { throw "Say -KeepIdentity or -Purge, not both." }
    $words = @()
    if ($Distribution) { $words += @("-d", $Distribution) }
    $words += @("--", "sh", "-c", 'exec "$HOME/.local/share/paris/uninstall.sh" "$@"', "uninstall.sh")
    if ($KeepIdentity) { $words += "--keep-identity" }
    if ($Purge) { $words += "--purge" }
    if ($DryRun) { $words += "--dry-run" }
    if (Get-ScheduledTask -TaskName "Paris node" -ErrorAction SilentlyContinue) {
        Write-Output "  remove  the scheduled task 'Paris node'"
        if (-not $DryRun) {
            Stop-ScheduledTask -TaskName "Paris node" -ErrorAction SilentlyContinue
            Unregister-ScheduledTask -TaskName "Paris node" -Confirm:$false
        }
    }
    & wsl.exe @words
    if ($LASTEXITCODE -ne 0) { throw "uninstall.sh inside WSL ended with $LASTEXITCODE." }
}

Main
