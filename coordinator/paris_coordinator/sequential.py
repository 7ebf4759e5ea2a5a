"""The paired test of L3 taken in looks: stop as soon as the answer is clear. Pure.

Most updates are plainly fine or plainly harmful after a quarter of the secret clips. After each
look but the last the test stops when the update is worse than the margin beyond doubt, or when even
the upper end of its interval stays below the margin; the last look decides as the fixed test does.

The error is spent in advance (a group-sequential test with Bonferroni's bound): the fixed test
refuses an update that is exactly as bad as the margin with probability α = 1 − Φ(standard errors).
Each early look may spend a twentieth of α and the last one spends what is left, so that all looks
together refuse an honest update no more often than the fixed test would. Stopping early in favour
of an update adds no refusal. Quantiles of early looks are Student's, their errors being estimated
from few clips::

    steps = plan((64, 128), clips=256, errors=3.0)     # 3 looks: 64, 128 and 256 clips
    found = conclude(delta, se, steps[0], margin=0.01, errors=3.0)   # −1, 0, 1, or None: look again
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

EARLY_SHARE: Final = 0.05
"""Part of the error that each early look may spend."""

BETTER: Final = -1
NO_EVIDENCE: Final = 0
WORSE: Final = 1


@dataclass(frozen=True, slots=True)
class Look:
    """After `clips` clips: worse if delta − `errors` · SE exceeds the margin."""

    clips: int
    errors: float
    last: bool


def plan(looks: Sequence[int], clips: int, errors: float) -> tuple[Look, ...]:
    """The looks of a test on `clips` clips; without early ones it is the fixed test."""
    early = sorted({n for n in looks if 2 <= n < clips})
    normal = NormalDist()
    alpha = normal.cdf(-errors)
    spent = EARLY_SHARE * alpha
    steps = [Look(n, _student(-normal.inv_cdf(spent), n - 1), last=False) for n in early]
    left = alpha - spent * len(early)
    final = -normal.inv_cdf(left) if early else errors
    return (*steps, Look(clips, final, last=True))


def _student(z: float, freedom: int) -> float:
    """Student's quantile for the normal one `z` (expansion of Cornish and Fisher)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def conclude(delta: float, se: float, look: Look, *, margin: float, errors: float) -> int | None:
    """The bucket (−1 better, 0 no evidence, 1 worse than the margin), or None: look further.

    Losses that are no numbers are worse. `errors` are the policy's standard errors.
    """
    if not (math.isfinite(delta) and math.isfinite(se)) or delta - look.errors * se > margin:
        return WORSE
    if delta + look.errors * se < 0:
        return BETTER
    if look.last or delta + errors * se < margin:
        return NO_EVIDENCE
    return None
