"""The encoders of a network, as `prepare` and its workers load them from a recipe.

Small encoders that the recipe does not pin are fitted on the clips once and kept in the work
folder, so that every process has the same. Raised: `recipe.invalid` for what cannot be loaded or
does not fit the expert, `encoder.mismatch` for another fingerprint than the recipe's::

    tools = Tools.load(recipe, items, work, progress)
    tools.prints                                  # {"codec": hex, "text": hex, "features": hex}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from paris_coordinator.captions import Item, Skip
from paris_coordinator.recipe import Recipe
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.clusters import Features, PixelStatistics
from paris_models.codec import Codec, PatchPCA
from paris_models.text import HashedWords, TextEncoder
from paris_models.video import Frames, VideoError, read_bucketed
from paris_protocol.errors import ParisError

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, parts done and parts in all."""
DECODERS: Final = 2
"""Threads that decode; PyAV releases the interpreter lock inside FFmpeg."""
TEXT_FILE: Final = "text.safetensors"
CODEC_FILE: Final = "codec.safetensors"


@dataclass(frozen=True, slots=True)
class Tools:
    """The three encoders of a network, the null text and the encoders' fingerprints."""

    codec: Codec
    text: TextEncoder
    features: Features
    null_seq: Tensor
    null_pooled: Tensor
    prints: Mapping[str, str]

    @classmethod
    def load(cls, recipe: Recipe, items: Sequence[Item], work: Path, progress: Progress) -> Tools:
        """The recipe's encoders; small ones that it does not pin are fitted on the clips."""
        codec = _codec(recipe, items, work, progress)
        text = _text(recipe, items, work)
        features = _features(recipe)
        prints = {
            "codec": codec.fingerprint,
            "text": text.fingerprint,
            "features": features.fingerprint,
        }
        for name, found in prints.items():
            wanted = getattr(recipe, name).fingerprint
            if wanted is not None and found != wanted:
                raise ParisError("encoder.mismatch", f"{name}: {found[:16]}…")
        _check_sizes(recipe, codec, text)
        null_seq, null_pooled = text.encode([""])
        return cls(codec, text, features, null_seq[0], null_pooled[0], prints)

    def small_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The encoders that travel with the network, by file name."""
        pairs = ((CODEC_FILE, self.codec), (TEXT_FILE, self.text))
        return {
            name: tool.tensors() for name, tool in pairs if isinstance(tool, PatchPCA | HashedWords)
        }


def _check_sizes(recipe: Recipe, codec: Codec, text: TextEncoder) -> None:
    if codec.channels != recipe.codec.channels:
        raise ParisError("recipe.invalid", f"codec.channels: the codec has {codec.channels}")
    if (text.length, text.dim, text.pooled_dim) != (
        recipe.text.length, recipe.text.dim, recipe.pooled_dim,
    ):  # fmt: skip
        raise ParisError("recipe.invalid", "text: the encoder has another length or size")
    patch = recipe.expert.config().patch
    for index, shape in enumerate(recipe.shapes):
        field = f"buckets: bucket {index}" if index else "geometry"
        try:
            _, height, width = codec.latent_grid(shape.frames, shape.height, shape.width)
        except ValueError as error:
            raise ParisError("recipe.invalid", f"{field}: {error}") from error
        if height % patch or width % patch:
            grid = f"{height}×{width} latents, patches of {patch}"
            raise ParisError("recipe.invalid", f"{field}: the expert cannot take it ({grid})")


def device() -> str:
    """Where encoders run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def refused(field: str, error: Exception) -> ParisError:
    """`recipe.invalid` with the field and the cause."""
    return ParisError("recipe.invalid", f"{field}: {str(error)[:150]}")


def _codec(recipe: Recipe, items: Sequence[Item], work: Path, progress: Progress) -> Codec:
    section = recipe.codec
    if section.kind != "patch-pca":
        from paris_models import encoders  # loads diffusers' VAEs, which small networks never need

        try:
            if section.kind == "hunyuan-vae":
                return encoders.HunyuanVAE.from_pretrained(section.source, device=device())
            return encoders.WanVAE.from_pretrained(section.source, device=device())
        except (OSError, ValueError) as error:
            raise refused("codec.source", error) from error
    made = work / CODEC_FILE
    if section.file is None and not made.exists():
        save_tensors(_fitted(recipe, items, progress).tensors(), made)
    try:
        path = made if section.file is None else recipe.file(section.file)
        return PatchPCA.from_tensors(load_tensors(path))
    except (ValueError, SafetensorError) as error:
        raise refused("codec.file", error) from error


def _fitted(recipe: Recipe, items: Sequence[Item], progress: Progress) -> PatchPCA:
    """A codec fitted on clips of the network's own size from all over the folder."""
    stride = max(1, len(items) // recipe.codec.fit_clips)
    chosen = items[::stride][: recipe.codec.fit_clips]
    clips: list[Frames] = []
    with ThreadPoolExecutor(DECODERS) as pool:
        for done, found in enumerate(pool.map(lambda item: decode(item, recipe), chosen), 1):
            clips += [] if isinstance(found, Skip) or found[0] else found[1][:1]
            progress("codec", done, len(chosen))
    if not clips:
        raise ParisError("clips.none", "no clip to fit the codec on")
    section = recipe.codec
    try:
        return PatchPCA.fit(stack(clips), section.channels, section.patch, section.block)
    except (ValueError, RuntimeError) as error:
        raise refused("codec", error) from error


def _text(recipe: Recipe, items: Sequence[Item], work: Path) -> TextEncoder:
    section = recipe.text
    if section.kind != "hashed-words":
        from paris_models import encoders

        try:
            return encoders.T5Clip.from_pretrained(
                section.source, length=section.length, device=device()
            )
        except (OSError, ValueError) as error:
            raise refused("text.source", error) from error
    made = work / TEXT_FILE
    if section.file is None and not made.exists():
        captions = {item.caption for item in items}
        short = [c for c in captions if len(c.split()) < section.length]
        save_tensors(HashedWords.fit(short, section.length, section.dim).tensors(), made)
    try:
        path = made if section.file is None else recipe.file(section.file)
        return HashedWords.from_tensors(load_tensors(path))
    except (ValueError, SafetensorError) as error:
        raise refused("text.file", error) from error


def _features(recipe: Recipe) -> Features:
    if recipe.features.kind == "pixel-statistics":
        return PixelStatistics()
    from paris_models import encoders

    try:
        return encoders.Dino.from_pretrained(recipe.features.source, device=device())
    except (OSError, ValueError) as error:
        raise refused("features.source", error) from error


def stack(clips: Sequence[Frames]) -> Tensor:
    """RGB frames as uint8 clips (n, 3, F, H, W)."""
    return torch.stack([torch.from_numpy(clip).permute(3, 0, 1, 2) for clip in clips])


def decode(item: Item, recipe: Recipe) -> tuple[int, list[Frames]] | Skip:
    """The bucket of a video and its clips, or why it is left out; never raises for a bad video."""
    try:
        return read_bucketed(item.read(), recipe.shapes, recipe.clips.stride, recipe.clips.most)
    except VideoError as error:
        return Skip(item.name, error.code, error.detail)
    except OSError as error:
        return Skip(item.name, "clip.truncated", (error.strerror or str(error))[:100])
