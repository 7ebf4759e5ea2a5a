"""The counter-based random streams of a unit, as NumPy arrays (format: protocol/SPEC.md).

Every random number of training is Philox4x64-10 at the counter [block, slot, step, stream] under
the unit's key: a function of where it is used, never of what was drawn before. NumPy ships the
same generator in C. A key that is not 16 bytes is refused with `ValueError`::

    noise = normals(key, NOISE, step=7, slot=3, n=1536)            # (1536,) float32
    batch = normals_batch(key, NOISE, 7, range(96), 1536)          # (96, 1536), row 3 is `noise`
    order = permutation(key, n=len(clips), epoch=0)                # (n,) int64
    bucket, visit = bucket_of(key, step=7, weights=(1000, 40))     # 0, 7: its eighth step
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

NOISE: Final = 1
TIME: Final = 2
DROP: Final = 3
ORDER: Final = 4
SAMPLE: Final = 5
HELD: Final = 6
ROUNDING: Final = 7
FACTORS: Final = 8
BUCKET: Final = 9
CONDITION: Final = 10


def words_batch(
    key: bytes, stream: int, step: int, slots: Iterable[int], n: int
) -> NDArray[np.uint64]:
    """The first `n` words of each slot's stream, (slots, n).

    NumPy adds one to the counter before its first block, so block b of the specification has
    NumPy's counter word b + 1 and the generator starts from zero there.
    """
    if len(key) != 16:
        raise ValueError("a stream key has 16 bytes")
    generator = np.random.Philox()
    state = generator.state
    counter = np.array([0, 0, step, stream], np.uint64)
    state["state"] = {"counter": counter, "key": np.frombuffer(key, "<u8").astype(np.uint64)}
    state["buffer_pos"] = 4  # empty: the next word begins a block
    rows = []
    for slot in slots:
        counter[1] = slot
        generator.state = state  # setting the state is several times cheaper than a new generator
        rows.append(generator.random_raw(n))
    return np.stack(rows) if rows else np.empty((0, n), np.uint64)


def uniforms_batch(
    key: bytes, stream: int, step: int, slots: Iterable[int], n: int
) -> NDArray[np.float64]:
    """`n` uniform numbers in [0, 1) per slot, (slots, n): the upper 53 bits of each word."""
    words = words_batch(key, stream, step, slots, n)
    out: NDArray[np.float64] = (words >> np.uint64(11)) * np.float64(2.0**-53)
    return out


def normals_batch(
    key: bytes, stream: int, step: int, slots: Iterable[int], n: int
) -> NDArray[np.float32]:
    """`n` standard normals per slot, (slots, n): Box–Muller in float64, two from each word."""
    words = words_batch(key, stream, step, slots, (n + 1) // 2)
    first = torch.from_numpy(((words >> np.uint64(32)) + np.uint64(1)) * 2.0**-32)
    angle = torch.from_numpy((words & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi * 2.0**-32))
    # torch's float64 functions are several times faster than NumPy's, and within 1 ulp of them.
    radius = first.log_().mul_(-2.0).sqrt_()
    pairs = torch.empty(*words.shape, 2)
    pairs[..., 0] = angle.cos().mul_(radius)
    pairs[..., 1] = angle.sin_().mul_(radius)
    out: NDArray[np.float32] = pairs.flatten(1).numpy()[:, :n]
    return out


def uniforms(key: bytes, stream: int, step: int, slot: int, n: int) -> NDArray[np.float64]:
    """`n` uniform numbers in [0, 1) of one slot, (n,)."""
    out: NDArray[np.float64] = uniforms_batch(key, stream, step, (slot,), n)[0]
    return out


def normals(key: bytes, stream: int, step: int, slot: int, n: int) -> NDArray[np.float32]:
    """`n` standard normals of one slot, (n,)."""
    out: NDArray[np.float32] = normals_batch(key, stream, step, (slot,), n)[0]
    return out


def picks(words: NDArray[np.uint64], weights: Sequence[int]) -> NDArray[np.int64]:
    """Which of the weighted things each word names, like `words`: ⌊word · Σ weights / 2⁶⁴⌋ lies in
    its span. Integers throughout, so that no rounding decides. Refuses impossible weights."""
    total = sum(weights)
    if not weights or min(weights) < 1 or total >> 63:
        raise ValueError("weights are whole numbers from 1 up, below 2⁶³ together")
    below = [sum(weights[:i]) for i in range(1, len(weights))]
    edges = np.array([-(-(part << 64) // total) for part in below], np.uint64)
    out: NDArray[np.int64] = np.searchsorted(edges, words, side="right").astype(np.int64)
    return out


def bucket_of(key: bytes, step: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which of the weighted buckets a step trains on, and how many steps before it did so too."""
    chosen = picks(words_batch(key, BUCKET, 0, (0,), step + 1)[0], weights)
    return int(chosen[step]), int(np.count_nonzero(chosen[:step] == chosen[step]))


@lru_cache(maxsize=16)
def permutation(key: bytes, n: int, epoch: int, bucket: int = 0) -> NDArray[np.int64]:
    """The order of `n` clips in a pass over them, (n,): stable sort by the pass's words."""
    words = words_batch(key, ORDER, epoch, (bucket,), n)[0]
    order: NDArray[np.int64] = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)  # the cache hands out this very array
    return order


def batch_rows(key: bytes, n: int, step: int, batch: int, bucket: int = 0) -> NDArray[np.int64]:
    """The clips of a step, (batch,): slot s takes place step × batch + s of the endless order.

    In a set of buckets `step` counts the bucket's own steps.
    """
    if n < 1:
        raise ValueError("there are no clips to train on")
    places = step * batch + np.arange(batch)
    chosen = [permutation(key, n, int(j) // n, bucket)[int(j) % n] for j in places]
    return np.array(chosen, np.int64)
