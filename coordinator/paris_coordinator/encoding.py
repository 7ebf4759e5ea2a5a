"""Encodes captioned videos once, in batches that survive a kill: the expensive half of `prepare`.

Each distinct caption is encoded once, in the order of the sorted captions; then the clips, in the
order of the items. Every finished batch is a safetensors file in the work folder, written whole or
not at all; a new run with the same inputs goes on after what is there. The inputs alone decide what
is in a batch, and encoders run on one CPU thread: the files are the same bits whoever wrote them. A
video or caption that cannot be used is skipped with its code and never stops the run::

    order = Order.of(recipe, items, work)
    Encoder(order, tools).do(("captions", 0))             # work/text-000000.safetensors
    words = read_captions(order)                          # once all captions are there
    found = read_clips(order, words.bad)                  # rows, features, skips
    table = gather(order, found.rows[:100], tools)        # a ClipTable in that order
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from paris_coordinator.captions import Item, Skip
from paris_coordinator.filters import Judge
from paris_coordinator.recipe import Recipe
from paris_coordinator.tools import DECODERS, Tools, decode, stack
from paris_models.checkpoint import read_metadata, save_tensors
from paris_models.rows import pack_rows, unpack_rows
from paris_models.shards import ClipTable
from paris_models.similar import fingerprint
from paris_models.video import Frames

Job = tuple[Literal["captions", "clips"], int]
"""A kind of batch and its number."""
BAD_CAPTIONS = "captions.json"


@dataclass(frozen=True, slots=True)
class Order:
    """What all workers encode: the items and their distinct captions, both sorted."""

    recipe: Recipe
    items: tuple[Item, ...]
    captions: tuple[str, ...]
    work: Path

    @classmethod
    def of(cls, recipe: Recipe, items: Sequence[Item], work: Path) -> Order:
        """The order for these items."""
        return cls(recipe, tuple(items), tuple(sorted({item.caption for item in items})), work)

    def jobs(self, kind: Literal["captions", "clips"]) -> list[Job]:
        """All batches of a kind."""
        count = len(self.captions if kind == "captions" else self.items)
        return [(kind, number) for number in range(-(-count // self.recipe.clips.batch))]

    def path(self, job: Job) -> Path:
        """The file of a batch."""
        kind, number = job
        name = "text" if kind == "captions" else "batch"
        return self.work / f"{name}-{number:06d}.safetensors"

    def span(self, job: Job) -> slice:
        """Which items or captions are in a batch."""
        size = self.recipe.clips.batch
        return slice(job[1] * size, (job[1] + 1) * size)

    def number(self, caption: str) -> int:
        """A caption's place among the captions."""
        return bisect.bisect_left(self.captions, caption)


