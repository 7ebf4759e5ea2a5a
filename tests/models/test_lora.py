"""LoRA products on the integer grid: exact in any order, near what was trained."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paris_models.lora import Grid, lora_product, to_grid

LIMIT = float(np.float32(3e38))
WIDE = st.floats(-LIMIT, LIMIT, width=32)


def exact(a: Grid, b: Grid, order: np.ndarray) -> np.ndarray:
    """The integer sum in int64, its terms in another order."""
    return b.values.astype(np.int64)[:, order] @ a.values.astype(np.int64)[order]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 128), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1 << 30))
def test_the_product_is_the_integer_sum_in_any_order(
    rank: int, rows: int, columns: int, seed: int
) -> None:
    g = np.random.default_rng(seed)
    spread = np.float32(2.0) ** g.integers(-60, 60, (rank, 1)).astype(np.float32)
    b = to_grid(g.standard_normal((rows, rank)).astype(np.float32) * spread.T, along=1)
    a = to_grid(g.standard_normal((rank, columns)).astype(np.float32) * spread, along=0)
    total = exact(a, b, g.permutation(rank))
    scaled = total.astype(np.float64)
    scaled = np.ldexp(np.ldexp(scaled, b.exponents[:, None]), a.exponents[None, :])
    with np.errstate(over="ignore"):
        expected = (scaled * (np.float64(12.0) / rank)).astype(np.float32)
        assert np.array_equal(lora_product(a, b, 12.0), expected)
    order = g.permutation(rank)
    turned_a = Grid(np.ascontiguousarray(a.values[order]), a.exponents, 0)
    turned_b = Grid(np.ascontiguousarray(b.values[:, order]), b.exponents, 1)
    with np.errstate(over="ignore"):
        turned = lora_product(turned_a, turned_b, 12.0)
        assert np.array_equal(lora_product(a, b, 12.0), turned)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (4, 5), elements=WIDE), st.integers(0, 1))
def test_the_grid_is_near_and_stays(matrix: np.ndarray, along: int) -> None:
    grid = to_grid(matrix, along)
    assert grid.values.dtype == np.int16
    assert np.abs(grid.values.astype(np.int32)).max() <= (1 << 15) - 1
    largest = np.abs(matrix.astype(np.float64)).max(axis=along, keepdims=True)
    assert (np.abs(grid.dense() - matrix) <= largest / (1 << 14)).all()
    again = to_grid(grid.dense(), along)
    assert np.array_equal(again.dense(), grid.dense())


def test_the_largest_sums_stay_exact() -> None:
    full = np.full((1, 128), (1 << 15) - 1, np.int16)
    b = Grid(full, np.zeros(1, np.int32), 1)
    a = Grid(np.ascontiguousarray(full.T), np.zeros(1, np.int32), 0)
    assert lora_product(a, b, 128.0)[0, 0] == np.float32(128 * ((1 << 15) - 1) ** 2)


def test_what_cannot_be_exact_is_refused() -> None:
    good = to_grid(np.ones((3, 3), np.float32), along=0)
    for matrix in (np.array([[np.nan]]), np.array([[np.inf]]), np.ones(3), np.ones((2, 2, 2))):
        with pytest.raises(ValueError, match="finite"):
            to_grid(matrix, along=0)
    with pytest.raises(ValueError, match="rank"):
        lora_product(good, good, 1.0)  # scales along the rank are no longer exact
    other = to_grid(np.ones((3, 2), np.float32), along=1)
    with pytest.raises(ValueError, match="rank"):
        lora_product(good, other, 1.0)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (4, 5), elements=WIDE), st.integers(0, 1), st.sampled_from([127, 32767]))
def test_a_grid_is_its_own_nearest_grid(matrix: np.ndarray, along: int, most: int) -> None:
    grid = to_grid(matrix, along, most)
    largest = np.abs(grid.values.astype(np.int32)).max(axis=along)
    assert (((largest > most // 2) & (largest <= most)) | (largest == 0)).all()
    again = to_grid(grid.dense(), along, most)
    assert np.array_equal(again.values, grid.values)
    assert np.array_equal(again.exponents, grid.exponents)


@pytest.mark.parametrize("most", [127, 32767])
def test_the_largest_number_of_a_grid_stays_on_it(most: int) -> None:
    for value in (most, most / 8, -most * 2.0**20):
        grid = to_grid(np.array([[value, 1.0]]), 1, most)
        assert abs(int(grid.values[0, 0])) == most


def test_a_product_that_is_made_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(5)
    b = to_grid(g.standard_normal((37, 8), np.float32), along=1)
    a = to_grid(g.standard_normal((8, 11), np.float32), along=0)
    whole = lora_product(a, b, 8.0)
    monkeypatch.setattr("paris_models.lora.PIECE", 30)
    assert np.array_equal(lora_product(a, b, 8.0), whole)
    empty = to_grid(np.zeros((0, 8), np.float32), along=1)
    assert lora_product(a, empty, 8.0).shape == (0, 11)
