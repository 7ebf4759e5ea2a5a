"""The small network of statements, with audits: draws, reports, revocations and reverts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paris_protocol.audit import chain_head, chain_value, make_draw, segments_of
from paris_protocol.draws import Standing, check_draws
from paris_protocol.envelope import SELF, Sealed, seal
from paris_protocol.errors import ParisError
from paris_protocol.log import Tree, leaf_hash
from paris_protocol.records import (
    AuditReport,
    AuditRules,
    Draw,
    Head,
    Layer,
    Revert,
    Revocation,
    Segment,
    Verdict,
)
from protocol.world import (
    COORDINATOR,
    NODES,
    ROOT,
    World,
    genesis_record,
    hexed,
    policy_record,
    tensor_file,
)

START, LENGTH = bytes.fromhex(hexed("chain")), 64
RULES = AuditRules(
    chain=chain_head(START, LENGTH), chain_length=LENGTH, segments=2, rate="9", floor="0.1",
    probation=3, probation_weight="0.25", vesting=2, answer_within=60, retry_within=60, auditors=0,
    canary="0",
)  # fmt: skip
Change = Callable[[Verdict], dict[str, Any]]


class AuditWorld(World):
    """A world whose policy has audit rules; verdicts carry their draws."""

    def __init__(self) -> None:
        super().__init__()
        self.genesis = seal(genesis_record(), ROOT, SELF)
        record = policy_record(1, None, (COORDINATOR.id,))
        first = seal(record.model_copy(update={"audit": RULES}), ROOT, self.network)
        self.policies, self.log = [first], [self.genesis, first]
        self.draws = 0

    def assignment(self, expert: int, unit: int, /, **changes: Any) -> Any:
        return super().assignment(expert, unit, policy=1, **changes)

    def merge_record(self, expert: int, contributions: list[Any], /, **changes: Any) -> Any:
        return super().merge_record(expert, contributions, policy=1, **changes)

    def draw(self, assignment: Sealed[Any], commitment: Sealed[Any]) -> Draw:
        """The next draw: the standing and the root are those of the commitment's place."""
        ids = [each.id for each in self.log]
        size, standing = ids.index(commitment.id) + 1, Standing()
        for each in self.log[: size - 1]:
            standing.take(each)
        number, self.draws = self.draws, self.draws + 1
        return make_draw(
            RULES, segments_of(assignment.record), number=number, size=size,
            root=Tree(leaf_hash(bytes.fromhex(id)) for id in ids[:size]).root().hex(),
            secret=chain_value(START, LENGTH, number),
            standing=standing.of(assignment.record.node),
        )  # fmt: skip

    def judge(
        self, expert: int, unit: int, /, accepted: bool = True, change: Change | None = None,
        **changes: Any,
    ) -> Any:  # fmt: skip
        assignment, commitment, contribution = self.unit(expert, unit, **changes)
        return self.verdict(assignment, commitment, contribution, accepted, change), assignment

    def verdict(
        self, assignment: Any, commitment: Any, contribution: Any, accepted: bool = True,
        change: Change | None = None,
    ) -> Any:  # fmt: skip
        draw = self.draw(assignment, commitment)
        reports, layers = [], [Layer(layer="L0", passed=True, code="")]
        if draw.audited:
            report = self.report(contribution.id, draw, passed=accepted)
            reports.append(self.put(report, COORDINATOR).id)
            count = (("segments", str(len(draw.segments))),)
            layers.append(Layer(layer="L4", passed=accepted, code="", numbers=count))
        record = Verdict(
            contribution=contribution.id, assignment=assignment.id, node=assignment.record.node,
            expert=assignment.record.expert, round=assignment.record.round, accepted=accepted,
            code="accepted" if accepted else "audit.mismatch", layers=tuple(layers), policy=1,
            at=1_700_000_100, audit=draw, reports=tuple(reports),
        )  # fmt: skip
        self.put(record.model_copy(update=change(record) if change else {}), COORDINATOR)
        return contribution

    @staticmethod
    def report(contribution: str, draw: Draw, passed: bool = True, **changes: Any) -> AuditReport:
        segments = tuple(
            Segment(
                index=i, exact=True, rho="0", tensor="0", limit="0", tensor_limit="0",
                passed=passed,
            )
            for i in draw.segments
        )  # fmt: skip
        made = AuditReport(
            contribution=contribution, assignment=None, auditor=COORDINATOR.id,
            numerics=hexed("numerics"), segments=segments, passed=passed, at=1_700_000_090,
        )  # fmt: skip
        return made.model_copy(update=changes)

    def check(self) -> dict[str, Any]:
        return check_draws(self.log, {each.record.number: each.record for each in self.policies})

    def code(self) -> str:
        with pytest.raises(ParisError) as caught:
            self.check()
        return caught.value.code

    def revoke(self, contributions: list[Any], node: int = 0) -> Sealed[Revocation]:
        record = Revocation(
            key=NODES[node].id, reason="audit.mismatch",
            contributions=tuple(each.id for each in contributions), at=1_700_000_250,
        )  # fmt: skip
        return self.put(record, COORDINATOR)

    def revert(self, revocation: Sealed[Any], expert: int = 0, **changes: Any) -> Sealed[Revert]:
        """Takes out what the revoked node has in the expert's last merge."""
        head = self.heads[expert]
        merge = next(each.record for each in self.log if each.id == head.merge)
        removed = tuple(
            part for part in merge.inputs if part.contribution in revocation.record.contributions
        )
        record = Revert(
            expert=expert, revocation=revocation.id, parent=head, removed=removed,
            result=tensor_file(f"reverted {len(self.log)}"), numbers=(), policy=1, at=1_700_000_260,
        )  # fmt: skip
        sealed = self.put(record.model_copy(update=changes), COORDINATOR)
        self.heads[expert] = Head(
            round=head.round, weights=sealed.record.result, merge=sealed.id
        )  # fmt: skip
        return sealed


def lived() -> AuditWorld:
    world = AuditWorld()
    for expert in (0, 1, 0):
        world.merge(expert)
    return world
