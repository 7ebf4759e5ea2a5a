"""With which weights accepted contributions are merged into the next head. Pure.

Step-weighted mean of the updates, each one clipped to a norm budget (trust reference §3.2, steps 2,
4 and 5, with an outer step of 1): the head becomes ``parent + Σ weight_i · (scale_i · update_i)``.
The scalars are published in the merge as hex floats, so that anyone can repeat the sum. It refuses
an empty merge and updates without steps or with an impossible norm (ValueError)::

    shares = merge_shares([Part("a", steps=120, norm=1.0), Part("b", steps=120, norm=9.0)])
    shares[1].weight.hex(), shares[1].scale.hex()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

NORM_BUDGET = 1.5
"""An update may be this often the median norm per square root of a step."""
MOST_WEIGHT = 1 / 3
"""No contribution has more weight than this, unless there are fewer than three."""


class Part(NamedTuple):
    """An accepted contribution: its id, its steps, and the norm of its update."""

    contribution: str
    steps: int
    norm: float


class Share(NamedTuple):
    """Its part in the merge: weight (they add up to 1) and clip scale (at most 1)."""

    contribution: str
    weight: float
    scale: float


def merge_shares(parts: Sequence[Part]) -> list[Share]:
    """Weights and scales in the order given. A single contribution is taken as it is.

    Scale: ``min(1, τ √H_i / ‖D_i‖)`` with ``τ = 1.5 · median_j(‖D_j‖ / √H_j)``. Weight: ∝ H_i, at
    most 1/3 (or 1/N for N < 3), the rest shared out among the others.
    """
    if not parts:
        raise ValueError("a merge has at least one contribution")
    if any(part.steps <= 0 or not 0 <= part.norm < math.inf for part in parts):
        raise ValueError("steps are positive and norms finite")
    if len(parts) == 1:
        return [Share(parts[0].contribution, 1.0, 1.0)]
    budget = NORM_BUDGET * median(part.norm / math.sqrt(part.steps) for part in parts)
    weights = capped([float(part.steps) for part in parts], max(MOST_WEIGHT, 1 / len(parts)))
    shares = []
    for part, weight in zip(parts, weights, strict=True):
        allowed = budget * math.sqrt(part.steps)
        scale = 1.0 if part.norm <= allowed else allowed / part.norm
        shares.append(Share(part.contribution, weight, scale))
    return shares


def capped(amounts: Sequence[float], most: float) -> list[float]:
    """Shares of 1 in proportion to `amounts`, none above `most`; what is cut goes to the others.

    `most` is at least 1/N, so a solution exists.
    """
    total = sum(amounts)
    shares = [amount / total for amount in amounts]
    full: set[int] = set()
    while over := {i for i, share in enumerate(shares) if share > most and i not in full}:
        full |= over
        rest = 1 - most * len(full)
        others = sum(amounts[i] for i in range(len(amounts)) if i not in full)
        shares = [most if i in full else rest * amounts[i] / others for i in range(len(amounts))]
    return shares
