"""The agent's side of the trainer: start the process, give it a unit, save and end it at a pause.

The process stays for the next unit, since its imports cost seconds; it is ended when the owner
wants the memory back. A process that ends by itself is `trainer.failed`::

    trainer = TrainerProcess(folder / "logs" / "trainer.log")
    result = await trainer.train(order, hear)          # a dict, see trainer.Unit.finish
    await trainer.pause(grace=5.0)                     # saved if that took no longer, then gone
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from paris_protocol.errors import REASONS, ParisError

LINE_LIMIT: Final = 64 << 20
START_LIMIT: Final = 180.0
MODULE: Final = "paris_node.trainer"

Report = dict[str, Any]


class TrainerProcess:
    """At most one trainer process, and at most one unit in it."""

    def __init__(self, log: Path, module: str = MODULE) -> None:
        self._log = log
        self._module = module
        self._process: Process | None = None
        self._busy = False

    @property
    def pid(self) -> int | None:
        """Process id while there is a process."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process else None

    async def train(self, order: Mapping[str, Any], hear: Callable[[Report], None]) -> Report:
        """Do a unit and return its result; every other report goes to `hear`."""
        await self._ensure()
        self._busy = True
        await self._tell({"do": "train", **order})
        while True:
            report = await self._next()
            if report["event"] == "done":
                self._busy = False
                return report
            if report["event"] == "failed":
                self._busy = False
                code = report["code"] if report["code"] in REASONS else "trainer.failed"
                raise ParisError(code, str(report["message"])[:300])
            hear(report)

    async def pause(self, grace: float) -> int | None:
        """Save if `grace` seconds suffice, then end the process; the step that was saved."""
        saved = None
        if self._busy and self.pid is not None:
            with suppress(TimeoutError, ParisError, OSError):
                async with asyncio.timeout(grace):
                    await self._tell({"do": "save"})
                    while (report := await self._next())["event"] not in ("done", "failed"):
                        if report["event"] == "saved":
                            saved = int(report["step"])
                            break
        await self.close()
        return saved

    async def close(self) -> None:
        """End the process now; idempotent."""
        process, self._process, self._busy = self._process, None, False
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    # ------------------------------------------------------------ inside

    async def _ensure(self) -> None:
        if self.pid is not None and not self._busy:
            return
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
        try:
            async with asyncio.timeout(START_LIMIT):
                while (await self._next())["event"] != "ready":
                    pass
        except TimeoutError as error:
            await self.close()
            raise ParisError("trainer.failed", "it did not start") from error

    async def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise ParisError("trainer.failed", "it is gone") from error

    async def _next(self) -> Report:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            status = await self._process.wait()
            self._busy = False
            raise ParisError("trainer.failed", f"exit status {status}")
        report: Report = json.loads(line)
        return report
