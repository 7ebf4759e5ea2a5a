"""Ensemble: routers and experts give the marginal flow; routing, guidance, seeds (F17, F18)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from paris_models import flow
from paris_models.config import SamplerConfig
from paris_models.ensemble import Ensemble, initial_noise
from paris_models.expert import as_velocity, build_expert, predict
from tiny_models import EXPERT, KEY, PAPER, RECIPE, clips

SHAPE = (8, 2, 2, 2)
TABLE = clips(6)
SEQ, POOLED = TABLE.text(torch.arange(6))
MEANS, PRIORS, SPREAD = (-1.0, 2.0), (0.7, 0.3), 0.5


def gaussian_x0(x: Tensor, t: Tensor, mean: float) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, SPREAD²) and x_t = (1 - t) x0 + t n."""
    a, b = 1 - t, t
    gain = a * SPREAD**2 / (a**2 * SPREAD**2 + b**2)
    return mean + gain * (x - a * mean)


@dataclass
class GaussianExpert:
    """Stands in for a perfectly trained expert on one Gaussian cluster."""

    mean: float
    calls: list[int] = field(default_factory=list)

    def __call__(self, hidden_states: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        self.calls.append(len(hidden_states))
        return (gaussian_x0(hidden_states, timestep[:, None, None], self.mean),)


class GaussianRouter:
    """The exact posterior of the cluster given x_t (all coordinates share the cluster)."""

    def probabilities(
        self, x: Tensor, t: Tensor, pooled: Tensor, feature: Tensor | None = None
    ) -> Tensor:
        var = ((1 - t) * SPREAD) ** 2 + t**2
        logs = []
        for mean, prior in zip(MEANS, PRIORS, strict=True):
            gap = x.flatten(1) - ((1 - t) * mean)[:, None]
            logs.append(torch.tensor(prior).log() - (gap.square().sum(1) / (2 * var)))
        return torch.softmax(torch.stack(logs, 1), 1)


def gaussians() -> Ensemble:
    experts = [GaussianExpert(mean) for mean in MEANS]
    return Ensemble(experts, GaussianRouter(), EXPERT, RECIPE, TABLE.null_seq, TABLE.null_pooled)


def networks(recipe=RECIPE, count: int = 2) -> Ensemble:
    models = []
    for seed in range(count):
        model = build_expert(EXPERT, seed=seed)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        models.append(model.eval())
    return Ensemble(models, GaussianRouter(), EXPERT, recipe, TABLE.null_seq, TABLE.null_pooled)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9, 1.0])
def test_router_and_experts_give_the_marginal_velocity(t: float) -> None:
    """Weighted velocities equal the score-based flow of the mixture density, by autograd."""
    ensemble, n = gaussians(), 5
    x0 = torch.randn(n, *SHAPE) * SPREAD + torch.tensor(MEANS)[[0, 1, 0, 1, 0]].reshape(
        -1, 1, 1, 1, 1
    )
    x = ((1 - t) * x0 + t * torch.randn(n, *SHAPE)).double().requires_grad_(True)
    var = ((1 - t) * SPREAD) ** 2 + t**2
    logs = torch.stack(
        [
            torch.tensor(p).log() - (x.flatten(1) - (1 - t) * m).square().sum(1) / (2 * var)
            for m, p in zip(MEANS, PRIORS, strict=True)
        ],
        1,
    )
    (score,) = torch.autograd.grad(torch.logsumexp(logs, 1).sum(), x)
    # E[n | x_t] = -t score, so x0 = (x + t² score) / (1 - t); v = E[n] - E[x0]
    expected = -t * score - (x + t**2 * score) / (1 - t) if t < 1 else None
    x, times = x.detach().float(), torch.full((n,), t)
    weights = ensemble.route(x, times, POOLED[:n], top_k=2)
    v = ensemble.velocity(x, times, SEQ[:n], POOLED[:n], weights, 1.0)
    if expected is None:  # at t = 1 the posterior is the prior
        torch.testing.assert_close(weights, torch.tensor([PRIORS]).expand(n, -1))
        expected = x - sum(m * p for m, p in zip(MEANS, PRIORS, strict=True))
    torch.testing.assert_close(v, expected.float(), atol=2e-4, rtol=1e-3)


