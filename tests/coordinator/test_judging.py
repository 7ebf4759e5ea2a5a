"""Verdicts follow from numbers: every limit refuses on its far side and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_coordinator.judging import (
    ACCEPTED,
    PairedLoss,
    UpdateNumbers,
    block_z,
    damage,
    decide,
    exact,
    failed,
    passed,
    statistics,
)
from paris_protocol.records import Layer, Margins
from protocol.world import policy_record

MARGINS = Margins(
    damage=("0.02", "0.005"), merge_damage="0.001", standard_errors="3", clips=256, norm_high="3",
    norm_low="0.2", copy_cosine="0.9", noise_cosine="0.01", source="test",
)  # fmt: skip
POLICY = policy_record(1, None, ()).model_copy(update={"margins": MARGINS})
HONEST: dict[str, Any] = {
    "norm": 30.0, "relative": 0.5, "reach": 0.25, "max_abs": 0.2, "descent": 0.06,
}  # fmt: skip


def l2(history: list[float] | None = None, **changes: Any) -> Layer:
    return statistics(UpdateNumbers(**{**HONEST, **changes}), history or [], MARGINS)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ""),
        ({"norm": 0.0, "reach": 0.0, "descent": 0.0}, "statistics.zero"),
        ({"reach": 0.005}, "statistics.zero"),
        ({"reach": 2.6}, "statistics.norm"),
        ({"copies": {"a": 0.3, "b": 0.95}}, "statistics.copy"),
        ({"copies": {"a": 0.89}}, ""),
        ({"rank": 0.05, "least_rank": 0.1}, "statistics.rank"),
        ({"rank": 0.05}, ""),
        ({"descent": 0.002}, "statistics.noise"),
        ({"descent": -0.06}, "statistics.direction"),
    ],
)
def test_each_attack_has_its_code(changes: dict[str, Any], code: str) -> None:
    layer = l2(**changes)
    assert (layer.passed, layer.code) == (not code, code)


def test_norms_are_compared_with_the_median_once_three_are_known() -> None:
    assert l2([0.1, 0.1], relative=0.5).passed
    assert l2([0.1, 0.1, 0.1], relative=0.5).code == "statistics.norm"
    assert l2([5.0, 5.0, 5.0], relative=0.5).code == "statistics.zero"
    assert l2([0.1, 0.4, 9.0], relative=0.5).passed


def paired(delta: float, se: float) -> PairedLoss:
    return PairedLoss(delta=delta, se=se, n=256, before=0.2, after=0.2 + delta)


@given(st.floats(-1, 1), st.floats(0, 0.1), st.integers(0, 5))
def test_damage_is_refused_beyond_margin_and_three_errors_only(
    delta: float, se: float, turn: int
) -> None:
    margin = 0.02 if turn == 0 else 0.005
    layer = damage(paired(delta, se), MARGINS, turn)
    assert layer.passed == (delta - 3 * se <= margin)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_damage(bad: float) -> None:
    layer = damage(paired(bad, 0.001), MARGINS, 0)
    assert layer.code == "loss.damage"
    assert decide([passed("L0"), passed("L1"), passed("L2"), layer], POLICY) == (
        False,
        "loss.damage",
    )


def test_unchanged_parent_and_improvement_are_no_damage() -> None:
    assert damage(paired(0.0, 0.0), MARGINS, 3).passed
    assert damage(paired(-0.1, 0.001), MARGINS, 3).passed


def test_decide_takes_the_first_refusal() -> None:
    good = damage(paired(-0.01, 0.001), MARGINS, 0)
    assert decide([passed("L0"), passed("L1"), passed("L2"), good], POLICY) == (True, ACCEPTED)
    refused = [passed("L0"), failed("L1", "commitment.missing")]
    assert decide(refused, POLICY) == (False, "commitment.missing")


def test_decide_needs_all_layers_in_order() -> None:
    good = damage(paired(-0.01, 0.001), MARGINS, 0)
    for layers in ([passed("L0")], [], [passed("L0"), passed("L2"), passed("L1"), good]):
        with pytest.raises(ValueError, match="L1"):
            decide(layers, POLICY)


def test_decide_concludes_l3_from_its_bucket() -> None:
    """A worker that says `passed` beside a bucket that says otherwise is not believed."""
    bad = damage(paired(0.5, 0.001), MARGINS, 0).model_copy(update={"passed": True, "code": ""})
    layers = [passed("L0"), passed("L1"), passed("L2"), bad]
    assert decide(layers, POLICY, 0) == (False, "loss.damage")


def test_margin_is_that_of_the_round() -> None:
    assert damage(paired(0.01, 0.0), MARGINS, 0).passed
    assert not damage(paired(0.01, 0.0), MARGINS, 1).passed


def test_the_verdict_tells_buckets_and_no_losses() -> None:
    for delta, bucket in ((-0.1, "-1"), (0.0, "0"), (0.5, "1")):
        found = dict(damage(paired(delta, 0.001), MARGINS, 0).numbers)
        assert found == {"n": "256", "margin": "0.02", "bucket": bucket}
    assert dict(exact(paired(0.5, 0.001)))["delta"] == "0.5"


def test_a_block_is_compared_with_its_own_lineage() -> None:
    known = {"a": [0.2, 0.21, 0.19, 0.2, 0.22, 0.2, 0.18, 0.2], "b": [0.5] * 7}
    assert block_z({"a": 0.2, "b": 9.0}, known) < 1  # seven are no distribution
    assert block_z({"a": 0.4}, known) == pytest.approx(block_z({"a": 0.1}, known), rel=1e-6)
    assert block_z({"a": 0.4}, known) > 4
    assert block_z({"a": 0.0}, known) > 1e6
    margins = MARGINS.model_copy(update={"block_z": "6"})
    for reach, code in ((0.24, ""), (2.0, "statistics.block"), (0.0, "statistics.block")):
        numbers = UpdateNumbers(**HONEST, blocks={"a": reach})
        assert statistics(numbers, [], margins, known).code == code
