"""Buckets: the sizes that clips are cut to, by resolution, frames and aspect.

A bucket has 4k + 1 frames (one frame is an image) and the area of a square of `side` pixels in one
of the aspects of Open-Sora 2.0. A clip goes to the bucket that keeps the most of it, without being
enlarged; only the first bucket, the network's own geometry, takes smaller pictures too::

    aspect_size(256, "16:9", 16)                  # (192, 336): height and width, multiples of 16
    choose([own, wide], height=720, width=1280, ticks=40)       # 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

LANDSCAPE: Final = {
    "2.39:1": 2.39, "2:1": 2.0, "16:9": 16 / 9, "1.85:1": 1.85, "8:5": 8 / 5, "3:2": 3 / 2,
    "4:3": 4 / 3,
}  # fmt: skip
ASPECTS: Final = {
    **LANDSCAPE,
    "1:1": 1.0,
    **{":".join(reversed(name.split(":"))): 1 / ratio for name, ratio in LANDSCAPE.items()},
}
"""Width over height by name: the list of Open-Sora 2.0, wide and upright."""


class Size(Protocol):
    """What a bucket says about itself here."""

    @property
    def frames(self) -> int:
        """Frames in a clip."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def width(self) -> int:
        """Pixels."""


def aspect_size(side: int, aspect: str, cell: int) -> tuple[int, int]:
    """Height and width nearest to `side`² pixels in this aspect, both multiples of `cell`.

    Raises `ValueError` for an unknown aspect.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"the aspect {aspect} is none of {', '.join(ASPECTS)}")
    root: float = ASPECTS[aspect] ** 0.5
    height, width = (max(1, round(length / cell)) for length in (side / root, side * root))
    return height * cell, width * cell


def fills(size: Size, height: int, width: int) -> bool:
    """Whether a picture covers the bucket without being enlarged."""
    return size.height <= height and size.width <= width


def choose(sizes: Sequence[Size], height: int, width: int, ticks: int) -> int | None:
    """The bucket of a clip of `ticks` frames (at the buckets' rate) of height × width pixels.

    Of those that it fills, the one that keeps the most: frames × pixels × share of the picture
    that the cut leaves. Without any, the first one, enlarged; None when it is too short for that.
    A video becomes an image only when nothing else takes it.
    """
    filled = [
        index
        for index, size in enumerate(sizes)
        if size.frames <= ticks and fills(size, height, width)
    ]
    best = [index for index in filled if sizes[index].frames > 1 or ticks == 1]
    if not best and sizes[0].frames <= ticks and (sizes[0].frames > 1 or not filled):
        return 0
    found = best or filled
    return max(found, key=lambda i: (_kept(sizes[i], height, width), -i)) if found else None


def _kept(size: Size, height: int, width: int) -> float:
    ratio = size.width * height / (size.height * width)
    return size.frames * size.height * size.width * min(ratio, 1 / ratio)
