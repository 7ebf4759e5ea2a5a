"""Clusters of clips: k-means on features, deterministic, with published centroids and priors.

Small data sets are clustered by plain k-means. Large ones are by two levels, as the paper does:
balanced k-means makes 1024 fine centres, which are put together to clusters of about equally many
clips (`paris_models.balanced` has the bounds). Features are six fixed pixel statistics (small
networks) or DINOv2's first-frame feature (`paris_models.encoders.Dino`). Clusters are numbered by
their centroids, so the same data give the same numbers whatever the seed found first::

    features = pixel_statistics(clips)                       # (n, 6)
    clusters = Clusters.fit(features, count=3, seed=0)
    labels = clusters.assign(features)                       # (n,) int64; clusters.priors sum to 1
    save_tensors(clusters.tensors(), path)                   # for clips that come later
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, Self

import torch
from torch import Tensor

from paris_models.balanced import CHUNK, Grid, chunks, fine_centres, grouped, nearest, sums

ITERATIONS: Final = 50
FINE: Final = 1024
"""Fine centres of a large data set (science reference, F6)."""
LARGE: Final = 16 * FINE
"""From so many clips on there are fine centres: sixteen clips for each."""
PER_CENTRE: Final = 128
"""Clips in the sample that each fine centre is made from."""


class Features(Protocol):
    """What every source of cluster features offers."""

    kind: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights and settings."""

    def __call__(self, clips: Tensor) -> Tensor:
        """uint8 clips (n, 3, F, H, W) as float32 features (n, D)."""


class PixelStatistics:
    """`pixel_statistics` as a source of features."""

    kind = "pixel-statistics"
    fingerprint = "0" * 64

    def __call__(self, clips: Tensor) -> Tensor:
        """(n, 6) features."""
        return pixel_statistics(clips)


def pixel_statistics(clips: Tensor) -> Tensor:
    """Grey mean and spread, border mean and spread, mean |space| and |time| difference, (n, 6)."""
    grey = clips.float().mean(1) / 255
    sides = (grey[:, :, :2], grey[:, :, -2:], grey[..., :2], grey[..., -2:])
    border = torch.cat([side.flatten(1) for side in sides], 1)
    space = grey.diff(dim=-1).abs().mean((1, 2, 3))
    time = grey.diff(dim=1).abs().mean((1, 2, 3)) if grey.shape[1] > 1 else torch.zeros(len(grey))
    whole = grey.flatten(1)
    return torch.stack([whole.mean(1), whole.std(1), border.mean(1), border.std(1), space, time], 1)


@dataclass(frozen=True, slots=True)
class Fine:
    """The fine level: centres (C, D) on the grid of `paris_models.balanced`, and their groups."""

    centres: Tensor
    group: Tensor


