"""Held-out losses: one number per clip with noise and times that are fixed by a key.

The same clips, noise and times for every model, so differences are per clip and their mean has a
small standard error. Times are stratified logit-normal with mean 0. Weights that
do not fit raise `ValueError`; a loss that is not finite is returned as it is::

    before = held_out_losses(parent, config, recipe, clips, key)       # (n,)
    after = held_out_losses(candidate, config, recipe, clips, key)
    result = paired(before, after)              # delta > 0: worse; result.delta / result.se
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paris_models import flow, noise
from paris_models.config import ExpertConfig, RecipeConfig
from paris_models.expert import expert_from, predict
from paris_models.shards import ClipTable


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean difference after − before over `n` clips, its standard error, and both means."""

    delta: float
    se: float
    n: int
    before: float
    after: float


def held_out_times(key: bytes, n: int) -> Tensor:
    """The fixed times of n clips, (n,): shuffled strata with one offset of the key's."""
    order = torch.from_numpy(noise.permutation(key, n, 0).copy())
    offset = float(noise.uniforms(key, noise.HELD, 1, 0, 1)[0])
    return flow.stratified_times(order, offset)


@torch.no_grad()
def held_out_losses(
    model_weights: Mapping[str, Tensor],
    config: ExpertConfig,
    recipe: RecipeConfig,
    clips: ClipTable,
    key: bytes,
    *,
    batch: int = 256,
    among: range | None = None,
) -> Tensor:
    """Each clip's mean squared error under the recipe's objective, (n,) float32 on the CPU.

    `model_weights` are the expert's by diffusers' names, in any float dtype; `key` has 16 bytes.
    Noise of clip i: stream HELD, step 0, slot i. No text is dropped and no time is shifted. With
    `among` only the losses of these clips, (len(among),), each with the same noise and time.
    """
    model = expert_from(config, {name: w.float() for name, w in model_weights.items()}).eval()
    device = next(model.parameters()).device
    times = held_out_times(key, len(clips))
    wanted = torch.tensor(among if among is not None else range(len(clips)), dtype=torch.int64)
    losses = []
    for rows in wanted.split(batch):
        x0 = clips.latents[rows].to(device)
        drawn = noise.normals_batch(key, noise.HELD, 0, rows.tolist(), x0[0].numel())
        x1 = torch.from_numpy(drawn).reshape(x0.shape).to(device)
        t = times[rows].to(device)
        seq, pooled = clips.text(rows)
        x = flow.interpolate(x0, x1, t, recipe.sigma_min)
        output = predict(
            model, config, x, t, seq.to(device), pooled.to(device), time_path=recipe.time_path
        )
        truth = flow.target(recipe.objective, x0, x1, recipe.sigma_min)
        losses.append((output - truth).square().flatten(1).mean(1).cpu())
    return torch.cat(losses)


def paired(before: Tensor, after: Tensor) -> Paired:
    """Compare two models clip by clip; both (n,), n ≥ 2, from the same key and clips."""
    n = len(before)
    if after.shape != before.shape or n < 2:
        raise ValueError("paired losses need the same two or more clips")
    difference = after.double() - before.double()
    se = float(difference.std()) / math.sqrt(n)
    means = (float(before.double().mean()), float(after.double().mean()))
    return Paired(float(difference.mean()), se, n, *means)
