"""Near-duplicates: clips that show the same as another, re-encoded, resized, re-timed or cropped.

A fingerprint is a small picture of the first, the middle and the last frame: 24×24 of luma and
12×12 of each colour difference, a byte each, packed in words. Two clips are alike when their
pictures, averaged down to 8×8 and 4×4, differ by at most `LIMIT` levels of 255 (root mean square)
for any of 46 ways to cut up to a tenth from the sides of either. The limit is measured:
docs/prepare.md. Frames that are no pictures are refused with `ValueError`::

    held = np.stack([fingerprint(frames) for frames in secret])      # (m, WORDS) uint64
    alike(np.stack([fingerprint(frames) for frames in others]), held)     # (n,) bool
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Picture = npt.NDArray[np.float32]
Frames = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

LUMA: Final = 24
CHROMA: Final = 12
SHRINK: Final = 3
"""Pictures are compared a third as wide as they are kept, so that they can be cut in between."""
WORDS: Final = 3 * (LUMA**2 + 2 * CHROMA**2) // 8
"""Words of a fingerprint."""
LIMIT: Final = 3.0
FAR: Final = 24.0
"""Clips that differ by more than this as they stand are not alike however they are cut."""
CUTS: Final = (0.02, 0.04, 0.06, 0.08, 0.10)
NEAR, MIDDLE = 8.0, 0.06
"""Nor are those that still differ by more than `NEAR` when the `MIDDLE` one of the cuts is made."""
BLOCK: Final = 512
"""Clips of either side that are compared at once."""
TO_YUV: Final = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)


def fingerprint(frames: Frames) -> Words:
    """The fingerprint of uint8 RGB frames (F, H, W, 3), (WORDS,) uint64."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError("a fingerprint is of uint8 frames (F, H, W, 3)")
    kept = frames[[0, len(frames) // 2, len(frames) - 1]].astype(np.float64) @ TO_YUV.T
    pictures = []
    for size, planes in ((LUMA, kept[..., :1]), (CHROMA, kept[..., 1:] + 128)):
        rows, columns = (_means(side, size, 0.0, 1.0) for side in frames.shape[1:3])
        small = rows @ planes.transpose(0, 3, 1, 2) @ columns.T
        pictures.append(small.round().clip(0, 255).astype(np.uint8).ravel())
    return np.concatenate(pictures).view(np.uint64)


def alike(prints: Words, held: Words, limit: float = LIMIT) -> npt.NDArray[np.bool_]:
    """Which of the fingerprints (n, WORDS) are alike to any of the held ones (m, WORDS)."""
    found = np.zeros(len(prints), dtype=bool)
    for start in range(0, len(held), BLOCK):
        theirs = _Cut(held[start : start + BLOCK])
        for place in range(0, len(prints), BLOCK):
            part = slice(place, place + BLOCK)
            found[part] |= _alike(prints[part], theirs, limit)
    return found


class _Cut:
    """Fingerprints as pictures, whole and cut: values whose differences have equal weight."""

    def __init__(self, prints: Words) -> None:
        pixels = prints.view(np.uint8).reshape(len(prints), 8 * WORDS).astype(np.float32) - 128
        luma, chroma = np.split(pixels, [3 * LUMA**2], axis=1)
        self._luma = luma.reshape(-1, 3, LUMA, LUMA)
        self._chroma = chroma.reshape(-1, 6, CHROMA, CHROMA)
        self._made: dict[Box, Picture] = {}

    def __call__(self, box: Box) -> Picture:
        """The part of the pictures inside the box, (n, 288)."""
        if box not in self._made:
            parts = []
            for picture in (self._luma, self._chroma):
                size = picture.shape[-1]
                rows, columns = (_means(size, size // SHRINK, *side) for side in box)
                small = rows @ picture @ columns.T
                parts.append(small.reshape(len(picture), -1))
            self._made[box] = np.concatenate([parts[0], 2 * parts[1]], axis=1).astype(np.float32)
        return self._made[box]


class Box(NamedTuple):
    """What remains of a picture: from and to, as parts of its height and of its width."""

    height: tuple[float, float]
    width: tuple[float, float]


WHOLE: Final = Box((0.0, 1.0), (0.0, 1.0))


BOXES: Final = tuple(
    Box(height, width)
    for sides in (((0.0, 1 - cut), (cut / 2, 1 - cut / 2), (cut, 1.0)) for cut in CUTS)
    for height in sides
    for width in sides
)
"""As much off the height as off the width: at the one end, at the other, or half at each."""


@lru_cache(maxsize=256)
def _means(size: int, parts: int, begin: float, end: float) -> Array:
    """(parts, size): averages over equal parts of the range; values are weighted by overlap."""
    edges = np.linspace(begin * size, end * size, parts + 1)
    cells = np.arange(size)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    weights: Array = overlap.clip(min=0)
    weights /= weights.sum(1, keepdims=True)
    return weights


def _alike(prints: Words, held: _Cut, limit: float) -> npt.NDArray[np.bool_]:
    """The same for a block of each: as they stand, by some cuts, and what is left by all."""
    ours = _Cut(prints)
    pairs = np.argwhere(_squares(ours(WHOLE), held(WHOLE)) <= FAR**2)
    for boxes, most in ((BOXES[CUTS.index(MIDDLE) * 9 :][:9], NEAR), (BOXES, limit)):
        if not len(pairs):
            break
        least = np.full(len(pairs), np.inf)
        some, rows = np.unique(pairs[:, 0], return_inverse=True)
        ours = _Cut(prints[some])
        for box in (WHOLE, *boxes):
            for mine, theirs in {(box, WHOLE), (WHOLE, box)}:
                gap = ours(mine)[rows] - held(theirs)[pairs[:, 1]]
                least = np.minimum(least, np.einsum("ij,ij->i", gap, gap) / gap.shape[1])
        pairs = pairs[least <= most**2]
    return np.isin(np.arange(len(prints)), pairs[:, 0])


def _squares(a: Picture, b: Picture) -> Picture:
    """Mean square differences (n, m), nearly."""
    square = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    squares: Picture = square / np.float32(a.shape[1])
    return squares
