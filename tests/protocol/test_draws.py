"""Audit draws: whoever has the log finds every draw that was dropped, doubled or made up."""

from __future__ import annotations

from typing import Any

import pytest

from paris_protocol.audit import chain_value, make_draw
from paris_protocol.draws import Standing, check_verdict
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    Head,
    KeyRotation,
    Layer,
    Policy,
    Verdict,
)
from protocol.auditworld import LENGTH, RULES, START, AuditWorld, lived
from protocol.world import COORDINATOR, NODES, check, hexed, key


def test_an_honest_log_passes_and_is_counted() -> None:
    world = lived()
    world.judge(0, 0, accepted=False)
    waiting = world.unit(1, 0)[2]
    facts = world.check()
    assert (facts["draws"], facts["waiting"]) == (7, [waiting.id])
    assert facts["audited"] == 7


def test_arrival_and_judgement_may_have_another_order() -> None:
    world = AuditWorld()
    first, second = world.unit(0, 0), world.unit(0, 1)
    world.draws = 1
    world.verdict(*second)
    world.draws = 0
    world.verdict(*first)
    assert world.check()["draws"] == 2


@pytest.mark.parametrize("field", ["size", "root", "standing", "secret", "number", "rate"])
def test_a_made_up_draw_is_found(field: str) -> None:
    """Each number of a draw, also with all that follows from it made to fit."""

    def change(verdict: Verdict) -> dict[str, Any]:
        draw = verdict.audit
        assert draw is not None
        other: dict[str, Any] = {
            "size": draw.size - 1, "root": hexed("another log"), "standing": draw.standing + 5,
            "secret": hexed("guess"), "number": draw.number + 1, "rate": "0.5",
        }  # fmt: skip
        changed = draw.model_copy(update={field: other[field]})
        if field not in ("rate", "secret"):
            fitting = make_draw(
                RULES, 4, number=changed.number, size=changed.size, root=changed.root,
                secret=chain_value(START, LENGTH, changed.number), standing=changed.standing,
            )  # fmt: skip
            changed = fitting
        return {"audit": changed, "accepted": False}

    world = AuditWorld()
    world.judge(0, 0)
    world.judge(0, 1, change=change)
    assert world.code() == "audit.draw"


def test_a_draw_that_was_thrown_away_is_found() -> None:
    world = AuditWorld()
    world.judge(0, 0)
    world.draws += 1
    world.judge(0, 1)
    assert world.code() == "audit.draw"
    world.unit(1, 0)  # somebody's draw that waits for its verdict may be the one
    assert world.check()["draws"] == 2


def test_one_number_is_one_contributions() -> None:
    world = AuditWorld()
    world.judge(0, 0)
    world.draws = 0
    world.judge(0, 1)
    assert world.code() == "audit.draw"


@pytest.mark.parametrize(
    "changes",
    [
        {"audit": None},
        {"layers": (Layer(layer="L0", passed=True, code=""),)},
        {"reports": ()},
    ],
    ids=["no draw", "no replay", "no report"],
)
def test_an_audit_that_was_not_done_is_found(changes: dict[str, Any]) -> None:
    world = AuditWorld()
    world.judge(0, 0, change=lambda _: changes)
    assert world.code() == "audit.draw"


def test_standing_is_earned_by_replays_and_lost() -> None:
    world = lived()
    node, other = NODES[0].id, NODES[1].id

    def standing(of: str) -> int:
        fold = Standing()
        for each in world.log:
            fold.take(each)
        return fold.of(of)

    assert standing(node) == 3
    world.judge(1, 1, accepted=False)
    assert (standing(node), standing(other)) == (3, 0)
    world.revoke([])
    assert standing(node) == 0


def test_a_lying_auditor_loses_standing() -> None:
    world = lived()
    fold = Standing()
    assignment, commitment, contribution = world.unit(1, 0)
    draw = world.draw(assignment, commitment)
    own = world.put(world.report(contribution.id, draw), COORDINATOR)
    lie = world.put(
        world.report(
            contribution.id, draw, passed=False, assignment=hexed("audit"), auditor=NODES[1].id
        ),
        NODES[1],
    )
    verdict = next(each.record for each in world.log if isinstance(each.record, Verdict))
    told = verdict.model_copy(update={"reports": (own.id, lie.id)})
    world.put(told, COORDINATOR)
    for each in world.log[:-1]:
        fold.take(each)
    assert fold.of(NODES[1].id) == 3
    fold.take(world.log[-1])
    assert fold.of(NODES[1].id) == 0


