"""Which statements a release has to carry, chosen out of everything that a network has signed.

For each head the merges and reverts below it, and for each contribution in them its whole story::

    for sealed in lineage_statements(heads, statements_in_log_order): ...
    parts_of(merge_or_revert)              # the contributions that it adds or takes away
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from paris_protocol.envelope import Sealed
from paris_protocol.records import (
    AuditReport,
    Challenge,
    Contribution,
    Head,
    Merge,
    MergeInput,
    Opening,
    Revert,
    Verdict,
)


def lineage_statements(
    heads: Sequence[Head], statements: Iterable[Sealed[Any]]
) -> list[Sealed[Any]]:
    """Out of all statements in log order, those that a release of `heads` has to carry, in order.

    Every merge and revert below the heads, the reverts' revocations, and of each input the
    contribution, assignment, commitment, accepting verdict, and what its audit left in the log.
    """
    pool = list(statements)
    steps = {each.id: each.record for each in pool if isinstance(each.record, Merge | Revert)}
    chosen: set[str] = set()
    waiting = [head.merge for head in heads]
    while waiting:
        id = waiting.pop()
        if id is not None and id in steps and id not in chosen:
            chosen.add(id)
            waiting.append(steps[id].parent.merge)
    inputs = {part.contribution for id in chosen for part in parts_of(steps[id])}
    chosen |= {step.revocation for id in chosen if isinstance(step := steps[id], Revert)} | inputs
    for each in pool:
        chosen |= _belonging(each, inputs, chosen)
    return [each for each in pool if each.id in chosen]


def parts_of(step: Merge | Revert) -> tuple[MergeInput, ...]:
    """The contributions that a step of a lineage adds or takes away."""
    return step.inputs if isinstance(step, Merge) else step.removed


def _belonging(each: Sealed[Any], inputs: Collection[str], chosen: Collection[str]) -> set[str]:
    """Ids that belong to the story of `inputs` because of this statement."""
    match each.record:
        case Contribution(assignment=assignment, commitment=commitment) if each.id in inputs:
            return {assignment, commitment}
        case Challenge(contribution=contribution) if contribution in inputs:
            return {each.id}
        case Opening(challenge=challenge) if challenge in chosen:
            return {each.id}
        case AuditReport(contribution=contribution, assignment=own) if contribution in inputs:
            return {each.id} | ({own} if own else set())
        case Verdict(contribution=contribution, accepted=True) if contribution in inputs:
            return {each.id}
    return set()
