"""What stands at the moment: experts, rounds, units, work and nodes, and everything read off them.

`Board` only answers; `desk.Desk` is the board together with the rules that change it. Pure; an
answer depends on the state and on `now` alone. It refuses unknown contributions (`unit.unknown`)::

    board.open_work(node, now)        # the node's open assignment or None
    board.choose(node, cached, now)   # the free unit that is needed most, or None
    list(board.due(now))              # what waits to be done, most urgent first
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from paris_coordinator.events import (
    Effect,
    RunMerge,
    RunRelease,
    RunRouter,
    RunSamples,
    Sampled,
    Verify,
)
from paris_protocol.canonical import real
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    Assignment,
    Commitment,
    Contribution,
    Genesis,
    Head,
    Merge,
    Policy,
    Release,
    Shard,
    Verdict,
)

State = Literal[
    "open", "uploading", "queued", "accepted", "refused", "merged", "unpublished", "closed"
]


@dataclass(slots=True)
class Work:
    """One assignment and everything that became of it."""

    id: str
    record: Assignment
    attempt: int
    state: State = "open"
    commitment: str | None = None
    committed: Commitment | None = None
    contribution: str | None = None
    handed_in: Contribution | None = None
    verdict: str | None = None
    judged: Verdict | None = None
    merge: str | None = None

    @property
    def done(self) -> Contribution:
        """The contribution, for work that has one."""
        if self.handed_in is None:
            raise ParisError("unit.unknown", "nothing was handed in")
        return self.handed_in


@dataclass(slots=True)
class Unit:
    """One unit of the current round: its shards, what happened, who accepted it."""

    shards: tuple[Shard, ...]
    free_since: int
    works: list[str] = field(default_factory=list)
    accepted: str | None = None
    refused: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Expert:
    """An expert's lineage: its head, and the round that is being trained on it."""

    index: int
    head: Head
    units: list[Unit]
    attempt: int = 0
    opened: int | None = None
    merges: list[str] = field(default_factory=list)

    @property
    def round(self) -> int:
        """Merges so far."""
        return self.head.round


@dataclass(slots=True)
class Node:
    """A registered key: its last fact, refusals since the last pardon, accepted and merged work."""

    since: int
    last: int
    registration: str
    refusals: int = 0
    accepted: int = 0
    quarantined: bool = False
    works: list[str] = field(default_factory=list)


