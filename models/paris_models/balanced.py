"""Balanced k-means in two levels on an integer grid: the same bits on every machine.

Points are rows of whole numbers in a ball of radius `RADIUS`, so that every scalar product is a
whole number below 2²⁴: exact in float32 in whatever order a library sums. Fine centres come from
halving: the largest part is cut in two by 2-means, neither side with less than a third, until there
are enough. Groups of centres come from k-means over them, and are then evened out. Everything runs
in chunks of rows. Equal distances go to the lowest number; what is no number is refused
(`ValueError`)::

    grid = Grid.of(features)                          # (n, D), float32
    centres = fine_centres(grid.points(sample), 1024)
    labels, cost = nearest(grid.points(features), centres)
    group = grouped(centres, torch.bincount(labels), count=8, seed=0, restarts=8)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

RADIUS: Final = 4000
"""4000² < 2²⁴, with room for rounding up to 30,000 dimensions."""
REACH: Final = 2.0
"""Rows further from the mean than this many times the root mean square are shortened to it."""
CHUNK: Final = 8192
"""Rows that are worked on at once."""
SLACK: Final = 0.25
"""A group's size may differ from the mean by this part of it, give or take the largest centre."""
ITERATIONS: Final = 50
CUTS: Final = 12
"""Rounds of 2-means for one cut."""


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover `count`."""
    return (slice(start, start + size) for start in range(0, count, size))


@dataclass(frozen=True, slots=True)
class Grid:
    """How features become points: mean and spread (D,) float32."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Tensor, chunk: int = CHUNK) -> Self:
        """Mean and spread of (n, D) features from exact sums, so that no order matters."""
        parts = [features[part] for part in chunks(len(features), chunk)]
        most = torch.stack([part.abs().amax(0) for part in parts]).amax(0).double()
        if not most.isfinite().all():
            raise ValueError("features must be finite numbers")
        scale = 2.0**20 / most.clamp(min=1e-30)
        total = torch.zeros(len(most), dtype=torch.int64)
        squares = torch.zeros(len(most), dtype=torch.int64)
        for part in parts:
            whole = (part.double() * scale).round().long()
            total += whole.sum(0)
            squares += whole.square().sum(0)
        n = len(features)
        mean = total.double() / n
        variance = (squares.double() / n - mean.square()).clamp(min=0) * (n / max(1, n - 1))
        spread = (variance.sqrt() / scale).float().clamp(min=1e-6)
        return cls((mean / scale).float(), spread)

    @property
    def unit(self) -> float:
        """One step of the grid, in units of the spread."""
        return REACH * math.sqrt(len(self.mean)) / RADIUS

    def points(self, features: Tensor) -> Tensor:
        """(n, D) features as whole numbers in float32, each row at most `RADIUS` long."""
        z = (features.double() - self.mean.double()) / self.spread.double() / self.unit
        z = z.clamp(-(2.0**20), 2.0**20).round()
        length = z.square().sum(1, keepdim=True).sqrt()
        return (z * (RADIUS / length.clamp(min=RADIUS))).round().float()


def nearest(x: Tensor, centres: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Nearest centre of each point, (n,) int64, and its squared distance, (n,) float64."""
    labels = torch.empty(len(x), dtype=torch.int64)
    costs = torch.empty(len(x), dtype=torch.float64)
    lengths = centres.double().square().sum(1)
    for part in chunks(len(x), chunk):
        scores = (x[part] @ centres.T).double().mul_(-2).add_(lengths)
        labels[part] = best = scores.argmin(1)
        own = scores.gather(1, best[:, None])[:, 0]
        costs[part] = own + x[part].double().square().sum(1)
    return labels, costs


def sums(x: Tensor, weights: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weight (count,) and weighted sum (count, D) of the points of each label, float64, exact."""
    total = torch.zeros(count, x.shape[1], dtype=torch.float64)
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, weights.double())
    for part in chunks(len(x), CHUNK):
        total.index_add_(0, labels[part], x[part].double() * weights[part, None].double())
    return sizes, total


