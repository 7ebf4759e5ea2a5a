"""How the rotary pairs of a file stand, read from its weights: side by side, or half a head apart.

Both orders load and run, and the wrong one draws noise. Names and shapes do not tell them apart,
but training should: the two rows of a pair are the components of one vector that attention turns,
so their sizes (scales of the QK norm, row norms of q and k) follow the pair's frequency, and those
of fast pairs are alike. The statistic is, for each head's worth of sizes, the log of (mean
difference of rows half a head apart ÷ mean difference of rows side by side). Both means run over
all rows, so that noise alone favours neither order; positive means interleaved.

Weights that training has not touched say nothing, and get no verdict::

    measure(source).order               # "interleaved", "half-split" or None
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from paris_models.convert.layout import RopeOrder, Source
from paris_models.convert.table import DOUBLE_SCALES, SINGLE_SCALES

CLEAR: Final = 6.0
"""Standard errors from zero at which a reading is a verdict."""
EFFECT: Final = 0.1
"""And the least mean log ratio, so that thousands of heads cannot make much of a trifle."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Mean log ratio over `heads` vectors of sizes; `score` standard errors away from zero."""

    mean: float
    score: float
    heads: int

    @property
    def order(self) -> RopeOrder | None:
        """The order that the weights show, if they show one."""
        if abs(self.score) < CLEAR or abs(self.mean) < EFFECT:
            return None
        return "interleaved" if self.mean > 0 else "half-split"


def measure(source: Source) -> Reading:
    """Read all QK-norm scales, and the row norms of q and k in six blocks."""
    sizes = torch.cat([*_scales(source), *_row_norms(source)])
    return reading(log_ratios(sizes))


def reading(ratios: Tensor) -> Reading:
    """The mean of the statistic over all heads, against its own spread."""
    count = len(ratios)
    if count < 2:
        return Reading(0.0, 0.0, count)
    mean, spread = float(ratios.mean()), float(ratios.std())
    return Reading(mean, mean / max(spread / math.sqrt(count), 1e-12), count)


def log_ratios(sizes: Tensor) -> Tensor:
    """The statistic for each row of `sizes` (n, head_dim), positive; constant rows are left out."""
    logs = sizes.double().abs().clamp_min(1e-8).log()
    first, second = logs.chunk(2, dim=1)
    apart = (first - second).abs().mean(1)
    beside = (logs[:, 0::2] - logs[:, 1::2]).abs().mean(1)
    varied = (beside > 0) | (apart > 0)
    # Rows may be alike to the last bit: the floor keeps the log finite.
    return ((apart[varied] + 1e-4) / (beside[varied] + 1e-4)).log()


def _scales(source: Source) -> list[Tensor]:
    config = source.config
    names = [
        f"{kind}.{i}.{part}.weight"
        for kind, blocks, parts in (
            ("transformer_blocks", config.double_blocks, DOUBLE_SCALES),
            ("single_transformer_blocks", config.single_blocks, SINGLE_SCALES),
        )
        for i in range(blocks)
        for part in parts.values()
    ]
    return [source.stored(name).unsqueeze(0) for name in names]


def _row_norms(source: Source) -> list[Tensor]:
    """Of the image's q and k in first, middle and last block of each kind, (heads, head_dim)."""
    config = source.config
    found: list[Tensor] = []
    for kind, blocks in (
        ("transformer_blocks", config.double_blocks),
        ("single_transformer_blocks", config.single_blocks),
    ):
        for i in sorted({0, blocks // 2, blocks - 1}) if blocks else ():
            for part in ("to_q", "to_k"):
                weight = source.stored(f"{kind}.{i}.attn.{part}.weight")
                norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
                found.append(norms.reshape(config.heads, config.head_dim))
    return found
