"""Training under a plan: the contract of `train.py` for experts that do not fit as float32.

The same clips, noise, times and dropout as `train.py`; what differs is how weights, gradients and
optimiser are kept (`plans.Plan`). The plan "float32" is `train.py` itself. On the CPU, resuming
at any step equals never having stopped, bitwise. A fused plan changes weights during backward: if
that is interrupted the state is torn, and everything but `load_state_tensors` refuses it with
`ValueError`; other plans change nothing. A loss or gradient that is not finite raises
`ArithmeticError`::

    state = new_state(PLANS["adafactor"], config, recipe, load_tensors(parent), key=unit.key)
    while state.step < unit.steps:
        loss = train_step(state, clips, unit)
    save_tensors(state_tensors(state), path)
    update = update_of(plan, parent, state_tensors(state), "dense-bf16")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paris_models import train, updates
from paris_models.adapters import adapt, first_factors
from paris_models.codecs import Codec, Lazy, left_out
from paris_models.codecs_layout import is_topk
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import expert_from, parameter_shapes
from paris_models.lean_optim import LeanOptimiser
from paris_models.plans import Plan, most_swap, swapped_blocks
from paris_models.shards import Clips
from paris_models.swap import BlockSwap
from paris_models.train import TrainState, batch_loss, deterministic, make_batch, rate_multiplier


@dataclass(slots=True)
class LeanState:
    """An expert in training under a plan; `trained` is what changes, by name.

    `whole` is false from the moment that weights may have changed until their step is complete.
    """

    plan: Plan
    config: ExpertConfig
    recipe: RecipeConfig
    model: Any
    trained: dict[str, nn.Parameter]
    optimiser: LeanOptimiser
    swap: BlockSwap | None
    device: torch.device
    step: int = 0
    whole: bool = True


State = TrainState | LeanState


def new_state(
    plan: Plan,
    config: ExpertConfig,
    recipe: RecipeConfig,
    weights: Mapping[str, Tensor],
    *,
    key: bytes,
    device: str = "cpu",
) -> State:
    """A fresh state from given weights, which are copied; `key` is the unit's, for LoRA's A.

    Raises `ValueError` for weights that do not fit, or more blocks to swap than the expert has.
    """
    if plan.optimiser == "recipe":
        return train.new_state(config, recipe, weights, device=device)
    if plan.swap > most_swap(plan, config):
        raise ValueError(f"{plan.swap} blocks to swap are too many for this expert and plan")
    # Quantised and swapped on the host, so that the device never holds more than the plan says.
    owned = {name: w.to("cpu", torch.bfloat16, copy=True) for name, w in weights.items()}
    model: Any = expert_from(config, owned)
    del owned
    model.train()
    if plan.checkpoint:
        model.enable_gradient_checkpointing(_again)
    if plan.rank:
        adapt(model, plan.base, plan.rank, key)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    where = torch.device(device)
    swap = None
    if plan.swap:
        chosen = swapped_blocks(config, plan.swap)
        swap = BlockSwap(blocks, chosen, where, only_frozen=bool(plan.rank))
    model.to(where)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = _optimiser(trained, plan, recipe, swap)
    return LeanState(plan, config, recipe, model, trained, optimiser, swap, where)


def start_state(
    plan: Plan,
    config: ExpertConfig,
    recipe: RecipeConfig,
    weights: Mapping[str, Tensor],
    *,
    key: bytes,
) -> State:
    """A fresh state to look at, with the tensors of `new_state`.

    Of adapters nothing but the factors is made, since no weight of their expert is in a state: it
    cannot be trained.
    """
    if not plan.rank:
        return new_state(plan, config, recipe, weights, key=key)
    first = first_factors(parameter_shapes(config), plan.rank, key)
    trained = {name: nn.Parameter(tensor) for name, tensor in first.items()}
    optimiser = _optimiser(trained, plan, recipe, None)
    return LeanState(plan, config, recipe, None, trained, optimiser, None, torch.device("cpu"))


def train_step(state: State, clips: Clips, unit: UnitConfig) -> float:
    """Take one step and return its loss (mean squared error, float32)."""
    if isinstance(state, TrainState):
        return train.train_step(state, clips, unit)
    _refuse_torn(state)
    if state.model is None:
        raise ValueError("a state without its expert cannot be trained")
    if state.step >= unit.steps:
        raise ValueError(f"the unit has {unit.steps} steps and all are done")
    if unit.dtype != state.plan.compute:
        raise ValueError(f"the plan computes in {state.plan.compute}, the unit in {unit.dtype}")
    if torch.get_num_threads() != unit.threads:
        torch.set_num_threads(unit.threads)
    deterministic(unit.kernels)
    batch = make_batch(clips, unit, state.recipe, state.step, state.config)
    if state.swap is not None:
        state.swap.backward = False
    # The loss reads model, recipe, config and device alone, which both kinds of state have.
    loss = batch_loss(cast(TrainState, state), batch, unit.dtype)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ArithmeticError(f"the loss of step {state.step} is {value}")
    _apply(state, loss, unit)
    state.step += 1
    return value


def weights(state: State) -> dict[str, Tensor]:
    """What is trained, by name: the expert's weights, or the factors of its adapters."""
    if isinstance(state, TrainState):
        return train.weights(state)
    if state.swap is None:
        return {name: p.detach() for name, p in state.trained.items()}
    state.swap.flush()
    home = state.swap.home_of()
    return {name: home.get(p, p).detach() for name, p in state.trained.items()}


