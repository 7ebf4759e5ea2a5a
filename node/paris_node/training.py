"""The agent's side of the trainer: start the process, give it orders, save and end it at a pause.

The process stays for the next unit, since its imports cost seconds; it is ended when the owner
wants the memory back. An opening may be ordered while a unit trains: the trainer saves, opens, and
trains on. A process that ends by itself is `trainer.failed`::

    trainer = TrainerProcess(folder / "logs" / "trainer.log")
    result = await trainer.train(order, hear)          # a dict, see unit.Unit.finish
    states = await trainer.open({**order, "roots": […], "states": [3]})
    await trainer.pause(grace=5.0)                     # saved if that took no longer, then gone
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

from paris_protocol.errors import REASONS, ParisError

LINE_LIMIT: Final = 64 << 20
START_LIMIT: Final = 180.0
MODULE: Final = "paris_node.trainer"
_LAST: Final = frozenset({"done", "opened", "replayed", "tested", "followed", "failed", "gone"})
"""Reports after which an order is over."""
_UNITS: Final = frozenset({"train", "replay"})
"""Orders that a pause saves before it ends them."""

Report = dict[str, Any]
Hear = Callable[[Report], None]


class TrainerProcess:
    """At most one trainer process, and at most one unit in it."""

    def __init__(self, log: Path, module: str = MODULE) -> None:
        self._log = log
        self._module = module
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = count(1)
        self._ears: dict[int, asyncio.Queue[Report]] = {}
        self._unit: int | None = None
        """Number of the order that trains (or replays), also after nobody listens to it."""
        self._saved: asyncio.Future[int | None] | None = None
        self._rests: int | None = None
        """The step at which the unit was saved, while it makes way for an opening."""

    @property
    def pid(self) -> int | None:
        """Process id while there is a process."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process else None

    async def train(self, order: Mapping[str, Any], hear: Hear) -> Report:
        """Do a unit and return its result; every other report goes to `hear`."""
        return await self._do({"do": "train", **order}, hear)

    async def replay(self, order: Mapping[str, Any], hear: Hear) -> Report:
        """Replay an audit's segments and return what was found."""
        return await self._do({"do": "replay", **order}, hear)

    async def open(self, order: Mapping[str, Any]) -> list[tuple[int, Path, str]]:
        """Lay states of a unit open: (place, file, root) each; training goes on afterwards."""
        report = await self._do({"do": "open", **order}, lambda _: None)
        return [(place, Path(path), root) for place, path, root in report["states"]]

    async def test(self, device: str, cases: Sequence[str]) -> list[Report]:
        """Compute the cases of the numeric self-test: `case`, `rho`, `passed` of each."""
        order = {"do": "test", "device": device, "cases": list(cases)}
        found: list[Report] = (await self._do(order, lambda _: None))["found"]
        return found

    async def follow(self, order: Mapping[str, Any], hear: Hear) -> None:
        """Make a head from its merges' inputs; see `merged.follow`."""
        await self._do({"do": "follow", "device": "cpu", **order}, hear)

    async def pause(self, grace: float) -> int | None:
        """Save if `grace` seconds suffice, then end the process; the step that was saved."""
        saved = self._rests
        if self._unit is not None and self.pid is not None and saved is None:
            self._saved = asyncio.get_running_loop().create_future()
            with suppress(TimeoutError, ParisError, OSError):
                async with asyncio.timeout(grace):
                    await self._tell({"do": "save"})
                    saved = await self._saved
            self._saved = None
        await self.close()
        return saved

    async def close(self) -> None:
        """End the process now; idempotent."""
        process, self._process, self._unit, self._rests = self._process, None, None, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if self._reader is not None:
            await self._reader

    # ------------------------------------------------------------ inside

    async def _do(self, order: dict[str, Any], hear: Hear) -> Report:
        works = order["do"] in _UNITS
        async with self._starting:
            # A unit that nobody listens to any more is ended with its process.
            if self.pid is None or (works and self._unit is not None):
                await self._start()
        number, ear = next(self._numbers), asyncio.Queue[Report]()
        self._ears[number] = ear
        if works:
            self._unit = number
        try:
            await self._tell({**order, "order": number})
            while (report := await ear.get())["event"] not in _LAST:
                hear(report)
        finally:
            del self._ears[number]
        if report["event"] in ("failed", "gone"):
            code = report["code"] if report["code"] in REASONS else "trainer.failed"
            raise ParisError(code, str(report["message"])[:300])
        return report

    async def _start(self) -> None:
        await self.close()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                limit=LINE_LIMIT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            )
        ready = asyncio.Event()
        self._reader = asyncio.create_task(self._read(self._process, ready))
        waits = asyncio.create_task(ready.wait())
        try:
            async with asyncio.timeout(START_LIMIT):
                await asyncio.wait({waits, self._reader}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError as error:
            await self.close()
            raise ParisError("trainer.failed", "it did not start") from error
        finally:
            waits.cancel()
        if not ready.is_set():
            raise ParisError("trainer.failed", f"exit status {await self._process.wait()}")

    async def _tell(self, message: Mapping[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise ParisError("trainer.failed", "it is gone")
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise ParisError("trainer.failed", "it is gone") from error

    async def _read(self, process: Process, ready: asyncio.Event) -> None:
        """Give every report to whoever waits for it, until the process ends."""
        assert process.stdout is not None
        while (line := await process.stdout.readline()).endswith(b"\n"):
            report: Report = json.loads(line)
            if report["event"] == "ready":
                ready.set()
                continue
            if report["order"] == self._unit:
                self._note(report)
            if report["order"] in self._ears:
                self._ears[report["order"]].put_nowait(report)
            if report["event"] == "opening" and self._unit is not None and self._rests is not None:
                # The unit that makes way is not silent: what it waits for is going on.
                ear = self._ears.get(self._unit)
                if ear is not None:
                    ear.put_nowait({"event": "progress", "step": self._rests})
        status = await process.wait()
        self._answer_save(None)
        for ear in self._ears.values():
            gone = {"event": "gone", "code": "trainer.failed", "message": f"exit status {status}"}
            ear.put_nowait(gone)
        if self._process is process:
            self._unit = None

    def _note(self, report: Report) -> None:
        """What a report about the unit means for a pause that waits for its save."""
        if report["event"] in _LAST:
            self._unit = self._rests = None
            self._answer_save(None)
            return
        self._rests = int(report["step"]) if report["event"] == "waiting" else None
        if self._rests is not None or report.get("asked") is True:
            self._answer_save(int(report["step"]))

    def _answer_save(self, step: int | None) -> None:
        if self._saved is not None and not self._saved.done():
            self._saved.set_result(step)
