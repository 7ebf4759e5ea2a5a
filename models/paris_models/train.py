"""Training of an expert as a function of (assignment, step).

Data order, noise, times, dropout and conditions come from the counter-based streams of the unit's
key, so stopping at any step and resuming equals never having stopped: bitwise on the CPU in float32
with the same number of threads. Steps beyond the unit, states that do not fit the configuration and
clips that lack what the recipe's conditions need are refused with `ValueError`; a loss that is not
finite raises `ArithmeticError`, changing nothing::

    state = new_state(config, recipe, load_tensors(parent))
    while state.step < unit.steps:
        loss = train_step(state, clips, unit)
    save_state(state, path); state = load_state(path, config, recipe)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paris_models import flow, noise
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.conditions import step_condition
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import expert_from, predict
from paris_models.optim import Optimiser
from paris_models.shards import Clips


@dataclass(slots=True)
class TrainState:
    """An expert in training: its model, its optimiser, and the number of steps taken."""

    config: ExpertConfig
    recipe: RecipeConfig
    model: Any
    optimiser: Optimiser
    step: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on: data, noise, times, text after dropout, packed condition."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    text_seq: Tensor
    text_pooled: Tensor
    condition: Tensor | None = None


def new_state(
    config: ExpertConfig,
    recipe: RecipeConfig,
    weights: Mapping[str, Tensor],
    *,
    device: str = "cpu",
) -> TrainState:
    """A fresh state from given weights: float32 copies of them, optimiser at zero, step 0."""
    owned = {n: torch.empty_like(w, dtype=torch.float32, device=device) for n, w in weights.items()}
    for name, tensor in owned.items():
        tensor.copy_(weights[name])
    model = expert_from(config, owned)
    model.requires_grad_(True).train()
    return TrainState(config, recipe, model, Optimiser(model, recipe))


def rate_multiplier(unit: UnitConfig, step: int) -> float:
    """The factor on the peak rates at a step: warm-up, then start → end along the shape."""
    warm = min(1.0, (step + 1) / unit.warmup) if unit.warmup else 1.0
    if unit.rate_shape == "constant":
        return warm * unit.rate_start
    cosine = 0.5 * (1 + math.cos(math.pi * step / unit.steps))
    return warm * (unit.rate_end + (unit.rate_start - unit.rate_end) * cosine)


def make_batch(
    clips: Clips,
    unit: UnitConfig,
    recipe: RecipeConfig,
    step: int,
    config: ExpertConfig | None = None,
) -> Batch:
    """The batch of a step, a function of (unit.key, step, slot) and the clips in their order.

    The recipe's conditions are made where `config` is that of a conditioned expert.
    """
    table, rows = clips.of_step(unit.key, step, unit.batch)
    slots = range(len(rows))
    x0 = table.latents[rows]
    drawn = noise.normals_batch(unit.key, noise.NOISE, step, slots, x0[0].numel())
    times = noise.normals_batch(unit.key, noise.TIME, step, slots, 1)[:, 0]
    shift = flow.shift_for(recipe.t_shift, *table.shape[1:])
    t = flow.times_from_normals(torch.from_numpy(times.copy()), recipe.t_mean, recipe.t_std, shift)
    seq, pooled = table.text(rows)
    drop_seq, drop_pooled = text_dropout(unit.key, recipe, step, len(rows))
    known = None
    if config is not None and config.conditioned and recipe.conditions:
        known = step_condition(unit.key, recipe, step, table, rows, config.patch)
    return Batch(
        x0=x0,
        x1=torch.from_numpy(drawn).reshape(x0.shape),
        t=t,
        text_seq=torch.where(drop_seq[:, None, None], table.null_seq, seq),
        text_pooled=torch.where(drop_pooled[:, None], table.null_pooled, pooled),
        condition=known,
    )


def text_dropout(key: bytes, recipe: RecipeConfig, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Which slots train on null sequence and null pooled text, two (batch,) of bool.

    "velocity": independently, each with √null_text (Open-Sora 2.0); "x0": both together.
    """
    u = noise.uniforms_batch(key, noise.DROP, step, range(batch), 2)
    if recipe.objective == "x0":
        both = torch.from_numpy(u[:, 0] < recipe.null_text)
        return both, both
    dropped = torch.from_numpy(u < np.sqrt(recipe.null_text))
    return dropped[:, 0], dropped[:, 1]


