"""What this machine is: memory, disk and device; and a scripted machine for tests.

The agent never imports torch: the device is what the driver's own tool reports, and what torch
makes of it is asked in a process of its own (`torch_report`)::

    machine = RealMachine()
    machine.memory_mb(), machine.disk_mb(folder), machine.device("auto").name
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from paris_models.fitting import Facts
from paris_node.fit import HOME, Links, facts_of
from paris_protocol.errors import ParisError

_QUERY: Final = ("--query-gpu=name,driver_version,memory.free", "--format=csv,noheader,nounits")
_PROBE: Final = """
import json, torch
gpu = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": gpu, "threads": torch.get_num_threads(),
                  "name": torch.cuda.get_device_name() if gpu else "cpu"}))
"""


@dataclass(frozen=True, slots=True)
class Device:
    """Where the trainer computes; `memory_mb` is what is free on it now."""

    kind: str
    name: str
    memory_mb: int
    driver: str = ""


class Machine(Protocol):
    """What the node wants to know of the machine under it."""

    def memory_mb(self) -> int:
        """Memory that could be used now without pushing others out, MB."""

    def disk_mb(self, folder: Path) -> int:
        """Free disk where `folder` is or will be, MB."""

    def device(self, wanted: str) -> Device:
        """The device for `auto`, `cpu` or `cuda`; `gpu.unavailable` without a wanted one."""


class RealMachine:
    """This machine."""

    def memory_mb(self) -> int:
        """See `Machine`."""
        import psutil

        return int(psutil.virtual_memory().available) >> 20

    def disk_mb(self, folder: Path) -> int:
        """See `Machine`."""
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free >> 20

    def device(self, wanted: str) -> Device:
        """See `Machine`."""
        gpu = None if wanted == "cpu" else _nvidia()
        if gpu is None and wanted == "cuda":
            raise ParisError("gpu.unavailable", "nvidia-smi reports none")
        return gpu or Device("cpu", "CPU", self.memory_mb())


@dataclass(slots=True)
class FakeMachine:
    """A machine by script: each question takes the next value, the last one stays."""

    memory: list[int] = field(default_factory=lambda: [16_000])
    disk: list[int] = field(default_factory=lambda: [100_000])
    gpu: Device | None = None

    def memory_mb(self) -> int:
        """See `Machine`."""
        return _next(self.memory)

    def disk_mb(self, folder: Path) -> int:
        """See `Machine`."""
        return _next(self.disk)

    def device(self, wanted: str) -> Device:
        """See `Machine`."""
        if wanted == "cuda" and self.gpu is None:
            raise ParisError("gpu.unavailable", "by script")
        if wanted == "cpu" or self.gpu is None:
            return Device("cpu", "CPU", self.memory[0])
        return self.gpu


def look(machine: Machine, wanted: str, folder: Path, links: Links = HOME) -> tuple[Device, Facts]:
    """The device, and the machine around it as plans are fitted to it; what is free counts."""
    device = machine.device(wanted)
    facts = facts_of(
        device.kind, device.name, free_mb=device.memory_mb, ram_mb=machine.memory_mb(),
        disk_mb=machine.disk_mb(folder), cores=os.cpu_count() or 1, links=links,
    )  # fmt: skip
    return device, facts


def torch_report() -> dict[str, Any]:
    """What torch sees here, asked in a process of its own; `gpu.unavailable` when it cannot run."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, timeout=120, check=True
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ParisError("gpu.unavailable", f"torch cannot be started: {error}"[:200]) from error
    return report


def numerics_report(device: str) -> list[dict[str, Any]]:
    """What the numeric self-test finds here, in a process of its own; `gpu.unavailable` likewise.

    One row for each case, with `case`, `rho` and `passed`.
    """
    command = [sys.executable, "-m", "paris_models.selftest", "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, timeout=300, check=False)
        rows: list[dict[str, Any]] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ParisError("gpu.unavailable", f"torch cannot be started: {error}"[:200]) from error
    return rows


def _next(script: list[int]) -> int:
    return script.pop(0) if len(script) > 1 else script[0]


def _nvidia(command: Sequence[str] = ("nvidia-smi", *_QUERY)) -> Device | None:
    """The NVIDIA device with most free memory, if the driver's tool is there and answers."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True, text=True)
        rows = [line.rsplit(",", 2) for line in done.stdout.splitlines() if "," in line]
        found = [
            Device("cuda", name.strip(), int(free), driver.strip()) for name, driver, free in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return max(found, key=lambda device: device.memory_mb, default=None)
