"""LoRA updates: the factors of every module on the grid of `lora.py`, as they cross the network.

A line of a factor (a row of B, a column of A) shares a power of two and runs along the rank, so the
product of what was sent is exact and its bits are everybody's. A line whose largest magnitude is
below 2⁻¹⁰⁰ is sent as zeros. Encoding what was decoded gives the same bytes. Refused with
`ValueError`: factors that are not pairs of one rank, magnitudes beyond 2⁶⁰ or not finite, files
that could not have been written::

    wire = encode("lora-int8", factors)                 # {"….a": (r, in), "….b": (out, r)}
    Reader("lora-int8", wire, shapes).tensor("….weight")        # B·A, float32 (out, in)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from paris_models.codecs_layout import LORA, MOST_RANK, Codec, Shapes, lora_modules, offsets
from paris_models.lora import Grid, lora_product, to_grid

LEAST: Final = 2.0**-100
MOST: Final = 2.0**60
"""Exponents between these fit a byte, and products of factors fit float32."""
NUMBERS: Final[Mapping[str, type[np.signedinteger[Any]]]] = {"I16": np.int16, "I8": np.int8}


def encode(codec: Codec, factors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
    """The arrays of a file of factors, modules sorted: B then A, exponents along."""
    modules = sorted({name[:-2] for name in factors})
    dtype, most = LORA[codec]
    number = NUMBERS[dtype]
    if not modules or factors.keys() != {f"{module}.{x}" for module in modules for x in "ab"}:
        raise ValueError("factors are pairs <module>.a and <module>.b")
    rank = len(factors[f"{modules[0]}.a"])
    values: list[NDArray[Any]] = []
    exponents: list[NDArray[Any]] = []
    for module in modules:
        a, b = factors[f"{module}.a"], factors[f"{module}.b"]
        if (
            a.ndim != 2
            or b.ndim != 2
            or not 1 <= rank <= MOST_RANK
            or {len(a), b.shape[1]} != {rank}
        ):
            raise ValueError(f"the factors of {module} are not of rank {rank}")
        for factor, along in ((b, 1), (a, 0)):
            grid = to_grid(_sendable(factor, along), along, most)
            values.append(grid.values.astype(number).reshape(-1))
            exponents.append(grid.exponents.astype(np.int8))
    return {
        f"{codec}.exponents": np.concatenate(exponents),
        f"{codec}.values": np.concatenate(values),
    }


def _sendable(factor: NDArray[np.float32], along: int) -> NDArray[np.float32]:
    """A factor without the lines that are too small; `ValueError` for magnitudes beyond `MOST`."""
    largest = np.abs(factor).max(axis=along, initial=0.0, keepdims=True)
    if not (largest <= MOST).all():
        raise ValueError("the factors hold values that are not finite or beyond 2^60")
    return np.where(largest >= LEAST, factor, np.float32(0))


class Reader:
    """The tensors of a file of factors: products, made when they are asked for, and zeros."""

    def __init__(self, codec: Codec, wire: Mapping[str, NDArray[Any]], shapes: Shapes) -> None:
        self._most = LORA[codec][1]
        self._shapes, self._modules = shapes, lora_modules(shapes)
        self._values, self._exponents = wire[f"{codec}.values"], wire[f"{codec}.exponents"]
        lines = [sum(pair) for pair in self._modules.values()]
        self._begins = dict(zip(self._modules, offsets(lines), strict=False))
        self.rank = self._values.size // max(1, sum(lines))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor, of its shape; `ValueError` for what `encode` never writes."""
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self._modules:
            return np.zeros(self._shapes[name], np.float32)
        a, b = self.grids(module)
        return lora_product(a, b, alpha=float(self.rank))

    def grids(self, module: str) -> tuple[Grid, Grid]:
        """A (r, in) and B (out, r) of a module on their grids."""
        out, into = self._modules[module]
        line, begin = self._begins[module], self._begins[module] * self.rank
        middle, end = begin + out * self.rank, begin + (out + into) * self.rank
        b = self._values[begin:middle].reshape(out, self.rank)
        a = self._values[middle:end].reshape(self.rank, into)
        exponents = self._exponents[line : line + out + into].astype(np.int32)
        return (
            self._grid(a, exponents[out:], along=0),
            self._grid(b, exponents[:out], along=1),
        )

    def _grid(self, values: NDArray[Any], exponents: NDArray[np.int32], along: int) -> Grid:
        """A grid as `to_grid` makes it: every line's power of two is the smallest that will do."""
        largest = np.abs(values.astype(np.int32)).max(axis=along, initial=0)
        size = np.ldexp(largest.astype(np.float64), exponents)
        used = (largest > self._most // 2) & (largest <= self._most)
        used &= (size >= LEAST) & (size <= MOST)
        if not np.where(largest > 0, used, exponents == 0).all():
            raise ValueError("a line of factors is not one that is ever written")
        return Grid(values.astype(np.int16), exponents, along)