def train_step(state: TrainState, clips: Clips, unit: UnitConfig) -> float:
    """Take one step and return its loss (mean squared error, float32).

    Sets torch's number of threads and its kernels to the unit's: the order of sums depends on them.
    """
    if state.step >= unit.steps:
        raise ValueError(f"the unit has {unit.steps} steps and all are done")
    if torch.get_num_threads() != unit.threads:
        torch.set_num_threads(unit.threads)
    deterministic(unit.kernels)
    batch = make_batch(clips, unit, state.recipe, state.step, state.config)
    loss = batch_loss(state, batch, unit.dtype)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ArithmeticError(f"the loss of step {state.step} is {value}")
    loss.backward()
    state.optimiser.step(rate_multiplier(unit, state.step))
    state.step += 1
    return value


def deterministic(kernels: str) -> None:
    """Let torch take deterministic algorithms only ("reference"), or the quickest ("fast").

    An operation that has none then raises `RuntimeError` instead of giving bits that no replay can
    repeat. Memory is not filled on allocation: nothing here reads what it has not written.
    """
    wanted = kernels == "reference"
    if torch.are_deterministic_algorithms_enabled() != wanted:
        # cuBLAS reads this when it starts; without a fixed workspace its sums are not repeatable.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def batch_loss(state: TrainState, batch: Batch, dtype: str = "float32") -> Tensor:
    """The recipe's loss of a batch as a scalar that has a gradient."""
    recipe, device = state.recipe, state.device
    x0, x1, t = (_there(part, device) for part in (batch.x0, batch.x1, batch.t))
    x = flow.interpolate(x0, x1, t, recipe.sigma_min)
    known = None if batch.condition is None else _there(batch.condition, device)
    half = dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        output = predict(
            state.model, state.config, x, t, _there(batch.text_seq, device),
            _there(batch.text_pooled, device), known, time_path=recipe.time_path,
        )  # fmt: skip
    wanted = flow.target(recipe.objective, x0, x1, recipe.sigma_min)
    return (output.float() - wanted).square().mean()


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; on a GPU through pinned memory, so that nobody waits for it.

    A pageable copy would wait until the card has finished the step before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def weights(state: TrainState) -> dict[str, Tensor]:
    """The expert's weights by diffusers' names: the state's own tensors, not copies."""
    return {name: p.detach() for name, p in state.model.named_parameters()}


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """The whole state: `weights.*`, `optimiser.*`, `step` (1,) int64. Views; copy to keep them."""
    named = {f"weights.{name}": tensor for name, tensor in weights(state).items()}
    named |= {f"optimiser.{name}": t for name, t in state.optimiser.state().items()}
    named["step"] = torch.tensor([state.step], dtype=torch.int64)
    return named


def load_state_tensors(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Take over a whole state, in place. `ValueError` if it cannot fit; then nothing changes."""
    own = state_tensors(state)
    if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
        raise ValueError("the saved state is not that of this expert and recipe")
    step = int(tensors["step"])
    prefix = "optimiser."
    saved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    state.optimiser.load(saved, step)
    with torch.no_grad():
        for name, tensor in weights(state).items():
            tensor.copy_(tensors[f"weights.{name}"])
    state.step = step


def save_state(state: TrainState, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the whole state to a safetensors file, atomically."""
    save_tensors(state_tensors(state), path, metadata)


def load_state(
    path: Path, config: ExpertConfig, recipe: RecipeConfig, *, device: str = "cpu"
) -> TrainState:
    """Read a state that `save_state` wrote; the next step is what it would have been."""
    tensors = load_tensors(path)
    prefix = "weights."
    start = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    state = new_state(config, recipe, start, device=device)
    load_state_tensors(state, tensors)
    return state