def test_verdicts_on_an_old_keys_work_count_for_the_key_that_came_after() -> None:
    world = lived()
    old, new = NODES[0].id, key("next").id
    fold = Standing()
    for each in world.log:
        fold.take(each)
    verdict = next(
        each.record
        for each in world.log
        if isinstance(each.record, Verdict) and each.record.node == old
    )
    record = KeyRotation(old=old, new=new, consent="0" * 128, at=0)
    fold.take(world.put(record, NODES[0]))
    assert (fold.of(old), fold.of(new)) == (0, 3)
    fold.take(world.put(verdict, COORDINATOR))
    assert (fold.of(old), fold.of(new)) == (0, 4)
    silent = verdict.model_copy(update={"accepted": False, "code": "audit.unanswered"})
    fold.take(world.put(silent, COORDINATOR))
    assert (fold.of(old), fold.of(new)) == (0, 0)


def test_rules_and_draws_belong_together() -> None:
    world = AuditWorld()
    world.judge(0, 0)
    verdict = next(each.record for each in world.log if isinstance(each.record, Verdict))
    lease = next(each.record for each in world.log if each.record.TYPE == "assignment")
    policy: Policy = world.policies[0].record
    check_verdict(verdict, lease, policy)
    with pytest.raises(ParisError):
        check_verdict(verdict, lease, policy.model_copy(update={"audit": None}))


# ---------------------------------------------------------------- in a release


def test_a_release_with_audits_and_a_revert_verifies() -> None:
    world = lived()
    merge = next(each.record for each in world.log if each.id == world.heads[0].merge)
    bad = [each for each in world.log if each.id == merge.inputs[0].contribution]
    revocation = world.revoke(bad)
    world.revert(revocation)
    verified = check(world.release())
    assert verified.merges == 3
    kinds = {each.record.TYPE for each in verified.lineage.values()}
    assert {"revert", "revocation", "audit-report"} <= kinds
    world.merge(0)
    assert check(world.release()).merges == 4


def refused(world: AuditWorld) -> str:
    with pytest.raises(ParisError) as caught:
        check(world.release())
    return caught.value.code


def test_a_release_shows_every_draw() -> None:
    world = AuditWorld()
    bad = {"audit": None}
    judged = [world.judge(0, 0, change=lambda _: bad)[0], world.judge(0, 1)[0]]
    merge = world.put(world.merge_record(0, judged), COORDINATOR)
    world.heads[0] = Head(round=1, weights=merge.record.result, merge=merge.id)
    assert refused(world) == "audit.draw"


def test_a_release_ties_the_draw_to_the_commitments_place() -> None:
    def earlier(verdict: Verdict) -> dict[str, Any]:
        draw = verdict.audit
        assert draw is not None
        return {"audit": draw.model_copy(update={"size": draw.size - 1})}

    world = AuditWorld()
    judged = [world.judge(0, 0, change=earlier)[0], world.judge(0, 1)[0]]
    merge = world.put(world.merge_record(0, judged), COORDINATOR)
    world.heads[0] = Head(round=1, weights=merge.record.result, merge=merge.id)
    assert refused(world) == "audit.draw"


@pytest.mark.parametrize("signer", [NODES[0], NODES[1]])
def test_a_revocation_is_the_coordinators(signer: Any) -> None:
    world = lived()
    merge = next(each.record for each in world.log if each.id == world.heads[0].merge)
    bad = [each for each in world.log if each.id == merge.inputs[0].contribution]
    record = world.revoke(bad).record
    world.log.pop()
    world.revert(world.put(record, signer))
    assert refused(world) == "release.key"


def test_what_was_revoked_may_not_stay() -> None:
    world = lived()
    merge = next(each.record for each in world.log if each.id == world.heads[0].merge)
    theirs = [each for each in world.log if each.id == merge.inputs[0].contribution]
    other = next(
        each.record for each in world.log if each.record.TYPE == "merge" and each.record.expert == 1
    )
    theirs += [each for each in world.log if each.id == other.inputs[0].contribution]
    world.revert(world.revoke(theirs))  # expert 1 still holds the other one
    assert refused(world) == "release.lineage"
