"""Leases as a node judges them: whose, needing what, and keeping the experts apart. Pure.

Refused: another node's lease (`unit.not-yours`), and what would mix an expert with other clusters'
shards or start it elsewhere, a plan that there is not, or an audit that does not hang together
(`structure.lineage`)::

    check_lease(assignment, node, genesis)
    for ref in needed_blobs(assignment): ...
"""

from __future__ import annotations

from typing import Final

from paris_models.plans import Plan, plan_of
from paris_protocol.audit import segments_of, states_to_open
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, AuditTask, BlobRef, Genesis

MINE: Final = frozenset(
    {"kind", "plan", "node", "policy", "issued", "soft_deadline", "hard_deadline", "audit"}
)
"""Fields in which an audit's assignment differs from the audited one."""


def needed_blobs(assignment: Assignment) -> list[BlobRef]:
    """The blobs of a unit: the parent head, the shards in their order, an audit's opened states."""
    shards = [shard.file.blob for shard in assignment.shards]
    return [assignment.parent.weights.blob, *shards, *opened_blobs(assignment)]


def opened_blobs(assignment: Assignment) -> list[BlobRef]:
    """The opened states that an audit replays from; none for training."""
    return [] if assignment.audit is None else [one.file.blob for one in assignment.audit.states]


def named_plan(assignment: Assignment) -> Plan:
    """The training plan that a unit is asked for."""
    try:
        return plan_of(assignment.plan)
    except ValueError as error:
        raise ParisError("structure.lineage", str(error)) from error


def check_lease(assignment: Assignment, node: str, genesis: Genesis) -> None:
    """Refuse a lease that is another node's, or that would break an expert's isolation."""
    if assignment.node != node:
        raise ParisError("unit.not-yours")
    clusters = {cluster.index: cluster for cluster in genesis.clusters}
    cluster = clusters.get(assignment.expert)
    if cluster is None or assignment.steps < 1:
        raise ParisError("structure.lineage", "no unit for an expert of this network")
    if not assignment.shards or not set(assignment.shards) <= set(cluster.shards):
        raise ParisError("structure.lineage", "shards of another cluster")
    if assignment.parent.round == 0 and assignment.parent.weights != genesis.initial:
        raise ParisError("structure.lineage", "round 0 starts from the network's checkpoint")
    if (assignment.kind == "audit") != (assignment.audit is not None):
        raise ParisError("structure.lineage", "an audit names what it audits, training nothing")
    named_plan(assignment)
    if assignment.audit is not None:
        _check_task(assignment, assignment.audit)


def _check_task(assignment: Assignment, task: AuditTask) -> None:
    places = [one.index for one in task.states]
    count = segments_of(assignment)
    if not task.segments or not all(0 <= one < count for one in task.segments):
        raise ParisError("structure.lineage", f"an audit of segments {task.segments} of {count}")
    most = count + (assignment.residual is not None)  # what it began with comes after all states
    if len(set(places)) != len(places) or not all(0 < place <= most for place in places):
        raise ParisError("structure.lineage", f"opened states {places} of {count}")
    if not set(states_to_open(task.segments, exact=True)) <= set(places):
        raise ParisError("structure.lineage", "the states to replay from were not opened")


def check_audited(assignment: Assignment, audited: Assignment) -> None:
    """That an audit's assignment repeats the audited one in all that training depends on."""
    fields = set(Assignment.model_fields) - MINE
    if audited.kind != "train" or audited.node == assignment.node:
        raise ParisError("structure.lineage", "nobody audits an audit, or his own work")
    differ = [name for name in fields if getattr(assignment, name) != getattr(audited, name)]
    if named_plan(assignment) != named_plan(audited):
        differ.append("plan")
    if differ:
        raise ParisError("structure.lineage", f"another {min(differ)} than was audited")


def version_tuple(text: str) -> tuple[int, ...]:
    """`0.4.1rc1` → (0, 4, 1): the leading numbers of a version."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = ""
        for char in part:
            if char not in "0123456789":
                break
            digits += char
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
