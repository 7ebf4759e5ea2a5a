"""Which piece of a blob to ask of which source next: decisions only, the caller moves the bytes.

Peers come first; the fallback (the coordinator) is asked only while no peer is usable, or for what
is overdue while none delivers. A source
that fails or is too slow rests, longer each time; one that sent wrong bytes is not asked again.
`next` never gives a piece twice at a time and answers None when there is nothing to ask now::

    transfer = Transfer(manifest, have=store_has, fallback="coordinator")
    while (ask := transfer.next(peers, now)) is not None:
        ...  # start fetching ask.piece from ask.source; give up at ask.deadline
    transfer.arrived(ask, now)   # or transfer.failed(ask, now, corrupt=...)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from paris_protocol.blobs import Manifest

IN_FLIGHT: Final = 2
"""Pieces asked of one source at a time: one travels while the next is being read."""
OVERDUE: Final = 10.0
"""Seconds after the first question for a piece from which only proven peers are still preferred."""
MAX_REST: Final = 60.0
MAX_PATIENCE: Final = 120.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: source, piece number, and the time after which it counts as stalled."""

    source: str
    piece: int
    deadline: float


@dataclass(slots=True)
class _Source:
    """What is known of a source; `pace` is the seconds its last piece took."""

    busy: int = 0
    failures: int = 0
    rests_until: float = 0.0
    pace: float = 0.0
    delivered: bool = False
    lied: bool = False


class Transfer:
    """The state of fetching one blob; times are seconds of any monotonic clock.

    `first` is the piece to begin with: fetchers that begin at different ones can help each other.
    """

    def __init__(
        self,
        manifest: Manifest,
        have: Collection[int] = (),
        *,
        fallback: str | None = None,
        stall: float = 5.0,
        first: int = 0,
    ) -> None:
        count = len(manifest.pieces)
        start = first % count if count else 0
        order = [*range(start, count), *range(start)]
        self._total = count
        self._wanted = dict.fromkeys(i for i in order if i not in have)
        self._tries: dict[int, int] = {}
        self._first_asked: dict[int, float] = {}
        self._flying: dict[Ask, float] = {}
        self._sources: dict[str, _Source] = {}
        self._fallback = fallback
        self._stall = stall

    @property
    def done(self) -> bool:
        """Whether every piece has arrived."""
        return not self._wanted and not self._flying

    @property
    def missing(self) -> list[int]:
        """Pieces that have not arrived, whether asked for or not, in ascending order."""
        return sorted([*self._wanted, *(ask.piece for ask in self._flying)])

    @property
    def total(self) -> int:
        """Number of pieces of the blob."""
        return self._total

    def next(self, peers: Sequence[str], now: float) -> Ask | None:
        """The next request to start, of these peers or the fallback; None if there is none now."""
        if not self._wanted:
            return None
        usable = [name for name in peers if name != self._fallback and self._usable(name, now)]
        if not usable and self._fallback is not None and self._usable(self._fallback, now):
            usable = [self._fallback]
        free = [name for name in usable if self._source(name).busy < IN_FLIGHT]
        if not free:
            return None
        best = min(free, key=lambda name: (self._source(name).busy, self._source(name).pace))
        piece = next(iter(self._wanted))
        late = now - self._first_asked.setdefault(piece, now) >= OVERDUE
        if late and not any(self._proven(name) for name in usable):
            # Any number of peers may drip or be silent: what is overdue goes to the fallback,
            # unless some peer delivers.
            sure = self._fallback
            if sure and self._usable(sure, now) and self._source(sure).busy < IN_FLIGHT:
                best = sure
        del self._wanted[piece]
        # A piece that nobody delivered in time gets twice the time: slow is better than never.
        patience = min(MAX_PATIENCE, self._stall * 2 ** min(self._tries.get(piece, 0), 10))
        ask = Ask(best, piece, now + patience)
        self._flying[ask] = now
        self._source(best).busy += 1
        return ask

    def arrived(self, ask: Ask, now: float) -> None:
        """The piece came and had the right digest."""
        began = self._landed(ask)
        if began is not None:
            source = self._source(ask.source)
            source.pace, source.failures, source.delivered = now - began, 0, True

    def failed(self, ask: Ask, now: float, *, corrupt: bool = False) -> None:
        """The request failed or stalled; with `corrupt`, the source sent wrong bytes."""
        if self._landed(ask) is None:
            return
        source = self._source(ask.source)
        source.failures += 1
        source.rests_until = now + min(MAX_REST, 2.0 ** min(source.failures - 1, 10))
        source.lied = source.lied or corrupt
        self._tries[ask.piece] = self._tries.get(ask.piece, 0) + 1
        # To the front: it is the oldest gap.
        self._wanted = {ask.piece: None, **self._wanted}

    def stalled(self, now: float) -> list[Ask]:
        """Requests past their deadline; the caller ends them and reports them as failed."""
        return [ask for ask in self._flying if now >= ask.deadline]

    def wake(self, peers: Sequence[str], now: float) -> float | None:
        """When to look again if nothing happens before: the next deadline or end of a rest."""
        names = [*peers, *([self._fallback] if self._fallback is not None else [])]
        times = [ask.deadline for ask in self._flying]
        if self._wanted:
            rests = (self._source(name) for name in names)
            times += [s.rests_until for s in rests if not s.lied and s.rests_until > now]
        return min(times, default=None)

    def hopeless(self, peers: Sequence[str]) -> bool:
        """Whether no source is left that has not lied: only new peers could help."""
        names = [*peers, *([self._fallback] if self._fallback is not None else [])]
        return not self.done and not self._flying and all(self._source(n).lied for n in names)

    def _source(self, name: str) -> _Source:
        return self._sources.setdefault(name, _Source())

    def _proven(self, name: str) -> bool:
        source = self._source(name)
        return source.delivered and not source.failures

    def _usable(self, name: str, now: float) -> bool:
        source = self._source(name)
        return not source.lied and source.rests_until <= now

    def _landed(self, ask: Ask) -> float | None:
        began = self._flying.pop(ask, None)
        if began is not None:
            self._source(ask.source).busy -= 1
        return began
