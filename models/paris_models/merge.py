"""Merges: published scalars times updates, added to a float32 master, the same bits everywhere.

The reductions that need an order (norms, weights) are done once by the coordinator and published;
what is left is element-wise float32 in NumPy, a multiply and then an add, never fused::

    c_i = float32(weight_i · scale_i)           product in float64
    g   = c_1 · D_1;  g = g + c_i · D_i         in the listed order
    new = master + g

Updates that do not fit the master, or hold values that are not finite, raise `ValueError`::

    head = merge(master, [a, b], weights=[0.5, 0.5], scales=[1.0, 0.8])
    merge_files(parent, [(update, 0.5, 1.0), (other, 0.5, 0.8)], out)    # one tensor at a time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from paris_models.checkpoint import Schema, file_order, write_stream

Array = NDArray[np.float32]


def merge_tensor(
    master: Array, updates: Sequence[Array], weights: Sequence[float], scales: Sequence[float]
) -> Array:
    """One tensor of a merge; all arrays float32 of one shape."""
    total: Array | None = None
    for update, weight, scale in zip(updates, weights, scales, strict=True):
        if update.shape != master.shape:
            raise ValueError("an update does not have the master's shape")
        if not np.isfinite(update).all():
            raise ValueError("an update holds values that are not finite")
        term = np.multiply(np.float32(weight * scale), update.astype(np.float32, copy=False))
        total = term if total is None else np.add(total, term, out=total)
    base = master.astype(np.float32, copy=False)
    return base.copy() if total is None else np.add(base, total, out=total)


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


def merge_files(
    master: Path,
    inputs: Sequence[tuple[Path, float, float]],
    out: Path,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Merge safetensors files (path, weight, scale) into `out`, atomically, tensor by tensor.

    The result is float32 with the master's names and deterministic bytes. Memory: a few times the
    largest tensor. `progress(done, tensors)` is called after each tensor.
    """
    weights = [weight for _, weight, _ in inputs]
    scales = [scale for _, _, scale in inputs]
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in (master, *(path for path, _, _ in inputs))
        ]
        names = set(files[0].keys())
        if any(set(file.keys()) != names for file in files[1:]):
            raise ValueError("an update does not have the master's tensors")
        schema: Schema = {
            name: ("F32", tuple(files[0].get_slice(name).get_shape())) for name in names
        }

        def tensors() -> Iterator[memoryview]:
            for done, name in enumerate(file_order(schema), 1):
                base, *updates = [_read(file, name) for file in files]
                merged = merge_tensor(base, updates, weights, scales)
                yield np.ascontiguousarray(merged).reshape(-1).view(np.uint8).data
                if progress:
                    progress(done, len(schema))

        write_stream(out, schema, tensors(), metadata)


def _read(file: Any, name: str) -> Array:
    array: Array = file.get_tensor(name).float().numpy()  # from bfloat16 exactly
    return array
