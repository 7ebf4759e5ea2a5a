"""Encodes captioned videos once, in batches that survive a kill: the expensive half of `prepare`.

Every finished batch is a safetensors file in the work folder, written whole or not at all; a new
run with the same inputs goes on after the last one. A video or caption that cannot be used is
skipped with its code and never stops the run::

    tools = Tools.load(recipe, items, work, progress)
    rows, features, skips = encode_all(items, recipe, tools, work, progress)
    table = gather(work, rows[:100], tools)               # a ClipTable in that order
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paris_coordinator.captions import Item, Skip
from paris_coordinator.recipe import Recipe
from paris_models.checkpoint import load_tensors, read_metadata, save_tensors
from paris_models.clusters import Features, PixelStatistics
from paris_models.codec import Codec, PatchPCA
from paris_models.shards import ClipTable
from paris_models.text import HashedWords, TextEncoder
from paris_models.video import Frames, VideoError, read_clips
from paris_protocol.errors import ParisError

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, parts done and parts in all."""
DECODERS: Final = 2
"""Threads that decode; PyAV releases the interpreter lock inside FFmpeg."""
TEXT_FILE: Final = "text.safetensors"
CODEC_FILE: Final = "codec.safetensors"


@dataclass(frozen=True, slots=True)
class Tools:
    """The three encoders of a network and the null text."""

    codec: Codec
    text: TextEncoder
    features: Features
    null_seq: Tensor
    null_pooled: Tensor

    @classmethod
    def load(cls, recipe: Recipe, items: Sequence[Item], work: Path, progress: Progress) -> Tools:
        """The recipe's encoders; small ones that it does not pin are fitted on the clips.

        Raises `recipe.invalid` when one cannot be loaded, `encoder.mismatch` when its
        fingerprint is not the recipe's.
        """
        codec = _codec(recipe, items, work, progress)
        text = _text(recipe, items)
        features = _features(recipe)
        for name, tool, wanted in (
            ("codec", codec, recipe.codec.fingerprint),
            ("text", text, recipe.text.fingerprint),
            ("features", features, recipe.features.fingerprint),
        ):
            if wanted is not None and tool.fingerprint != wanted:
                raise ParisError("encoder.mismatch", f"{name}: {tool.fingerprint[:16]}…")
        if codec.channels != recipe.codec.channels:
            raise ParisError("recipe.invalid", f"codec.channels: the codec has {codec.channels}")
        if (text.length, text.dim, text.pooled_dim) != (
            recipe.text.length, recipe.text.dim, recipe.pooled_dim,
        ):  # fmt: skip
            raise ParisError("recipe.invalid", "text: the encoder has another length or size")
        null_seq, null_pooled = text.encode([""])
        return cls(codec, text, features, null_seq[0], null_pooled[0])

    def small_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The encoders that travel with the network, by file name."""
        pairs = ((CODEC_FILE, self.codec), (TEXT_FILE, self.text))
        return {
            name: tool.tensors() for name, tool in pairs if isinstance(tool, PatchPCA | HashedWords)
        }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _refused(field: str, error: Exception) -> ParisError:
    return ParisError("recipe.invalid", f"{field}: {str(error)[:150]}")


def _codec(recipe: Recipe, items: Sequence[Item], work: Path, progress: Progress) -> Codec:
    section = recipe.codec
    if section.kind != "patch-pca":
        from paris_models import encoders  # loads diffusers' VAEs, which small networks never need

        try:
            if section.kind == "hunyuan-vae":
                return encoders.HunyuanVAE.from_pretrained(section.source, device=_device())
            return encoders.WanVAE.from_pretrained(section.source, device=_device())
        except (OSError, ValueError) as error:
            raise _refused("codec.source", error) from error
    made = work / CODEC_FILE
    if section.file is None and not made.exists():
        save_tensors(_fitted(recipe, items, progress).tensors(), made)
    try:
        path = made if section.file is None else recipe.file(section.file)
        codec = PatchPCA.from_tensors(load_tensors(path))
        codec.latent_grid(recipe.geometry.frames, recipe.geometry.height, recipe.geometry.width)
    except (ValueError, SafetensorError) as error:
        raise _refused("codec.file", error) from error
    return codec


def _fitted(recipe: Recipe, items: Sequence[Item], progress: Progress) -> PatchPCA:
    """A codec fitted on clips from all over the folder."""
    stride = max(1, len(items) // recipe.codec.fit_clips)
    chosen = items[::stride][: recipe.codec.fit_clips]
    clips: list[Frames] = []
    with ThreadPoolExecutor(DECODERS) as pool:
        for done, found in enumerate(pool.map(lambda item: _decode(item, recipe), chosen), 1):
            clips += [] if isinstance(found, Skip) else found[:1]
            progress("codec", done, len(chosen))
    if not clips:
        raise ParisError("clips.none", "no clip to fit the codec on")
    section = recipe.codec
    try:
        return PatchPCA.fit(_stack(clips), section.channels, section.patch, section.block)
    except (ValueError, RuntimeError) as error:
        raise _refused("codec", error) from error


def _text(recipe: Recipe, items: Sequence[Item]) -> TextEncoder:
    section = recipe.text
    if section.kind != "hashed-words":
        from paris_models import encoders

        try:
            return encoders.T5Clip.from_pretrained(
                section.source, length=section.length, device=_device()
            )
        except (OSError, ValueError) as error:
            raise _refused("text.source", error) from error
    if section.file is None:
        captions = {item.caption for item in items}
        short = [c for c in captions if len(c.split()) < section.length]
        return HashedWords.fit(short, section.length, section.dim)
    try:
        return HashedWords.from_tensors(load_tensors(recipe.file(section.file)))
    except (ValueError, SafetensorError) as error:
        raise _refused("text.file", error) from error


def _features(recipe: Recipe) -> Features:
    if recipe.features.kind == "pixel-statistics":
        return PixelStatistics()
    from paris_models import encoders

    try:
        return encoders.Dino.from_pretrained(recipe.features.source, device=_device())
    except (OSError, ValueError) as error:
        raise _refused("features.source", error) from error


def _stack(clips: Sequence[Frames]) -> Tensor:
    """RGB frames as uint8 clips (n, 3, F, H, W)."""
    return torch.stack([torch.from_numpy(clip).permute(3, 0, 1, 2) for clip in clips])


def _decode(item: Item, recipe: Recipe) -> list[Frames] | Skip:
    try:
        return read_clips(item.read(), recipe.geometry, recipe.clips.stride, recipe.clips.most)
    except VideoError as error:
        return Skip(item.name, error.code, error.detail)
    except OSError as error:
        return Skip(item.name, "clip.truncated", (error.strerror or str(error))[:100])


class Row(NamedTuple):
    """Where an encoded clip is: batch file and row, item, caption, digest of its pixels."""

    batch: int
    row: int
    item: int
    caption: str
    digest: str


def batch_path(work: Path, number: int) -> Path:
    """The file of a batch."""
    return work / f"batch-{number:06d}.safetensors"


def encode_all(
    items: Sequence[Item], recipe: Recipe, tools: Tools, work: Path, progress: Progress
) -> tuple[list[Row], Tensor, list[Skip]]:
    """Encodes what is not encoded yet: rows in the order of the items, features (n, D), skips."""
    rows: list[Row] = []
    features: list[Tensor] = []
    skips: list[Skip] = []
    size = recipe.clips.batch
    with ThreadPoolExecutor(DECODERS) as pool:
        for number, start in enumerate(range(0, len(items), size)):
            path, part = batch_path(work, number), items[start : start + size]
            if not path.exists():
                encoded = _encode_batch(part, recipe, tools, pool)
                save_tensors(encoded.tensors, path, {"facts": json.dumps(encoded.facts)})
            found, feature, skipped = _read_batch(path, number, start, items)
            rows += found
            skips += skipped
            features.append(feature)
            progress("encode", min(start + size, len(items)), len(items))
    return rows, torch.cat(features), skips


class _Encoded(NamedTuple):
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def _encode_batch(
    items: Sequence[Item], recipe: Recipe, tools: Tools, pool: ThreadPoolExecutor
) -> _Encoded:
    """Decodes and encodes one batch; never raises for a bad video or caption."""
    skips: list[Skip] = []
    captions: dict[str, tuple[Tensor, Tensor]] = {}
    usable: list[int] = []
    for index, item in enumerate(items):
        try:
            if item.caption not in captions:
                seq, pooled = tools.text.encode([item.caption])
                captions[item.caption] = (seq[0], pooled[0])
            usable.append(index)
        except ValueError as error:
            skips.append(Skip(item.name, "caption.too-long", str(error)[:100]))
    clips: list[Frames] = []
    of_item: list[int] = []
    for index, found in zip(
        usable, pool.map(lambda i: _decode(items[i], recipe), usable), strict=True
    ):
        if isinstance(found, Skip):
            skips.append(found)
        else:
            clips += found
            of_item += [index] * len(found)
    facts = {
        "skips": [[skip.name, skip.code, skip.detail] for skip in skips],
        "digests": [hashlib.sha256(clip.tobytes()).hexdigest() for clip in clips],
    }
    used = sorted({items[index].caption for index in of_item})
    tensors = {"item": torch.tensor(of_item, dtype=torch.int64), "features": torch.zeros(0, 0)}
    if clips:
        stacked = _stack(clips)
        tensors["latents"] = tools.codec.encode(stacked).float().cpu()
        if tools.codec.kind != "patch-pca":
            tensors["first"] = tools.codec.encode_first(stacked).float().cpu()
        tensors["features"] = tools.features(stacked).float().cpu()
        tensors["text_seq"] = torch.stack([captions[caption][0] for caption in used])
        tensors["text_pooled"] = torch.stack([captions[caption][1] for caption in used])
    return _Encoded(tensors, facts | {"captions": used})


def _read_batch(
    path: Path, number: int, start: int, items: Sequence[Item]
) -> tuple[list[Row], Tensor, list[Skip]]:
    facts = json.loads(read_metadata(path)["facts"])
    with safe_open(path, framework="pt") as file:
        indices, features = file.get_tensor("item").tolist(), file.get_tensor("features")
    rows = [
        Row(number, row, start + index, items[start + index].caption, digest)
        for row, (index, digest) in enumerate(zip(indices, facts["digests"], strict=True))
    ]
    if not rows:
        return [], torch.zeros(0), [Skip(*skip) for skip in facts["skips"]]
    return rows, features, [Skip(*skip) for skip in facts["skips"]]


def gather(work: Path, rows: Sequence[Row], tools: Tools) -> ClipTable:
    """The clips at `rows`, in that order, with the table of their captions."""
    captions = sorted({row.caption for row in rows})
    number = {caption: i for i, caption in enumerate(captions)}
    columns: dict[str, list[Any]] = {"latents": [None] * len(rows)}
    columns |= {"first": [None] * len(rows), "features": [None] * len(rows)}
    texts: list[Any] = [None] * len(captions)
    for batch, places in _by_batch(rows):
        path = batch_path(work, batch)
        known = {c: i for i, c in enumerate(json.loads(read_metadata(path)["facts"])["captions"])}
        tensors = load_tensors(path)
        for place in places:
            row = rows[place]
            for name, column in columns.items():
                column[place] = tensors[name][row.row] if name in tensors else None
            local = known[row.caption]
            texts[number[row.caption]] = (tensors["text_seq"][local], tensors["text_pooled"][local])
    keep_features = tools.features.kind != "pixel-statistics"
    return ClipTable(
        latents=torch.stack(columns["latents"]),
        caption=torch.tensor([number[row.caption] for row in rows], dtype=torch.int64),
        text_seq=torch.stack([seq for seq, _ in texts]),
        text_pooled=torch.stack([pooled for _, pooled in texts]),
        null_seq=tools.null_seq,
        null_pooled=tools.null_pooled,
        first=torch.stack(columns["first"]) if columns["first"][0] is not None else None,
        features=torch.stack(columns["features"]) if keep_features else None,
    )


def _by_batch(rows: Sequence[Row]) -> Iterator[tuple[int, list[int]]]:
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.batch, []).append(place)
    yield from sorted(places.items())


def disk_full(error: OSError) -> bool:
    """Whether the error means that the disk or the quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