class Encoder:
    """Encodes batches in one process."""

    def __init__(self, order: Order, tools: Tools) -> None:
        self.order, self.tools = order, tools
        self.judge = Judge.load(order.recipe.filters)
        self._bad: frozenset[str] | None = None

    def do(self, job: Job) -> None:
        """Makes a batch's file, unless it is there. Raises `OSError` for a full disk."""
        path = self.order.path(job)
        if path.exists():
            return
        with one_thread():
            encoded = self._captions(job) if job[0] == "captions" else self._clips(job)
        marks = {"facts": json.dumps(encoded.facts), **self.tools.prints}
        save_tensors(encoded.tensors, path, marks)

    def _captions(self, job: Job) -> _Encoded:
        captions = self.order.captions[self.order.span(job)]
        bad: dict[str, str] = {}
        try:
            seq, pooled = self.tools.text.encode(captions)
        except ValueError:
            bad = self._too_long(captions)
            seq, pooled = self.tools.text.encode(["" if c in bad else c for c in captions])
        facts: dict[str, Any] = {"bad": bad, "square": float(seq.double().square().sum())}
        tensors = {"text_pooled": pooled}
        store = self.order.recipe.text.store
        if store == "float32":
            return _Encoded(tensors | {"text_seq": seq}, facts | {"lost": 0.0})
        codes, scale = pack_rows(seq, store)
        lost = (unpack_rows(codes, scale) - seq).double().square().sum()
        return _Encoded(
            tensors | {"text_seq": codes, "text_scale": scale}, facts | {"lost": float(lost)}
        )

    def _too_long(self, captions: Sequence[str]) -> dict[str, str]:
        bad = {}
        for caption in captions:
            try:
                self.tools.text.encode([caption])
            except ValueError as error:
                bad[caption] = str(error)[:100]
        return bad

    def _clips(self, job: Job) -> _Encoded:
        """Decodes and encodes; never raises for a bad video."""
        if self._bad is None:
            self._bad = frozenset(json.loads((self.order.work / BAD_CAPTIONS).read_text()))
        items = self.order.items[self.order.span(job)]
        usable = [index for index, item in enumerate(items) if item.caption not in self._bad]
        clips: list[_Clip] = []
        skips: list[Skip] = []
        with ThreadPoolExecutor(DECODERS) as pool:
            found = pool.map(lambda index: decode(items[index], self.order.recipe), usable)
            for index, part in zip(usable, found, strict=True):
                if isinstance(part, Skip):
                    skips.append(part)
                    continue
                for frames in part[1]:
                    refusal = self.judge(frames)
                    if refusal is None:
                        clips.append(_Clip(index, part[0], frames))
                    else:
                        skips.append(Skip(items[index].name, *refusal))
        facts = {
            "skips": [[skip.name, skip.code, skip.detail] for skip in skips],
            "digests": [hashlib.sha256(clip.frames.tobytes()).hexdigest() for clip in clips],
        }
        return _Encoded(self._tensors(clips), facts)

    def _tensors(self, clips: Sequence[_Clip]) -> dict[str, Tensor]:
        """Item, bucket and row in the bucket of each clip; latents and features of each bucket."""
        tensors = {"item": torch.tensor([clip.item for clip in clips], dtype=torch.int64)}
        tensors["bucket"] = torch.tensor([clip.bucket for clip in clips], dtype=torch.int64)
        tensors["row"] = torch.zeros(len(clips), dtype=torch.int64)
        prints = [torch.from_numpy(fingerprint(clip.frames).view(np.int64)) for clip in clips]
        tensors["hashes"] = torch.stack(prints) if prints else torch.zeros(0, 0, dtype=torch.int64)
        for bucket in sorted({clip.bucket for clip in clips}):
            places = [place for place, clip in enumerate(clips) if clip.bucket == bucket]
            tensors["row"][places] = torch.arange(len(places))
            pixels = stack([clips[place].frames for place in places])
            tensors |= {f"{bucket}.{k}": t for k, t in self._latents(pixels).items()}
            # Clips of all sizes are clustered together, so by what all of them have.
            seen = pixels[:, :, :1] if len(self.order.recipe.shapes) > 1 else pixels
            tensors[f"{bucket}.features"] = self.tools.features(seen).float().cpu()
        return tensors

    def _latents(self, pixels: Tensor) -> dict[str, Tensor]:
        """Latents (scale applied, once, by the codec), and the frames that are encoded alone.

        An image has none of these: it is its own first and last frame.
        """
        codec, alone = self.tools.codec, self.order.recipe.frames_alone
        found = {"latents": codec.encode(pixels).float().cpu()}
        if pixels.shape[2] == 1:
            return found
        if codec.kind != "patch-pca" or "first" in alone:
            found["first"] = codec.encode_first(pixels).float().cpu()
        if "last" in alone:
            found["last"] = codec.encode_first(pixels[:, :, -1:]).float().cpu()
        return found


class _Clip(NamedTuple):
    item: int
    bucket: int
    frames: Frames


