"""Router: learns the cluster, knows how sure it is, loads again, depends on its key alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paris_models.config import RouterConfig
from paris_models.latents import image_ids
from paris_models.router import Router, calibration_error, fit_temperature, train_router
from tiny_models import KEY, RECIPE, clips

CONFIG = RouterConfig(width=24, blocks=1, heads=2, batch=32, steps=60, lr=1e-2)


def labelled(n: int, seed: int, features: int = 0):
    """Clips of two clusters, one three times as frequent, that differ in their mean."""
    table = clips(n, seed=seed, features=features)
    labels = (torch.arange(n) % 4 == 0).long()
    shifted = table.latents * 0.5 + (2.0 * labels - 1)[:, None, None, None, None]
    return replace(table, latents=shifted), labels


TRAIN, HELD = labelled(200, 1), labelled(120, 2)


def test_the_router_learns_and_is_calibrated(tmp_path) -> None:
    calls = []
    router, report = train_router(
        CONFIG, RECIPE, *TRAIN, KEY, patch=1, held=HELD, progress=lambda *p: calls.append(p)
    )
    assert report["bins"][0]["accuracy"] > 0.95
    assert report["bins"][0]["accuracy"] >= report["bins"][-1]["accuracy"]
    assert report["bins"][-1]["accuracy"] > 0.7
    assert report["ece"] < 0.2
    assert report["priors"] == [0.75, 0.25]
    assert (report["samples"], calls[-1]) == (60 * 32, (60, 60))

    router.save_pretrained(tmp_path)
    again = Router.from_pretrained(tmp_path)
    x, t = HELD[0].latents[:9], torch.linspace(0, 1, 9)
    pooled = HELD[0].text_pooled[:1].expand(9, -1)
    p = again.probabilities(x, t, pooled)
    assert torch.equal(p, router.probabilities(x, t, pooled))
    torch.testing.assert_close(p.sum(1), torch.ones(9))
    assert list(again.config.priors) == [0.75, 0.25]
    again.register_to_config(temperatures=[1e6, 1.0, 1.0, 1.0, 1.0])
    flat = again.probabilities(x, t, pooled)
    torch.testing.assert_close(flat[0], torch.full((2,), 0.5), atol=1e-4, rtol=0)
    assert flat[4].max() > 0.6  # each bin of t has a temperature of its own
    again = Router.from_pretrained(tmp_path)
    assert [b["temperature"] for b in again.config.calibration] == list(again.config.temperatures)


def test_the_key_decides() -> None:
    short = replace(CONFIG, steps=3)
    torch.manual_seed(1)
    a, _ = train_router(short, RECIPE, *TRAIN, KEY, patch=1)
    torch.manual_seed(2)
    b, _ = train_router(short, RECIPE, *TRAIN, KEY, patch=1)
    c, _ = train_router(short, RECIPE, *TRAIN, b"o" * 16, patch=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, c.head.weight)


def test_any_grid_and_an_absent_feature() -> None:
    table, labels = labelled(40, 3, features=5)
    router, _ = train_router(replace(CONFIG, steps=2), RECIPE, table, labels, KEY, patch=1)
    with torch.no_grad():
        router.absent.copy_(torch.randn_like(router.absent))
    t, pooled = torch.full((4,), 0.5), table.text_pooled[:4]
    tokens = torch.randn(4, 3 * 5 * 2, 8)
    ids = image_ids(3, 5, 2, 1)
    without = router(tokens, t, pooled, ids=ids)
    assert without.shape == (4, 2)
    feature = table.features[:4]
    nowhere = torch.zeros(4, dtype=torch.bool)
    assert torch.equal(router(tokens, t, pooled, feature, ids=ids, present=nowhere), without)
    assert not torch.equal(router(tokens, t, pooled, feature, ids=ids), without)
    assert not torch.equal(router(tokens, t, pooled, ids=ids.flip(0)), without)  # positions count
    plain, _ = train_router(replace(CONFIG, steps=1), RECIPE, *TRAIN, KEY, patch=1)
    with pytest.raises(ValueError, match="no image feature"):
        plain(tokens, t, pooled, feature, ids=ids)


def test_the_full_router_has_about_a_hundred_million_parameters() -> None:
    with torch.device("meta"):
        router = Router(8, 16, 2, 768, 12, 12, 768, 1024)
    count = sum(p.numel() for p in router.parameters())
    assert 90e6 < count < 100e6


def test_temperature_and_calibration_error() -> None:
    g = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 3, generator=g) * 2
    labels = torch.multinomial(torch.softmax(true, 1), 1, generator=g)[:, 0]
    assert fit_temperature(3 * true, labels) == pytest.approx(3, rel=0.15)
    assert calibration_error(torch.softmax(true, 1), labels) < 0.03
    assert calibration_error(torch.softmax(3 * true, 1), labels) > 0.08


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="one cluster per clip"):
        train_router(CONFIG, RECIPE, TRAIN[0], TRAIN[1][:5], KEY, patch=1)
    with pytest.raises(ValueError, match="one cluster per clip"):
        train_router(CONFIG, RECIPE, *TRAIN, KEY, patch=1, experts=1)
