"""Sizes of the ladder, start of an expert, plain diffusers compatibility (F8, F9)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from paris_models import flow
from paris_models.config import (
    LADDER,
    ExpertConfig,
    RecipeConfig,
    RouterConfig,
    SamplerConfig,
    UnitConfig,
)
from paris_models.ensemble import Ensemble
from paris_models.evaluate import held_out_losses
from paris_models.expert import (
    build_expert,
    expert_from,
    parameter_count,
    parameter_shapes,
    predict,
)
from tiny_models import EXPERT, KEY, clips


def test_the_papers_two_counts_and_the_demos() -> None:
    assert parameter_count(LADDER["paper"]) == 11_891_387_456
    assert parameter_count(LADDER["paper-64"]) == 11_891_178_560
    assert parameter_count(LADDER["demo"]) == 319_392


@pytest.mark.parametrize("name", LADDER)
def test_the_closed_form_counts_what_diffusers_builds(name: str) -> None:
    assert LADDER[name].parameters == parameter_count(LADDER[name])


def test_sizes_are_near_their_names() -> None:
    rough = {"5M": 5e6, "38M": 38e6, "287M": 287e6, "950M": 0.95e9, "2.2B": 2.24e9, "5.2B": 5.23e9}
    for name, size in rough.items():
        assert LADDER[name].parameters == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    "change",
    [{"patch": 3}, {"in_channels": 9}, {"rope_axes": (2, 2, 2)}, {"rope_axes": (3, 1, 4)}],
)
def test_impossible_experts_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(EXPERT, **change)  # type: ignore[arg-type]


def test_configs_are_read_from_records_with_decimal_strings() -> None:
    record = SimpleNamespace(width=32, blocks=2, heads=2, batch=64, steps=200, lr="4e-3", more=1)
    assert RouterConfig.from_record(record) == RouterConfig(32, 2, 2, 64, 200, 0.004)
    rate = SimpleNamespace(start="1", end="0.5", shape="cosine", warmup=3)
    assignment = SimpleNamespace(
        steps=30, batch=8, rate=rate, commit_every=10, dtype="float32", threads=1,
        kernels="reference",
    )  # fmt: skip
    unit = UnitConfig.from_record(assignment, KEY)
    assert unit == UnitConfig(KEY, 30, 8, 1.0, 0.5, "cosine", 3, 10, "float32", 1)
    with pytest.raises(ValueError, match="16 bytes"):
        UnitConfig.from_record(assignment, b"short")


def test_a_fresh_expert_says_nothing_and_is_a_function_of_its_seed() -> None:
    table = clips()
    a, b, c = (build_expert(EXPERT, seed=seed) for seed in (1, 1, 2))
    seq, pooled = table.text(torch.arange(10))
    out = predict(a, EXPERT, table.latents, torch.full((10,), 0.5), seq, pooled)
    assert out.shape == table.latents.shape
    assert out.abs().max() == 0
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.x_embedder.weight, c.x_embedder.weight)


def test_building_does_not_touch_the_global_random_state() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    build_expert(EXPERT, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_conditioned_expert_starts_equal_to_the_unconditioned_one() -> None:
    table = clips(3)
    conditioned = replace(EXPERT, in_channels=8 + EXPERT.condition_size)
    model = build_expert(conditioned, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
        model.x_embedder.weight[:, 8:] = 0
    seq, pooled = table.text(torch.arange(3))
    t = torch.tensor([0.1, 0.5, 0.9])
    tokens = torch.randn(3, 8, conditioned.condition_size)
    with_it = predict(model, conditioned, table.latents, t, seq, pooled, tokens)
    without = predict(model, conditioned, table.latents, t, seq, pooled)
    assert torch.equal(with_it, without)
    weights = dict(model.state_dict())
    weights["x_embedder.weight"] = weights["x_embedder.weight"][:, :8].contiguous()
    plain = expert_from(EXPERT, weights)
    torch.testing.assert_close(
        predict(plain, EXPERT, table.latents, t, seq, pooled), without, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="takes no condition"):
        predict(plain, EXPERT, table.latents, t, seq, pooled, tokens)


def test_the_folder_loads_with_plain_diffusers(tmp_path) -> None:
    model = build_expert(LADDER["demo"], seed=3)
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_weights_that_do_not_fit_are_refused() -> None:
    weights = dict(build_expert(EXPERT, seed=0).state_dict())
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    assert parameter_shapes(EXPERT) == shapes
    with pytest.raises(ValueError, match="do not fit"):
        expert_from(EXPERT, {**weights, "extra": torch.zeros(1)})
    weights.pop("proj_out.bias")
    with pytest.raises(ValueError, match="do not fit"):
        expert_from(EXPERT, weights)


def test_the_default_recipe_is_the_papers() -> None:
    paper = RecipeConfig()
    assert (paper.objective, paper.optimiser, paper.eps) == ("velocity", "adamw", 1e-15)
    assert (paper.beta1, paper.beta2, paper.weight_decay) == (0.9, 0.999, 0)
    assert isinstance(LADDER["paper"], ExpertConfig)


# ---------------------------------------------------------------- times near noise


def embedded_times(path: str, *, autocast: bool, times: Tensor) -> Tensor:
    """What the time embedding's first Linear reads in bfloat16, (n, 256)."""
    model = build_expert(EXPERT, seed=0)
    half = model if autocast else model.to(torch.bfloat16)
    seen: list[Tensor] = []
    hook = half.time_text_embed.timestep_embedder.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].to(torch.bfloat16))
    )
    kind = torch.float32 if autocast else torch.bfloat16
    n = len(times)
    x, seq, pooled = torch.zeros(n, 8, 2, 2, 2), torch.zeros(n, 3, 12), torch.zeros(n, 10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predict(half, EXPERT, x.to(kind), times, seq.to(kind), pooled.to(kind), time_path=path)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16-weights"])
def test_sampling_times_of_long_large_clips_stay_apart_in_bfloat16(autocast: bool) -> None:
    """50 Euler steps at 1024² and 129 frames: latents 33 × 128 × 128 (science §5.3)."""
    times = flow.sampling_times(50, flow.size_shift(33, 128, 128))[:-1]
    apart = {
        path: len(embedded_times(path, autocast=autocast, times=times).unique(dim=0))
        for path in ("hidden", "float32")
    }
    assert apart == {"hidden": 39, "float32": 50}


def test_small_shifts_lose_nothing_in_either_path() -> None:
    for frames in (9, 33):  # 33 and 129 frames at 256²
        times = flow.sampling_times(50, flow.size_shift(frames, 32, 32))[:-1]
        assert len(embedded_times("hidden", autocast=True, times=times).unique(dim=0)) == 50


def test_in_float32_both_time_paths_are_the_same_bits() -> None:
    table, model = clips(), build_expert(EXPERT, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    seq, pooled = table.text(torch.arange(10))
    t = torch.linspace(0.001, 0.9999, 10)
    outs = []
    for path in ("hidden", "float32", "hidden"):
        out = predict(model, EXPERT, table.latents, t, seq, pooled, time_path=path)
        out.square().sum().backward()
        outs.append((out, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    for out, gradients in outs[1:]:
        assert torch.equal(out, outs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, outs[0][1], strict=True))


def test_the_exact_times_leave_no_trace_on_the_model() -> None:
    model, table = build_expert(EXPERT, seed=0), clips(2)
    seq, pooled = table.text(torch.arange(2))
    predict(model, EXPERT, table.latents, torch.ones(2), seq, pooled, time_path="float32")
    with pytest.raises(RuntimeError):
        predict(
            model, EXPERT, table.latents, torch.ones(2), seq, pooled[:, 1:], time_path="float32"
        )
    assert not model.time_text_embed._forward_pre_hooks


def test_measuring_and_sampling_take_the_recipes_time_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(model: object, config: object, x: Tensor, *rest: Tensor, time_path: str) -> Tensor:
        seen.append(time_path)
        return torch.zeros_like(x)

    for name in ("evaluate", "ensemble"):
        monkeypatch.setattr(f"paris_models.{name}.predict", spy)
    recipe, table = RecipeConfig(time_path="float32"), clips(2)
    weights = dict(build_expert(EXPERT, seed=0).state_dict())
    held_out_losses(weights, EXPERT, recipe, table, KEY)
    seq, pooled = table.text(torch.arange(2))
    ensemble = Ensemble([object()], None, EXPERT, recipe, table.null_seq, table.null_pooled)
    ensemble.sample(seq, pooled, table.shape, KEY, SamplerConfig(steps=1, guidance=2.0))
    assert seen == ["float32"] * 3
