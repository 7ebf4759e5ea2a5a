"""k-means: deterministic, numbered by centroids, and close to the worlds on rendered clips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models.clusters import Clusters, PixelStatistics, pixel_statistics
from paris_models.worlds import factors, render


def test_worlds_are_found_from_six_statistics() -> None:
    clips, captions = render(900, 100)
    features = PixelStatistics()(clips)
    assert features.shape == (900, 6)
    clusters = Clusters.fit(features, 3)
    labels = clusters.assign(features)
    world = factors(captions)[0]
    largest = [int(torch.bincount(world[labels == k]).max()) for k in range(3)]
    assert sum(largest) / 900 > 0.9
    for seed in (1, 2):
        assert torch.equal(Clusters.fit(features, 3, seed).assign(features), labels)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10_000))
def test_a_clip_is_in_one_cluster_and_priors_are_shares(count: int, seed: int) -> None:
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    clusters = Clusters.fit(features, count, seed)
    labels = clusters.assign(features)
    assert torch.equal(labels, Clusters.fit(features, count, seed).assign(features))
    assert clusters.centroids.shape == (count, 3)
    assert abs(float(clusters.priors.sum()) - 1) < 1e-12
    assert torch.equal(torch.bincount(labels, minlength=count) / 40, clusters.priors.float())
    rows = clusters.centroids.tolist()
    assert rows == sorted(rows)


def test_equal_clips_do_not_break_it() -> None:
    clusters = Clusters.fit(torch.ones(5, 2), 2)
    assert clusters.centroids.isfinite().all()


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="2 clips cannot make 3"):
        Clusters.fit(torch.randn(2, 6), 3)


def test_statistics_of_a_still_and_a_single_frame() -> None:
    still = torch.full((1, 3, 4, 8, 8), 51, dtype=torch.uint8)
    expected = torch.tensor([[0.2, 0, 0.2, 0, 0, 0]])
    assert torch.allclose(pixel_statistics(still), expected, atol=1e-6)
    assert torch.allclose(pixel_statistics(still[:, :, :1]), expected, atol=1e-6)
