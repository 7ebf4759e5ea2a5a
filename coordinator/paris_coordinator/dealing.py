"""Who gets which clip: clusters, held-out clips, shards.

All clips of a video are in one cluster, and on the same side of the held-out border. Held-out clips
are of the network's own size, bucket 0; a shard holds clips of one bucket. What looks like a
held-out clip of any cluster is dealt to nobody. `recipe.invalid` when a cluster has too few clips::

    rows, features, skips = without_duplicates(rows, features, items)
    clusters, labels = cluster(recipe, rows, features)
    held = hold_out(recipe, 0, [row for row, label in zip(rows, labels) if label == 0])
    near = near_duplicates(recipe, rows, hashes, [held])
    dealt = deal(recipe, held, near)
    dealt.files()                         # {"private/validation0.safetensors": (0, rows), …}
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paris_coordinator.captions import Item, Skip
from paris_coordinator.encoding import Row
from paris_coordinator.recipe import Recipe
from paris_models.clusters import Clusters
from paris_models.noise import permutation
from paris_models.similar import alike
from paris_protocol.errors import ParisError


def without_duplicates(
    rows: list[Row], features: Tensor, items: Sequence[Item]
) -> tuple[list[Row], Tensor, list[Skip]]:
    """Every picture once: a copy among the held-out clips would judge what was trained on."""
    first: dict[str, Row] = {}
    keep: list[int] = []
    skips: list[Skip] = []
    for index, row in enumerate(rows):
        known = first.setdefault(row.digest, row)
        if known is row:
            keep.append(index)
        else:
            skips.append(
                Skip(items[row.item].name, "clip.duplicate", f"of {items[known.item].name}")
            )
    return [rows[i] for i in keep], features[keep] if keep else features, skips


def cluster(recipe: Recipe, rows: Sequence[Row], features: Tensor) -> tuple[Clusters, list[int]]:
    """One cluster per clip; all clips of a video are in the cluster of their mean feature."""
    section = recipe.clusters
    try:
        clusters = Clusters.fit(
            features, section.count, section.seed, section.restarts, section.centres
        )
    except ValueError as error:
        raise ParisError("recipe.invalid", f"clusters.count: {error}") from error
    videos, place = torch.unique(torch.tensor([row.item for row in rows]), return_inverse=True)
    total = torch.zeros(len(videos), features.shape[1]).index_add(0, place, features)
    means = total / torch.bincount(place)[:, None]
    return clusters, clusters.assign(means)[place].tolist()


@dataclass(frozen=True, slots=True)
class Held:
    """One cluster's held-out clips, and the videos that are left, in the order of dealing."""

    index: int
    validation: list[Row]
    audit: list[Row]
    left: list[list[Row]]
    others: list[Row]
    """Clips of other buckets."""

    @property
    def rows(self) -> list[Row]:
        """All that is held out."""
        return self.validation + self.audit


def hold_out(recipe: Recipe, index: int, rows: list[Row]) -> Held:
    """Takes whole videos of bucket 0, in an order that only the seed and the clips decide.

    At most a quarter of the cluster's clips of bucket 0 is held out for each purpose.
    """
    own = [row for row in rows if row.bucket == 0]
    order = _shuffled(recipe, index, 0, own)
    shares: list[list[Row]] = []
    for wanted in (recipe.held_out.validation, recipe.held_out.audit):
        share: list[Row] = []
        limit = min(wanted, len(own) // 4)
        while order and len(share) < limit:
            share += order.pop()
        shares.append(share)
    validation, audit = shares
    return Held(index, validation, audit, order, [row for row in rows if row.bucket])


def near_duplicates(
    recipe: Recipe, rows: Sequence[Row], hashes: Tensor, held: Sequence[Held]
) -> frozenset[int]:
    """Videos (items) of which a clip looks like one that any cluster holds out.

    `hashes` (n, k) int64 are the fingerprints of the rows.
    """
    secret = {row for part in held for row in part.rows}
    kept, prints = [row in secret for row in rows], hashes.numpy().view(np.uint64)
    same_side = {row.item for row in secret}
    if not recipe.held_out.alike:
        return frozenset()
    free = [place for place, row in enumerate(rows) if row.item not in same_side]
    near = alike(prints[free], prints[kept], recipe.held_out.alike)
    return frozenset(rows[free[place]].item for place in np.flatnonzero(near))


class Table(NamedTuple):
    """The clips of a file, all of one bucket."""

    bucket: int
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Dealt:
    """One cluster's clips: shards for training, and what never leaves the coordinator."""

    index: int
    validation: list[Row]
    audit: list[Row]
    shards: list[Table]

    @property
    def training(self) -> int:
        """Number of training clips."""
        return sum(len(shard.rows) for shard in self.shards)

    @property
    def clips(self) -> int:
        """Number of all clips."""
        return self.training + len(self.validation) + len(self.audit)

    def files(self) -> dict[str, Table]:
        """Relative path and clips of every file: validation, audit, then the shards."""
        k = self.index
        named = {f"private/validation{k}.safetensors": Table(0, self.validation)}
        named[f"private/audit{k}.safetensors"] = Table(0, self.audit)
        named |= {f"shards/cluster{k}/shard{i}.safetensors": s for i, s in enumerate(self.shards)}
        return named


def deal(recipe: Recipe, held: Held, near: frozenset[int] = frozenset()) -> Dealt:
    """Deals a cluster's videos but those of `near`, whole.

    The other buckets have as many shards as bucket 0, or one per video where there are fewer.
    """
    order = [video for video in held.left if video[0].item not in near]
    others = [row for row in held.others if row.item not in near]
    shards = _shards(recipe, 0, order)
    if len(shards) < recipe.plan.units or not (held.validation and held.audit):
        own = len(held.rows) + sum(map(len, order))
        few = f"clusters.count: cluster {held.index} has only {own} clips"
        raise ParisError("recipe.invalid", f"{few} of bucket 0" if others else few)
    for bucket in sorted({row.bucket for row in others}):
        same = [row for row in others if row.bucket == bucket]
        shards += _shards(recipe, bucket, _shuffled(recipe, held.index, bucket, same))
    return Dealt(held.index, held.validation, held.audit, shards)


def _shuffled(recipe: Recipe, index: int, bucket: int, rows: list[Row]) -> list[list[Row]]:
    """The videos, each with its clips, in the order in which they are dealt."""
    videos: dict[int, list[Row]] = {}
    for row in rows:
        videos.setdefault(row.item, []).append(row)
    words = f"paris deal {recipe.shards.seed} {index}" + (f" bucket {bucket}" if bucket else "")
    key = hashlib.sha256(words.encode()).digest()[:16]
    return [list(videos.values())[i] for i in permutation(key, len(videos), 0)] if rows else []


def _shards(recipe: Recipe, bucket: int, order: list[list[Row]]) -> list[Table]:
    count = min(recipe.shards.per_cluster, len(order))
    return [
        Table(bucket, [row for video in order[i::count] for row in video]) for i in range(count)
    ]