class Board:
    """The state of a network at its coordinator; `desk.Desk` adds the rules that change it."""

    def __init__(self, network: str, genesis: Genesis, policy: Policy, policy_id: str = "") -> None:
        self.network, self.genesis = network, genesis
        self.policy, self.policy_id = policy, policy_id
        self.works: dict[str, Work] = {}
        self.contributions: dict[str, str] = {}
        self.commitments: dict[str, str] = {}
        self.queue: list[str] = []
        self.nodes: dict[str, Node] = {}
        self.merges: dict[str, Merge] = {}
        self.releases: dict[str, Release] = {}
        self.router: str | None = None
        self.sampled: Sampled | None = None
        self.sampled_at = 0
        self.ordered = False
        self.experts = [
            Expert(cluster.index, Head(round=0, weights=genesis.initial), [])
            for cluster in genesis.clusters
        ]

    @property
    def complete(self) -> bool:
        """Whether every expert has its planned merges."""
        return all(expert.round >= self.policy.plan.rounds for expert in self.experts)

    @property
    def roots(self) -> tuple[str, ...]:
        """The tensor roots of the current heads, by expert."""
        return tuple(expert.head.weights.root for expert in self.experts)

    def work_of(self, contribution: str) -> Work:
        """The work that this contribution belongs to, or ParisError("unit.unknown")."""
        if contribution not in self.contributions:
            raise ParisError("unit.unknown", contribution[:16])
        return self.works[self.contributions[contribution]]

    def open_work(self, node: str, now: int) -> Work | None:
        """The node's open assignment; an assignment is open until its update has arrived."""
        known = self.nodes.get(node)
        for id in reversed(known.works if known else []):
            work = self.works[id]
            if work.state in ("open", "uploading") and now <= work.record.hard_deadline:
                return work
        return None

    def releasing(self) -> bool:
        """Whether a release of the current heads is wanted and not yet made."""
        if not (self.complete or self.ordered):
            return False
        last = next(reversed(self.releases.values()), None)
        return last is None or tuple(e.root for e in last.experts) != self.roots or self.ordered

    def choose(self, node: str, cached: frozenset[str], now: int) -> tuple[Expert, int] | None:
        """The most needed free unit: own refusals last, lowest round, cached shards, least busy."""
        best: tuple[Any, Expert, int] | None = None
        for expert in self.experts:
            if expert.round >= self.policy.plan.rounds:
                continue
            busy = sum(not self.free(unit, now) for unit in expert.units)
            for number, unit in enumerate(expert.units):
                if not self.free(unit, now) or not self.allowed(unit, node, now):
                    continue
                here = sum(shard.file.blob.id in cached for shard in unit.shards)
                need = (node in unit.refused, expert.round, -here, busy, expert.index, number)
                if best is None or need < best[0]:
                    best = (need, expert, number)
        return best and (best[1], best[2])

    def free(self, unit: Unit, now: int) -> bool:
        """Not accepted, nothing of it queued, and no lease within its soft deadline."""
        if unit.accepted is not None:
            return False
        for id in unit.works:
            work = self.works[id]
            if work.state == "queued":
                return False
            if work.state in ("open", "uploading") and now <= work.record.soft_deadline:
                return False
        return True

    def allowed(self, unit: Unit, node: str, now: int) -> bool:
        """A node refused on a unit gets it again only if no other living node could take it."""
        if node not in unit.refused or now - unit.free_since > self.policy.soft_deadline:
            return True
        return not any(
            other not in unit.refused
            and not entry.quarantined
            and now - entry.last <= self.policy.soft_deadline
            for other, entry in self.nodes.items()
        )

    def due(self, now: int, samples_every: int) -> Iterator[Effect]:
        """Everything that waits to be done, most urgent first; a function of the state alone."""
        for expert in self.experts:
            if inputs := self._closable(expert, now):
                yield RunMerge(expert.index, inputs)
        yield from (Verify(contribution) for contribution in self.queue)
        if self.releasing():
            if self.router is None:
                yield RunRouter()
            elif self.sampled is None or self.sampled.roots != self.roots:
                yield RunSamples(self.roots)
            else:
                yield RunRelease()
        elif samples_every and now - self.sampled_at >= samples_every:
            fresh = self.sampled is None or self.sampled.roots != self.roots
            if fresh and any(expert.round for expert in self.experts):
                yield RunSamples(self.roots)

    def _closable(self, expert: Expert, now: int) -> tuple[str, ...]:
        """The contributions to merge when the round is over, by unit; else nothing."""
        accepted = tuple(unit.accepted for unit in expert.units if unit.accepted is not None)
        if not accepted or len(accepted) == len(expert.units):
            return accepted
        waiting = any(
            self.works[id].state == "queued" for unit in expert.units for id in unit.works
        )
        late = expert.opened is not None and now - expert.opened >= self.policy.plan.close_after
        return accepted if late and not waiting else ()

    # ------------------------------------------------------------ measurements for the verifier

    def relative_norms(self, turn: int) -> list[float]:
        """Relative norms (L2, number `relative`) of the accepted work of this round, in order."""
        return [
            real(value)
            for work in self.works.values()
            if work.judged is not None and work.judged.accepted and work.record.round == turn
            for layer in work.judged.layers
            for name, value in layer.numbers
            if name == "relative"
        ]

    def rivals(self, work: Work) -> list[Work]:
        """Others' handed-in work on the same parent that was committed earlier, oldest first."""
        order = list(self.commitments)
        mine = order.index(work.commitment) if work.commitment in self.commitments else len(order)
        earlier = (self.works[self.commitments[id]] for id in order[:mine])
        return [
            other
            for other in earlier
            if other.record.parent == work.record.parent
            and other.record.expert == work.record.expert
            and other.record.node != work.record.node
            and other.state not in ("open", "uploading")
            and other.handed_in is not None
        ]
