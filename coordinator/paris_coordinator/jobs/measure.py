"""The measurements behind layer L2 that need a model: how far a unit can move, and where down is.

`reach` compares an update with the sum of the optimiser's largest possible steps, so that it needs
no history. `downhill` is the first step that the network's own optimiser takes at the parent on the
secret clips: an honest update points along it far more than noise does, whatever the noise's norm
(at demo size .02 to .08 against .002; the raw gradient separates four times less)::

    whole, blocks = reach(norm, norms_of_blocks, farthest(state, unit))     # 0.1 to 0.5
    down = downhill(parent, config, recipe, clips, key)
    descent = cosine(update, down)            # honest > 0, noise ≈ ±1/√parameters, sign flip < 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from paris_models import flow
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.noise import permutation
from paris_models.shards import ClipTable
from paris_models.train import (
    TrainState,
    batch_loss,
    make_batch,
    new_state,
    rate_multiplier,
    weights,
)
from paris_models.updates import block_of

ORTHOGONAL_HIGH = 1.21
"""Largest singular value that five Newton–Schulz steps leave (maximum of the polynomial)."""
CLIPS = 96
"""Clips that show where down is: their gradient costs three forward passes each."""


def downhill(
    parent: Mapping[str, torch.Tensor],
    config: ExpertConfig,
    recipe: RecipeConfig,
    clips: ClipTable,
    key: bytes,
) -> dict[str, torch.Tensor]:
    """The step that the network's own optimiser takes at `parent` on `CLIPS` clips, by name.

    Noise and clips are drawn from `key`, every clip counts once. The times are the recipe's law in
    equal strata, which halves what the direction differs by from one draw to the next.
    """
    state = new_state(config, recipe, parent)
    count = min(CLIPS, len(clips))
    batch = make_batch(clips, UnitConfig(key=key, steps=1, batch=count), recipe, 0)
    strata = torch.from_numpy(permutation(key, count, 1).copy()).double()
    normals = torch.special.ndtri((strata + 0.5) / count).float()
    shift = flow.shift_for(recipe.t_shift, *clips.shape[1:])
    times = flow.times_from_normals(normals, recipe.t_mean, recipe.t_std, shift)
    loss = batch_loss(state, replace(batch, t=times))
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimiser.step(1.0)
    return {name: after - parent[name] for name, after in weights(state).items()}


def farthest(state: TrainState, unit: UnitConfig) -> dict[str, float]:
    """The farthest that the unit's steps could move each tensor of the fresh `state`.

    Muon moves a matrix (r × c) by at most rate · 1.21 · √min(r, c) · √max(1, r/c) per step. AdamW
    moves each element by at most rate · max(1, (1 − β1)/√(1 − β2)), and decays it by rate · decay.
    """
    recipe = state.recipe
    total = sum(rate_multiplier(unit, step) for step in range(unit.steps))
    adam = max(1.0, (1 - recipe.beta1) / math.sqrt(1 - recipe.beta2))
    ways = {}
    for name, parameter in state.optimiser.parameters.items():
        if name in state.optimiser.rest:
            step = recipe.lr * adam * math.sqrt(parameter.numel())
            step += recipe.lr * recipe.weight_decay * float(parameter.detach().norm())
        else:
            rows, columns = parameter.shape
            step = recipe.matrix_lr * ORTHOGONAL_HIGH * math.sqrt(min(rows, columns))
            step *= math.sqrt(max(1.0, rows / columns))
        ways[name] = total * step
    return ways


def reach(
    norm: float, blocks: Mapping[str, float], ways: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """An update's norm over the `farthest` ways, in all and for each block."""
    squares: dict[str, float] = {}
    for name, way in ways.items():
        squares[block_of(name)] = squares.get(block_of(name), 0.0) + way**2
    parts = {block: size / math.sqrt(squares[block]) for block, size in blocks.items()}
    return norm / math.sqrt(sum(squares.values())), parts
