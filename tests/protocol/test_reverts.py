"""Reverts: what a revoked key had merged leaves its head once, exactly, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from paris_protocol.envelope import Sealed
from paris_protocol.errors import ParisError
from paris_protocol.lineage import Evidence, Lineage, fold
from paris_protocol.records import Head, Merge, Revert, Revocation
from protocol.auditworld import AuditWorld
from protocol.world import COORDINATOR, hexed, tensor_file


class Case:
    """Two rounds of expert 0, one of expert 1, and the revocation of the first node's work."""

    def __init__(self) -> None:
        self.world = AuditWorld()
        self.merges = [self.world.merge(expert) for expert in (0, 1, 0)]
        self.bad = [self.contribution(merge, 0) for merge in self.merges]
        self.revocation = self.world.revoke([self.bad[0], self.bad[2]])
        self.lineage = Lineage(self.world.genesis.record)
        for merge in self.merges:
            self.lineage.apply(merge, self.world.accepted())
        inputs = [self.merges[0].record.inputs[0], self.merges[2].record.inputs[0]]
        self.record = Revert(
            expert=0, revocation=self.revocation.id, parent=self.world.heads[0],
            removed=tuple(inputs), result=tensor_file("reverted"), numbers=(), policy=1, at=1,
        )  # fmt: skip

    def contribution(self, merge: Sealed[Merge], place: int) -> Sealed[Any]:
        id = merge.record.inputs[place].contribution
        return next(each for each in self.world.log if each.id == id)

    def apply(self, revocation: Revocation | None = None, **changes: Any) -> str:
        before = (dict(self.lineage.heads), set(self.lineage.removed))
        sealed = self.world.put(self.record.model_copy(update=changes), COORDINATOR)
        try:
            self.lineage.revert(sealed, revocation or self.revocation.record)
        except ParisError as error:
            assert (self.lineage.heads, self.lineage.removed) == before
            return error.code
        return ""


def test_a_revert_moves_the_head_and_keeps_its_round() -> None:
    case = Case()
    assert case.apply() == ""
    revert = case.world.log[-1]
    expected = Head(round=2, weights=tensor_file("reverted"), merge=revert.id)
    assert case.lineage.heads[0] == expected
    assert case.lineage.removed == {case.bad[0].id, case.bad[2].id}


def test_the_line_goes_on_behind_a_revert() -> None:
    case = Case()
    world = case.world
    sealed = world.put(case.record, COORDINATOR)
    world.heads[0] = Head(round=2, weights=case.record.result, merge=sealed.id)
    again = world.merge(0)
    evidence = Evidence.of(
        each for each in world.log if each.record.TYPE not in ("genesis", "policy")
    )
    assert [step.id for step in evidence.steps(0)] == [
        case.merges[0].id, case.merges[2].id, sealed.id, again.id,
    ]  # fmt: skip
    assert fold(world.genesis.record, evidence).heads[0] == world.heads[0]


def test_broken_reverts_change_nothing() -> None:
    case = Case()
    one, two = case.record.removed
    other = case.merges[1].record.inputs[0]
    stranger = case.merges[0].record.inputs[1]
    old = Head(round=1, weights=case.merges[0].record.result, merge=case.merges[0].id)
    cases: list[dict[str, Any]] = [
        {"parent": old},
        {"parent": case.record.parent.model_copy(update={"round": 1})},
        {"expert": 1},
        {"expert": 7},
        {"removed": ()},
        {"removed": (one, one)},
        {"removed": (other,)},
        {"removed": (stranger,)},
        {"removed": (one.model_copy(update={"weight": (0.25).hex()}), two)},
        {"removed": (one.model_copy(update={"scale": (0.25).hex()}), two)},
        {"removed": (one.model_copy(update={"update": tensor_file("other")}), two)},
        {"removed": (one.model_copy(update={"contribution": hexed("nobody")}),)},
    ]
    for changes in cases:
        assert case.apply(**changes) == "merge.lineage", changes
    key = case.revocation.record
    assert case.apply(key.model_copy(update={"contributions": (one.contribution,)}))
    assert case.apply(key.model_copy(update={"key": key.key[:-1] + "0"}))


def test_what_was_taken_out_is_not_taken_out_again() -> None:
    case = Case()
    one, two = case.record.removed
    assert case.apply(removed=(one,)) == ""
    parent = case.lineage.heads[0]
    assert case.apply(parent=parent, removed=(one, two)) == "merge.lineage"
    assert case.apply(parent=parent, removed=(two,)) == ""


def test_what_was_taken_out_does_not_come_back() -> None:
    case = Case()
    assert case.apply() == ""
    case.world.heads[0] = case.lineage.heads[0]
    merge = case.world.merge_record(0, [case.bad[0]])
    with pytest.raises(ParisError):
        case.lineage.apply(case.world.put(merge, COORDINATOR), case.world.accepted())


def test_a_merge_and_a_revert_do_not_share_a_parent() -> None:
    case = Case()
    world, heads = case.world, list(case.world.heads)
    world.put(case.record, COORDINATOR)
    world.heads = heads
    world.merge(0)
    evidence = Evidence.of(
        each for each in world.log if each.record.TYPE not in ("genesis", "policy")
    )
    with pytest.raises(ParisError):
        fold(world.genesis.record, evidence)
