"""What stands at the moment: experts, rounds, units, work and nodes, and everything read off them.

`Board` only answers; `desk.Desk` is the board together with the rules that change it. Pure; an
answer depends on the state and on `now` alone. It refuses unknown contributions (`unit.unknown`)::

    board.open_work(node, now)        # the node's open assignment or None
    board.choose(node, cached, now)   # the free unit that is needed most, or None
    board.unvested(node)              # what a revocation would take back
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from paris_coordinator.auditing import Audit
from paris_coordinator.events import Sampled, Scanned
from paris_coordinator.planning import plan_name
from paris_coordinator.secrets import Shelf
from paris_protocol.averages import released
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
    Revert,
    Revocation,
    Shard,
    Verdict,
    Withdrawal,
)

State = Literal[
    "open", "uploading", "queued", "auditing", "accepted", "refused", "merged", "unpublished",
    "revoked", "withdrawn", "reported", "closed",
]  # fmt: skip
"""`revoked` and `withdrawn`: accepted, then taken back with its node's key, or with a clip that it
was trained on; `reported`: an audit that was done."""


@dataclass(slots=True)
class Work:
    """One assignment and everything that became of it.

    `number` is its draw's, by order of arrival; `standing` its node's when the commitment came.
    """

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
    number: int | None = None
    standing: int = 0
    revocation: str | None = None

    @property
    def done(self) -> Contribution:
        """The contribution, for work that has one."""
        if self.handed_in is None:
            raise ParisError("unit.unknown", "nothing was handed in")
        return self.handed_in


@dataclass(slots=True)
class Unit:
    """One unit of the current round: its shards (without any it is closed), and what happened."""

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
    """A registered key: its last fact, refusals less acceptances since, accepted work, standing.

    `standing`: replay-verified contributions in a row. `condemned` is the reason for a revocation
    that is due, `revoked` the revocation. `before` and `after` are keys of the same volunteer: the
    one that gave way to this key, and the one to which this key gave way.
    """

    since: int
    last: int
    registration: str
    refusals: int = 0
    accepted: int = 0
    quarantined: bool = False
    standing: int = 0
    condemned: str = ""
    revoked: str | None = None
    before: str | None = None
    after: str | None = None
    works: list[str] = field(default_factory=list)


class Board:
    """The state of a network at its coordinator; `desk.Desk` adds the rules that change it.

    `trials` and `dismissed` are contributions whose audit is under way, and such as came too late
    and wait for the verdict that says so; `leases` and `draws` count the assignments and the draws
    of each hash chain; `withdrawing`: clips to be withdrawn, and why; `withdrawn`: shards.
    """

    def __init__(self, network: str, genesis: Genesis, policy: Policy, policy_id: str = "") -> None:
        self.network, self.genesis = network, genesis
        self.policy, self.policy_id = policy, policy_id
        self.policies: dict[int, Policy] = {policy.number: policy}
        self.works: dict[str, Work] = {}
        self.contributions: dict[str, str] = {}
        self.commitments: dict[str, str] = {}
        self.queue: list[str] = []
        self.audits: dict[str, Audit] = {}
        self.trials: list[str] = []
        self.dismissed: list[str] = []
        self.leases: dict[str, int] = {}
        self.draws: dict[str, int] = {}
        self.shelf = Shelf()
        self.nodes: dict[str, Node] = {}
        self.merges: dict[str, Merge] = {}
        self.revocations: dict[str, Revocation] = {}
        self.reverts: dict[str, Revert] = {}
        self.withdrawing: dict[str, str] = {}
        self.withdrawals: dict[str, Withdrawal] = {}
        self.withdrawn: frozenset[str] = frozenset()
        self.releases: dict[str, Release] = {}
        self.router: str | None = None
        self.sampled: Sampled | None = None
        self.sampled_at = 0
        self.scanned: Scanned | None = None
        self.suspicious = False
        self.ordered = False
        self.experts = [
            Expert(cluster.index, Head(round=0, weights=genesis.initial), [])
            for cluster in genesis.clusters
        ]

    @property
    def complete(self) -> bool:
        """Whether every expert has its planned merges, or nothing left to be trained on."""
        return all(self.ended(expert) for expert in self.experts)

    @property
    def roots(self) -> tuple[str, ...]:
        """The tensor roots of the current heads, by expert."""
        return tuple(expert.head.weights.root for expert in self.experts)

    def left(self, expert: Expert) -> tuple[Shard, ...]:
        """The shards of the expert's cluster of which no clip was withdrawn."""
        shards = self.genesis.clusters[expert.index].shards
        return tuple(shard for shard in shards if shard.file.blob.id not in self.withdrawn)

    def ended(self, expert: Expert) -> bool:
        """Whether the expert has its planned merges, or no shard left."""
        return expert.round >= self.policy.plan.rounds or not self.left(expert)

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
        if not (self.complete or self.ordered) or self.reverting():
            return False
        last = next(reversed(self.releases.values()), None)
        held = [released(expert.head, self.merges).root for expert in self.experts]
        return last is None or [e.root for e in last.experts] != held or self.ordered

    def current(self, work: Work) -> bool:
        """Whether its unit still waits for a result: same head, same attempt, nothing accepted."""
        expert = self.experts[work.record.expert]
        same = expert.head == work.record.parent and expert.attempt == work.attempt
        return same and expert.units[work.record.unit].accepted is None

    def keys_of(self, node: str) -> tuple[str, ...]:
        """This key and all that are of the same volunteer by rotation."""
        keys = [node]
        for direction in ("before", "after"):
            at: str | None = node
            while at is not None:
                at = getattr(self.nodes[at], direction)
                keys += [] if at is None else [at]
        return tuple(keys)

    def heir(self, node: str) -> Node:
        """The newest key of this key's volunteer: standing and refusals are its own."""
        known = self.nodes[node]
        while known.after is not None:
            known = self.nodes[known.after]
        return known

    def audit_task(self, node: str, now: int, plans: Collection[str] | None = None) -> Audit | None:
        """The oldest audit that this node was drawn for and has not been given yet.

        `plans`: only such as train by one of these, which the node says that it can do.
        """
        for contribution in self.trials:
            audit = self.audits[contribution]
            drawn = node in (audit.called or ()) and node not in audit.tasks
            if plans is not None and plan_name(self.work_of(contribution).record) not in plans:
                continue
            if drawn and audit.own is None and now <= audit.called_at + self.policy.soft_deadline:
                return audit
        return None

    def challenges(self, node: str) -> list[str]:
        """Challenges of this node that are not answered completely."""
        return [
            self.audits[contribution].challenges[-1]
            for contribution in self.trials
            if self.audits[contribution].challenges
            and not self.audits[contribution].opened
            and self.work_of(contribution).record.node == node
        ]

    def of_standing(self) -> list[str]:
        """Nodes with as many replay-verified contributions in a row as the policy asks for."""
        rules = self.policy.audit
        return [
            id
            for id, node in self.nodes.items()
            if rules is not None
            and node.standing >= rules.probation
            and node.revoked is None
            and not (node.quarantined or node.condemned)
        ]

    def vested(self, contribution: str) -> bool | None:
        """Whether its expert has made enough merges since its own; None if it is in no head."""
        work = self.work_of(contribution)
        if work.state != "merged" or work.merge is None:
            return None
        rules = self.policies[work.record.policy].audit
        since = self.experts[work.record.expert].round - self.merges[work.merge].round - 1
        return rules is None or since >= rules.vesting

    def unvested(self, node: str) -> tuple[str, ...]:
        """The node's merged contributions that a revocation takes out of their heads."""
        done = [self.works[id].contribution for id in self._works_of(node)]
        return tuple(id for id in done if id is not None and self.vested(id) is False)

    def _works_of(self, node: str) -> list[str]:
        return self.nodes[node].works if node in self.nodes else []

    def reverting(self) -> dict[tuple[int, str], tuple[str, ...]]:
        """What revocations still have to take out: contributions by expert and revocation."""
        found: dict[tuple[int, str], tuple[str, ...]] = {}
        for id, revocation in self.revocations.items():
            for contribution in revocation.contributions:
                work = self.work_of(contribution)
                if work.state == "merged":
                    key = (work.record.expert, id)
                    found[key] = (*found.get(key, ()), contribution)
        return found

    def choose(self, node: str, cached: frozenset[str], now: int) -> tuple[Expert, int] | None:
        """The most needed free unit: own refusals last, lowest round, cached shards, least busy."""
        best: tuple[Any, Expert, int] | None = None
        leaving = {expert for expert, _ in self.reverting()}
        for expert in self.experts:
            if self.ended(expert) or expert.index in leaving:
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
        """Not accepted or closed, nothing of it queued, and no lease within its soft deadline."""
        if unit.accepted is not None or not unit.shards:
            return False
        for id in unit.works:
            work = self.works[id]
            if work.state in ("queued", "auditing"):
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
            and not (entry.quarantined or entry.revoked)
            and now - entry.last <= self.policy.soft_deadline
            for other, entry in self.nodes.items()
        )

    # ------------------------------------------------------------ measurements for the verifier

    def head_of(self, step: str) -> Head:
        """The head that a published merge or a revert made."""
        if step in self.reverts:
            revert = self.reverts[step]
            return Head(round=revert.parent.round, weights=revert.result, merge=step)
        merge = self.merges[step]
        return Head(round=merge.round + 1, weights=merge.result, merge=step)

    def head_before(self, head: Head) -> Head | None:
        """The head that this one was made from; None for the initial checkpoint."""
        made = self.merges.get(head.merge or "") or self.reverts.get(head.merge or "")
        return None if made is None else made.parent

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
