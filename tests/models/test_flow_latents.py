"""Flow matching, time law and packing against closed forms (F11, F12)."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models import flow
from paris_models.latents import condition, first_frame_condition, image_ids, pack, unpack

SIZE = st.integers(1, 3)


@settings(max_examples=30, deadline=None)
@given(n=SIZE, c=SIZE, t=SIZE, h=SIZE, w=SIZE, patch=SIZE)
def test_packing_round_trip(n: int, c: int, t: int, h: int, w: int, patch: int) -> None:
    shape = (c, t, h * patch, w * patch)
    x = torch.arange(float(n * c * t * h * w * patch**2)).reshape(n, *shape)
    tokens = pack(x, patch)
    assert tokens.shape == (n, t * h * w, c * patch**2)
    assert torch.equal(unpack(tokens, shape, patch), x)


def test_a_token_is_channel_row_column_at_its_id() -> None:
    x = torch.randn(2, 3, 2, 4, 6)
    tokens, ids = pack(x, 2), image_ids(2, 4, 6, 2)
    frame, row, column = (int(v) for v in ids[7])
    assert ids.shape == (12, 3)
    assert (frame, row, column) == (1, 0, 1)
    square = x[:, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(tokens[:, 7], square.reshape(2, 12))


def test_images_are_clips_of_one_frame() -> None:
    assert image_ids(1, 4, 4, 2)[:, 0].eq(0).all()
    assert pack(torch.randn(1, 4, 1, 4, 4), 2).shape == (1, 4, 16)


def test_the_condition_has_68_columns_in_the_paper() -> None:
    first = torch.randn(2, 16, 1, 4, 4)
    tokens = first_frame_condition(first, 3, 2)
    assert tokens.shape == (2, 12, 68)
    assert torch.equal(unpack(tokens, (17, 3, 4, 4), 2)[:, 1:, :1], first)
    assert tokens[:, 4:].abs().max() == 0
    hidden = condition(torch.zeros(2, 1, 3, 4, 4), torch.randn(2, 16, 3, 4, 4), 2)
    assert hidden.abs().max() == 0


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        pack(torch.zeros(1, 1, 1, 3, 4), 2)


def test_the_path_and_its_derivative() -> None:
    x0, x1 = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    s, t, h = 1e-5, torch.tensor([0.2, 0.7], dtype=torch.float64), 1e-6
    there = flow.interpolate(x0, x1, t, s)
    expected = (1 - t)[:, None, None] * x0 + (1 - (1 - s) * (1 - t))[:, None, None] * x1
    torch.testing.assert_close(there, expected)
    slope = (flow.interpolate(x0, x1, t + h, s) - there) / h
    torch.testing.assert_close(slope, flow.velocity(x0, x1, s), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(flow.velocity(x0, x1, s), (1 - s) * x1 - x0)
    torch.testing.assert_close(flow.velocity_from_x0(there, x0, t, s), flow.velocity(x0, x1, s))
    ones, zeros = torch.ones(2).double(), torch.zeros(2).double()
    torch.testing.assert_close(flow.interpolate(x0, x1, ones, s), x1)
    torch.testing.assert_close(flow.interpolate(x0, x1, zeros, s), x0 + s * x1)


def test_the_shift_by_latent_size() -> None:
    assert flow.size_shift(1, 32, 32) == pytest.approx(1)
    assert flow.size_shift(9, 32, 32) == pytest.approx(3)
    assert flow.size_shift(1, 128, 128) == pytest.approx(3)
    assert flow.size_shift(33, 32, 32) == pytest.approx(math.sqrt(33))
    assert flow.shift_for(0, 9, 32, 32) == pytest.approx(3)
    assert flow.shift_for(2, 9, 32, 32) == 2


def test_the_time_law() -> None:
    n = torch.tensor([-1.0, 0.0, 2.0])
    expected = torch.sigmoid(0.8 + n)
    torch.testing.assert_close(flow.times_from_normals(n, 0.8, 1, 1), expected)
    shifted = 3 * expected / (1 + 2 * expected)
    torch.testing.assert_close(flow.times_from_normals(n, 0.8, 1, 3), shifted)


def test_stratified_times_are_the_quantiles() -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    t = flow.stratified_times(order, 0.5)
    z = torch.logit(t.double())
    assert abs(float(z.mean())) < 1e-3
    assert abs(float(z.std()) - 1) < 5e-3
    assert torch.equal(t.argsort(), order.argsort())


def test_sampling_times_are_those_of_diffusers_scheduler() -> None:
    steps, shift = 20, 3.0
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    ours = flow.sampling_times(steps, shift)
    torch.testing.assert_close(ours, scheduler.sigmas.float(), atol=2e-7, rtol=0)
    assert (ours[0], ours[-1]) == (1, 0)