@dataclass(frozen=True, slots=True)
class Clusters:
    """Centroids (K, D) in standardised features, and the share of the clips in each cluster.

    With a fine level a clip belongs to the cluster of its nearest fine centre, and the centroids
    are the means of the clusters' clips; without one, to that of its nearest centroid.
    """

    mean: Tensor
    spread: Tensor
    centroids: Tensor
    priors: Tensor
    fine: Fine | None = None

    @classmethod
    def fit(
        cls,
        features: Tensor,
        count: int,
        seed: int = 0,
        restarts: int = 8,
        centres: int | None = None,
        chunk: int = CHUNK,
    ) -> Self:
        """Clusters of (n, D) features; `ValueError` with too few clips or different centres.

        `centres` is how many fine ones to make, 0 for none, None for what `centres_for` decides.
        """
        if len(features) < count:
            raise ValueError(f"{len(features)} clips cannot make {count} clusters")
        wanted = centres_for(len(features)) if centres is None else min(centres, len(features))
        if wanted:
            return cls._two_levels(features, count, seed, restarts, wanted, chunk)
        mean, spread = features.mean(0), features.std(0).nan_to_num().clamp(min=1e-6)
        x = ((features - mean) / spread).double()
        generator = torch.Generator().manual_seed(seed)
        tries = [_kmeans(x, count, generator) for _ in range(restarts)]
        centroids = min(tries, key=lambda found: found[0])[1]
        centroids = torch.tensor(sorted(centroids.tolist())).float()
        labels = torch.cdist(x.float(), centroids).argmin(1)
        priors = torch.bincount(labels, minlength=count).double() / len(x)
        return cls(mean, spread, centroids, priors)

    @classmethod
    def _two_levels(
        cls, features: Tensor, count: int, seed: int, restarts: int, wanted: int, chunk: int
    ) -> Self:
        if wanted < count:
            raise ValueError(f"{wanted} centres cannot make {count} clusters")
        grid = Grid.of(features, chunk)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        sample = order[: PER_CENTRE * wanted].sort().values
        points = [grid.points(features[sample[part]]) for part in chunks(len(sample), chunk)]
        centres = fine_centres(torch.cat(points), wanted)
        sizes, total = torch.zeros(len(centres), dtype=torch.float64), torch.zeros_like(centres)
        total = total.double()
        for part in chunks(len(features), chunk):
            x = grid.points(features[part])
            found = sums(x, torch.ones(len(x)), nearest(x, centres)[0], len(centres))
            sizes, total = sizes + found[0], total + found[1]
        used = sizes > 0
        centres, sizes, total = centres[used], sizes[used], total[used]
        group = grouped(centres, sizes, count, seed, restarts)
        weight = torch.zeros(count, dtype=torch.float64).index_add_(0, group, sizes)
        place = torch.zeros(count, len(grid.mean), dtype=torch.float64).index_add_(0, group, total)
        place = (place / weight[:, None] * grid.unit).float()
        by_place = sorted(range(count), key=lambda k: place[k].tolist())
        number = torch.empty(count, dtype=torch.int64)
        number[by_place] = torch.arange(count)
        return cls(
            grid.mean,
            grid.spread,
            place[by_place],
            weight[by_place] / len(features),
            Fine(centres, number[group]),
        )

    def assign(self, features: Tensor, chunk: int = CHUNK) -> Tensor:
        """Cluster of each row of (n, D) features, (n,) int64."""
        if self.fine is None:
            return torch.cdist((features - self.mean) / self.spread, self.centroids).argmin(1)
        grid, parts = Grid(self.mean, self.spread), []
        for part in chunks(len(features), chunk):
            parts.append(nearest(grid.points(features[part]), self.fine.centres)[0])
        return self.fine.group[torch.cat(parts)]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `assign` needs, for a safetensors file."""
        named = {name: getattr(self, name) for name in ("mean", "spread", "centroids", "priors")}
        if self.fine is not None:
            named |= {"centres": self.fine.centres, "group": self.fine.group}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The clusters of `tensors()`; `ValueError` when they do not fit together."""
        named = dict(tensors)
        parts = [named.pop(name, None) for name in ("centres", "group")]
        try:
            mean, spread, centroids, priors = (
                named.pop(name) for name in ("mean", "spread", "centroids", "priors")
            )
        except KeyError as error:
            raise ValueError(f"not the tensors of clusters: {error}") from error
        centres, group = parts
        fine = None if centres is None or group is None else Fine(centres, group)
        count, sizes = len(priors), {len(mean), len(spread), centroids.shape[-1]}
        good = not named and centroids.shape[:-1] == (count,) and len(sizes) == 1
        if fine is not None:
            sizes.add(fine.centres.shape[-1])
            good = good and len(sizes) == 1 and len(fine.group) == len(fine.centres) > 0
            good = good and 0 <= int(fine.group.min()) <= int(fine.group.max()) < count
        elif centres is not None or group is not None:
            good = False
        if not good:
            raise ValueError("the tensors of the clusters do not fit together")
        return cls(mean, spread, centroids, priors, fine)


def centres_for(clips: int) -> int:
    """Fine centres for so many clips: 1024 from `LARGE` clips on, fewer clips need none (0)."""
    return FINE if clips >= LARGE else 0


def _kmeans(x: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """One run from k-means++ seeds: inertia and centroids. An empty cluster keeps its centroid."""
    centroids = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centroids) < count:
        far = torch.cdist(x, centroids).min(1)[0].square()
        far = far if float(far.sum()) > 0 else torch.ones(len(x), dtype=x.dtype)
        centroids = torch.cat([centroids, x[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(ITERATIONS):
        labels = torch.cdist(x, centroids).argmin(1)
        groups = [x[labels == k] for k in range(count)]
        means = [g.mean(0) if len(g) else centroids[k] for k, g in enumerate(groups)]
        moved = torch.stack(means)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    inertia = float(torch.cdist(x, centroids).min(1)[0].square().sum())
    return inertia, centroids
