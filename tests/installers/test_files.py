"""The installers' files by their linters: shell, systemd, launchd, compose, PowerShell."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLERS = Path(__file__).resolve().parents[2] / "installers"
NO_SYSTEMD = "SKIPPED: systemd-analyze is missing (apt install systemd); the units are NOT checked"
FORBIDDEN = re.compile(
    r"nvidia-smi|apt(-get)? install|ufw |netsh|iptables|New-NetFirewallRule"
    r"|killall|kill -9|New-Service"
)
NOT_CODE = re.compile(r"\s*(#|say |fail )")


def scripts() -> list[Path]:
    return sorted(INSTALLERS.rglob("*.sh"))


def test_shellcheck() -> None:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, *scripts()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", scripts(), ids=lambda p: p.name)
def test_scripts_are_executable_and_guarded(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "\nset -eu\n" in text
    assert text.endswith('\nmain "$@"\n'), "a cut-off download must do nothing"


def test_no_installer_touches_what_it_must_not() -> None:
    for path in INSTALLERS.rglob("*"):
        if path.suffix in {".sh", ".ps1"} or path.name == "Dockerfile":
            lines = path.read_text().splitlines()
            code = "\n".join(line for line in lines if not NOT_CODE.match(line))
            assert not FORBIDDEN.search(code), path


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with programs that exist here in the place of the installed ones."""
    if not shutil.which("systemd-analyze"):
        print(NO_SYSTEMD, file=sys.stderr)
        pytest.skip(NO_SYSTEMD)
    for unit in (INSTALLERS / "linux").glob("*.service"):
        text = re.sub(r"(?m)^(ExecStart=)\S+", r"\1/bin/true", unit.read_text())
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*words: str | Path) -> str:
    environment = {**os.environ, "XDG_RUNTIME_DIR": "/tmp"}
    done = subprocess.run(
        ["systemd-analyze", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    # A warning is a fault too: an unknown key would be ignored silently.
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_units_verify(units: Path) -> None:
    analyze("verify", "--man=no", units / "paris-node.service")
    analyze("verify", "--man=no", "--user", units / "paris-node.user.service")


def test_system_unit_is_hardened(units: Path) -> None:
    table = analyze("security", "--offline=true", units / "paris-node.service")
    found = re.search(r"exposure level for .*: ([0-9.]+)", table)
    assert found, table
    assert float(found[1]) <= 4.0
    assert found[1] in (INSTALLERS / "README.md").read_text(), "README names this figure"


def test_units_do_not_loop_on_what_needs_the_owner() -> None:
    from paris_protocol import errors

    for unit in (INSTALLERS / "linux").glob("*.service"):
        line = re.search(r"(?m)^RestartPreventExitStatus=(.*)$", unit.read_text())
        assert line
        expected = {errors.USAGE, errors.INPUT, errors.WRONG_NETWORK, errors.STATE, errors.DISK}
        assert {int(code) for code in line[1].split()} == expected


def test_launchd_agent_parses() -> None:
    agent = plistlib.loads((INSTALLERS / "macos/org.paris-ddm.node.plist").read_bytes())
    assert agent["Label"] == "org.paris-ddm.node"
    assert agent["ProgramArguments"][:2] == ["/bin/sh", "-c"]
    assert agent["Umask"] == 0o077
    assert agent["KeepAlive"] == {"SuccessfulExit": False}


def test_compose_and_dockerfile_say_the_same() -> None:
    compose = (INSTALLERS / "docker/compose.yaml").read_text()
    dockerfile = (INSTALLERS / "docker/Dockerfile").read_text()
    assert 'command: ["run", "--state", "/state"]' in compose
    assert 'CMD ["run", "--state", "/state"]' in dockerfile
    assert "privileged: true" not in compose
    assert "cap_drop: [ALL]" in compose
    assert "\nUSER paris\n" in dockerfile


def test_powershell_is_balanced_and_strict() -> None:
    """No PowerShell runs here: brackets, strict mode, and the one entry at the end."""
    for script in (INSTALLERS / "windows").glob("*.ps1"):
        text = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"", "''", script.read_text())
        for left, right in ("()", "{}", "[]"):
            assert text.count(left) == text.count(right), (script.name, left)
        assert "Set-StrictMode -Version Latest" in text
        assert text.endswith("\nMain\n")


def test_all_agree_on_where_the_state_is() -> None:
    for name in (
        "linux/paris-node.user.service",
        "macos/org.paris-ddm.node.plist",
        "windows/install.ps1",
    ):
        assert ".local/share/paris/node/genesis.json" in (INSTALLERS / name).read_text(), name
    assert "state=$data/node" in (INSTALLERS / "uninstall.sh").read_text()
