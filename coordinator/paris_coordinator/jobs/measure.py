"""The measurements behind layer L2 that need a model: how far a unit can move, and where down is.

`reach` compares an update with the sum of the optimiser's largest possible steps, so that it needs
no history. `downhill` is the first step that the network's own optimiser takes at the parent on the
secret clips: an honest update points along it far more than noise does, whatever the noise's norm
(at demo size .02 to .08 against .002; the raw gradient separates four times less)::

    down = downhill(parent, config, recipe, clips, key)
    descent = cosine(update, down)            # honest > 0, noise ≈ ±1/√parameters, sign flip < 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.shards import ClipTable
from paris_models.train import (
    TrainState,
    batch_loss,
    make_batch,
    new_state,
    rate_multiplier,
    weights,
)

ORTHOGONAL_HIGH = 1.21
"""Largest singular value that five Newton–Schulz steps leave (maximum of the polynomial)."""
BATCH = 128
"""Clips whose activations are held at once."""


def downhill(
    parent: Mapping[str, torch.Tensor],
    config: ExpertConfig,
    recipe: RecipeConfig,
    clips: ClipTable,
    key: bytes,
) -> dict[str, torch.Tensor]:
    """The step that the network's own optimiser takes at `parent` on all `clips`, by name.

    Noise and times are the recipe's, drawn from `key`; every clip counts once.
    """
    state = new_state(config, recipe, parent)
    size = min(BATCH, len(clips))
    steps = len(clips) // size
    unit = UnitConfig(key=key, steps=steps, batch=size)
    for step in range(steps):
        loss = batch_loss(state, make_batch(clips, unit, recipe, step)) / steps
        loss.backward()  # type: ignore[no-untyped-call]
    state.optimiser.step(1.0)
    return {name: after - parent[name] for name, after in weights(state).items()}


def reach(norm: float, state: TrainState, unit: UnitConfig) -> float:
    """An update's norm over the farthest that the unit's steps could move the fresh `state`.

    Muon moves a matrix (r × c) by at most rate · 1.21 · √min(r, c) · √max(1, r/c) per step. AdamW
    moves each element by at most rate · max(1, (1 − β1)/√(1 − β2)), and decays it by rate · decay.
    """
    recipe = state.recipe
    total = sum(rate_multiplier(unit, step) for step in range(unit.steps))
    adam = max(1.0, (1 - recipe.beta1) / math.sqrt(1 - recipe.beta2))
    square = 0.0
    for name, parameter in state.optimiser.parameters.items():
        if name in state.optimiser.rest:
            step = recipe.lr * adam * math.sqrt(parameter.numel())
            step += recipe.lr * recipe.weight_decay * float(parameter.detach().norm())
        else:
            rows, columns = parameter.shape
            step = recipe.matrix_lr * ORTHOGONAL_HIGH * math.sqrt(min(rows, columns))
            step *= math.sqrt(max(1.0, rows / columns))
        square += (total * step) ** 2
    return norm / math.sqrt(square)
