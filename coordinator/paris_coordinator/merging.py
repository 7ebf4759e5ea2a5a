"""With which weights accepted contributions are merged into the next head. Pure.

Step-weighted mean of the updates, each one clipped to a norm budget (trust reference §3.2, steps 2,
4 and 5, with an outer step of 1): the head becomes ``parent + Σ weight_i · (scale_i · update_i)``.
The scalars are published in the merge as hex floats, so that anyone can repeat the sum. Nodes in
probation have at most a given part of a merge, together. It refuses an empty merge, updates without
steps or with an impossible norm, and a cap outside [0, 1] (ValueError)::

    shares = merge_shares([Part("a", steps=120, norm=1.0), Part("b", steps=120, norm=9.0)])
    shares[1].weight.hex(), shares[1].scale.hex()
    merge_shares([Part("a", 120, 1.0), Part("new", 120, 1.0, trusted=False)], probation=0.25)
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
    """An accepted contribution: its id, its steps, and the norm of its update.

    `trusted`: its node is of standing, or no node of the network is yet (bootstrap).
    """

    contribution: str
    steps: int
    norm: float
    trusted: bool = True


class Share(NamedTuple):
    """Its part in the merge: weight (they add up to at most 1) and clip scale (at most 1)."""

    contribution: str
    weight: float
    scale: float


def merge_shares(parts: Sequence[Part], probation: float = 1.0) -> list[Share]:
    """Weights and scales in the order given. A single trusted contribution is taken as it is.

    Scale: ``min(1, τ √H_i / ‖D_i‖)`` with ``τ = 1.5 · median_j(‖D_j‖ / √H_j)``. Weight: ∝ H_i, at
    most 1/3 (or 1/N for N < 3), the rest shared out among the others. Those that are not trusted
    have at most `probation` of the merge together: what they lose goes to the trusted ones, by the
    same rule among themselves, and without any stays with the parent.
    """
    if not parts:
        raise ValueError("a merge has at least one contribution")
    if any(part.steps <= 0 or not 0 <= part.norm < math.inf for part in parts):
        raise ValueError("steps are positive and norms finite")
    if not 0 <= probation <= 1:
        raise ValueError("the part of those in probation lies between 0 and 1")
    budget = NORM_BUDGET * median(part.norm / math.sqrt(part.steps) for part in parts)
    shares = []
    for part, weight in zip(parts, _weights(parts, probation), strict=True):
        allowed = budget * math.sqrt(part.steps)
        scale = 1.0 if len(parts) == 1 or part.norm <= allowed else allowed / part.norm
        shares.append(Share(part.contribution, weight, scale))
    return shares


def _weights(parts: Sequence[Part], probation: float) -> list[float]:
    weights = _fair([float(part.steps) for part in parts])
    new = [i for i, part in enumerate(parts) if not part.trusted]
    if math.fsum(weights[i] for i in new) <= probation:
        return weights
    known = [i for i, part in enumerate(parts) if part.trusted]
    for group, total in ((new, probation), (known, 1 - probation)):
        fair = _fair([float(parts[i].steps) for i in group])
        for place, share in zip(group, fair, strict=True):
            weights[place] = total * share
    return weights


def _fair(steps: Sequence[float]) -> list[float]:
    """Shares of 1 by steps, none above the cap for so many."""
    return capped(steps, max(MOST_WEIGHT, 1 / len(steps))) if steps else []


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
