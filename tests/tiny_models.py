"""The smallest models and clips that still have every part, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch

from paris_models.config import DEMO_RECIPE, ExpertConfig, RecipeConfig, UnitConfig
from paris_models.shards import ClipTable

EXPERT = ExpertConfig(1, 8, 8, 1, 1, 2, 8, (2, 2, 4), 12, 10)
RECIPE = replace(DEMO_RECIPE, lr=3e-3)
PAPER = RecipeConfig(lr=1e-3, t_shift=1.0)
KEY = bytes(range(16))
UNIT = UnitConfig(KEY, steps=6, batch=4, warmup=2)


def clips(n: int = 10, seed: int = 0, channels: int = 8, features: int = 0) -> ClipTable:
    """`n` clips of (channels, 2, 2, 2) with five captions."""
    g = torch.Generator().manual_seed(seed)
    return ClipTable(
        latents=torch.randn(n, channels, 2, 2, 2, generator=g),
        caption=torch.randint(0, 5, (n,), generator=g),
        text_seq=torch.randn(5, 3, 12, generator=g),
        text_pooled=torch.randn(5, 10, generator=g),
        null_seq=torch.zeros(3, 12),
        null_pooled=torch.zeros(10),
        features=torch.randn(n, features, generator=g) if features else None,
    )
