"""The rules of descent: what a contribution and a merge must be for an expert's head to be true.

Isolation (science F14): an expert descends from the common initial checkpoint, its own heads and
its own cluster's shards, from nothing else. One head, one parent; a contribution merges once. What
a revoked node had merged is taken out again by a revert, once, with the scalars of its merge.
Broken rules raise `commitment.*`, `structure.lineage`, `unit.not-yours`, or `merge.lineage`::

    check_contribution(assignment, commitment, contribution)
    lineage = Lineage(genesis)
    head = lineage.apply(merge, {contribution.id: (contribution.record, assignment.record)})
    head = lineage.revert(revert, revocation.record)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

from paris_protocol.averages import check_average, released
from paris_protocol.canonical import real
from paris_protocol.envelope import Sealed
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    Assignment,
    AuditReport,
    Challenge,
    Cluster,
    Commitment,
    Contribution,
    Genesis,
    Head,
    Merge,
    MergeInput,
    Opening,
    Release,
    Revert,
    Revocation,
    Shard,
    Verdict,
)
from paris_protocol.tensors import states_root

Accepted: TypeAlias = Mapping[str, tuple[Contribution, Assignment]]
"""Accepted contributions by id, each with the assignment that it answers."""

EVIDENCE: Final = (
    Assignment,
    Commitment,
    Contribution,
    Challenge,
    Opening,
    AuditReport,
    Verdict,
    Merge,
    Revocation,
    Revert,
)
"""The statements that a lineage is proved with."""
_SLACK: Final = 1e-6
MOST_STATES: Final = 1 << 14
"""No commitment of more states fits into a statement, so no unit has more."""


def committed_steps(steps: int, every: int) -> tuple[int, ...]:
    """Steps whose states are committed: 0, k, 2k, … and always the last; 1 + ceil(steps/k)."""
    if steps < 1 or every < 1:
        raise ParisError("structure.lineage", "a unit has steps, and commits some of them")
    if steps // every >= MOST_STATES:
        raise ParisError("structure.lineage", f"{steps // every} states are too many")
    return (*range(0, steps, every), steps)


def check_contribution(
    assignment: Sealed[Assignment],
    commitment: Sealed[Commitment],
    contribution: Sealed[Contribution],
    *,
    first_state: str | None = None,
) -> None:
    """That the three statements tell one story: L0 and L1 as far as they need no tensors.

    `first_state` is the root of the parent with a fresh optimiser, where the caller computed it.
    """
    lease, promise, result = assignment.record, commitment.record, contribution.record
    if contribution.signer != lease.node or commitment.signer != lease.node:
        raise ParisError("unit.not-yours")
    if result.assignment != assignment.id or promise.assignment != assignment.id:
        raise ParisError("structure.lineage", "made for another assignment")
    if result.commitment != commitment.id:
        raise ParisError("commitment.missing", "the contribution names another commitment")
    if (result.steps, promise.steps) != (lease.steps, lease.steps):
        raise ParisError("structure.lineage", f"{result.steps} of {lease.steps} steps")
    if result.samples != lease.steps * lease.batch:
        raise ParisError("structure.lineage", f"{result.samples} samples")
    if len(promise.states) != len(committed_steps(lease.steps, lease.commit_every)):
        raise ParisError("commitment.mismatch", f"{len(promise.states)} committed states")
    if promise.states_root != states_root(promise.states):
        raise ParisError("commitment.mismatch", "the root is not that of the states")
    if promise.update_root != result.update.root:
        raise ParisError("commitment.mismatch", "the update is not the committed one")
    if first_state is not None and promise.states[0] != first_state:
        raise ParisError("commitment.start")


def _refuse(detail: str) -> NoReturn:
    raise ParisError("merge.lineage", detail)


def check_merge(
    merge: Merge,
    parent: Head,
    accepted: Accepted,
    merged_already: Collection[str],
    cluster: Cluster,
) -> None:
    """That a merge follows from `parent` by accepted contributions of this expert alone.

    `cluster` is the genesis entry of the expert; weights are positive and sum to at most 1, clip
    scales lie in (0, 1]. Raises `merge.lineage`.
    """
    if merge.expert != cluster.index:
        _refuse(f"expert {merge.expert} on the data of cluster {cluster.index}")
    if merge.parent != parent or merge.round != parent.round:
        _refuse(f"round {merge.round} of expert {merge.expert} does not follow the head")
    if not merge.inputs:
        _refuse("a merge of nothing")
    ids = [each.contribution for each in merge.inputs]
    for each in ids:
        if ids.count(each) > 1 or each in merged_already:
            _refuse(f"{each[:12]} merges twice")
        if each not in accepted:
            _refuse(f"{each[:12]} was not accepted")
    own, used = set(cluster.shards), set[Shard]()
    for entry in merge.inputs:
        contribution, assignment = accepted[entry.contribution]
        _check_input(merge, entry.contribution, assignment)
        if entry.update != contribution.update:
            _refuse(f"{entry.contribution[:12]} handed in another update")
        if not own.issuperset(assignment.shards):
            _refuse(f"{entry.contribution[:12]} was trained on another cluster's shards")
        if not used.isdisjoint(assignment.shards):
            _refuse(f"{entry.contribution[:12]} shares clips with another unit of the round")
        used.update(assignment.shards)
    _check_scalars(merge)


def _check_input(merge: Merge, id: str, assignment: Assignment) -> None:
    if assignment.kind != "train":
        _refuse(f"{id[:12]} is no training")
    if assignment.expert != merge.expert:
        _refuse(f"{id[:12]} was trained for expert {assignment.expert}")
    if assignment.parent != merge.parent or assignment.round != merge.round:
        _refuse(f"{id[:12]} was trained from another head")


def _check_scalars(merge: Merge) -> None:
    try:
        weights = [float.fromhex(each.weight) for each in merge.inputs]
        scales = [float.fromhex(each.scale) for each in merge.inputs]
    except OverflowError:
        _refuse("a weight or scale that is no float")
    if not all(math.isfinite(x) and 0 < x <= 1 + _SLACK for x in (*weights, *scales)):
        _refuse("a weight or scale outside (0, 1]")
    if sum(weights) > 1 + _SLACK:
        _refuse("weights that sum to more than 1")


class Merged(NamedTuple):
    """A contribution in a lineage: for which expert, whose, and with which scalars."""

    expert: int
    node: str
    input: MergeInput


def check_revert(
    revert: Revert,
    parent: Head,
    merged: Mapping[str, Merged],
    removed_already: Collection[str],
    revocation: Revocation,
) -> None:
    """That a revert takes out of `parent` what a revoked key had merged there, and nothing else.

    `merged` holds what was merged into the lineages of the network. Raises `merge.lineage`.
    """
    if revert.parent != parent:
        _refuse(f"a revert of expert {revert.expert} does not follow the head")
    if not revert.removed:
        _refuse("a revert of nothing")
    ids = [each.contribution for each in revert.removed]
    for each in revert.removed:
        name, found = each.contribution[:12], merged.get(each.contribution)
        if found is None or found.expert != revert.expert:
            _refuse(f"{name} was not merged into expert {revert.expert}")
        if ids.count(each.contribution) > 1 or each.contribution in removed_already:
            _refuse(f"{name} is taken out twice")
        if each != found.input:
            _refuse(f"{name} was merged with other scalars")
        if found.node != revocation.key or each.contribution not in revocation.contributions:
            _refuse(f"{name} is not among the work of the revoked key")


class Lineage:
    """The fold of a network's merges and reverts: one head per expert, and what went into it."""

    def __init__(self, genesis: Genesis) -> None:
        self._clusters = {cluster.index: cluster for cluster in genesis.clusters}
        self.shards = {s.file.blob.id for c in genesis.clusters for s in c.shards}
        self._ema = real(genesis.recipe.ema)
        initial = Head(round=0, weights=genesis.initial)
        self.heads: dict[int, Head] = dict.fromkeys(self._clusters, initial)
        self.merged: dict[str, Merged] = {}
        self.removed: set[str] = set()

    def _head(self, expert: int) -> Head:
        if expert not in self.heads:
            _refuse(f"there is no expert {expert}")
        return self.heads[expert]

    def apply(self, merge: Sealed[Merge], accepted: Accepted) -> Head:
        """Check a merge against its expert's head and move the head if it was published.

        Raises `merge.lineage` and changes nothing when a rule is broken.
        """
        record = merge.record
        head = self._head(record.expert)
        check_merge(record, head, accepted, self.merged, self._clusters[record.expert])
        steps = sum(accepted[each.contribution][1].steps for each in record.inputs)
        check_average(record, self._ema, steps)
        if record.published:
            for each in record.inputs:
                node = accepted[each.contribution][1].node
                self.merged[each.contribution] = Merged(record.expert, node, each)
            head = Head(round=record.round + 1, weights=record.result, merge=merge.id)
            self.heads[record.expert] = head
        return head

    def revert(self, revert: Sealed[Revert], revocation: Revocation) -> Head:
        """Check a revert against its expert's head and move the head; it keeps its round.

        Raises `merge.lineage` and changes nothing when a rule is broken.
        """
        record = revert.record
        head = self._head(record.expert)
        check_revert(record, head, self.merged, self.removed, revocation)
        self.removed.update(each.contribution for each in record.removed)
        head = Head(round=head.round, weights=record.result, merge=revert.id)
        self.heads[record.expert] = head
        return head


