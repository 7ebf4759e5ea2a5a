"""Weights and clip scales of a merge."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_coordinator.merging import NORM_BUDGET, Part, capped, merge_shares

MIXED = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(1e-6, 1e6), st.booleans()), min_size=1, max_size=12
).map(lambda rows: [Part(str(i), *row) for i, row in enumerate(rows)])
PARTS = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(1e-6, 1e6)), min_size=1, max_size=12
).map(lambda pairs: [Part(str(i), steps, norm) for i, (steps, norm) in enumerate(pairs)])


def test_one_contribution_is_taken_as_it_is():
    assert merge_shares([Part("a", 120, 1e9)]) == [("a", 1.0, 1.0)]


def test_equal_ones_share_equally():
    shares = merge_shares([Part("a", 120, 1.0), Part("b", 120, 1.1), Part("c", 120, 0.9)])
    assert [share.weight for share in shares] == pytest.approx([1 / 3] * 3)
    assert [share.scale for share in shares] == [1.0] * 3


def test_steps_weigh_and_the_cap_holds():
    shares = merge_shares(
        [Part(c, n, 1.0) for c, n in zip("abcd", (1000, 100, 100, 100), strict=True)]
    )
    assert shares[0].weight == pytest.approx(1 / 3)
    assert shares[1].weight == pytest.approx(2 / 9)


def test_the_loud_one_is_clipped_to_the_budget():
    shares = merge_shares([Part("a", 100, 1.0), Part("b", 100, 1.0), Part("c", 100, 10.0)])
    assert shares[2].scale == pytest.approx(NORM_BUDGET / 10)
    assert shares[0].scale == 1.0


@given(PARTS)
def test_weights_sum_to_one_and_scales_only_shrink(parts):
    shares = merge_shares(parts)
    assert math.fsum(share.weight for share in shares) == pytest.approx(1)
    most = max(1 / 3, 1 / len(parts))
    assert all(0 < share.weight <= most + 1e-9 for share in shares) or len(parts) == 1
    assert all(0 < share.scale <= 1 for share in shares)
    assert [share.contribution for share in shares] == [part.contribution for part in parts]
    assert merge_shares(parts) == shares


@given(PARTS)
def test_what_is_published_is_what_is_used(parts):
    for share in merge_shares(parts):
        assert float.fromhex(share.weight.hex()) == share.weight
        assert float.fromhex(share.scale.hex()) == share.scale


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_capped_shares(amounts):
    most = max(1 / 3, 1 / len(amounts))
    shares = capped(amounts, most)
    assert math.fsum(shares) == pytest.approx(1)
    assert max(shares) <= most + 1e-9


def test_probationers_have_their_part_and_no_more():
    new = [Part(c, 100, 1.0, trusted=False) for c in "abcdef"]
    shares = merge_shares([*new, Part("g", 100, 1.0), Part("h", 300, 1.0)], probation=0.25)
    assert math.fsum(share.weight for share in shares[:6]) == pytest.approx(0.25)
    assert [share.weight for share in shares[6:]] == pytest.approx([0.75 / 2] * 2)


def test_few_probationers_among_many_count_fully():
    known = [Part(c, 100, 1.0) for c in "abcdefg"]
    shares = merge_shares([*known, Part("new", 100, 1.0, trusted=False)], probation=0.25)
    assert [share.weight for share in shares] == pytest.approx([1 / 8] * 8)


def test_without_a_trusted_node_the_rest_stays_with_the_parent():
    assert merge_shares([Part("a", 1, 1.0, trusted=False)], probation=0.25) == [("a", 0.25, 1.0)]
    pair = [Part("a", 100, 1.0, trusted=False), Part("b", 300, 1.0, trusted=False)]
    assert [share.weight for share in merge_shares(pair, 0.25)] == pytest.approx([0.125] * 2)


@given(MIXED, st.sampled_from([0.0625, 0.25, 0.5, 1.0]))
def test_the_cap_on_probation_holds_whatever_comes(parts, probation):
    shares = merge_shares(parts, probation)
    new = [share.weight for share, part in zip(shares, parts, strict=True) if not part.trusted]
    assert math.fsum(new) <= probation + 1e-12
    total = math.fsum(share.weight for share in shares)
    assert total == pytest.approx(1 if any(part.trusted for part in parts) else probation)
    assert all(0 < share.weight <= 1 and 0 < share.scale <= 1 for share in shares)
    everyone = merge_shares([part._replace(trusted=True) for part in parts], probation)
    assert [share.scale for share in shares] == [share.scale for share in everyone]


@pytest.mark.parametrize("probation", [-0.1, 1.1, math.nan])
def test_a_cap_that_is_no_part_is_refused(probation):
    with pytest.raises(ValueError, match="probation"):
        merge_shares([Part("a", 1, 1.0)], probation)


@pytest.mark.parametrize(
    "parts", [[], [Part("a", 0, 1.0)], [Part("a", 1, math.nan)], [Part("a", 1, math.inf)]]
)
def test_nonsense_is_refused(parts):
    with pytest.raises(ValueError):
        merge_shares(parts)
