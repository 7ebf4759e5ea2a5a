"""k-means, plain and in two levels: deterministic, numbered by centroids, balanced, bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models import balanced
from paris_models.balanced import SLACK, Grid, fine_centres, nearest
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.clusters import (
    FINE,
    LARGE,
    Clusters,
    PixelStatistics,
    centres_for,
    pixel_statistics,
)
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


# ---------------------------------------------------------------- two levels


def heap(n: int, seed: int, dim: int = 12) -> torch.Tensor:
    """Features of very unequal, overlapping heaps, (n, dim) float32."""
    generator = torch.Generator().manual_seed(seed)
    middles = 3 * torch.randn(9, dim, generator=generator)
    shares = torch.rand(9, generator=generator) ** 3 + 0.01
    which = torch.multinomial(shares, n, replacement=True, generator=generator)
    return middles[which] + torch.randn(n, dim, generator=generator)


def sizes(clusters: Clusters, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of each cluster, and of each fine centre."""
    assert clusters.fine is not None
    points = Grid(clusters.mean, clusters.spread).points(features)
    fine = torch.bincount(nearest(points, clusters.fine.centres)[0])
    return torch.bincount(clusters.assign(features), minlength=len(clusters.priors)), fine


def test_small_data_sets_are_clustered_as_before_and_large_ones_in_two_levels() -> None:
    assert [centres_for(n) for n in (1, 10_536, LARGE - 1, LARGE)] == [0, 0, 0, FINE]
    features = heap(500, 1)
    assert Clusters.fit(features, 3).fine is None
    assert Clusters.fit(features, 3, centres=40).fine is not None


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(0, 999))
def test_any_number_of_clusters_is_balanced_within_the_bound(count: int, seed: int) -> None:
    features = heap(1500, seed)
    clusters = Clusters.fit(features, count, seed, restarts=2, centres=40)
    coarse, fine = sizes(clusters, features)
    assert clusters.centroids.shape == (count, 12)
    mean, most = 1500 / count, int(fine.max())
    assert int(coarse.min()) > 0
    assert (1 - SLACK) * mean - most <= int(coarse.min())
    assert int(coarse.max()) <= (1 + SLACK) * mean + most
    assert torch.equal(coarse.double() / 1500, clusters.priors)
    rows = clusters.centroids.tolist()
    assert rows == sorted(rows)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(0, 999))
def test_no_part_has_more_than_three_times_the_points_of_another(count: int, seed: int) -> None:
    features = heap(900, seed)
    x = Grid.of(features).points(features)
    found: list[torch.Tensor] = []
    kept = balanced.means
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced, "means", lambda *a: found.append(a[2]) or kept(*a))
        centres = fine_centres(x, count)
    parts = torch.bincount(found[-1], minlength=count)
    assert len(centres) == len(parts) == count
    assert int(parts.max()) <= 3 * int(parts.min()) + 2


def test_the_centroid_is_the_mean_of_its_clips() -> None:
    features = heap(1200, 5)
    clusters = Clusters.fit(features, 4, centres=60)
    labels = clusters.assign(features)
    z = (features - clusters.mean) / clusters.spread
    for k in range(4):
        assert torch.allclose(z[labels == k].mean(0), clusters.centroids[k], atol=0.02)


def test_threads_and_chunks_do_not_change_a_bit() -> None:
    features = heap(700, 7, dim=96)
    before = torch.get_num_threads()
    try:
        found = []
        for threads, chunk in ((1, 8192), (2, 8192), (2, 97), (1, 256)):
            torch.set_num_threads(threads)
            clusters = Clusters.fit(features, 5, restarts=2, centres=24, chunk=chunk)
            found.append((clusters, clusters.assign(features, chunk)))
    finally:
        torch.set_num_threads(before)
    first, labels = found[0]
    for other, also in found[1:]:
        assert torch.equal(labels, also)
        for name, tensor in first.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_products_of_points_are_exact_in_float32() -> None:
    x = Grid.of(heap(400, 3, dim=1024)).points(50 * heap(400, 4, dim=1024))
    assert torch.equal(x, x.round())
    assert float(x.double().norm(dim=1).max()) < 2**12
    assert torch.equal((x @ x.T).double(), x.double() @ x.double().T)


def test_equal_distances_go_to_the_lowest_number() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    labels, cost = nearest(x, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]))
    assert labels.tolist() == [0, 0]
    assert cost.tolist() == [1, 1]


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    features = heap(4000, 2)
    most = 0
    kept = balanced.Grid.points

    def points(self: Grid, rows: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(rows))
        return kept(self, rows)

    monkeypatch.setattr(balanced.Grid, "points", points)
    Clusters.fit(features, 3, centres=8, chunk=100).assign(features, 100)
    assert most == 100


def test_later_clips_are_assigned_as_before_by_the_kept_file(tmp_path: Path) -> None:
    features, later = heap(1500, 8), heap(50, 9)
    for centres in (0, 50):
        clusters = Clusters.fit(features, 4, centres=centres)
        save_tensors(clusters.tensors(), tmp_path / "clusters.safetensors")
        again = Clusters.from_tensors(load_tensors(tmp_path / "clusters.safetensors"))
        assert torch.equal(again.assign(later), clusters.assign(later))
        assert torch.equal(again.assign(features), clusters.assign(features))


def test_tensors_that_are_no_clusters_are_refused() -> None:
    good = Clusters.fit(heap(300, 1), 3, centres=20).tensors()
    bad: list[dict[str, torch.Tensor]] = [
        {k: v for k, v in good.items() if k != "priors"},
        {k: v for k, v in good.items() if k != "group"},
        good | {"group": good["group"] + 3},
        good | {"centres": good["centres"][:, :5]},
        good | {"more": good["mean"]},
    ]
    for tensors in bad:
        with pytest.raises(ValueError, match="clusters"):
            Clusters.from_tensors(tensors)


def test_what_cannot_be_clustered_in_two_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="8 centres cannot make 9"):
        Clusters.fit(heap(100, 1), 9, centres=8)
    with pytest.raises(ValueError, match="1 different centres cannot make 2"):
        Clusters.fit(torch.ones(100, 4), 2, centres=8)
    broken = heap(100, 1)
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        Clusters.fit(broken, 2, centres=8)


def test_equal_clips_among_others_make_fewer_centres() -> None:
    features = torch.cat([torch.ones(600, 12), heap(400, 1)])
    clusters = Clusters.fit(features, 3, centres=64)
    coarse, fine = sizes(clusters, features)
    assert int(fine.max()) >= 600
    assert int(coarse.max()) <= (1 + SLACK) * 1000 / 3 + int(fine.max())


def test_two_levels_find_heaps_that_lie_apart() -> None:
    middles = 40 * torch.eye(4, 12)
    which = torch.arange(2000) % 4
    features = middles[which] + torch.randn(2000, 12, generator=torch.Generator().manual_seed(1))
    labels = Clusters.fit(features, 4, centres=64).assign(features)
    largest = [int(torch.bincount(labels[which == k]).max()) for k in range(4)]
    assert sum(largest) / 2000 > 0.98
    assert len({int(torch.bincount(labels[which == k]).argmax()) for k in range(4)}) == 4