def means(x: Tensor, weights: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """The rounded weighted mean of each label's points; one without any stays where it was."""
    sizes, total = sums(x, weights, labels, len(before))
    found = (total / sizes.clamp(min=1)[:, None]).round().float()
    return torch.where(sizes[:, None] > 0, found, before)


# ---------------------------------------------------------------- fine centres


def fine_centres(x: Tensor, count: int) -> Tensor:
    """At most `count` centres (C, D): means of parts of the points of which none is large.

    No part has more than three times the points of another, but where points are equal: those
    cannot be cut, and there are fewer centres where nothing can be.
    """
    parts: list[tuple[int, int, Tensor]] = [(-len(x), 0, torch.arange(len(x)))]
    whole: list[Tensor] = []
    made = 0
    while parts and len(parts) + len(whole) < count:
        _, _, rows = heapq.heappop(parts)
        left = _cut(x[rows])
        if left is None:
            whole.append(rows)
            continue
        for side in (rows[left], rows[~left]):
            made += 1
            heapq.heappush(parts, (-len(side), made, side))
    members = [*whole, *(rows for _, _, rows in sorted(parts, key=lambda part: part[1]))]
    labels = torch.empty(len(x), dtype=torch.int64)
    for number, rows in enumerate(members):
        labels[rows] = number
    return means(x, torch.ones(len(x)), labels, torch.zeros(len(members), x.shape[1]))


def _cut(x: Tensor) -> Tensor | None:
    """Which of the points lie on the one side of a cut by 2-means, (n,) bool; None if all are one.

    Neither side has less than a third of the points, as far as their projections differ.
    """
    ones, none = torch.ones(len(x)), torch.zeros(len(x), dtype=torch.int64)
    middle = means(x, ones, none, x[:1])
    one = x[int(nearest(x, middle)[1].argmax())]
    pair = torch.stack([one, middle[0]])
    least = -(-len(x) // 3)
    left: Tensor | None = None
    for _ in range(CUTS):
        direction = ((pair[0] - pair[1]) / 2).round()
        along = (x @ direction).double()
        order = along.sort().values
        border = float((pair[0] + pair[1]).double() @ direction.double()) / 2
        if left is None:
            border = float(order[len(x) // 2])
        border = min(max(border, float(order[least])), float(order[len(x) - least]))
        side = along < border
        if not side.any():
            side = along <= border
        if side.all():
            return None
        if left is not None and torch.equal(left, side):
            break
        left = side
        pair = means(x, ones, side.long(), pair)
    return left


# ---------------------------------------------------------------- groups of centres


def grouped(
    centres: Tensor, sizes: Tensor, count: int, seed: int, restarts: int, slack: float = SLACK
) -> Tensor:
    """The group of each centre, (C,) int64: k-means weighted by size, the best of some starts.

    No group is empty, and every one ends within (1 ± `slack`) times the mean size, give or take
    the largest centre. Raises `ValueError` with fewer different centres than groups.
    """
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(restarts):
        middles = _spread_out(centres, sizes, count, generator)
        for _ in range(ITERATIONS):
            labels, _ = nearest(centres, middles)
            moved = means(centres, sizes, labels, middles)
            if torch.equal(moved, middles):
                break
            middles = moved
        labels = _evened(centres, sizes, nearest(centres, middles)[0], count, slack)
        own = means(centres, sizes, labels, middles)[labels]
        away = (centres.double() - own.double()).square().sum(1)
        cost = float((away * sizes.double()).sum())
        if best is None or cost < best[0]:
            best = cost, labels
    assert best is not None
    return best[1]


def _spread_out(x: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Start by k-means++: rows drawn by weight times squared distance, all of them different."""
    chance = weights.long()
    rows: list[int] = []
    least = torch.full((len(x),), math.inf, dtype=torch.float64)
    while len(rows) < count:
        ladder = chance.cumsum(0)
        if int(ladder[-1]) == 0:
            raise ValueError(f"{len(rows)} different centres cannot make {count} clusters")
        at = torch.randint(int(ladder[-1]), (1,), generator=generator)
        rows.append(int(torch.searchsorted(ladder, at, right=True)))
        least = torch.minimum(least, nearest(x, x[rows[-1:]])[1])
        chance = weights.long() * least.long()
    return x[rows]


def _evened(x: Tensor, weights: Tensor, labels: Tensor, count: int, slack: float) -> Tensor:
    """Labels of weighted points such that no group is empty and none is far from the mean size.

    Points leave the largest group, or enter the smallest, by the shortest detour. Each move makes
    the sum of the squared sizes less, so they come to an end.
    """
    labels, weights = labels.clone(), weights.double()
    mean, most = float(weights.sum()) / count, float(weights.max())
    middles = torch.zeros(count, x.shape[1])
    while True:
        sizes, _ = sums(x, weights, labels, count)
        middles = means(x, weights, labels, middles)
        far = middles.double().square().sum(1) - 2 * (x @ middles.T).double()
        detour = far - far.gather(1, labels[:, None])
        alone = torch.bincount(labels, minlength=count)
        large, small = int(sizes.argmax()), int(sizes.argmin())
        if not alone.all():
            small, allowed = int(alone.argmin()), alone[labels] > 1
        elif float(sizes[large]) > (1 + slack) * mean + most:
            detour[:, sizes > mean] = math.inf
            allowed = labels == large
        elif float(sizes[small]) < (1 - slack) * mean - most:
            allowed = sizes[labels] >= mean
        else:
            return labels
        detour[~allowed] = math.inf
        if not alone.all() or float(sizes[large]) <= (1 + slack) * mean + most:
            labels[int(detour[:, small].argmin())] = small
        else:
            point = int(detour.min(1).values.argmin())
            labels[point] = int(detour[point].argmin())
