"""int8 updates: blocks of 256 values of a tensor, each by its largest magnitude.

A block stores m = max |x| in float32 and, for each value, q = x · 127 / m to the nearest integer,
halves to even; q stands for q · m / 127. Both are float64 with one rounding each, so that all
machines agree, and encoding what was decoded gives the same bytes. A block below 2⁻¹⁰⁰ is sent as
zeros. What is not finite, or could not have been written, raises `ValueError`::

    largest, values = encode_tensor(x)             # (blocks,) float32, (n,) int8
    decode_tensor(largest, values)                 # (n,) float32, within m/254 of x
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from paris_models.codecs_layout import BLOCK, Shapes, offsets

STEPS: Final = 127
LEAST: Final = np.float32(2.0**-100)
"""Below this a block's steps would fall among the denormal numbers, which have fewer bits."""
PIECE: Final = 1 << 10
"""Blocks that are worked on at once: their float64 copies fit a core's cache."""


def encode_tensor(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """(blocks,) largest magnitudes and (n,) steps of a flat float32 array."""
    largest = np.empty(-(-x.size // BLOCK), np.float32)
    values = np.empty(x.size, np.int8)
    for begin in range(0, largest.size, PIECE):
        part = slice(begin * BLOCK, min((begin + PIECE) * BLOCK, x.size))
        blocks = _blocks(x[part], np.float32)
        most = np.abs(blocks).max(axis=1)
        if not np.isfinite(most).all():
            raise ValueError("the update holds values that are not finite")
        most[most < LEAST] = 0
        divisor = np.where(most > 0, most, np.inf).astype(np.float64)[:, None]
        steps = np.rint(blocks.astype(np.float64) * STEPS / divisor).astype(np.int8)
        largest[begin : begin + len(most)] = most
        values[part] = steps.reshape(-1)[: part.stop - part.start]
    return largest, values


def decode_tensor(largest: NDArray[np.float32], values: NDArray[np.int8]) -> NDArray[np.float32]:
    """The flat float32 array that `encode_tensor` stored; `ValueError` for what it never writes."""
    out = np.empty(values.size, np.float32)
    for begin in range(0, largest.size, PIECE):
        part = slice(begin * BLOCK, min((begin + PIECE) * BLOCK, values.size))
        steps = _blocks(values[part], np.int16)
        most = largest[begin : begin + PIECE]
        # A bit pattern of zero is +0; everything else lies between the least and the infinite.
        sound = (most.view(np.uint32) == 0) | ((most >= LEAST) & np.isfinite(most))
        if not (sound & (np.abs(steps).max(axis=1) == np.where(most > 0, STEPS, 0))).all():
            raise ValueError("a block of int8 values is not one that is ever written")
        exact = steps * most.astype(np.float64)[:, None] / STEPS
        out[part] = exact.reshape(-1)[: part.stop - part.start]
    return out


class Reader:
    """The tensors of an int8 file, each decoded when it is asked for."""

    def __init__(self, wire: Mapping[str, NDArray[Any]], shapes: Shapes) -> None:
        self._shapes, names = shapes, sorted(shapes)
        self._largest, self._values = wire["int8.largest"], wire["int8.values"]
        sizes = [math.prod(shapes[name]) for name in names]
        self._values_at = dict(zip(names, offsets(sizes), strict=False))
        self._blocks_at = dict(zip(names, offsets(-(-n // BLOCK) for n in sizes), strict=False))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor, of its shape; `ValueError` for what `encode_tensor` never writes."""
        size, value, block = (
            math.prod(self._shapes[name]), self._values_at[name], self._blocks_at[name],
        )  # fmt: skip
        largest = self._largest[block : block - (-size // BLOCK)]
        return decode_tensor(largest, self._values[value : value + size]).reshape(
            self._shapes[name]
        )


def _blocks(x: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
    """(blocks, 256) of a flat array; what the last block lacks is zero."""
    blocks = -(-x.size // BLOCK)
    if x.size == blocks * BLOCK:
        return x.astype(dtype, copy=False).reshape(blocks, BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype)
    padded[: x.size] = x
    return padded.reshape(blocks, BLOCK)
