"""Merges: published scalars times updates, added to a float32 master, the same bits everywhere.

The reductions that need an order (norms, weights) are done once by the coordinator and published;
what is left is element-wise float32 in NumPy, a multiply and then an add, never fused::

    c_i = float32(weight_i · scale_i)           product in float64
    g   = c_1 · D_1;  g = g + c_i · D_i         in the listed order
    new = master + g                            a revert: head − g

Nothing is summed over elements, so threads, BLAS and instruction sets have nothing to reorder.
Inputs are mapped, or decoded a tensor at a time; a piece of every tensor is worked on while it is
in the cache, and one output tensor is held. Updates that do not fit the master, or hold values that
are not finite, raise `ValueError`::

    head = merge(master, [a, b], weights=[0.5, 0.5], scales=[1.0, 0.8])
    merge_files(parent, [(update, 0.5, 1.0), (other, 0.5, 0.8)], out)    # one tensor at a time
    revert_files(head, [(other, 0.5, 0.8)], out)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from paris_models.checkpoint import file_order, write_stream
from paris_models.codecs import mapped, open_update

Array = NDArray[np.float32]
Input = tuple[Path, float, float]
"""An update's file, its weight and its clip scale."""
PIECE: Final = 1 << 18
"""Elements that are worked on at once: with their intermediate results they fit a core's cache."""


def merge_tensor(
    master: Array,
    updates: Sequence[NDArray[Any]],
    weights: Sequence[float],
    scales: Sequence[float],
    out: Array | None = None,
) -> Array:
    """One tensor of a merge, of the master's shape.

    `master` is float32, updates are float32, or bfloat16 as uint16 bit patterns; `out`
    (C-contiguous float32) is filled and returned where it is given.
    """
    if any(update.shape != master.shape for update in updates):
        raise ValueError("an update does not have the master's shape")
    factors = [np.float32(w * s) for w, s in zip(weights, scales, strict=True)]
    if len(factors) != len(updates):
        raise ValueError("one argument of weight and scale for each update")
    if out is None:
        out = np.empty(master.shape, np.float32)
    base, target = _flat(master), out.reshape(-1)
    flat = [_flat(update) for update in updates]
    term = np.empty(min(PIECE, base.size), np.float32)
    for begin in range(0, base.size, PIECE):
        part = slice(begin, min(begin + PIECE, base.size))
        pieces = [update[part] for update in flat]
        _merge_piece(base[part], pieces, factors, target[part], term[: part.stop - begin])
    return out


def _merge_piece(
    base: Array,
    updates: Sequence[NDArray[Any]],
    factors: Sequence[np.float32],
    out: Array,
    term: Array,
) -> None:
    """The arithmetic of the module's docstring on a piece that stays in the cache.

    `out` holds the sum g on the way; `term` is room for one product.
    """
    if not updates:
        np.copyto(out, base)
        return
    for place, (update, factor) in enumerate(zip(updates, factors, strict=True)):
        into = term if place else out
        np.multiply(_widened(update, into), factor, out=into)
        if place:
            np.add(out, term, out=out)
    np.add(base, out, out=out)
    # A value that is not finite makes the squares' sum so; that may also overflow, hence a second
    # look. This sum is for the check alone: none of its bits is in the result.
    if not math.isfinite(np.dot(out, out)):
        for update in updates:
            if not np.isfinite(_widened(update, term)).all():
                raise ValueError("an update holds values that are not finite")


def _widened(update: NDArray[Any], room: Array) -> Array:
    """A piece as float32: bfloat16 bits become exactly the same numbers, in `room`."""
    if update.dtype != np.uint16:
        return update
    bits = room.view(np.uint32)
    np.copyto(bits, update)
    np.left_shift(bits, 16, out=bits)
    return room


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    kind = np.uint16 if array.dtype == np.uint16 else np.float32
    return np.ascontiguousarray(array, dtype=kind).reshape(-1)


def merge(
    master: Mapping[str, Array],
    updates: Sequence[Mapping[str, Array]],
    weights: Sequence[float],
    scales: Sequence[float],
) -> dict[str, Array]:
    """The next head from the master and accepted updates in listed order.

    Raises `ValueError` when the counts differ or an update's tensors are not the master's.
    """
    if any(update.keys() != master.keys() for update in updates):
        raise ValueError("an update does not have the master's tensors")
    return {
        name: merge_tensor(array, [update[name] for update in updates], weights, scales)
        for name, array in master.items()
    }


# ---------------------------------------------------------------- files


def merge_files(
    master: Path,
    inputs: Sequence[Input],
    out: Path,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Merge safetensors files (path, weight, scale) into `out`, atomically, tensor by tensor.

    Updates may be of any codec, each of another one: an input is what it decodes to. The result is
    float32 with the master's names and deterministic bytes. Memory beyond the mapped files: the
    largest tensor once, and once for each input that is not dense. `progress(done, tensors)` is
    called after each tensor. The caller has checked the headers before (`paris_protocol.gate`).
    """
    weights, scales = [weight for _, weight, _ in inputs], [scale for _, _, scale in inputs]
    schema, base = mapped(master)
    if any(dtype != "F32" for dtype, _ in schema.values()):
        raise ValueError("the master is not float32")
    shapes = {name: array.shape for name, array in base.items()}
    updates = [open_update(path, None, shapes) for path, _, _ in inputs]
    room = np.empty(max((array.size for array in base.values()), default=0), np.float32)

    def tensors() -> Iterator[memoryview]:
        for done, name in enumerate(file_order(schema), 1):
            array = base[name]
            merged = room[: array.size].reshape(array.shape)
            merge_tensor(array, [update[name] for update in updates], weights, scales, merged)
            yield merged.reshape(-1).view(np.uint8).data
            if progress:
                progress(done, len(schema))

    write_stream(out, schema, tensors(), metadata)


def revert_files(
    head: Path,
    removed: Sequence[Input],
    out: Path,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Takes merged inputs out of a head: head − Σ weight · scale · update, in listed order.

    Changing a sign rounds nothing, so this is a merge with the weights negated, to the bit.
    """
    negated = [(path, -weight, scale) for path, weight, scale in removed]
    merge_files(head, negated, out, metadata, progress)
