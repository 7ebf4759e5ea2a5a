"""LoRA products that are the same bits on every machine: integers on a grid of powers of two.

The product B·A sums over the rank, and a sum of floats depends on its order. Therefore A and B are
put on an int16 (or int8) grid whose scales are constant along the rank: one power of two per row of
B, one per column of A. All products and partial sums are then integers below 2⁵³, so that a float64
GEMM is exact in any order, on any BLAS; scales come afterwards (trust reference §3.5). Refused with
`ValueError`: values that are not finite, shapes that do not fit, a rank beyond 2²³::

    b, a = to_grid(B, along=1), to_grid(A, along=0)      # B: (out, r), A: (r, in)
    update = lora_product(a, b, alpha=16.0)              # float32 (out, in): alpha/r · B·A
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST: Final = (1 << 15) - 1
MOST_RANK: Final = 1 << 23
"""So many products of two 15-bit integers stay below 2⁵³."""
PIECE: Final = 1 << 20
"""Elements of a product that are made at once."""


class Grid(NamedTuple):
    """A matrix on the grid: `values · 2^exponents`, the exponents constant along axis `along`."""

    values: NDArray[np.int16]
    exponents: NDArray[np.int32]
    along: int

    def dense(self) -> NDArray[np.float64]:
        """The matrix that it stands for, exactly."""
        return np.ldexp(self.values.astype(np.float64), np.expand_dims(self.exponents, self.along))


def to_grid(matrix: NDArray[Any], along: int, most: int = LARGEST) -> Grid:
    """The nearest grid of numbers up to `most`, halves to even; `along` is the axis of the rank.

    Each line along that axis gets the smallest power of two with which its largest value fits, so
    that a grid's own matrix has that grid again.
    """
    exact = np.asarray(matrix, np.float64)
    if exact.ndim != 2 or not np.isfinite(exact).all():
        raise ValueError("a matrix of finite values goes onto the grid")
    largest = np.abs(exact).max(axis=along, initial=0.0)
    fraction, exponents = np.frexp(largest / most)  # largest ≤ most · 2^exponent
    exponents = np.where(largest > 0, exponents - (fraction == 0.5), 0).astype(np.int32)
    scaled = np.ldexp(exact, -np.expand_dims(exponents, along))
    return Grid(np.rint(scaled).astype(np.int16), exponents, along)


def lora_product(a: Grid, b: Grid, alpha: float) -> NDArray[np.float32]:
    """alpha / r · B·A as float32 of shape (out, in), from B (out, r) and A (r, in) on their grids.

    The sum is exact; one float64 multiplication and one rounding to float32 follow for each value.
    """
    rank = a.values.shape[0]
    if (a.along, b.along) != (0, 1) or b.values.shape[1] != rank:
        raise ValueError("scales vary along the rank, or the ranks differ")
    if not 0 < rank <= MOST_RANK:
        raise ValueError(f"a rank of {rank}")
    columns = a.values.shape[1]
    product = np.empty((len(b.values), columns), np.float32)
    right, scale = a.values.astype(np.float64), np.float64(alpha) / rank
    rows = max(1, PIECE // max(1, columns))
    for begin in range(0, len(product), rows):
        part = slice(begin, begin + rows)
        exact = b.values[part].astype(np.float64) @ right
        np.ldexp(exact, b.exponents[part, None], out=exact)
        np.ldexp(exact, a.exponents[None, :], out=exact)
        product[part] = np.multiply(exact, scale, out=exact)
    return product
