"""The running average of a lineage's heads: what a recipe with `ema` > 0 is to release.

After a merge that keeps the share c (its `decay`, a float64 that the merge publishes), element by
element in float32, every product and the sum rounded by itself::

    e ← float32(c) · e + float32(1 − c) · head              e begins as the initial checkpoint

Nothing is summed over elements, so anybody gets the same bits from the signed merges. A revert
begins the average anew at its head: what was taken out must not live on in the average. Shares
outside [0, 1) and files that do not fit or are not finite are refused with `ValueError`::

    average_files(average, head, float.fromhex(merge.decay), out)       # one tensor at a time
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from paris_models.checkpoint import Schema, file_order, write_stream

Array = NDArray[np.float32]


def average_tensor(average: Array, head: Array, share: float) -> Array:
    """float32(share) · average + float32(1 − share) · head, of one shape, float32."""
    if not 0 <= share < 1:
        raise ValueError("the share that an average keeps lies in [0, 1)")
    if average.shape != head.shape:
        raise ValueError("average and head do not have the same shapes")
    out: Array = average * np.float32(share)
    out += head * np.float32(1.0 - share)
    if not np.isfinite(out).all():
        raise ValueError("the average holds values that are not finite")
    return out


def average_files(
    average: Path,
    head: Path,
    share: float,
    out: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The average after a head, from and to float32 safetensors files; atomic."""
    with safe_open(average, framework="np") as before, safe_open(head, framework="np") as after:
        schema = _schema(before)
        if _schema(after) != schema:
            raise ValueError("average and head do not have the same tensors")

        def tensors() -> Iterator[Any]:
            for name in file_order(schema):
                both = before.get_tensor(name), after.get_tensor(name)
                yield average_tensor(*both, share).reshape(-1).view(np.uint8).data

        write_stream(out, schema, tensors(), metadata)


def _schema(file: Any) -> Schema:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    found: Schema = {n: (each.get_dtype(), tuple(each.get_shape())) for n, each in slices.items()}
    if any(dtype != "F32" for dtype, _ in found.values()):
        raise ValueError("averages are made of float32")
    return found
