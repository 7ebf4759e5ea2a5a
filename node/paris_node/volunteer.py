"""A volunteer's life with a network, as a state machine that does no I/O.

Tell it what happened; it answers with what to do next::

    for effect in volunteer.handle(event, now):
        perform(effect)                      # the only impure line in the program

IDLE → LEASED → FETCHING → TRAINING → COMMIT → OUTBOX → ACK → IDLE. Each phase has one job: ask for
work, look whether the lease fits this machine, fetch, train, send the commitment, hand in, clear
away. Its answer leads to the next phase, its failure to the same job again after a longer and
longer wait. A unit that can no longer count goes straight to ACK.

Three promises hold for any events in any order:

1. It is never stuck: after every event exactly one alarm lies in the future, and not far.
2. The owner wins: between `Forbidden` and the next `Allowed` nothing is started, and what was
   running is halted at once; without leave to take work, none is asked for.
3. Answers count once: each job has a `turn`; an answer to any other turn is ignored.

`now` is a monotonic clock in seconds, but a clock that jumps in either direction breaks no promise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Phase(StrEnum):
    """Where a volunteer is in the life of a unit."""

    IDLE = "idle"
    LEASED = "leased"
    FETCHING = "fetching"
    TRAINING = "training"
    COMMIT = "commit"
    OUTBOX = "outbox"
    ACK = "ack"


NEXT: Final[Mapping[Phase, Phase]] = {
    Phase.LEASED: Phase.FETCHING,
    Phase.FETCHING: Phase.TRAINING,
    Phase.TRAINING: Phase.COMMIT,
    Phase.COMMIT: Phase.OUTBOX,
    Phase.OUTBOX: Phase.ACK,
    Phase.ACK: Phase.IDLE,
}
PATIENCE: Final[Mapping[Phase, float]] = {
    Phase.IDLE: 120.0,
    Phase.LEASED: 120.0,
    Phase.FETCHING: 1800.0,
    Phase.TRAINING: 900.0,
    Phase.COMMIT: 120.0,
    Phase.OUTBOX: 1800.0,
    Phase.ACK: 120.0,
}
"""Seconds after which a job that says nothing is halted and begun again; progress renews them."""
UNSENT: Final = frozenset({Phase.LEASED, Phase.FETCHING, Phase.TRAINING})
"""Phases in which nothing has been handed in yet."""
AWAITED: Final = frozenset({"gpu.unavailable"})
"""What may come back by itself: a unit is kept for it until its deadline."""
GIVE_UP: Final = 5
"""Failures of training in a row, without a single step between them, after which a unit is left."""
LONGEST_WAIT: Final = 3600.0
REST: Final = 60.0


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Allowed:
    """The owner lets the node work; with `take` false it ends its unit and takes no more."""

    take: bool = True


@dataclass(frozen=True, slots=True)
class Forbidden:
    """The owner wants the machine; `reason` is a catalogue code."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The alarm went off (or anything else that is worth another look)."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The coordinator granted a unit; `unit` is the assignment's id."""

    turn: int
    unit: str


@dataclass(frozen=True, slots=True)
class Done:
    """The job of this turn ended well."""

    turn: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The job of this turn is alive; in training, `step` steps are behind it."""

    turn: int
    step: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The job of this turn ended badly; `final` means that this unit can no longer count."""

    turn: int
    code: str
    final: bool = False
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Over:
    """The network has all it planned; what has not been handed in yet is of no use any more."""


Event = Allowed | Forbidden | Tick | Assigned | Done | Progress | Failed | Over


# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Start:
    """Do the job of `phase` (in IDLE: ask for work) and answer with this turn."""

    turn: int
    phase: Phase
    unit: str | None