class _Encoded(NamedTuple):
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@contextmanager
def one_thread() -> Iterator[None]:
    """Encoders run on one CPU thread: sums in another order would be other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- what was encoded


class Row(NamedTuple):
    """Where a clip is (batch, bucket, row there), its item, caption and digest of its pixels."""

    batch: int
    bucket: int
    row: int
    item: int
    caption: int
    digest: str


class Found(NamedTuple):
    """All encoded clips in the order of the items, and what was skipped.

    `features` (n, D) float32 and `hashes` (n, k) int64 (`similar.fingerprint`) go with the rows.
    """

    rows: list[Row]
    features: Tensor
    hashes: Tensor
    skips: list[Skip]


class Words(NamedTuple):
    """What became of the captions: those too long with the facts, and the share lost in storing."""

    bad: dict[str, str]
    lost: float


def read_captions(order: Order) -> Words:
    """After all captions are encoded; leaves the list that encoders of clips read.

    `lost` is the root of the squared error of the stored rows over their squares.
    """
    facts = [json.loads(read_metadata(order.path(j))["facts"]) for j in order.jobs("captions")]
    bad = {caption: words for part in facts for caption, words in part["bad"].items()}
    (order.work / BAD_CAPTIONS).write_text(json.dumps(sorted(bad)))
    lost, square = (sum(part[name] for part in facts) for name in ("lost", "square"))
    return Words(bad, (lost / square) ** 0.5 if square else 0.0)


def read_clips(order: Order, bad: dict[str, str]) -> Found:
    """After all clips are encoded."""
    rows: list[Row] = []
    features: list[Tensor] = []
    hashes: list[Tensor] = []
    skips: list[Skip] = []
    for job in order.jobs("clips"):
        items = order.items[order.span(job)]
        facts = json.loads(read_metadata(order.path(job))["facts"])
        with safe_open(order.path(job), framework="pt") as file:
            names = ("item", "bucket", "row")
            places = list(zip(*(file.get_tensor(name).tolist() for name in names), strict=True))
            found = {b: file.get_tensor(f"{b}.features") for b in {place[1] for place in places}}
            hashes += file.get_tensor("hashes")
        start = order.span(job).start
        for (item, bucket, row), digest in zip(places, facts["digests"], strict=True):
            caption = order.number(items[item].caption)
            rows.append(Row(job[1], bucket, row, start + item, caption, digest))
            features.append(found[bucket][row])
        skips += [
            Skip(item.name, "caption.too-long", bad[item.caption])
            for item in items
            if item.caption in bad
        ]
        skips += [Skip(*skip) for skip in facts["skips"]]
    if not rows:
        return Found([], torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64), skips)
    return Found(rows, torch.stack(features), torch.stack(hashes), skips)


def gather(order: Order, rows: Sequence[Row], tools: Tools) -> ClipTable:
    """The clips at `rows`, all of one bucket, in that order, with the table of their captions."""
    used = sorted({row.caption for row in rows})
    number = {caption: index for index, caption in enumerate(used)}
    clips = _picked(order, "clips", [(row.batch, f"{row.bucket}.", row.row) for row in rows])
    if tools.features.kind == "pixel-statistics":  # anybody computes these from the clips
        del clips["features"]
    size = order.recipe.clips.batch
    text = _picked(order, "captions", [(c // size, "text_", c % size) for c in used])
    if "scale" in text:
        text["seq"] = unpack_rows(text["seq"], text.pop("scale"))
    return ClipTable(
        **clips,
        caption=torch.tensor([number[row.caption] for row in rows], dtype=torch.int64),
        text_seq=text["seq"],
        text_pooled=text["pooled"],
        null_seq=tools.null_seq,
        null_pooled=tools.null_pooled,
    )


def _picked(
    order: Order, kind: Literal["captions", "clips"], places: Sequence[tuple[int, str, int]]
) -> dict[str, Tensor]:
    """Rows of the tensors with a prefix, from (batch, prefix, row); only those rows are read."""
    columns: dict[str, list[Any]] = {}
    batches: dict[int, list[int]] = {}
    for place, (batch, _, _) in enumerate(places):
        batches.setdefault(batch, []).append(place)
    for batch, members in sorted(batches.items()):
        prefix = places[members[0]][1]
        with safe_open(order.path((kind, batch)), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                if not name.startswith(prefix):
                    continue
                column = columns.setdefault(name.removeprefix(prefix), [None] * len(places))
                part = file.get_slice(name)
                for place in members:
                    row = places[place][2]
                    column[place] = part[row : row + 1]
    return {name: torch.cat(column) for name, column in columns.items()}


def disk_full(error: OSError) -> bool:
    """Whether the error means that the disk or the quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
