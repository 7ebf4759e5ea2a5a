"""Held-out losses: fixed noise and times, paired differences."""

from __future__ import annotations

import math

import pytest
import torch

from paris_models import flow
from paris_models.evaluate import held_out_losses, held_out_times, paired
from paris_models.expert import build_expert
from paris_models.train import new_state, train_step, weights
from tiny_models import EXPERT, KEY, PAPER, RECIPE, UNIT, clips

WEIGHTS = dict(build_expert(EXPERT, seed=5).state_dict())


def test_a_fresh_expert_has_the_loss_of_saying_nothing() -> None:
    table = clips(40)
    losses = held_out_losses(WEIGHTS, EXPERT, RECIPE, table, KEY)
    torch.testing.assert_close(losses, table.latents.square().flatten(1).mean(1))
    velocity = held_out_losses(WEIGHTS, EXPERT, PAPER, table, KEY)
    assert float(velocity.mean()) == pytest.approx(2, rel=0.1)  # |x1 - x0|², both of spread 1


def test_losses_are_fixed_by_the_key_and_not_by_the_batch() -> None:
    table = clips(30)
    state = new_state(EXPERT, RECIPE, WEIGHTS)
    train_step(state, table, UNIT)
    a = held_out_losses(weights(state), EXPERT, RECIPE, table, KEY)
    assert torch.equal(a, held_out_losses(weights(state), EXPERT, RECIPE, table, KEY))
    b = held_out_losses(weights(state), EXPERT, RECIPE, table, KEY, batch=7)
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, held_out_losses(weights(state), EXPERT, RECIPE, table, b"o" * 16))


def test_times_are_stratified() -> None:
    t = torch.logit(held_out_times(KEY, 200).double())
    quantiles = torch.special.ndtr(t).sort().values * 200
    gaps = quantiles.diff()
    assert float((gaps - 1).abs().max()) < 0.01
    assert not torch.equal(held_out_times(KEY, 200), held_out_times(b"o" * 16, 200))
    assert flow.stratified_times(torch.arange(3), 0.5)[1] == 0.5


def test_paired_statistics() -> None:
    before, after = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 4.0])
    p = paired(before, after)
    assert (p.n, p.before, p.after) == (3, 2.0, 2.5)
    assert p.delta == pytest.approx(0.5)
    assert p.se == pytest.approx(0.5 / math.sqrt(3))
    with pytest.raises(ValueError, match="same two"):
        paired(before, after[:2])


def test_training_shows_and_damage_shows() -> None:
    table = clips(16)
    unit = UNIT.__class__(KEY, 60, 16)
    state = new_state(EXPERT, RECIPE, WEIGHTS)
    before = held_out_losses(WEIGHTS, EXPERT, RECIPE, table, KEY)
    for _ in range(60):
        train_step(state, table, unit)
    after = held_out_losses(weights(state), EXPERT, RECIPE, table, KEY)
    better = paired(before, after)
    assert better.delta < -3 * better.se
    flipped = {n: 2 * WEIGHTS[n] - w for n, w in weights(state).items()}
    worse = paired(before, held_out_losses(flipped, EXPERT, RECIPE, table, KEY))
    assert worse.delta > 3 * worse.se