@dataclass(frozen=True, slots=True)
class Halt:
    """End the job of this turn now, saving what can be saved; its answer no longer matters."""

    turn: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a `Tick` at this time; it takes the place of every earlier alarm."""

    at: float


@dataclass(frozen=True, slots=True)
class Quit:
    """Nothing is left to do, and the owner asked to be told so by an exit."""


Effect = Start | Halt | Wake | Quit


# ---------------------------------------------------------------- the core


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds to wait after failures: `base`, doubled up to `cap`; `salt` spreads the nodes."""

    base: float = 15.0
    cap: float = 60.0
    salt: str = ""

    def wait(self, failures: int, turn: int) -> float:
        """Seconds to wait after the n-th failure in a row: .8 to 1 of min(cap, base·2^(n−1))."""
        full = min(self.cap, self.base * 2.0 ** min(max(failures, 1) - 1, 30))
        word = hashlib.sha256(f"{self.salt}/{turn}".encode()).digest()[0]
        return full * (0.8 + 0.2 * word / 255)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the journal keeps: enough to go on after kill -9 at any point."""

    phase: Phase = Phase.IDLE
    unit: str | None = None
    left: bool = False
    spoiled: int = 0


class Volunteer:
    """One node's life; see the promises above."""

    def __init__(
        self, pace: Pace, memory: Snapshot | None = None, *, until_over: bool = False
    ) -> None:
        memory = memory or Snapshot()
        self.phase, self.unit = memory.phase, memory.unit
        self.left, self.spoiled = memory.left, memory.spoiled
        self.pace = pace
        self.until_over = until_over
        self.over = False
        self.allowed = False
        self.take = True
        self.turn = 0
        self.running = False
        self.step = 0
        self.failures = 0
        self._forbidden = "node.starting"
        self._trouble = ""
        self._due = float("-inf")
        """When the running job is given up, or when the wait before the next one ends."""
        self._span = 0.0
        """How far `_due` lay ahead when it was set: no jump of the clock makes the wait longer."""

    @property
    def memory(self) -> Snapshot:
        """What must be journalled before the effects of this state are performed."""
        return Snapshot(self.phase, self.unit, self.left, self.spoiled)

    @property
    def why(self) -> str:
        """The one reason of the present state: a catalogue code, `node.working` if all is well."""
        if not self.allowed:
            return self._forbidden
        if self.phase is Phase.IDLE and not self.take:
            return "owner.finished"
        if self.phase is Phase.IDLE and self.over:
            return "network.finished"
        return self._trouble or "node.working"

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; the effects are in the order in which they must be performed."""
        if self._due - now > self._span:
            self._due = now + self._span
        effects = self._take_in(event, now)
        if self.running and now >= self._due:
            effects += self._halt()
            self._fail("job.silent", now)
        effects += self._go_on(now)
        effects.append(Wake(self._alarm(now)))
        return effects

    # ------------------------------------------------------------ what happened

    def _take_in(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Allowed(take):
                self.allowed, self.take = True, take
                asking = self.running and self.phase is Phase.IDLE
                return self._halt() if asking and not take else []
            case Forbidden(reason):
                self.allowed, self._forbidden = False, reason
                return self._halt()
            case Over():
                return self._network_is_over(now)
            case Assigned(turn, unit) if self._current(turn) and self.phase is Phase.IDLE:
                self.running, self.over, self.step = False, False, 0
                self.unit, self.phase = unit, Phase.LEASED
                self._clear_trouble(now)
            case Done(turn) if self._current(turn) and self.phase is not Phase.IDLE:
                self.running = False
                self._advance(now)
            case Progress(turn, step) if self._current(turn):
                if step > self.step:
                    self.step, self.failures, self._trouble = step, 0, ""
                self._wait(now, PATIENCE[self.phase])
            case Failed(turn, code, final, retry_after) if self._current(turn):
                self.running = False
                self._fail(code, now, final=final, retry_after=retry_after)
            case _:
                pass
        return []

    def _network_is_over(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        self.over = True
        if self.phase in UNSENT or self.phase is Phase.IDLE:
            effects = self._halt()
            self._wait(now, 0.0 if self.unit else self.pace.cap)
        if self.phase in UNSENT:
            self._leave("network.finished")
        if self.phase is Phase.IDLE and self.until_over:
            effects.append(Quit())
        return effects

    def _current(self, turn: int) -> bool:
        return self.running and turn == self.turn

    def _advance(self, now: float) -> None:
        ended = self.phase
        self.phase, self.step = NEXT[ended], 0
        if ended is Phase.OUTBOX:
            self.spoiled = 0
        if ended is Phase.ACK and self.left:
            # The coordinator may grant the same unit again: do not fail in a tight circle.
            self.failures = 0
            self._wait(now, 0.0 if self.over else self.pace.wait(self.spoiled, self.turn))
        else:
            self._clear_trouble(now)
        if ended is Phase.ACK:
            self.unit, self.left = None, False

    def _fail(
        self, code: str, now: float, *, final: bool = False, retry_after: float | None = None
    ) -> None:
        self.failures += 1
        self._trouble = code
        hopeless = self.phase is Phase.TRAINING and self.failures >= GIVE_UP and code not in AWAITED
        wait = self.pace.wait(self.failures, self.turn)
        if retry_after is not None:
            wait = min(max(retry_after, 0.05), LONGEST_WAIT)
        if (final or hopeless) and self.phase not in (Phase.IDLE, Phase.ACK):
            self._leave(code)
            wait = 0.0
        self._wait(now, wait)

    def _leave(self, code: str) -> None:
        self.phase, self.left, self._trouble = Phase.ACK, True, code
        self.spoiled += 1
        self.failures = 0

    def _clear_trouble(self, now: float) -> None:
        self.failures, self._trouble = 0, ""
        self._wait(now, 0.0)

    # ------------------------------------------------------------ what to do

    def _halt(self) -> list[Effect]:
        if not self.running:
            return []
        self.running = False
        self._due = float("-inf")
        return [Halt(self.turn)]

    def _go_on(self, now: float) -> list[Effect]:
        if not self.allowed or self.running or now < self._due:
            return []
        if self.phase is Phase.IDLE and self.over and self.until_over:
            return [Quit()]
        if self.phase is Phase.IDLE and not self.take:
            return []
        self.turn += 1
        self.running = True
        self._wait(now, PATIENCE[self.phase])
        return [Start(self.turn, self.phase, self.unit)]

    def _wait(self, now: float, span: float) -> None:
        self._due, self._span = now + span, span

    def _alarm(self, now: float) -> float:
        if self.allowed and now < self._due:
            return self._due
        return now + REST
