"""Sizes of the ladder, start of an expert, plain diffusers compatibility (F8, F9)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from paris_models.config import LADDER, ExpertConfig, RecipeConfig, RouterConfig, UnitConfig
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