@dataclass(frozen=True, slots=True)
class Evidence:
    """The statements of a bundle by kind and id."""

    assignments: dict[str, Sealed[Assignment]]
    commitments: dict[str, Sealed[Commitment]]
    contributions: dict[str, Sealed[Contribution]]
    challenges: dict[str, Sealed[Challenge]]
    openings: dict[str, Sealed[Opening]]
    reports: dict[str, Sealed[AuditReport]]
    verdicts: dict[str, Sealed[Verdict]]
    merges: dict[str, Sealed[Merge]]
    revocations: dict[str, Sealed[Revocation]]
    reverts: dict[str, Sealed[Revert]]

    @classmethod
    def of(cls, statements: Iterable[Sealed[Any]]) -> Evidence:
        """Sorts statements; `merge.lineage` for one that is no evidence."""
        kinds: dict[type, dict[str, Sealed[Any]]] = {kind: {} for kind in EVIDENCE}
        for sealed in statements:
            if type(sealed.record) not in kinds:
                _refuse(f"a {sealed.record.TYPE} is no evidence")
            kinds[type(sealed.record)][sealed.id] = sealed
        return cls(*(kinds[kind] for kind in EVIDENCE))

    def accepted(self) -> dict[str, tuple[Contribution, Assignment]]:
        """The contributions with an accepting verdict whose whole story holds."""
        table = {}
        for verdict in (sealed.record for sealed in self.verdicts.values()):
            if not verdict.accepted:
                continue
            contribution = self.contributions.get(verdict.contribution)
            assignment = self.assignments.get(verdict.assignment)
            if contribution is None or assignment is None:
                _refuse(f"{verdict.contribution[:12]} or its assignment is missing")
            commitment = self.commitments.get(contribution.record.commitment)
            if commitment is None:
                _refuse(f"the commitment of {contribution.id[:12]} is missing")
            check_contribution(assignment, commitment, contribution)
            lease = assignment.record
            if (verdict.node, verdict.expert, verdict.round) != (
                lease.node,
                lease.expert,
                lease.round,
            ):
                _refuse(f"the verdict about {contribution.id[:12]} is about another unit")
            self._check_reports(verdict)
            table[contribution.id] = (contribution.record, lease)
        return table

    def _check_reports(self, verdict: Verdict) -> None:
        """What a verdict names as its audit is here and about this contribution."""
        for id in verdict.reports:
            report = self.reports.get(id)
            if report is None or report.record.contribution != verdict.contribution:
                _refuse(f"audit report {id[:12]} of {verdict.contribution[:12]} is missing")

    def steps(self, expert: int) -> list[Sealed[Merge] | Sealed[Revert]]:
        """An expert's merges and reverts from the initial checkpoint on, each after its parent.

        Merges that were not published stand before the statement that moved their head. Refused:
        two that move one head, and what hangs on no head of this line.
        """
        waiting: list[Sealed[Any]] = [*self.merges.values(), *self.reverts.values()]
        waiting = [each for each in waiting if each.record.expert == expert]
        ordered: list[Sealed[Merge] | Sealed[Revert]] = []
        head: str | None = None
        while waiting:
            here = [each for each in waiting if each.record.parent.merge == head]
            moving = [each for each in here if each.record.TYPE != "merge" or each.record.published]
            if not here or len(moving) > 1:
                _refuse(f"{len(moving)} of {len(waiting)} statements of expert {expert} go on")
            ordered += [each for each in here if each not in moving] + moving
            waiting = [each for each in waiting if each not in here]
            if not moving and waiting:
                _refuse(f"a merge of expert {expert} follows no head")
            head = moving[0].id if moving else head
        return ordered


