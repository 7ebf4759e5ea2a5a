"""The audit's economics, played with the real draws, weights and rates: no strategy beats honesty.

Nodes are functions of a seed; whether and where a contribution is audited is `audit.make_draw`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.economics import (
    detection,
    displacement,
    gain,
    majority_cost,
    needed,
    passes_probation,
    sybil_weight,
    weakest,
)
from paris_coordinator.merging import MOST_WEIGHT, NORM_BUDGET, Part, merge_shares
from paris_protocol.audit import audit_rate, make_draw
from paris_protocol.records import AuditRules

SEGMENTS = 100
Z99 = 2.576


@cache
def rules(**changes: object) -> AuditRules:
    value = {
        "chain": "0" * 64, "chain_length": 1 << 16, "segments": 2, "rate": "10", "floor": "0.05",
        "probation": 10, "probation_weight": "0.25", "vesting": 20, "answer_within": 1,
        "retry_within": 1, "auditors": 0, "canary": "0",
    } | changes  # fmt: skip
    return AuditRules.model_validate_json(json.dumps(value))


def words(*seed: object) -> Iterator[float]:
    """Endless numbers in [0, 1) that follow from a seed."""
    counter = 0
    while True:
        block = hashlib.sha256(repr((*seed, counter)).encode()).digest()
        yield from (int.from_bytes(block[i : i + 4], "big") / (1 << 32) for i in range(0, 32, 4))
        counter += 1


@dataclass
class Node:
    """A node that falsifies each segment with probability `share` from its `start`-th unit on."""

    seed: str
    share: float = 0.0
    start: int = 0
    standing: int = 0
    done: int = 0
    caught_at: int | None = None
    bad: list[int] = field(default_factory=list)

    def contribute(self, own: AuditRules) -> bool:
        """One contribution; True if it is accepted."""
        digest = hashlib.sha256(f"{self.seed} {self.done}".encode()).hexdigest()
        draw = make_draw(
            own, SEGMENTS, number=self.done % own.chain_length, size=1, root=digest,
            secret=hashlib.sha256(digest.encode()).hexdigest(), standing=self.standing,
        )  # fmt: skip
        share = self.share if self.done >= self.start else 0.0
        dice = words("skip", self.seed, self.done)
        false = [next(dice) < share for _ in range(SEGMENTS)] if share else [False] * SEGMENTS
        found = any(false[segment] for segment in draw.segments)
        if found:
            self.caught_at, self.standing = self.done, 0
        else:
            self.standing += draw.audited
            self.bad += [self.done] if any(false) else []
        self.done += 1
        return not found


def frequency(own: AuditRules, standing: int, share: float, trials: int) -> float:
    """How often a contribution with this share of false segments is found out."""
    found = 0
    for trial in range(trials):
        found += not Node(f"{standing} {share} {trial}", share, standing=standing).contribute(own)
    return found / trials


def interval(p: float, trials: int) -> float:
    """Half of the 99 % interval of a frequency."""
    return Z99 * math.sqrt(max(p * (1 - p), 1e-9) / trials)


# ---------------------------------------------------------------- detection


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("standing", [0, 20, 500])
def test_detection_lies_in_the_interval_of_the_formula(share: float, standing: int) -> None:
    trials = 1500
    expected = detection(rules(), standing, share)
    q = float(audit_rate(rules(), standing))
    assert expected == pytest.approx(1 - (1 - q * (1 - (1 - share) ** 2)))
    assert abs(frequency(rules(), standing, share, trials) - expected) <= interval(expected, trials)


def test_known_values_of_the_trust_reference() -> None:
    per_audit = [detection(rules(), 0, share) for share in (0.1, 0.5, 0.9)]
    assert per_audit == pytest.approx([0.19, 0.75, 0.99])
    means = [
        sum(float(audit_rate(rules(), n)) for n in range(count)) / count
        for count in (20, 100, 1000)
    ]
    assert means == pytest.approx([0.83, 0.33, 0.079], abs=0.01)
    assert [round(needed(1.0, n), 3) for n in (5, 10, 20, 50)] == [0.167, 0.091, 0.048, 0.02]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2000), st.floats(0, 1))
def test_detection_grows_with_the_share_and_with_the_layers_before(
    low: float, high: float, standing: int, before: float
) -> None:
    low, high = sorted((low, high))
    some = detection(rules(), standing, low)
    assert 0 <= some <= detection(rules(), standing, high) + 1e-12 <= 1 + 1e-9
    assert detection(rules(), standing, low, before=before) >= max(some, before) - 1e-12
    assert detection(rules(), standing, high, blind=1.0) == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_impossible_shares_are_refused(share: float) -> None:
    for wrong in (lambda: detection(rules(), 0, share), lambda: needed(share, 1)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            wrong()
    with pytest.raises(ValueError, match="for ever"):
        displacement(0.0, 0.5)


# ---------------------------------------------------------------- incentive


def profit(own: AuditRules, share: float, unvested: int, trials: int) -> tuple[float, float]:
    """Mean gain of cheating over honesty per contribution, and its 99 % interval."""
    gains = []
    for trial in range(trials):
        node = Node(f"profit {share} {trial}", share, standing=unvested)
        kept = 1.0 if node.contribute(own) else -float(unvested)
        spent = 1 - share
        gains.append(kept - spent)
    mean = sum(gains) / trials
    spread = math.sqrt(sum((g - mean) ** 2 for g in gains) / (trials - 1))
    return mean, Z99 * spread / math.sqrt(trials)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("unvested", [0, 5, 20])
def test_cheating_pays_only_where_the_formula_says_so(share: float, unvested: int) -> None:
    for floor in ("0.005", "0.2"):
        own = rules(rate="0", floor=floor)
        p = detection(own, unvested, share)
        expected = gain(p, share, unvested)
        assert (expected <= 1e-12) == (p >= needed(share, unvested) - 1e-12)
        mean, error = profit(own, share, unvested, 1200)
        assert abs(mean - expected) <= max(error, 0.02)


def test_the_default_rules_leave_no_cheat_that_pays_at_any_standing() -> None:
    for standing in (*range(0, 60), 100, 1000, 100_000):
        share, best = weakest(rules(), standing, min(standing, rules().vesting))
        assert best <= 0, (standing, share)
    assert weakest(rules(floor="0.01"), 1000, 20)[1] > 0  # a fifth of the floor would not do
    assert weakest(rules(), 1000, 0)[1] > 0  # nor would it without vesting


def test_over_a_long_life_honest_nodes_lose_nothing_and_cheats_end() -> None:
    """A population over many rounds: all honest ones stay, every cheat is found in time."""
    for number in range(30):
        node = Node(f"honest {number}")
        assert all(node.contribute(rules()) for _ in range(150))
        assert node.standing >= rules().probation
    for share in (0.1, 0.5, 1.0):
        ends = []
        for number in range(60):
            node = Node(f"lazy {share} {number}", share)
            while node.caught_at is None:
                node.contribute(rules())
            ends.append(node.done)
        assert sum(ends) / len(ends) < 1.5 / detection(rules(), 0, share)


# ---------------------------------------------------------------- displacement, sybils


def test_a_long_con_moves_the_head_less_than_the_bound() -> None:
    """Honest for 200 units, then all false: merged bad work times weight and clip stays bounded."""
    merged = []
    for number in range(250):
        node = Node(f"con {number}", share=1.0, start=200, standing=150)
        while node.caught_at is None:
            node.contribute(rules())
        merged.append(len(node.bad))
    p = detection(rules(), 150, 1.0)
    assert p == pytest.approx(1 - (1 - 0.0662), abs=0.02)
    mean = sum(merged) / len(merged)
    error = Z99 * math.sqrt((1 - p) / p**2 / len(merged))
    floor = detection(rules(), 10**6, 1.0)
    bound = displacement(floor, MOST_WEIGHT) * NORM_BUDGET  # in median updates
    assert mean * MOST_WEIGHT * NORM_BUDGET <= bound
    assert mean <= 1 / floor + error
    lasting = [max(0, bad - rules().vesting) for bad in merged]  # the rest is taken out again
    assert sum(lasting) / len(lasting) < mean / 2


@pytest.mark.parametrize("sybils", [1, 10, 300])
def test_sybils_in_probation_have_no_more_of_a_merge_than_the_cap(sybils: int) -> None:
    parts = [Part(f"known {i}", 40, 1.0) for i in range(4)]
    parts += [Part(f"new {i}", 40, 1.0, trusted=False) for i in range(sybils)]
    shares = merge_shares(parts, sybil_weight(rules()))
    new = [share.weight for share in shares if share.contribution.startswith("new")]
    assert sum(new) <= sybil_weight(rules()) + 1e-12
    assert sum(share.weight for share in shares) == pytest.approx(1.0)


def test_cheating_identities_do_not_come_to_standing() -> None:
    own, came = rules(), 0
    for number in range(400):
        node = Node(f"sybil {number}", share=0.1)
        while node.caught_at is None and node.standing < own.probation:
            node.contribute(own)
        came += node.caught_at is None
    expected = passes_probation(own, 0.1)
    assert expected == pytest.approx(0.81**10)
    assert abs(came / 400 - expected) <= interval(expected, 400)
    assert passes_probation(own, 0.5) < 1e-5
    assert majority_cost(own, 50) == 500
