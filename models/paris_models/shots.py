"""Whether a clip is one moving shot: joined shots and still pictures are told by their pixels.

A step is the mean absolute change of grey from one frame to the next, in grey levels of 255. At a
cut one step stands out over all others; where nothing moves, all are next to nothing. What the two
thresholds find and what they miss was measured on rendered clips (docs/prepare.md)::

    found = steps(frames)                           # (F - 1,) for frames (F, H, W, 3) uint8
    cut_score(found) > 1.5                          # joined; largest(found) < 0.5 is a still
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Steps = npt.NDArray[np.float32]
GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""
FLOOR = 1.0
"""Grey levels added to what a step is compared with: noise is no cut."""


def steps(frames: npt.NDArray[np.uint8]) -> Steps:
    """Mean |change| of grey between neighbouring frames; none for an image."""
    grey = frames.astype(np.float32) @ GREY
    found: Steps = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    return found


def cut_score(found: Steps) -> float:
    """The widest gap among the largest steps: step ÷ (next smaller step + one grey level).

    One or two cuts are looked for, in longer clips one per eight frames; 0 below three frames.
    """
    falling = np.sort(found)[::-1]
    cuts = min(max(2, len(found) // 8), len(found) - 1)
    return max((float(falling[i] / (falling[i + 1] + FLOOR)) for i in range(cuts)), default=0.0)


def largest(found: Steps) -> float:
    """The largest step; infinite for an image, which need not move."""
    return float(found.max()) if len(found) else float("inf")
