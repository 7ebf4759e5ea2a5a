"""Shards: safetensors files of cached clips (latents and encoded text), all that training reads.

A shard holds `latents` (n, C, T, H, W) F32, `caption` (n,) I64 into the caption tables `text_seq`
(m, L, D) and `text_pooled` (m, P), the encodings of the empty caption `null_seq` (L, D) and
`null_pooled` (P,), and where the data set has them `first` and `last` (n, C, 1, H, W), the first
and the last frame encoded alone, and `features` (n, F). All clips of a shard are of one size, a
bucket. `text_seq` may be kept in int8 or float8 with `text_scale` (m, L); it is float32 once read.
Tables whose parts do not fit together are refused with `ValueError`::

    write_shard(path, table, {"cluster": "0"})
    clips = read_shards([path, other])              # one ClipTable; equal captions are shared
    clips = read_training([path, images], buckets=[0, 1], batches={1: 45})      # a BucketSet
    table, rows = clips.of_step(unit.key, step=7, batch=12)                     # either has this
    check_header(prefix, size, shard_schema(n, m, (32, 3, 4, 4), 6, 64, 64))   # protocol's gate
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from paris_models import noise
from paris_models.checkpoint import Schema, load_tensors, raw_bytes, save_tensors
from paris_models.latents import Shape
from paris_models.rows import DTYPES, Store, pack_rows, unpack_rows


@dataclass(frozen=True, slots=True, eq=False)
class ClipTable:
    """Cached clips and the encodings of their captions (shapes: module docstring)."""

    latents: Tensor
    caption: Tensor
    text_seq: Tensor
    text_pooled: Tensor
    null_seq: Tensor
    null_pooled: Tensor
    first: Tensor | None = None
    last: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        n, captions = len(self.latents), len(self.text_seq)
        if self.latents.ndim != 5 or self.caption.shape != (n,):
            raise ValueError("latents must be (n, C, T, H, W) with one caption index per clip")
        if self.caption.dtype != torch.int64 or self.latents.dtype != torch.float32:
            raise ValueError("latents must be float32 and caption indices int64")
        if n and not 0 <= int(self.caption.min()) <= int(self.caption.max()) < captions:
            raise ValueError("a caption index lies outside the caption table")
        if len(self.text_pooled) != captions or (
            (self.null_seq.shape, self.null_pooled.shape)
            != (self.text_seq.shape[1:], self.text_pooled.shape[1:])
        ):
            raise ValueError("sequence, pooled and null text do not fit together")
        extra = [t for t in (self.first, self.last, self.features) if t is not None]
        if any(len(t) != n for t in extra):
            raise ValueError("first and last frames and features must be one per clip")

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def shape(self) -> Shape:
        """(C, T, H, W) of a clip's latents."""
        channels, frames, height, width = self.latents.shape[1:]
        return channels, frames, height, width

    def rows(self, index: Tensor) -> ClipTable:
        """The clips at `index` (k,) int64, with the same caption tables."""
        return replace(
            self,
            latents=self.latents[index],
            caption=self.caption[index],
            first=None if self.first is None else self.first[index],
            last=None if self.last is None else self.last[index],
            features=None if self.features is None else self.features[index],
        )

    def text(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Text of the clips at `index`: sequence (k, L, D) and pooled (k, P)."""
        caption = self.caption[index]
        return self.text_seq[caption], self.text_pooled[caption]

    def of_step(self, key: bytes, step: int, batch: int) -> tuple[ClipTable, Tensor]:
        """The table that a step trains on and the rows of its clips there, (batch,)."""
        return self, torch.from_numpy(noise.batch_rows(key, len(self), step, batch))

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors as they stand in a file."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True, eq=False)
class BucketSet:
    """Clips of several sizes: a table for each bucket, and how many of its clips a step takes.

    A step trains on one bucket, drawn in proportion to clips ÷ batch, so that on average every clip
    of every bucket is seen equally often, as in Open-Sora. Bucket 0 takes the unit's own batch.
    """

    tables: Mapping[int, ClipTable]
    batches: Mapping[int, int]

    def __post_init__(self) -> None:
        if not self.tables or any(len(table) == 0 for table in self.tables.values()):
            raise ValueError("every bucket has clips")
        if any(self.batches.get(bucket, 0) < 1 for bucket in self.tables if bucket):
            raise ValueError("every bucket but the first names its clips per step, at least 1")
        kinds = {(t.shape[0], t.null_seq.shape, t.null_pooled.shape) for t in self.tables.values()}
        if len(kinds) > 1:
            raise ValueError("the buckets differ in channels or in the size of their text")

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables.values())

    def of_step(self, key: bytes, step: int, batch: int) -> tuple[ClipTable, Tensor]:
        """The table that a step trains on and the rows of its clips there, (its batch,)."""
        order = sorted(self.tables)
        sizes = [self.batches[bucket] if bucket else batch for bucket in order]
        common = math.lcm(*sizes)
        weights = [
            len(self.tables[bucket]) * (common // size)
            for bucket, size in zip(order, sizes, strict=True)
        ]
        place, visit = noise.bucket_of(key, step, weights)
        bucket, table = order[place], self.tables[order[place]]
        rows = noise.batch_rows(key, len(table), visit, sizes[place], bucket)
        return table, torch.from_numpy(rows)


Clips = ClipTable | BucketSet
"""What a unit trains on."""


def write_shard(
    path: Path,
    table: ClipTable,
    metadata: Mapping[str, str] | None = None,
    store: Store = "float32",
) -> None:
    """Write a shard with the captions that its clips use; deterministic bytes, atomic.

    `store` is how their sequences are kept (`rows.pack_rows`).
    """
    used, caption = torch.unique(table.caption, return_inverse=True)
    table = replace(
        table, caption=caption, text_seq=table.text_seq[used], text_pooled=table.text_pooled[used]
    )
    tensors = table.tensors()
    if store != "float32":
        tensors["text_seq"], tensors["text_scale"] = pack_rows(tensors["text_seq"], store)
    save_tensors(tensors, path, metadata)


def store_of(dtype: str) -> Store:
    """How text is kept, by the dtype of a header's `text_seq`; float32 for any other."""
    return next((store for store, name in DTYPES.items() if name == dtype), "float32")


def check_encoders(metadata: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """That a shard was made by these encoders: fingerprints by name, `codec`, `text`, `features`.

    Raises `ValueError` naming the first that is another one. What a shard does not say is not
    checked: those of version 0.1 say nothing.
    """
    for name, fingerprint in wanted.items():
        found = metadata.get(name, fingerprint)
        if found != fingerprint:
            raise ValueError(f"{name}: made by {found[:16]}…, not by {fingerprint[:16]}…")


def shard_schema(
    clips: int,
    captions: int,
    latent: Shape,
    length: int,
    dim: int,
    pooled_dim: int,
    *,
    first: bool = False,
    last: bool = False,
    features: int = 0,
    store: Store = "float32",
) -> Schema:
    """The header of a shard of `clips` clips with `captions` captions."""
    channels, _, height, width = latent
    schema: Schema = {
        "latents": ("F32", (clips, *latent)),
        "caption": ("I64", (clips,)),
        "text_seq": (DTYPES[store], (captions, length, dim)),
        "text_pooled": ("F32", (captions, pooled_dim)),
        "null_seq": ("F32", (length, dim)),
        "null_pooled": ("F32", (pooled_dim,)),
    }
    for name, has in (("first", first), ("last", last)):
        if has:
            schema[name] = ("F32", (clips, channels, 1, height, width))
    if store != "float32":
        schema["text_scale"] = ("F32", (captions, length))
    if features:
        schema["features"] = ("F32", (clips, features))
    return schema


def read_shards(paths: Iterable[Path]) -> ClipTable:
    """All clips of the given shards in the given order; captions that are equal are merged.

    Raises `ValueError` when there is no shard, a tensor is missing or unknown, or shards differ
    in shape or null text.
    """
    tables = [_table(load_tensors(path)) for path in paths]
    if not tables:
        raise ValueError("there are no shards to read")
    return concatenate(tables)


def read_training(
    paths: Sequence[Path], buckets: Sequence[int], batches: Mapping[int, int]
) -> Clips:
    """All clips of a unit's shards: `buckets` names each shard's, `batches` the clips per step.

    Shards of bucket 0 alone give a plain table. Raises `ValueError` as `read_shards` does, for
    another number of buckets than of shards, and for a bucket without clips per step.
    """
    if len(paths) != len(buckets):
        raise ValueError("every shard is of one bucket")
    if not any(buckets):
        return read_shards(paths)
    found: dict[int, list[Path]] = {}
    for path, bucket in zip(paths, buckets, strict=True):
        found.setdefault(bucket, []).append(path)
    return BucketSet({bucket: read_shards(part) for bucket, part in found.items()}, batches)


def _table(tensors: dict[str, Tensor]) -> ClipTable:
    try:
        if "text_scale" in tensors:
            tensors["text_seq"] = unpack_rows(tensors["text_seq"], tensors.pop("text_scale"))
        return ClipTable(**tensors)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"that is no shard: {error}") from error


def concatenate(tables: Sequence[ClipTable]) -> ClipTable:
    """One table of all clips in order. Raises `ValueError` when the tables do not fit."""
    if len(tables) == 1:
        return tables[0]
    head = tables[0]
    if not all(torch.equal(t.null_seq, head.null_seq) for t in tables):
        raise ValueError("the shards have different null text")
    places: dict[tuple[bytes, bytes], int] = {}
    keep: list[tuple[Tensor, Tensor]] = []
    captions = []
    for table in tables:
        lookup = []
        for seq, pooled in zip(table.text_seq, table.text_pooled, strict=True):
            place = places.setdefault((bytes(raw_bytes(seq)), bytes(raw_bytes(pooled))), len(keep))
            if place == len(keep):
                keep.append((seq, pooled))
            lookup.append(place)
        captions.append(torch.tensor(lookup, dtype=torch.int64)[table.caption])
    try:
        return ClipTable(
            latents=torch.cat([t.latents for t in tables]),
            caption=torch.cat(captions),
            text_seq=torch.stack([seq for seq, _ in keep]),
            text_pooled=torch.stack([pooled for _, pooled in keep]),
            null_seq=head.null_seq,
            null_pooled=head.null_pooled,
            first=_joined([t.first for t in tables]),
            last=_joined([t.last for t in tables]),
            features=_joined([t.features for t in tables]),
        )
    except RuntimeError as error:
        raise ValueError(f"the shards do not fit together: {error}") from error


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None
