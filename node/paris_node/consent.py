"""The owner's wishes, as a pure core: may this machine work now, and if not, for which one reason?

Tell it what the owner said; it answers with what the volunteer must hear::

    for event in consent.handle(Said(Wish.PAUSE)):
        volunteer.handle(event, now)

It refuses to take back a stop: a process that was told to stop starts nothing any more. Limits of
the machine (heat, hours, other programs) are further events of this core, not of the volunteer,
which only ever hears `Allowed` and `Forbidden` with one reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from paris_node.volunteer import Allowed, Forbidden


class Wish(StrEnum):
    """What the owner wants; `finish` ends the unit in hand and takes no more."""

    RUN = "run"
    PAUSE = "pause"
    FINISH = "finish"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Said:
    """The owner said something, on the command line or through the control socket."""

    wish: Wish


class Consent:
    """Holds the last wish; `decision` is what follows from it."""

    def __init__(self, wish: Wish = Wish.RUN) -> None:
        self.wish = wish

    @property
    def decision(self) -> Allowed | Forbidden:
        """What the volunteer may do now; a refusal carries its catalogue code."""
        match self.wish:
            case Wish.RUN:
                return Allowed(take=True)
            case Wish.FINISH:
                return Allowed(take=False)
            case Wish.PAUSE:
                return Forbidden("owner.paused")
            case Wish.STOP:
                return Forbidden("owner.stopped")

    def handle(self, event: Said) -> list[Allowed | Forbidden]:
        """Take in what the owner said; the answer is empty when nothing changes by it."""
        if self.wish in (Wish.STOP, event.wish):
            return []
        self.wish = event.wish
        return [self.decision]