def fold(genesis: Genesis, evidence: Evidence) -> Lineage:
    """The lineage that the evidence proves, all rules checked. Raises `merge.lineage`."""
    accepted, lineage = evidence.accepted(), Lineage(genesis)
    steps: list[Sealed[Any]] = [*evidence.merges.values(), *evidence.reverts.values()]
    strange = {each.record.expert for each in steps} - lineage.heads.keys()
    if strange:
        _refuse(f"there is no expert {min(strange)}")
    for expert in lineage.heads:
        for step in evidence.steps(expert):
            if isinstance(step.record, Merge):
                lineage.apply(step, accepted)
                continue
            revocation = evidence.revocations.get(step.record.revocation)
            if revocation is None:
                _refuse(f"the revocation of revert {step.id[:12]} is missing")
            lineage.revert(step, revocation.record)
    for revocation in evidence.revocations.values():
        left = [
            id
            for id in revocation.record.contributions
            if id in lineage.merged and id not in lineage.removed
        ]
        if left:
            _refuse(f"{left[0][:12]} was revoked and is still in a head")
    return lineage


def check_release_lineage(
    genesis: Genesis, release: Release, statements: Iterable[Sealed[Any]]
) -> Lineage:
    """That every released expert descends by merges and reverts from the initial checkpoint.

    `statements` are opened envelopes (their signers are the caller's business) of every merge and
    revert below the heads, the reverts' revocations, and of each input's contribution, assignment,
    commitment and verdict with its audit reports, in any order. Merges that were not published may
    be among them; a second published one on a parent may not.
    """
    evidence = Evidence.of(statements)
    lineage = fold(genesis, evidence)
    merges = {id: merge.record for id, merge in evidence.merges.items()}
    if [each.expert for each in release.experts] != sorted(lineage.heads):
        raise ParisError("release.lineage", "the released experts are not those of the genesis")
    for each in release.experts:
        head = lineage.heads[each.expert]
        if (each.merge, each.root) != (head.merge, released(head, merges).root):
            raise ParisError("release.lineage", f"expert {each.expert} is not the last head")
    return lineage
