"""The agent: one asyncio process that performs what the volunteer's core decides.

It puts the parts together (journal, blob store, control client, network process, trainer, control
socket), journals every transition before it acts on it, and is the only place that owns a clock.
It refuses a folder that is in use, of another network or newer (`state.*`)::

    code = asyncio.run(run_agent(folder, until_finished=True))
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from paris_node import logs, receipts
from paris_node.config import load_settings
from paris_node.consent import Consent, Said, Wish
from paris_node.control import FolderLock, Server
from paris_node.jobs import Jobs, NetworkOver, is_final
from paris_node.kit import BOOTSTRAPS, Kit, join_swarm, make_kit, watch
from paris_node.machine import Machine
from paris_node.traffic import Traffic
from paris_node.upkeep import let_go
from paris_node.view import describe
from paris_node.volunteer import (
    Allowed,
    Assigned,
    Done,
    Effect,
    Event,
    Failed,
    Forbidden,
    Halt,
    Over,
    Pace,
    Phase,
    Progress,
    Quit,
    Start,
    Tick,
    Volunteer,
    Wake,
)
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.net.swarm import SwarmStatus
from paris_protocol.records import Beat

DISK_RETRY: Final = 5.0
JUDGED_BEAT: Final = 15.0
"""Seconds between beats while work of ours is being judged, if they are not shorter anyway."""
LAST_WORDS: Final = 20.0
"""Seconds that the end may take for asking what became of the contributions."""
MakeJobs = Callable[[Kit], Jobs]


class Agent:
    """One volunteer at work; `run` returns when the owner, or the end of the network, says so."""

    def __init__(self, kit: Kit, jobs: Jobs, *, until_finished: bool = False) -> None:
        self.kit, self.jobs = kit, jobs
        settings = kit.settings
        pace = Pace(settings.retry, settings.retry_cap, salt=kit.key.id)
        self.volunteer = Volunteer(pace, kit.journal.memory(), until_over=until_finished)
        wish = kit.journal.fact("wish")
        self.consent = Consent(Wish(wish) if wish in ("pause", "finish") else Wish.RUN)
        self.traffic = Traffic(kit.journal)
        kit.journal.set_fact("node", kit.key.id)
        self.since = kit.clock()
        self._events: asyncio.Queue[tuple[Event, str]] = asyncio.Queue()
        self._words: deque[tuple[Event, str]] = deque()
        self._wake = 0.0
        self._job: asyncio.Task[None] | None = None
        self._halting: asyncio.Task[None] | None = None
        self.openings = jobs.openings()
        self._opening: asyncio.Task[None] | None = None
        self._training = False
        self._quit = False
        self._revoked: ParisError | None = None
        self._disk_full = False

    async def run(self) -> None:
        """Live; what is running is saved and ended before this returns.

        `node.revoked` when that ended it: without a key that counts there is nothing to wait for.
        """
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, self._said, Wish.STOP)
        verbs = {"status": self._status, "receipts": self._receipts} | {
            wish.value: self._wish(wish) for wish in (Wish.PAUSE, Wish.FINISH, Wish.STOP)
        }
        server = Server(self.kit.folder, {**verbs, "resume": self._wish(Wish.RUN)})
        await server.start()
        beats = asyncio.create_task(self._beat())
        try:
            await self._hear(self.consent.decision, "started")
            while not self._quit:
                await self._hear(*await self._next_event())
        finally:
            beats.cancel()
            try:
                await self._settle()
            finally:
                await server.close()
        with contextlib.suppress(ParisError, OSError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self._look_after()
                await self._note_traffic()
        if self._revoked is not None:
            raise self._revoked

    async def _next_event(self) -> tuple[Event, str]:
        if self._words:
            return self._words.popleft()
        wait = self._wake - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, wait)):
                return await self._events.get()
        except TimeoutError:
            return Tick(), "alarm"

    # ------------------------------------------------------------ the core and its effects

    async def _hear(self, event: Event, note: str) -> None:
        before, why = self.volunteer.memory, self.volunteer.why
        effects = self.volunteer.handle(event, asyncio.get_running_loop().time())
        if self.volunteer.memory != before:
            await self._write_down(note)
            self.kit.log.info("phase.%s", self.volunteer.phase, extra=self._about(note=note))
        if self.volunteer.why != why:
            self.since = self.kit.clock()
            self.kit.log.info("why.%s", self.volunteer.why)
        for effect in effects:
            self._perform(effect)
        if isinstance(event, Allowed) and self._opening is None:
            self._opening = asyncio.create_task(self._open(self._halting))
        if isinstance(event, Forbidden):
            # The owner gets the memory back even if the trainer only waited for a next unit.
            opening, self._opening = self._opening, None
            end = self._end(None, self._halting, free=True, opening=opening)
            self._halting = asyncio.create_task(end)
            self._quit |= self.consent.wish is Wish.STOP

    async def _write_down(self, note: str) -> None:
        """Journal the state before acting on it; a full disk stops the node until there is room."""
        while True:
            try:
                self.kit.journal.record(self.volunteer.memory, note, self.kit.clock())
            except ParisError as error:
                if error.code != "disk.full":
                    raise
                self._disk_full = True
                self.kit.log.error("disk.full", extra={"detail": error.detail})
                if isinstance(self.consent.decision, Forbidden):  # the owner comes first, here too
                    await self._settle()
                if self.consent.wish is Wish.STOP:
                    raise
                await asyncio.sleep(DISK_RETRY)
            else:
                self._disk_full = False
                return

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Start():
                self._job = asyncio.create_task(self._do(effect, self._halting))
                self._training = effect.phase is Phase.TRAINING
            case Halt():
                end = self._end(self._job, self._halting, free=self._training)
                self._halting, self._job = asyncio.create_task(end), None
            case Wake(at):
                self._wake = at
            case Quit():
                self._quit = True

    async def _do(self, start: Start, before: asyncio.Task[None] | None) -> None:
        """Do one job and report how it ended; the one place where a failure becomes an event."""
        turn, phase = start.turn, start.phase
        if before is not None:
            await asyncio.shield(before)
        try:
            if start.unit is None:
                unit = await self.jobs.ask()
                self._events.put_nowait((Assigned(turn, unit), "assigned"))
            else:
                await self.jobs.run(phase, start.unit, lambda step: self._progress(turn, step))
                self._events.put_nowait((Done(turn), "done"))
        except NetworkOver:
            self._events.put_nowait((Over(), "network.finished"))
        except ParisError as error:
            self._failed(start, error)
        except OSError as error:
            full = error.errno in (28, 122)
            self._failed(start, ParisError("disk.full" if full else "internal", str(error)[:200]))
        except Exception as error:  # an unforeseen failure is retried, and told
            self.kit.log.exception("job.%s", phase)
            self._failed(start, ParisError("internal", f"{type(error).__name__}: {error}"[:200]))

    async def _open(self, before: asyncio.Task[None] | None) -> None:
        """Answer challenges beside everything else, from when the machine is free again."""
        if before is not None:
            await asyncio.shield(before)
        while True:
            try:
                await self.openings.run()
            except (
                Exception
            ):  # an unforeseen failure is told, and keeps no challenge from its answer
                self.kit.log.exception("openings")
            await asyncio.sleep(self.kit.settings.retry)

    def _failed(self, start: Start, error: ParisError) -> None:
        final = is_final(start.phase, error.code)
        if final and start.unit is not None:
            self.kit.journal.settle(start.unit, error.code)
        if error.code == "node.revoked" and self.volunteer.until_over:
            self._revoked, self._quit = error, True  # nothing that this key does counts any more
        if error.code in ("network.version", "record.signer", "unit.unknown"):
            self.kit.registered = False
        extra = self._about(code=error.code, detail=error.detail)
        self.kit.log.warning("job.failed", extra=extra)
        event = Failed(start.turn, error.code, final, error.retry_after)
        self._events.put_nowait((event, error.code))

    def _progress(self, turn: int, step: int) -> None:
        self._events.put_nowait((Progress(turn, step), "progress"))

    async def _end(
        self,
        job: asyncio.Task[None] | None,
        before: asyncio.Task[None] | None,
        *,
        free: bool,
        opening: asyncio.Task[None] | None = None,
    ) -> None:
        if before is not None:
            await before
        for task in (job, opening):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if free and self.kit.trainer.pid is not None:
            saved = await self.kit.trainer.pause(self.kit.settings.save_grace)
            self.kit.log.info("trainer.ended", extra={"saved": saved})

    async def _settle(self) -> None:
        """End whatever runs, with its save, before the process ends."""
        await self._end(self._job, self._halting, free=True, opening=self._opening)

    # ------------------------------------------------------------ what others ask

    def _said(self, wish: Wish) -> None:
        """The owner's word goes before everything else that waits to be heard."""
        for event in self.consent.handle(Said(wish)):
            self._words.append((event, f"owner.{wish.value}"))
            self._events.put_nowait((Tick(), "owner"))
            if wish is not Wish.STOP:
                try:
                    self.kit.journal.set_fact("wish", wish.value)
                except ParisError as error:  # a full disk keeps nobody from pausing
                    self.kit.log.error(error.code, extra={"detail": error.detail})

    def _wish(self, wish: Wish) -> Callable[[Mapping[str, Any]], Any]:
        async def verb(request: Mapping[str, Any]) -> dict[str, Any]:
            begun = time.monotonic()
            self._said(wish)
            # On a full disk nothing goes on before it is written down; a pause frees the trainer.
            while self._words and not (self._disk_full and self.kit.trainer.pid is None):
                if self._disk_full and wish is not Wish.PAUSE:
                    break
                await asyncio.sleep(0.01)
            if wish is Wish.PAUSE and self._halting is not None:
                await asyncio.shield(self._halting)
            return {"wish": self.consent.wish.value, "seconds": time.monotonic() - begun}

        return verb

    async def _status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        kit, swarm = self.kit, None
        with contextlib.suppress(ParisError, OSError):  # `why` answers also when these do not
            swarm = await self._note_traffic()
        training = self.volunteer.phase is Phase.TRAINING
        view = describe(
            kit.journal,
            kit.folder,
            why="disk.full" if self._disk_full else self.volunteer.why,
            running=True,
        )
        view |= {
            "step": self.volunteer.step if training else 0,  # else it counts bytes
            "loss": kit.loss,
            "since": self.since,
            "wish": self.consent.wish.value,
            "trainer": kit.trainer.pid,
        }
        if swarm is not None:
            view["swarm"] = swarm.as_json()
        return view

    async def _receipts(self, request: Mapping[str, Any]) -> dict[str, Any]:
        await receipts.refresh(self.kit)
        return {}

    async def _beat(self) -> None:
        """Tell the coordinator that we are alive, and ask what became of our contributions."""
        kit = self.kit
        while True:
            await self._rest()
            core = self.volunteer
            step = core.step if core.phase is Phase.TRAINING else 0
            phase, at = core.phase.value, int(kit.clock())
            beat = Beat(at=at, assignment=core.unit, step=step, state=phase)
            try:
                answer = await kit.control.post("beat", seal(beat, kit.key, kit.network).raw)
                await self.openings.hear(answer.get("challenges"))
                if answer.get("finished") is True and not core.over:
                    self._events.put_nowait((Over(), "network.finished"))
                await self._look_after()
                await self._note_traffic()
            except (ParisError, OSError) as error:
                kit.log.info("beat.failed", extra={"detail": str(error)})
            except Exception:  # an unforeseen failure is told; without beats no challenge is heard
                kit.log.exception("beat")

    async def _rest(self) -> None:
        """Between two beats: not for long while work of ours waits for its verdict.

        A challenge is heard of in the answer to a beat, and a round waits for those who are asked.
        """
        rested, span = 0.0, self.kit.settings.beat
        while rested < span:
            part = min(span - rested, JUDGED_BEAT)
            await asyncio.sleep(part)
            rested += part
            if any(receipt.state == "queued" for receipt in self.kit.journal.receipts()):
                return

    async def _look_after(self) -> None:
        """Ask what became of our contributions, and let go of what nobody will ask for any more."""
        if await receipts.refresh(self.kit) and self.kit.watch is not None:
            await self.kit.watch()
        await let_go(self.kit, but=self.volunteer.unit)

    async def _note_traffic(self) -> SwarmStatus | None:
        swarm = None if self.kit.swarm is None else await self.kit.swarm.status()
        self.traffic.note(self.kit.control, swarm)
        return swarm

    def _about(self, **extra: object) -> dict[str, object]:
        return {"unit": self.volunteer.unit, **extra}


async def run_agent(
    folder: Path,
    *,
    until_finished: bool = False,
    swarm: bool = True,
    make_jobs: MakeJobs = Jobs,
    machine: Machine | None = None,
) -> None:
    """Run the agent of an enrolled folder until it is stopped; see the module for refusals."""
    settings = load_settings(folder)
    with FolderLock(folder):
        logs.to_file(folder)
        kit = make_kit(folder, settings, time.time, machine)
        if kit.journal.renewed is not None:
            kit.log.error("state.corrupt", extra={"moved_to": kit.journal.renewed.name})
        kit.watch = lambda: watch(kit)
        if swarm and settings.swarm:
            kit.join_swarm = lambda: join_swarm(kit)
            if kit.journal.fact(BOOTSTRAPS) is not None:
                await join_swarm(kit)
        try:
            await Agent(kit, make_jobs(kit), until_finished=until_finished).run()
        finally:
            await kit.trainer.close()
            if kit.swarm is not None:
                await kit.swarm.close()
            await kit.control.close()
            kit.journal.close()
