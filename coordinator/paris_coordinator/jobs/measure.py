"""The measurements behind layer L2 that need a model: how far a unit can move, and where down is.

`reach` compares an update with the sum of the optimiser's largest possible steps, so that it needs
no history. `direction` is the first step that a unit's own plan would take at the parent on the
secret clips: an honest update points along it far more than noise does, whatever the noise's norm
(at demo size .02 to .08 against .002; the raw gradient separates four times less)::

    state = lean.new_state(plan, config, recipe, parent, key=unit.key)
    whole, blocks = reach(norm, norms_of_blocks, farthest(state, unit))     # 0.1 to 0.5
    slope = downhill(parent, config, recipe, clips, key)                    # once for each head
    descent = cosine(update, direction(slope, state))    # honest > 0, noise ≈ 0, sign flip < 0

Adapters can move along the rows of their first factors alone, which the unit's key decides: their
first step is taken inside that space, −sign(G Aᵀ) A for a gradient G, and so has its own direction
for each unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from paris_models import flow, lean
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

Weights = dict[str, torch.Tensor]

ORTHOGONAL_HIGH = 1.21
"""Largest singular value that five Newton–Schulz steps leave (maximum of the polynomial)."""
CLIPS = 96
"""Clips that show where down is: their gradient costs three forward passes each."""


@dataclass(frozen=True, slots=True)
class Slope:
    """A head on secret clips: the gradient, and the first step of the network's own optimiser."""

    gradient: Weights
    step: Weights


def downhill(
    parent: Mapping[str, torch.Tensor],
    config: ExpertConfig,
    recipe: RecipeConfig,
    clips: ClipTable,
    key: bytes,
) -> Slope:
    """Where down is at `parent`, by `CLIPS` clips.

    Noise and clips are drawn from `key`, every clip counts once. The times are the recipe's law in
    equal strata, which halves what the direction differs by from one draw to the next.
    """
    state = new_state(config, recipe, parent)
    count = min(CLIPS, len(clips))
    batch = make_batch(clips, UnitConfig(key=key, steps=1, batch=count), recipe, 0, config)
    strata = torch.from_numpy(permutation(key, count, 1).copy()).double()
    normals = torch.special.ndtri((strata + 0.5) / count).float()
    shift = flow.shift_for(recipe.t_shift, *clips.shape[1:])
    times = flow.times_from_normals(normals, recipe.t_mean, recipe.t_std, shift)
    loss = batch_loss(state, replace(batch, t=times))
    loss.backward()  # type: ignore[no-untyped-call]
    named = state.optimiser.parameters.items()
    gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}
    state.optimiser.step(1.0)
    return Slope(gradient, {n: after - parent[n] for n, after in weights(state).items()})


def direction(slope: Slope, state: lean.State) -> Weights:
    """The first step of the fresh `state`'s own plan, as a change of the expert's tensors."""
    if isinstance(state, TrainState):
        return slope.step
    if not state.plan.rank:
        return {name: -gradient.sign() for name, gradient in slope.gradient.items()}
    step = {name: torch.zeros_like(gradient) for name, gradient in slope.gradient.items()}
    for module, a, _ in _factors(state):
        gradient = slope.gradient[f"{module}.weight"]
        step[f"{module}.weight"] = -(gradient @ a.mT).sign() @ a
    return step


def farthest(state: lean.State, unit: UnitConfig) -> dict[str, float]:
    """The farthest that the unit's steps could move each tensor of the fresh `state`.

    Muon moves a matrix (r × c) by at most rate · 1.21 · √min(r, c) · √max(1, r/c) per step. AdamW
    moves each element by at most rate · max(1, (1 − β1)/√(1 − β2)), and decays it by rate · decay;
    Adafactor's steps have at most that root mean square. Factors that start at (A, 0) and whose
    elements move by at most m end in a product of norm m √(out · r) · (‖A‖₂ + m √(r · in)).
    """
    total = sum(rate_multiplier(unit, step) for step in range(unit.steps))
    if isinstance(state, TrainState):
        return _farthest_of_recipe(state, total)
    recipe = state.recipe
    most = total * recipe.lr * max(1.0, (1 - recipe.beta1) / math.sqrt(1 - recipe.beta2))
    ways = {}
    if not state.plan.rank:
        for name, tensor in lean.weights(state).items():
            decay = total * recipe.lr * recipe.weight_decay * float(tensor.float().norm())
            ways[name] = most * math.sqrt(tensor.numel()) + decay
        return ways
    for module, a, b in _factors(state):
        longest = float(torch.linalg.matrix_norm(a, 2)) + most * math.sqrt(a.numel())
        ways[f"{module}.weight"] = most * math.sqrt(b.numel()) * longest
    return ways


def _farthest_of_recipe(state: TrainState, total: float) -> dict[str, float]:
    recipe = state.recipe
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


def _factors(state: lean.LeanState) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each adapter's module with its factors A (r, in) and B (out, r)."""
    named = lean.weights(state)
    modules = [name.removesuffix(".a") for name in named if name.endswith(".a")]
    return [(module, named[f"{module}.a"], named[f"{module}.b"]) for module in modules]


def reach(
    norm: float, blocks: Mapping[str, float], ways: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """An update's norm over the `farthest` ways, in all and for each block that can move."""
    squares: dict[str, float] = {}
    for name, way in ways.items():
        squares[block_of(name)] = squares.get(block_of(name), 0.0) + way**2
    parts = {block: blocks[block] / math.sqrt(square) for block, square in squares.items()}
    return norm / math.sqrt(sum(squares.values())), parts