def state_tensors(state: State) -> dict[str, Tensor]:
    """The whole state: `weights.*` (what is trained), `optimiser.*`, `step` (1,) int64. Views.

    Refuses a torn state.
    """
    if isinstance(state, TrainState):
        return train.state_tensors(state)
    _refuse_torn(state)
    named = {f"weights.{name}": tensor for name, tensor in weights(state).items()}
    named |= {f"optimiser.{name}": t for name, t in state.optimiser.state().items()}
    named["step"] = torch.tensor([state.step], dtype=torch.int64)
    return named


def load_state_tensors(state: State, tensors: Mapping[str, Tensor]) -> None:
    """Take over a whole state, in place. `ValueError` if it cannot fit; then nothing changes."""
    if isinstance(state, TrainState):
        train.load_state_tensors(state, tensors)
        return
    if state.swap is not None:
        state.swap.forget()
    own = {f"weights.{name}": tensor for name, tensor in weights(state).items()}
    prefix = "optimiser."
    saved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    wanted = {*own, *(prefix + name for name in state.optimiser.state()), "step"}
    if wanted != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
        raise ValueError("the saved state is not that of this expert and plan")
    state.optimiser.load(saved)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    state.step, state.whole = int(tensors["step"]), True


def start_of(parent: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> Lazy[Tensor]:
    """What a unit begins with that makes up for an earlier update's residual: parent + residual.

    Raises `ValueError` where the two have other names or shapes.
    """
    if parent.keys() != residual.keys() or any(
        parent[n].shape != residual[n].shape for n in parent
    ):
        raise ValueError("the residual is not one of this expert")
    return Lazy(parent, lambda name: parent[name].float() + residual[name].float())


def update_of(
    plan: Plan,
    parent: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    codec: Codec,
    residual: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The update that a unit's last state makes of its float32 parent, as it crosses the network.

    With a `residual` the unit began with parent + residual, so that its result holds both. A plan
    in bfloat16 began with that rounded: the rounding is not what training changed, and what a Kahan
    residual holds is. Of adapters it is their factors.
    """
    if plan.rank:
        return updates.make_update(parent, _trained(tensors), codec)
    begin, end = _ends(plan, parent, tensors, residual)
    return updates.make_update(begin, end, codec)


def rest_of(
    plan: Plan,
    parent: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    wire: Mapping[str, Tensor],
    codec: Codec,
    residual: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor] | None:
    """What the update of `update_of` left out, for the next unit to begin with.

    Float32 by the names of the expert's tensors; None for codecs that leave nothing out.
    """
    if plan.rank or not is_topk(codec):
        return None
    begin, end = _ends(plan, parent, tensors, residual)
    shapes = {name: tuple(tensor.shape) for name, tensor in parent.items()}
    changed = Lazy(begin, lambda name: end[name].float() - begin[name].float())
    return left_out(changed, wire, codec, shapes)


def _trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "weights."
    return {n.removeprefix(prefix): t.cpu() for n, t in tensors.items() if n.startswith(prefix)}


def _ends(
    plan: Plan,
    parent: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    residual: Mapping[str, Tensor] | None,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What an update is the difference of: made a tensor at a time."""
    result = _trained(tensors)
    if plan.optimiser == "recipe":
        return parent, result

    def begin(name: str) -> Tensor:
        if residual is None:
            return parent[name].to(torch.bfloat16).float()
        exact = parent[name].float() + residual[name].float()
        return exact.to(torch.bfloat16).float() - residual[name].float()

    def end(name: str) -> Tensor:
        exact = result[name].float()
        kahan = plan.rounding == "kahan"
        return exact + tensors[f"optimiser.residual.{name}"].cpu() if kahan else exact

    return Lazy(parent, begin), Lazy(result, end)


def _apply(state: LeanState, loss: Tensor, unit: UnitConfig) -> None:
    """Backward and update; a fused plan's state is torn until both are through."""
    state.optimiser.begin(unit.key, state.step, rate_multiplier(unit, state.step))
    state.whole = not state.plan.fused
    if state.swap is not None:
        state.swap.backward = True
    try:
        loss.backward()
        state.optimiser.finish()
    finally:
        state.optimiser.drop()
    state.whole = True


def _optimiser(
    trained: dict[str, nn.Parameter], plan: Plan, recipe: RecipeConfig, swap: BlockSwap | None
) -> LeanOptimiser:
    """The optimiser; its state takes shape and place from the tensors, swapped ones too."""
    home = {} if swap is None else swap.home_of()
    shapes = {name: tuple(home.get(p, p).shape) for name, p in trained.items()}
    return LeanOptimiser(trained, plan, recipe, shapes)


def _again(block: nn.Module, *inputs: Any) -> Any:
    """Run a block now, and once more in backward instead of keeping what it computed."""
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def _refuse_torn(state: LeanState) -> None:
    if not state.whole:
        raise ValueError("a step was interrupted while it changed weights: load the last state")
