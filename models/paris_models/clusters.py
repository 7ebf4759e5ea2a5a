"""Clusters of clips: k-means on features, deterministic, with published centroids and priors.

Features are six fixed pixel statistics (small networks) or DINOv2's first-frame feature
(`paris_models.encoders.Dino`). Clusters are numbered by their centroids, so the same data give
the same numbers whatever the seed found first::

    features = pixel_statistics(clips)                       # (n, 6)
    clusters = Clusters.fit(features, count=3, seed=0)
    labels = clusters.assign(features)                       # (n,) int64; clusters.priors sum to 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol, Self

import torch
from torch import Tensor

ITERATIONS: Final = 50


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
class Clusters:
    """Centroids (K, D) in standardised features, and the share of the clips in each cluster."""

    mean: Tensor
    spread: Tensor
    centroids: Tensor
    priors: Tensor

    @classmethod
    def fit(cls, features: Tensor, count: int, seed: int = 0, restarts: int = 8) -> Self:
        """k-means++ with restarts on standardised features; `ValueError` with too few clips."""
        if len(features) < count:
            raise ValueError(f"{len(features)} clips cannot make {count} clusters")
        mean, spread = features.mean(0), features.std(0).nan_to_num().clamp(min=1e-6)
        x = ((features - mean) / spread).double()
        generator = torch.Generator().manual_seed(seed)
        tries = [_kmeans(x, count, generator) for _ in range(restarts)]
        centroids = min(tries, key=lambda found: found[0])[1]
        centroids = torch.tensor(sorted(centroids.tolist())).float()
        labels = torch.cdist(x.float(), centroids).argmin(1)
        priors = torch.bincount(labels, minlength=count).double() / len(x)
        return cls(mean, spread, centroids, priors)

    def assign(self, features: Tensor) -> Tensor:
        """Index of the nearest centroid of each row, (n,) int64."""
        return torch.cdist((features - self.mean) / self.spread, self.centroids).argmin(1)


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
