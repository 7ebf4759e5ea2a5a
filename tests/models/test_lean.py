"""Training plans: one contract, resume changes no bit, and a step is whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from paris_models import lean
from paris_models.codecs import decode
from paris_models.config import ExpertConfig
from paris_models.expert import build_expert
from paris_models.lean import (
    LeanState,
    State,
    load_state_tensors,
    new_state,
    start_state,
    state_tensors,
    train_step,
    update_of,
    weights,
)
from paris_models.plans import PLANS, Plan, with_swap
from paris_models.train import TrainState, batch_loss, make_batch
from tiny_models import KEY, PAPER, UNIT, clips

DEEP = ExpertConfig(1, 8, 8, 2, 3, 2, 8, (2, 2, 4), 12, 10)
"""Five blocks, so that some can be swapped."""
WEIGHTS = {
    name: tensor + 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
    for i, (name, tensor) in enumerate(build_expert(DEEP, seed=5).state_dict().items())
}
HALF = replace(UNIT, dtype="bfloat16")
RECIPE = replace(PAPER, lr=3e-3, eps=1e-8)
SWAPPED = [with_swap(PLANS["adafactor"], 3), with_swap(PLANS["lora-16-nf4"], 2)]
EVERY = [p for p in PLANS.values() if p.rank in (0, 16)] + SWAPPED
TABLE = clips()


def names(plans: list[Plan]) -> list[str]:
    return [f"{plan.name}-{plan.swap}" for plan in plans]


def fresh(plan: Plan) -> State:
    return new_state(plan, DEEP, RECIPE, WEIGHTS, key=KEY)


def unit_of(plan: Plan):
    return replace(UNIT, dtype=plan.compute)


def trained(plan: Plan, steps: int) -> tuple[State, list[float]]:
    state = fresh(plan)
    return state, [train_step(state, TABLE, unit_of(plan)) for _ in range(steps)]


def bits(state: State) -> dict[str, bytes]:
    return {n: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for n, t in copied(state).items()}  # fmt: skip


def copied(state: State) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_tensors(state).items()}


@pytest.mark.parametrize("plan", EVERY, ids=names(EVERY))
def test_resuming_at_every_step_changes_no_bit(plan: Plan) -> None:
    state, kept = fresh(plan), []
    for _ in range(3):
        kept.append(copied(state))
        train_step(state, TABLE, unit_of(plan))
    wanted = bits(state)
    for stop, saved in enumerate(kept):
        again = fresh(plan)
        train_step(again, TABLE, unit_of(plan))  # whatever it had done before plays no part
        load_state_tensors(again, saved)
        torch.manual_seed(stop)
        while again.step < 3:
            train_step(again, TABLE, unit_of(plan))
        assert bits(again) == wanted


@pytest.mark.parametrize("plan", EVERY, ids=names(EVERY))
def test_every_plan_learns(plan: Plan) -> None:
    unit = replace(unit_of(plan), warmup=0, rate_shape="constant")
    state = new_state(plan, DEEP, replace(RECIPE, lr=1e-2), WEIGHTS, key=KEY)
    first, *_ = [train_step(state, TABLE, unit) for _ in range(6)]
    batch = make_batch(TABLE, unit, RECIPE, 0)
    again = float(batch_loss(cast(TrainState, state), batch, unit.dtype).detach())
    assert again < (0.999 if plan.rank else 0.99) * first


@pytest.mark.parametrize("name", ["adafactor", "lora-16-nf4"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_swapping_blocks_changes_no_bit(name: str, blocks: int) -> None:
    plan = PLANS[name]
    wanted, losses = trained(plan, 3)
    state, found = trained(with_swap(plan, blocks), 3)
    assert found == losses and bits(state) == bits(wanted)


def test_at_most_two_swapped_blocks_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh(with_swap(PLANS["adafactor"], 3))
    assert isinstance(state, LeanState) and state.swap is not None
    most, fetch = [], type(state.swap)._fetch

    def watched(swap, index: int) -> None:
        fetch(swap, index)
        most.append(len(swap.resident))

    monkeypatch.setattr(type(state.swap), "_fetch", watched)
    train_step(state, TABLE, HALF)
    assert max(most) == 2
    state.swap.flush()
    assert state.swap.resident == []


@pytest.mark.parametrize("name", ["adafactor", "adamw-host"])
def test_a_fused_step_keeps_no_gradients(name: str) -> None:
    state, _ = trained(PLANS[name], 1)
    assert isinstance(state, LeanState)
    assert all(p.grad is None for p in state.trained.values())


def test_keeping_the_optimiser_in_host_memory_changes_no_bit() -> None:
    plan = PLANS["adamw-host"]
    wanted, losses = trained(replace(plan, host_state=False), 3)
    state, found = trained(plan, 3)
    assert found == losses and bits(state) == bits(wanted)


def test_checkpointing_changes_no_bit() -> None:
    plan = PLANS["adafactor"]
    wanted, losses = trained(plan, 2)
    state, found = trained(replace(plan, checkpoint=False), 2)
    assert found == losses and bits(state) == bits(wanted)


def test_fusing_into_backward_changes_no_bit_where_nothing_is_clipped() -> None:
    recipe = replace(RECIPE, clip_norm=1e9)
    plan = replace(PLANS["adamw"], fused=True)
    states = [new_state(p, DEEP, recipe, WEIGHTS, key=KEY) for p in (PLANS["adamw"], plan)]
    for state in states:
        train_step(state, TABLE, HALF)
        train_step(state, TABLE, HALF)
    assert bits(states[0]) == bits(states[1])


@pytest.mark.parametrize("name", ["float32", "adafactor", "lora-16-nf4"])
def test_a_loss_that_is_not_finite_changes_nothing(name: str) -> None:
    plan = PLANS[name]
    state, _ = trained(plan, 1)
    before = bits(state)
    bad = replace(TABLE, latents=TABLE.latents * float("nan"))
    with pytest.raises(ArithmeticError, match="loss of step 1"):
        train_step(state, bad, unit_of(plan))
    assert bits(state) == before
    train_step(state, TABLE, unit_of(plan))


@pytest.mark.parametrize("name", ["adafactor", "adamw-host", "adafactor+swap"])
def test_an_interrupted_fused_step_is_refused_until_a_whole_state_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SWAPPED[0] if "+" in name else PLANS[name]
    state, _ = trained(plan, 1)
    assert isinstance(state, LeanState)
    saved, update, seen = copied(state), type(state.optimiser)._update, []

    def interrupted(optimiser, parameter: str, gradient: Tensor) -> None:
        seen.append(parameter)
        if len(seen) > 20:
            raise KeyboardInterrupt
        update(optimiser, parameter, gradient)

    with monkeypatch.context() as patch:
        patch.setattr(type(state.optimiser), "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_step(state, TABLE, HALF)
    for refused in (lambda: train_step(state, TABLE, HALF), lambda: state_tensors(state)):
        with pytest.raises(ValueError, match="interrupted"):
            refused()
    load_state_tensors(state, saved)
    train_step(state, TABLE, HALF)
    assert bits(state) == bits(trained(plan, 2)[0])


@pytest.mark.parametrize("name", ["adamw", "lora-16-bf16"])
def test_an_interrupted_backward_of_other_plans_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = trained(PLANS[name], 1)
    before = bits(state)
    with monkeypatch.context() as patch:
        patch.setattr(type(state.optimiser), "_check", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_step(state, TABLE, HALF)
    assert bits(state) == before
    train_step(state, TABLE, HALF)
    assert bits(state) == bits(trained(PLANS[name], 2)[0])


def test_a_lora_state_holds_its_factors_alone_and_begins_as_its_base() -> None:
    state = fresh(PLANS["lora-32-bf16"])
    found = weights(state)
    assert len(found) == 2 * (2 * 12 + 3 * 5)
    assert all(name.endswith((".a", ".b")) and ".norm" not in name for name in found)
    assert all(not t.any() for name, t in found.items() if name.endswith(".b"))
    others = [new_state(PLANS["lora-32-bf16"], DEEP, RECIPE, WEIGHTS, key=key)
              for key in (KEY, bytes(16))]  # fmt: skip
    first = next(name for name in found if name.endswith(".a"))
    assert torch.equal(weights(others[0])[first], found[first])
    assert not torch.equal(weights(others[1])[first], found[first])
    half = [train_step(fresh(PLANS[n]), TABLE, HALF) for n in ("lora-32-bf16", "adafactor")]
    assert half[0] == pytest.approx(half[1], rel=1e-2)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_start_of_a_unit_is_known_without_the_expert_of_its_adapters(
    monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    wanted = bits(fresh(plan))
    if plan.rank:
        monkeypatch.setattr(lean, "expert_from", None)
    state = start_state(plan, DEEP, RECIPE, WEIGHTS, key=KEY)
    assert bits(state) == wanted
    if plan.rank:
        with pytest.raises(ValueError, match="without its expert"):
            train_step(state, TABLE, HALF)
        assert bits(state) == wanted


@pytest.mark.parametrize(("name", "tolerance"), [("lora-16-fp8", 0.03), ("lora-16-nf4", 0.15)])
def test_a_quantised_base_computes_nearly_the_same(name: str, tolerance: float) -> None:
    wanted = train_step(fresh(PLANS["lora-16-bf16"]), TABLE, HALF)
    assert train_step(fresh(PLANS[name]), TABLE, HALF) == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw-host"])
def test_rounding_the_parent_is_no_part_of_an_update(name: str) -> None:
    """A plan in bfloat16 that changes nothing hands in zeros, not what the rounding took away."""
    plan = PLANS[name]
    still = update_of(plan, WEIGHTS, state_tensors(fresh(plan)), "dense-f32")
    assert still.keys() == WEIGHTS.keys()
    assert all(not tensor.any() for tensor in still.values())
    state, _ = trained(plan, 2)
    moved = update_of(plan, WEIGHTS, state_tensors(state), "dense-f32")
    for name, now in weights(state).items():
        begin, end = WEIGHTS[name].bfloat16().float(), now.float()
        # What Kahan's residual adds is below half a step of bfloat16.
        rest = end.abs() * 2**-8 if plan.rounding == "kahan" else 0.0
        assert bool(((moved[name] - (end - begin)).abs() <= rest).all())


def test_what_a_kahan_residual_holds_is_part_of_an_update() -> None:
    plan = PLANS["adamw"]
    state, _ = trained(plan, 1)
    tensors = copied(state)
    name = "proj_out.weight"
    kept = tensors[f"optimiser.residual.{name}"]
    found = update_of(plan, WEIGHTS, tensors, "dense-f32")[name]
    tensors[f"optimiser.residual.{name}"] = torch.zeros_like(kept)
    without = update_of(plan, WEIGHTS, tensors, "dense-f32")[name]
    assert kept.any() and torch.allclose(found - without, kept.float(), rtol=0, atol=1e-7)


def test_the_update_of_adapters_is_their_factors() -> None:
    plan = PLANS["lora-16-bf16"]
    state, _ = trained(plan, 2)
    wire = update_of(plan, WEIGHTS, state_tensors(state), "lora-int16")
    shapes = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
    dense, factors = decode(wire, "lora-int16", shapes), weights(state)
    name = "transformer_blocks.0.attn.to_q"
    product = factors[f"{name}.b"] @ factors[f"{name}.a"]
    assert torch.allclose(dense[f"{name}.weight"], product, rtol=0.01, atol=1e-6)
    assert not dense["proj_out.weight"].any()


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    plan = PLANS["adafactor"]
    state, _ = trained(plan, 1)
    before, saved = bits(state), copied(state)
    with pytest.raises(ValueError, match="too many"):
        fresh(replace(plan, swap=4))
    with pytest.raises(ValueError, match="can swap"):
        with_swap(PLANS["adamw"], 1)
    with pytest.raises(ValueError, match="computes in bfloat16"):
        train_step(state, TABLE, UNIT)
    with pytest.raises(ValueError, match="all are done"):
        train_step(state, TABLE, replace(HALF, steps=1))
    with pytest.raises(ValueError, match="do not fit"):
        new_state(plan, DEEP, RECIPE, dict(list(WEIGHTS.items())[1:]), key=KEY)
    for wrong in (dict(list(saved.items())[1:]), {**saved, "more": saved["step"]},
                  copied(trained(PLANS["adamw"], 1)[0])):  # fmt: skip
        with pytest.raises(ValueError, match="not that of this expert"):
            load_state_tensors(state, wrong)
    assert bits(state) == before
