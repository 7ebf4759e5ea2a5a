"""Audit work: replay segments of another's training from its opened states, and report.

The trainer's process replays; what it compares with is fetched by statement id and checked first.
A node that cannot tell (no calibrated tolerance between its machine and the trainer's) says so with
a report without segments, which counts as an abstention: a report is never a guess::

    report = await replay(kit, unit, hear)            # an AuditReport, not signed yet
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paris_node.leases import check_audited
from paris_node.upkeep import assignment_of, order_of
from paris_protocol.canonical import decimal
from paris_protocol.envelope import Sealed, unseal
from paris_protocol.errors import ParisError
from paris_protocol.lineage import check_contribution
from paris_protocol.records import (
    Assignment,
    AuditReport,
    AuditTask,
    Commitment,
    Contribution,
    Segment,
)

if TYPE_CHECKING:
    from paris_node.jobs import Hear
    from paris_node.kit import Kit


async def replay(kit: Kit, unit: str, hear: Hear) -> AuditReport:
    """What this machine finds about the audit's segments; see the module for refusals."""
    assignment = assignment_of(kit, unit)
    task = assignment.audit
    assert task is not None
    commitment, contribution = await _audited(kit, assignment, task)
    rules = (await kit.control.policy()).record.audit
    order = await order_of(kit, unit)
    places = [one.index for one in task.states]
    order |= {
        "commitment": commitment.record.model_dump(mode="json"),
        "states": [list(pair) for pair in zip(places, order["opened"], strict=True)],
        "numerics": contribution.record.numerics,
        "rules": None if rules is None else rules.model_dump(mode="json"),
    }

    def listen(report: dict[str, Any]) -> None:
        hear(int(report.get("step", 0)))

    found = await kit.trainer.replay(order, listen)
    return AuditReport(
        contribution=task.contribution,
        assignment=unit,
        auditor=kit.key.id,
        numerics=found["numerics"],
        segments=tuple(_segment(one) for one in found["segments"]),
        passed=found["passed"],
        at=int(kit.clock()),
    )


async def _audited(
    kit: Kit, assignment: Assignment, task: AuditTask
) -> tuple[Sealed[Commitment], Sealed[Contribution]]:
    """The audited statements, which must tell one story about another node's work."""
    control, network = kit.control, kit.network
    lease = unseal(await control.statement(task.assignment), Assignment, network, None)
    commitment = unseal(await control.statement(task.commitment), Commitment, network, None)
    result = unseal(await control.statement(task.contribution), Contribution, network, None)
    check_audited(assignment, lease.record)
    check_contribution(lease, commitment, result)
    for one in task.states:
        roots = (*commitment.record.states, lease.record.residual)
        if roots[one.index] != one.file.root:
            raise ParisError("structure.lineage", f"opened state {one.index} was not committed")
    return commitment, result


def _segment(found: dict[str, Any]) -> Segment:
    numbers = {key: decimal(found[key]) for key in ("rho", "tensor", "limit", "tensor_limit")}
    return Segment(index=found["index"], exact=found["exact"], passed=found["passed"], **numbers)