def test_samples_fall_into_the_clusters_at_their_priors() -> None:
    n = 400
    sampler = SamplerConfig(steps=100, shift=1.0, guidance=1.0, top_k=2)
    seq, pooled = SEQ[:1].expand(n, -1, -1), POOLED[:1].expand(n, -1)
    x = gaussians().sample(seq, pooled, SHAPE, KEY, sampler)
    mean = x.flatten(1).mean(1)
    second = mean > 0.5
    assert float(second.float().mean()) == pytest.approx(PRIORS[1], abs=0.07)
    assert float(mean[second].mean()) == pytest.approx(MEANS[1], abs=0.1)
    assert float(mean[~second].mean()) == pytest.approx(MEANS[0], abs=0.1)


def test_top_k_is_renormalised_and_only_needed_experts_run() -> None:
    ensemble = gaussians()
    t, x = torch.full((6,), 0.999), torch.randn(6, *SHAPE)  # the router is unsure
    one = ensemble.route(x, t, POOLED, top_k=1)
    assert ((one > 0).sum(1) == 1).all()
    torch.testing.assert_close(one.sum(1), torch.ones(6))
    assert torch.equal(ensemble.route(x, t, POOLED, 9), ensemble.route(x, t, POOLED, 2))
    only = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    ensemble.velocity(x, t, SEQ, POOLED, only, 1.0)
    assert [e.calls for e in ensemble.experts] == [[6], []]
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    ensemble.velocity(x[:3], t[:3], SEQ[:3], POOLED[:3], mixed, 1.0)
    assert [e.calls[-1] for e in ensemble.experts] == [2, 2]


def test_guidance_is_inside_each_expert() -> None:
    ensemble = networks(PAPER)
    x, t = torch.randn(6, *SHAPE), torch.full((6,), 0.5)
    weights = torch.tensor([[0.25, 0.75]]).expand(6, 2)
    expected = torch.zeros_like(x)
    for share, model in zip((0.25, 0.75), ensemble.experts, strict=True):
        with torch.no_grad():
            cond = predict(model, EXPERT, x, t, SEQ, POOLED)
            none = predict(model, EXPERT, x, t, torch.zeros_like(SEQ), torch.zeros_like(POOLED))
        expected += share * (none + 3 * (cond - none))
    got = ensemble.velocity(x, t, SEQ, POOLED, weights, 3.0)
    torch.testing.assert_close(got, expected)


def test_euler_over_the_schedule() -> None:
    ensemble = replace(networks(count=1), router=None)
    sampler = SamplerConfig(steps=4, shift=2.0, guidance=1.0)
    x = initial_noise(KEY, range(6), SHAPE)
    times = flow.sampling_times(4, 2.0)
    with torch.no_grad():
        for now, then in pairwise(times):
            t = now.expand(6)
            out = predict(ensemble.experts[0], EXPERT, x, t, SEQ, POOLED)
            x = x + (then - now) * as_velocity(RECIPE, x, t, out)
    torch.testing.assert_close(ensemble.sample(SEQ, POOLED, SHAPE, KEY, sampler), x)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    ensemble = networks()
    sampler = SamplerConfig(steps=5, shift=2.0, guidance=1.5, top_k=1)
    whole, weights = ensemble.sample_with_weights(SEQ, POOLED, SHAPE, KEY, sampler)
    assert weights.shape == (5, 6, 2)
    calls = []
    split = ensemble.sample(
        SEQ, POOLED, SHAPE, KEY, sampler, batch=4, callback=lambda *p: calls.append(p)
    )
    torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)
    assert calls[-1] == (10, 10)
    tail = ensemble.sample(SEQ[4:], POOLED[4:], SHAPE, KEY, sampler, first_slot=4)
    torch.testing.assert_close(tail, whole[4:], atol=1e-4, rtol=1e-4)
    assert torch.equal(whole, ensemble.sample(SEQ, POOLED, SHAPE, KEY, sampler))
    assert not torch.allclose(whole, ensemble.sample(SEQ, POOLED, SHAPE, b"o" * 16, sampler))


def test_what_does_not_fit_is_refused() -> None:
    ensemble = gaussians()
    with pytest.raises(ValueError, match="need a router"):
        replace(ensemble, router=None)
    with pytest.raises(ValueError, match="another number"):
        replace(ensemble, experts=ensemble.experts * 2).route(
            torch.zeros(1, *SHAPE), torch.ones(1), POOLED[:1], 1
        )
    with pytest.raises(ValueError, match="one per clip"):
        ensemble.sample(SEQ, POOLED[:2], SHAPE, KEY, SamplerConfig(2, 1.0, 1.0))
