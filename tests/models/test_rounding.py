"""Rounding to bfloat16: counter-based bits, no bias, nothing lost; Adafactor as in its paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paris_models import rounding
from paris_models.adapters import LEVELS, dense, stored
from paris_models.lean_optim import LeanOptimiser
from paris_models.plans import PLANS, Base
from paris_models.rounding import Seed, add_with_residual, bits16, philox, round_to, seed_of
from tiny_models import KEY, PAPER


@pytest.mark.parametrize(
    ("seed", "start", "wanted"),
    [
        (Seed((0, 0), (0, 0)), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            Seed((0xA4093822, 0x299F31D0), (0x13198A2E, 0x03707344)),
            0x85A308D3_243F6A88 - (1 << 64),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(seed: Seed, start: int, wanted: tuple[int, ...]) -> None:
    """Known answers of Random123 (Salmon et al. 2011); the counter's low words are 64 bits."""
    assert tuple(philox(seed, start, 1)[0].tolist()) == wanted


@given(st.integers(0, 40), st.integers(1, 100))
@settings(max_examples=20, deadline=None)
def test_the_bits_of_a_place_do_not_depend_on_the_cut(block: int, count: int) -> None:
    seed = seed_of(KEY, 3, 1)
    assert torch.equal(bits16(seed, 8 * block, count), bits16(seed, 0, 500)[8 * block :][:count])


def test_every_key_step_and_parameter_has_bits_of_its_own() -> None:
    seeds = [seed_of(KEY, 0, 0), seed_of(KEY, 1, 0), seed_of(KEY, 0, 1), seed_of(bytes(16), 0, 0)]
    drawn = {tuple(bits16(seed, 0, 64).tolist()) for seed in seeds}
    assert len(drawn) == 4
    assert min(map(min, drawn)) >= 0 and 60_000 < max(map(max, drawn)) < 1 << 16
    with pytest.raises(ValueError, match="16 bytes"):
        seed_of(b"short", 0, 0)


def test_rounding_takes_a_neighbour_and_keeps_the_mean() -> None:
    exact = torch.linspace(-3, 3, 64).repeat_interleave(4096)
    rounded = torch.empty(exact.shape, dtype=torch.bfloat16)
    round_to(rounded, exact, seed_of(KEY, 0, 0))
    gap = 2.0 ** (exact.abs().log2().floor() - 7)
    assert bool(((rounded.float() - exact).abs() < gap).all())
    error = (rounded.float() - exact).view(64, -1).mean(dim=1) / gap.view(64, -1)[:, 0]
    assert float(error.abs().max()) < 5 * 0.5 / 4096**0.5
    held = torch.tensor([1.0, -0.5, 0.0, 384.0])
    same = torch.empty(4, dtype=torch.bfloat16)
    round_to(same, held, seed_of(KEY, 0, 0))
    assert torch.equal(same.float(), held)
    with pytest.raises(ValueError, match="bfloat16"):
        round_to(torch.empty(4), held, seed_of(KEY, 0, 0))


def test_rounding_in_pieces_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, seed = torch.randn(1000, generator=torch.Generator().manual_seed(0)), seed_of(KEY, 2, 5)
    whole, pieces = (torch.empty(1000, dtype=torch.bfloat16) for _ in range(2))
    round_to(whole, exact, seed)
    monkeypatch.setattr(rounding, "CHUNK", 64)
    round_to(pieces, exact, seed)
    assert torch.equal(whole, pieces)


def test_small_updates_are_lost_without_either_and_kept_with_each() -> None:
    """A thousand updates of 1e-5 of the weight: bfloat16 alone keeps none of them."""
    start, update, steps = 1.0, 1e-5, 1000
    plain = torch.full((4096,), start, dtype=torch.bfloat16)
    drawn, kahan = plain.clone(), plain.clone()
    residual = torch.zeros_like(kahan)
    change = torch.full((4096,), update)
    for step in range(steps):
        plain.add_(change.to(torch.bfloat16))
        round_to(drawn, drawn.float() + change, seed_of(KEY, step, 0))
        add_with_residual(kahan, residual, change)
    wanted = start + steps * update
    assert float(plain[0]) == start
    assert float(drawn.float().mean()) == pytest.approx(wanted, abs=2e-4)
    assert float(kahan[0].float() + residual[0].float()) == pytest.approx(
        wanted, abs=1.5e-3
    )  # its residual has 8 bits


def stepped(name: str, gradients: list[torch.Tensor], weight: torch.Tensor, **changes: object):
    parameter = nn.Parameter(weight.clone())
    plan = replace(PLANS[name], rounding="none", fused=False, **changes)
    recipe = replace(PAPER, lr=1e-2, eps=1e-8, clip_norm=1e9)
    optimiser = LeanOptimiser({"w": parameter}, plan, recipe)
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        optimiser.begin(KEY, step, 1.0)
        optimiser.finish()
    return parameter.detach(), optimiser


def test_adamw_is_torch_s() -> None:
    g = torch.Generator().manual_seed(1)
    weight, gradients = torch.randn(6, 4, generator=g), list(torch.randn(5, 6, 4, generator=g))
    theirs = nn.Parameter(weight.clone())
    adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    for gradient in gradients:
        theirs.grad = gradient
        adam.step()
    ours, _ = stepped("adamw", gradients, weight)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4), (5,)])
def test_adafactor_is_torch_s(shape: tuple[int, ...]) -> None:
    """torch's own with its relative step switched off by large weights and an equal rate."""
    g = torch.Generator().manual_seed(2)
    gradients = list(torch.randn(4, *shape, generator=g))
    weight = torch.randn(shape, generator=g)
    weight = weight / weight.square().mean().sqrt()
    ours, optimiser = stepped("adafactor", gradients[:1], weight)
    theirs = nn.Parameter(weight.clone())
    adafactor = torch.optim.Adafactor([theirs], lr=1e-2, eps=(1e-30, 1e-3))
    theirs.grad = gradients[0]
    adafactor.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
    kinds = {"row.w", "column.w"} if len(shape) == 2 else {"exp_avg_sq.w"}
    assert optimiser.state().keys() == kinds


def test_a_gradient_that_is_not_finite_changes_nothing_unfused() -> None:
    weight = torch.ones(3, 3)
    with pytest.raises(ArithmeticError, match="not finite"):
        stepped("adamw", [torch.full((3, 3), float("inf"))], weight)


@pytest.mark.parametrize(("base", "error"), [("bfloat16", 2**-8), ("float8", 2**-4), ("nf4", 0.16)])
def test_a_stored_matrix_comes_back_within_its_grid(base: Base, error: float) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    kept = stored(weight, base)
    back = dense(kept, base, (32, 64)).float()
    largest = weight.view(-1, 64).abs().amax(dim=1, keepdim=True).expand(-1, 64).reshape(32, 64)
    limit = error * (largest if base == "nf4" else weight.abs()) + largest * 2**-9
    assert bool(((back - weight).abs() <= limit).all())
    sizes = {"bfloat16": 2.0, "float8": 1 + 4 / 64, "nf4": 0.5 + 4 / 64}
    assert sum(t.nbytes for t in kept) == sizes[base] * weight.numel()


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    published = (
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    )  # fmt: skip
    assert pytest.approx(published, abs=1e-6) == LEVELS


def test_a_matrix_that_is_not_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        stored(torch.ones(3, 3), "nf4")
