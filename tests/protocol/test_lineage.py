"""Isolation and descent: every broken rule is refused, and a refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.lineage import Lineage, check_contribution, check_merge, committed_steps
from paris_protocol.records import Merge
from paris_protocol.tensors import states_root
from protocol.world import (
    BATCH,
    COORDINATOR,
    EVERY,
    NODES,
    STEPS,
    World,
    cluster,
    hexed,
    tensor_file,
)

FOUR = (hexed("a"),) * 4


def test_committed_steps() -> None:
    assert committed_steps(30, 8) == (0, 8, 16, 24, 30)
    assert committed_steps(30, 10) == (0, 10, 20, 30)
    assert committed_steps(3, 10) == (0, 3)
    for steps, every in ((0, 1), (1, 0)):
        with pytest.raises(ParisError):
            committed_steps(steps, every)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_number_of_committed_states(steps: int, every: int) -> None:
    made = committed_steps(steps, every)
    assert len(made) == len(set(made)) == 1 + -(-steps // every)
    assert (made[0], made[-1]) == (0, steps)


# ---------------------------------------------------------------- contributions


def test_honest_contribution_passes() -> None:
    assignment, commitment, contribution = World().unit(0, 0)
    check_contribution(assignment, commitment, contribution)
    first = commitment.record.states[0]
    check_contribution(assignment, commitment, contribution, first_state=first)
    with pytest.raises(ParisError) as caught:
        check_contribution(assignment, commitment, contribution, first_state="00" * 32)
    assert caught.value.code == "commitment.start"


@pytest.mark.parametrize(
    ("which", "changes", "code"),
    [
        (2, {"assignment": "00" * 32}, "structure.lineage"),
        (2, {"commitment": "00" * 32}, "commitment.missing"),
        (2, {"steps": STEPS - 1}, "structure.lineage"),
        (2, {"samples": STEPS * BATCH + 1}, "structure.lineage"),
        (2, {"update": tensor_file("other")}, "commitment.mismatch"),
        (1, {"steps": STEPS + 1}, "structure.lineage"),
        (1, {"states_root": "00" * 32}, "commitment.mismatch"),
        (1, {"states": ()}, "commitment.mismatch"),
        (1, {"states": FOUR, "states_root": states_root(FOUR)}, "commitment.mismatch"),
        (1, {"update_root": "00" * 32}, "commitment.mismatch"),
        (1, {"assignment": "00" * 32}, "structure.lineage"),
        (0, {"commit_every": EVERY - 3}, "commitment.mismatch"),
    ],
)  # fmt: skip
def test_stories_that_disagree_are_refused(which: int, changes: dict[str, Any], code: str) -> None:
    world = World()
    parts = list(world.unit(0, 0))
    old = parts[which]
    record = old.record.model_copy(update=changes)
    parts[which] = type(old)(record, old.raw, old.id, old.signer)
    with pytest.raises(ParisError) as caught:
        check_contribution(*parts)
    assert caught.value.code == code


@pytest.mark.parametrize("which", [1, 2])
def test_another_nodes_statement_is_refused(which: int) -> None:
    world = World()
    parts: list[Any] = list(world.unit(0, 0))
    old = parts[which]
    parts[which] = type(old)(old.record, old.raw, old.id, NODES[1].id)
    with pytest.raises(ParisError) as caught:
        check_contribution(*parts)
    assert caught.value.code == "unit.not-yours"


# ---------------------------------------------------------------- merges


class Case:
    """A world with two accepted contributions for expert 0 and the merge of them."""

    def __init__(self, first: dict[str, Any] | None = None, **changes: Any) -> None:
        self.world = World()
        self.units = [
            self.world.judge(0, 0, **(first or {}))[0],
            self.world.judge(0, 1)[0],
        ]
        self.merge: Merge = self.world.merge_record(0, self.units, **changes)
        self.accepted = self.world.accepted()

    def code(self, **changes: Any) -> str:
        arguments: dict[str, Any] = {
            "merge": self.merge, "parent": self.world.heads[0], "accepted": self.accepted,
            "merged_already": set(), "cluster": cluster(0),
        }  # fmt: skip
        try:
            check_merge(**(arguments | changes))
        except ParisError as error:
            return error.code
        return ""

    def input(self, **changes: Any) -> Merge:
        inputs = (self.merge.inputs[0].model_copy(update=changes), self.merge.inputs[1])
        return self.merge.model_copy(update={"inputs": inputs})


def test_honest_merge_passes() -> None:
    assert Case().code() == ""


@pytest.mark.parametrize(
    "first",
    [
        {"shards": cluster(1).shards[:1]},
        {"shards": (*cluster(0).shards[:1], *cluster(1).shards[:1])},
        {"shards": cluster(0).shards},
        {"expert": 1},
        {"kind": "audit"},
        {"round": 1},
        {"parent": World().heads[0].model_copy(update={"weights": tensor_file("other")})},
    ],
    ids=["other cluster", "mixed", "overlap", "other expert", "audit", "other round", "other head"],
)
def test_foreign_work_never_merges(first: dict[str, Any]) -> None:
    assert Case(first).code() == "merge.lineage"


def test_merge_rules() -> None:
    case = Case()
    head, merge = case.world.heads[0], case.merge
    other = head.model_copy(update={"weights": tensor_file("other")})
    cases: list[dict[str, Any]] = [
        {"parent": other},
        {"parent": head.model_copy(update={"round": 1})},
        {"cluster": cluster(1)},
        {"merged_already": {case.units[0].id}},
        {"accepted": {}},
        {"merge": merge.model_copy(update={"inputs": ()})},
        {"merge": merge.model_copy(update={"inputs": (merge.inputs[0],) * 2})},
        {"merge": merge.model_copy(update={"round": 1})},
        {"merge": merge.model_copy(update={"expert": 1})},
        {"merge": merge.model_copy(update={"parent": other})},
        {"merge": case.input(update=tensor_file("other"))},
        {"merge": case.input(weight=(0.6).hex())},
        {"merge": case.input(weight=(0.0).hex())},
        {"merge": case.input(weight=(-0.5).hex())},
        {"merge": case.input(scale=(1.5).hex())},
        {"merge": case.input(scale=(-1.0).hex())},
    ]
    for changes in cases:
        assert case.code(**changes) == "merge.lineage", changes


def test_lineage_is_the_fold_of_published_merges() -> None:
    world = World().lived()
    lineage = Lineage(world.genesis.record)
    for each in world.log:
        if isinstance(each.record, Merge):
            lineage.apply(each, world.accepted())
    assert [lineage.heads[0], lineage.heads[1]] == world.heads
    assert len(lineage.merged) == 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12))
def test_any_order_of_merges_keeps_one_line(order: list[int]) -> None:
    """Applied in any order and any number of times, a merge counts once and on its own parent."""
    world = World()
    merges = [world.merge(expert) for expert in (0, 1, 0, 1, 0, 0)]
    accepted, lineage = world.accepted(), Lineage(world.genesis.record)
    for pick in order:
        before = (dict(lineage.heads), dict(lineage.merged))
        expert = merges[pick].record.expert
        if merges[pick].record.parent == lineage.heads[expert]:
            lineage.apply(merges[pick], accepted)
            assert lineage.heads[expert].merge == merges[pick].id
        else:
            with pytest.raises(ParisError):
                lineage.apply(merges[pick], accepted)
            assert (lineage.heads, lineage.merged) == before
    applied = sum(head.round for head in lineage.heads.values())
    assert len(lineage.merged) == 2 * applied


def test_merge_of_an_unknown_expert_is_refused() -> None:
    world = World()
    record = world.merge_record(0, [world.judge(0, 0)[0]], expert=7)
    with pytest.raises(ParisError):
        Lineage(world.genesis.record).apply(
            seal(record, COORDINATOR, world.network), world.accepted()
        )
