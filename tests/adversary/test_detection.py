"""Rows "fewer steps than claimed" and "long con": how often the real draw finds a cheat, and what
he moves until it does. The draws are the protocol's own, over logs that nobody chose.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest

from paris_protocol.audit import audit_rate, make_draw
from paris_protocol.records import AuditRules

SEGMENTS, TRIALS = 20, 4000
RULES = AuditRules(
    chain="0" * 64, chain_length=1 << 16, segments=2, rate="10", floor="0.05", probation=10,
    probation_weight="0.25", vesting=20, answer_within=60, retry_within=60, auditors=0, canary="0",
)  # fmt: skip
MOST_WEIGHT = 1 / 4


def found(standing: int, skipped: int, trial: int, rules: AuditRules = RULES) -> bool:
    """Whether the draw of this trial opens one of the `skipped` first segments of a unit."""
    root, secret = (hashlib.sha256(f"{name} {trial}".encode()).hexdigest() for name in "ab")
    draw = make_draw(
        rules, SEGMENTS, number=trial, size=trial + 1, root=root, secret=secret, standing=standing
    )
    return any(segment < skipped for segment in draw.segments)


def formula(standing: int, skipped: int, rules: AuditRules = RULES) -> float:
    """q · (1 − share of pairs of segments that miss every skipped one)."""
    honest = SEGMENTS - skipped
    missed = math.comb(honest, rules.segments) / math.comb(SEGMENTS, rules.segments)
    return float(audit_rate(rules, standing)) * (1 - missed)


@pytest.mark.parametrize("standing", [0, 20, 1000])
@pytest.mark.parametrize("skipped", [0, 2, 10, 18, 20])
def test_cheats_are_found_as_often_as_the_formula_says(standing: int, skipped: int) -> None:
    times = sum(found(standing, skipped, trial) for trial in range(TRIALS))
    expected = formula(standing, skipped)
    error = math.sqrt(max(expected * (1 - expected), 1e-9) / TRIALS)
    assert abs(times / TRIALS - expected) <= 3.3 * error + 1e-9
    if skipped == 0:
        assert times == 0, "an honest unit has nothing to find"


def test_figures_of_the_reference() -> None:
    """19 %, 75 % and 99 % per audited contribution for a tenth, half and nine tenths skipped."""
    for skipped, share in ((2, 0.19), (10, 0.75), (18, 0.99)):
        assert formula(0, skipped) == pytest.approx(share, abs=0.02)


def test_the_rate_never_falls_below_its_floor() -> None:
    rates = [float(audit_rate(RULES, n)) for n in range(5000)]
    assert rates[:10] == [1.0] * 10 and min(rates) == 0.05
    assert all(a >= b for a, b in pairwise(rates))


def test_a_long_con_moves_the_head_by_a_bounded_distance() -> None:
    """Honest for a thousand units, then hostile in every one until he is found."""
    bad = []
    for con in range(600):
        merged = 0
        while not found(1000 + merged, SEGMENTS, con * 1000 + merged):
            merged += 1
        bad.append(merged)
    mean = sum(bad) / len(bad)
    bound = 1 / 0.05
    error = 3.3 * math.sqrt(1 - 0.05) / 0.05 / math.sqrt(len(bad))
    assert mean <= bound + error, "expected bad contributions before detection: 1/P"
    assert mean * MOST_WEIGHT <= 5 + error * MOST_WEIGHT, "clipped norms by which the head moved"
    # What has not vested when he is found is taken back: more than what he did in the mean.
    taken_back = sum(min(merged, RULES.vesting) for merged in bad) / sum(bad)
    assert taken_back > 0.6


def test_cheating_does_not_pay_at_the_working_point() -> None:
    """P ≥ φ / (1 + n) for n unvested contributions: at floor rate and a vesting of 20."""
    for skipped in range(1, SEGMENTS + 1):
        share = skipped / SEGMENTS
        assert formula(10**6, skipped) >= share / (1 + RULES.vesting)
    without = RULES.model_copy(update={"vesting": 0})
    assert formula(10**6, SEGMENTS) < 1 / (1 + without.vesting), "without vesting it would pay"
