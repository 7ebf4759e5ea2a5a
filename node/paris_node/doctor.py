"""`paris-node doctor`: what could keep a node from working here, each with one fix.

Every check runs, whatever the others say; nothing is changed on the machine::

    for check in examine(folder, RealMachine()): print(check.ok, check.name, check.detail)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from paris_node.config import load_settings
from paris_node.control import owner_of
from paris_node.fit import need_of_network
from paris_node.journal import Journal
from paris_node.machine import Machine, numerics_report, torch_report
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError
from paris_protocol.keys import load_key

LEAST_DISK_MB: Final = 1024
PACKAGES: Final = ("torch", "diffusers", "safetensors", "aiohttp", "cryptography", "hivemind")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `fix` is empty when all is well."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    code: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain form for `--json`."""
        return asdict(self)


def examine(folder: Path, machine: Machine) -> list[Check]:
    """All findings about this machine and, if it is enrolled, about the state folder."""
    checks = [_run("python", _python), _run("packages", _packages), _run("torch", _torch)]
    checks.append(_run("numerics", lambda: _numerics(machine)))
    checks.append(_run("disk", lambda: _disk(folder, machine)))
    if not (folder / "genesis.json").exists():
        return [*checks, Check("state", True, "not enrolled yet; `paris-node join INVITE`")]
    checks += [
        _run("key", lambda: load_key(folder / "key").id),
        _run("settings", lambda: load_settings(folder).invite.network[:12]),
        _run("journal", lambda: _journal(folder)),
        _run("agent", lambda: _agent(folder)),
        _run("memory", lambda: _memory(folder, machine)),
        _run("coordinator", lambda: asyncio.run(_coordinator(folder))),
    ]
    return checks


def _run(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except ParisError as error:
        return Check(name, False, error.sentence, error.reason.fix, error.code)
    except OSError as error:
        return Check(name, False, str(error), "Check the folder's owner and mode.", "internal")


def _python() -> str:
    return ".".join(str(number) for number in sys.version_info[:3])


def _packages() -> str:
    lacking = [name for name in PACKAGES if find_spec(name) is None]
    if lacking:
        raise ParisError("usage", f"not installed: {', '.join(lacking)}")
    return f"{len(PACKAGES)} found"


def _torch() -> str:
    report = torch_report()
    return f"torch {report['torch']} on {report['name']}"


def _numerics(machine: Machine) -> str:
    device = machine.device("auto")
    found = numerics_report(device.kind)
    if wrong := [one for one in found if not one["passed"]]:
        told = ", ".join(f"{one['case']}: {one['rho']:.2g} apart" for one in wrong)
        raise ParisError("machine.numerics", told)
    worst = max(one["rho"] for one in found)
    return f"{len(found)} trainings on {device.name} within {worst:.1g} of what they must give"


def _disk(folder: Path, machine: Machine) -> str:
    free = machine.disk_mb(folder)
    if free < LEAST_DISK_MB:
        raise ParisError("disk.full", f"{free} MB free")
    return f"{free:,} MB free"


def _memory(folder: Path, machine: Machine) -> str:
    settings = load_settings(folder)
    genesis = open_genesis((folder / "genesis.json").read_bytes(), settings.invite.network)
    need, device = need_of_network(genesis.record), machine.device(settings.device)
    if need.memory_mb > device.memory_mb:
        raise ParisError(
            "machine.too-small", f"{need.memory_mb} MB needed, {device.memory_mb} MB free"
        )
    return f"{need.memory_mb:,} MB needed, {device.memory_mb:,} MB free on {device.name}"


def _journal(folder: Path) -> str:
    journal = Journal.read(folder / "journal.sqlite")
    if journal is None:
        return "none yet"
    try:
        return f"last phase {journal.memory().phase.value}"
    finally:
        journal.close()


def _agent(folder: Path) -> str:
    owner = owner_of(folder)
    return "not running" if owner is None else f"running as process {owner}"


async def _coordinator(folder: Path) -> str:
    from paris_protocol.net.control import HttpControl

    invite = load_settings(folder).invite
    async with HttpControl(invite.url, invite.network) as control:
        policy = (await control.policy()).record
        index = (await control.index()).record
    return f"policy {policy.number}, {index.log_size} statements in the log, clocks agree"
