"""Shards: safetensors files of cached clips (latents and encoded text), all that training reads.

A shard holds `latents` (n, C, T, H, W) F32, `caption` (n,) I64 into the caption tables `text_seq`
(m, L, D) and `text_pooled` (m, P), the encodings of the empty caption `null_seq` (L, D) and
`null_pooled` (P,), and where the data set has them `first` (n, C, 1, H, W), the first frame encoded
alone, and `features` (n, F). Tables whose parts do not fit together are refused with `ValueError`::

    write_shard(path, table, {"cluster": "0"})
    clips = read_shards([path, other])              # one ClipTable; equal captions are shared
    check_header(prefix, size, shard_schema(n, m, (32, 3, 4, 4), 6, 64, 64))   # protocol's gate
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from paris_models.checkpoint import Schema, load_tensors, raw_bytes, save_tensors
from paris_models.latents import Shape


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
        extra = [t for t in (self.first, self.features) if t is not None]
        if any(len(t) != n for t in extra):
            raise ValueError("first frames and features must be one per clip")

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
            features=None if self.features is None else self.features[index],
        )

    def text(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Text of the clips at `index`: sequence (k, L, D) and pooled (k, P)."""
        caption = self.caption[index]
        return self.text_seq[caption], self.text_pooled[caption]

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors as they stand in a file."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def write_shard(path: Path, table: ClipTable, metadata: Mapping[str, str] | None = None) -> None:
    """Write a shard with the captions that its clips use; deterministic bytes, atomic."""
    used, caption = torch.unique(table.caption, return_inverse=True)
    table = replace(
        table, caption=caption, text_seq=table.text_seq[used], text_pooled=table.text_pooled[used]
    )
    save_tensors(table.tensors(), path, metadata)


def shard_schema(
    clips: int,
    captions: int,
    latent: Shape,
    length: int,
    dim: int,
    pooled_dim: int,
    *,
    first: bool = False,
    features: int = 0,
) -> Schema:
    """The header of a shard of `clips` clips with `captions` captions."""
    channels, _, height, width = latent
    schema: Schema = {
        "latents": ("F32", (clips, *latent)),
        "caption": ("I64", (clips,)),
        "text_seq": ("F32", (captions, length, dim)),
        "text_pooled": ("F32", (captions, pooled_dim)),
        "null_seq": ("F32", (length, dim)),
        "null_pooled": ("F32", (pooled_dim,)),
    }
    if first:
        schema["first"] = ("F32", (clips, channels, 1, height, width))
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


def _table(tensors: dict[str, Tensor]) -> ClipTable:
    try:
        return ClipTable(**tensors)
    except TypeError as error:
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
            features=_joined([t.features for t in tables]),
        )
    except RuntimeError as error:
        raise ValueError(f"the shards do not fit together: {error}") from error


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None
