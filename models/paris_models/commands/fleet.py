"""The demo's processes: real programs, started, watched, killed and counted.

A `Fleet` owns nothing but processes on this machine; it tags each with an environment variable so
that children of children are found too, also after their parent was killed::

    fleet = Fleet(out)
    node = fleet.start("node-1", ["paris-node", "join", invite, "--yes"])
    fleet.kill(node)                      # kill -9, as a power cut would
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

TAG = "PARIS_DEMO_RUN"


@dataclass
class Span:
    """One bar of the timeline: seconds since the fleet was made."""

    process: str
    kind: str
    start: float
    end: float | None
    label: str


@dataclass
class Running:
    """A started program with its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    span: Span


@dataclass
class Fleet:
    """All processes of one demo run, their timeline and their peak memory (sum of PSS)."""

    out: Path
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    spans: list[Span] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    peak_pss_mb: float = 0.0

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.began_at = time.time()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def seconds(self) -> float:
        """Seconds since the fleet was made."""
        return time.monotonic() - self.began

    def mark(self, process: str, kind: str, start: float, end: float | None, label: str) -> Span:
        """Add a bar (or, with end equal to start, an event) to the timeline."""
        span = Span(process, kind, start, end, label)
        self.spans.append(span)
        return span

    def start(self, name: str, command: list[str]) -> Running:
        """Start a program of ours (or `python -m …`) with its output in OUT/logs/NAME.log."""
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            process = subprocess.Popen(
                resolve(command),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, TAG: self.tag, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )
        run = Running(name, process, log, self.mark(name, "alive", self.seconds(), None, name))
        self.running.append(run)
        return run

    def call(self, name: str, command: list[str], timeout: float) -> str:
        """Run a program to its end; returns what it printed; its failure ends the demo."""
        run = self.start(name, command)
        try:
            code = run.process.wait(timeout)
        finally:
            self.finished(run)
        text = run.log.read_text(errors="replace")
        if code != 0:
            raise RuntimeError(f"{name} ended with {code}: {text.strip()[-800:]}")
        return text

    def finished(self, run: Running) -> None:
        """Close the bar of a process that has ended (it is killed if it has not)."""
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        if run.span.end is None:
            run.span.end = self.seconds()
        if run in self.running:
            self.running.remove(run)

    def kill(self, run: Running) -> None:
        """kill -9; what the process had started must notice by itself."""
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        now = self.seconds()
        self.mark(run.name, "kill", now, now, "kill -9")
        self.finished(run)

    def close(self) -> None:
        """End every process of this run, also orphans; nothing of ours stays behind."""
        for run in list(self.running):
            run.process.terminate()
        deadline = time.monotonic() + 15
        for run in list(self.running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(max(0.1, deadline - time.monotonic()))
            self.finished(run)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._stop.set()
        self._sampler.join(5)

    def pids(self) -> list[int]:
        """Every process that carries this run's tag, children of children included."""
        needle = f"{TAG}={self.tag}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def _sample(self) -> None:
        """Every two seconds: the proportional set size of the whole run (Linux)."""
        while not self._stop.wait(2.0):
            total = sum(map(pss_kb, [os.getpid(), *self.pids()]))
            self.peak_pss_mb = max(self.peak_pss_mb, total / 1024)


def pss_kb(pid: int) -> int:
    """Proportional set size of a process in KiB; 0 where the system does not tell."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def resolve(command: list[str]) -> list[str]:
    """Our programs by their place beside this Python, so that PATH does not matter."""
    if command[0] == "python":
        return [sys.executable, *command[1:]]
    beside = Path(sys.executable).parent / command[0]
    return [
        str(beside) if beside.exists() else shutil.which(command[0]) or command[0],
        *command[1:],
    ]


def free_port() -> int:
    """A TCP port of the loopback address that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
