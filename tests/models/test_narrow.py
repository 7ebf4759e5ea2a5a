"""Moments in 8 bits: what the codes keep, that rounding keeps means, and how close AdamW stays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models import narrow
from paris_models.config import DEMO_RECIPE, LADDER, UnitConfig
from paris_models.expert import build_expert, parameter_shapes
from paris_models.lean import new_state, train_step, weights
from paris_models.numerics import toy_clips
from paris_models.plans import MOMENT_BLOCK, PLANS, Work, moment_blocks, need_of
from paris_models.rounding import CHUNK, seed_of
from tiny_models import KEY

CPU = torch.device("cpu")


def kept(mean: torch.Tensor, square: torch.Tensor, step: int = 0) -> dict[str, torch.Tensor]:
    state = narrow.fresh(tuple(mean.shape), CPU)
    narrow.write(state, mean, square, seed_of(KEY, step, 0))
    return state


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3 * MOMENT_BLOCK), st.floats(-30, 10), st.integers(0, 2**31 - 1))
def test_values_are_kept_within_a_code(n: int, power: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, generator=g) * 10**power
    square = torch.randn(n, generator=g).square() * 10**power
    state = kept(mean, square)
    found_mean, found_square = narrow.read(state, (n,))
    for start in range(0, n, MOMENT_BLOCK):
        part = slice(start, start + MOMENT_BLOCK)
        top = mean[part].abs().max()
        root = (found_mean[part].abs() / top).sqrt() - (mean[part].abs() / top).sqrt()
        assert float(root.abs().max()) <= 0.5 / 127 + 1e-5
        assert torch.equal((found_mean[part] * mean[part]) < 0, torch.zeros_like(root, dtype=bool))
        top = square[part].max()
        fourth = (found_square[part] / top) ** 0.25 - (square[part] / top) ** 0.25
        assert float(fourth.abs().max()) <= 1 / 255 + 1e-5
        assert bool((found_square[part] > 0).all()), "no step divides by nothing"
        assert float(found_square[part].max()) == pytest.approx(float(top), rel=1e-6)


def test_zeros_stay_zeros_and_finite() -> None:
    state = kept(torch.zeros(300), torch.zeros(300))
    mean, square = narrow.read(state, (300,))
    assert not mean.any() and not square.any()


def test_a_second_moment_is_never_lost_beside_a_large_one() -> None:
    """A small one that became zero would divide its next step by nothing."""
    square = torch.tensor([1.0, 1e-8, 1e-11, 1e-14, 0.0])
    for step in range(20):
        found = narrow.read(kept(torch.zeros(5), square, step), (5,))[1]
        assert bool((found > 0).all()) and float(found[2:].max()) < 1e-8


def test_rounding_keeps_the_mean_of_second_moments() -> None:
    exact = torch.cat([torch.ones(1), torch.linspace(0.01, 0.99, 255)])
    total = torch.zeros(256, dtype=torch.float64)
    for step in range(2000):
        total += narrow.read(kept(torch.zeros(256), exact, step), (256,))[1]
    off = (total / 2000 - exact) / exact
    assert float(off.abs().max()) < 4e-3 and abs(float(off.mean())) < 5e-4


def test_a_slow_decay_happens_though_it_is_less_than_a_code() -> None:
    """Nearest rounding would leave every value where it is for ever."""
    square = torch.linspace(0.2, 1.0, 256)
    start = square.clone()
    square[-1] = 1.0
    for step in range(1000):
        state = kept(torch.zeros(256), torch.cat([square[:-1] * 0.999, torch.ones(1)]), step)
        square = narrow.read(state, (256,))[1]
    shrunk = float((square[:-1] / start[:-1]).mean())
    assert shrunk == pytest.approx(0.999**1000, rel=0.1)


def test_a_piece_does_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    mean, square = torch.randn(5000, generator=g), torch.randn(5000, generator=g).square()
    whole = kept(mean, square)
    assert CHUNK % MOMENT_BLOCK == 0
    monkeypatch.setattr(narrow, "CHUNK", 1024)
    cut = kept(mean, square)
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("size", ["demo", "5M", "38M", "paper", "paper-64"])
def test_scales_are_counted_exactly(size: str) -> None:
    shapes = parameter_shapes(LADDER[size]).values()
    wanted = sum(-(-math.prod(shape) // MOMENT_BLOCK) for shape in shapes)
    assert moment_blocks(LADDER[size]) == wanted


def test_the_paper_s_expert_needs_the_published_moments() -> None:
    """Science §7.1: 22.15 GiB of moments in 8 bits, beside a Kahan residual of as much."""
    need = need_of(PLANS["adamw-8bit"], LADDER["paper"], Work(2304, 512))
    scales = 8 * moment_blocks(LADDER["paper"])
    assert (need.optimiser - scales) / 2**30 == pytest.approx(2 * 22.15, abs=0.06)
    assert scales / 2**30 < 0.4
    assert need.device < 80 * 2**30


def test_training_stays_close_to_adamw_with_exact_moments() -> None:
    config = LADDER["demo"]
    recipe = replace(DEMO_RECIPE, optimiser="adamw", lr=2e-3, beta2=0.999, batch=4)
    unit = UnitConfig(KEY, steps=20, batch=4, dtype="bfloat16", rate_shape="constant")
    start = dict(build_expert(config, seed=0).state_dict())
    clips, ends = toy_clips(config, 8), {}
    for name in ("adamw-host", "adamw-8bit"):
        state = new_state(PLANS[name], config, recipe, start, key=KEY)
        losses = [train_step(state, clips, unit) for _ in range(20)]
        ends[name] = (losses, weights(state))
    moved = off = 0.0
    for name, tensor in start.items():
        exact, found = ends["adamw-host"][1][name].float(), ends["adamw-8bit"][1][name].float()
        moved += float((exact - tensor).double().square().sum())
        off += float((exact - found).double().square().sum())
    print(f"updates are {math.sqrt(off / moved):.4f} apart")
    assert 0 < math.sqrt(off / moved) < 0.1
    assert ends["adamw-8bit"][0] == pytest.approx(ends["adamw-host"][0], rel=5e-3)
