"""Release folders in the layout of Paris 1: written piece by piece, loaded expert by expert.

`model_index.json` names the parts as diffusers does and holds, under `_paris`, what sampling needs
(objective, sampler, geometry). Experts are plain `FluxTransformer2DModel` folders. Only safetensors
are read. What is missing raises `FileNotFoundError`, what does not fit `ValueError`::

    release = load_release(Path("release"))
    text = release.text.encode(["a red ball moves left"])
    clips = generate(release, text, seed=7)                          # uint8 (1, 3, F, H, W)
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast, overload

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codec import Codec, PatchPCA
from paris_models.config import ExpertConfig, RecipeConfig, SamplerConfig
from paris_models.ensemble import Ensemble
from paris_models.expert import expert_from
from paris_models.flow import shift_for
from paris_models.router import Router
from paris_models.text import HashedWords, TextEncoder

INDEX = "model_index.json"
LATER: Final = frozenset({"conditions", "null_image", "time_path", "ema"})
"""Fields of a recipe that came after version 0.1."""


@dataclass(frozen=True, slots=True)
class Part:
    """The codec or the text encoder of a release: its kind and source, tensors if it is small."""

    kind: str
    source: str
    fingerprint: str
    numbers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ReleaseSettings:
    """What sampling needs beside the weights."""

    expert: ExpertConfig
    recipe: RecipeConfig
    sampler: SamplerConfig
    latent: tuple[int, int, int, int]
    clip: tuple[int, int, int, int]
    """Frames, height, width, frames per second."""


# ---------------------------------------------------------------- writing


def write_expert(folder: Path, config: ExpertConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """An expert's folder, as diffusers writes it; loads with plain diffusers."""
    model = expert_from(config, weights)
    model.save_pretrained(folder, safe_serialization=True)


def write_part(folder: Path, part: Part, tensors: Path | None) -> None:
    """`codec/` or `text/`: its description, and its tensors where they are part of the release."""
    folder.mkdir(parents=True)
    if tensors is not None:
        save_tensors(load_tensors(tensors), folder / f"{folder.name}.safetensors")
    _write_json(folder / "config.json", asdict(part))


def write_index(folder: Path, settings: ReleaseSettings, experts: int) -> None:
    """`model_index.json` and `scheduler/`, the last pieces of the models' part of a release."""
    sampler = settings.sampler
    shift = shift_for(sampler.shift, *settings.latent[1:])
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "ParisPipeline",
        "_diffusers_version": diffusers.__version__,
        "_paris": {"format": 1, "experts": experts, **asdict(settings)},
    }
    # A reader one version behind does not know the later fields of a recipe.
    same = {f.name for f in fields(RecipeConfig) if getattr(settings.recipe, f.name) == f.default}
    for name in same & LATER:
        del index["_paris"]["recipe"][name]
    for expert in range(experts):
        index[f"expert_{expert}"] = ["diffusers", "FluxTransformer2DModel"]
    index["router"] = ["paris_models.router", "Router"]
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    _write_json(folder / INDEX, index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- loading


class Experts(Sequence[Any]):
    """The experts of a release, each loaded when it is first used; at most `resident` stay."""

    def __init__(self, folder: Path, count: int, resident: int) -> None:
        self._folder, self._count, self._resident = folder, count, max(1, resident)
        self._loaded: OrderedDict[int, Any] = OrderedDict()
        self.loads = 0

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Expert `index`, evaluated and without gradients; loading may drop the least recent."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index not in self._loaded:
            while len(self._loaded) >= self._resident:
                self._loaded.popitem(last=False)
            model = FluxTransformer2DModel.from_pretrained(
                self._folder / f"expert_{index}", use_safetensors=True, local_files_only=True
            )
            self._loaded[index] = model.eval().requires_grad_(False)
            self.loads += 1
        self._loaded.move_to_end(index)
        return self._loaded[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._count))


class LoadedRelease:
    """A release folder with its parts loaded on first use; `experts` may be any sequence."""

    def __init__(self, folder: Path, settings: ReleaseSettings, experts: Sequence[Any]) -> None:
        self.folder, self.settings, self.experts = folder, settings, experts

    @cached_property
    def router(self) -> Router:
        """The router, ready to be asked."""
        return load_router(self.folder / "router")

    @cached_property
    def codec(self) -> Codec:
        """The codec; big ones are loaded from the source that the release names."""
        kind, source, tensors, _ = self._part("codec")
        return load_codec(kind, source, tensors)

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder; big ones are loaded from the source that the release names."""
        kind, source, tensors, numbers = self._part("text")
        return load_text(kind, source, tensors, numbers["length"])

    def _part(self, name: str) -> tuple[str, str, Path, dict[str, int]]:
        folder = self.folder / name
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return config["kind"], config["source"], folder / f"{name}.safetensors", config["numbers"]

    def sample(
        self,
        text: tuple[torch.Tensor, torch.Tensor],
        key: bytes,
        sampler: SamplerConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Clips of encoded prompts from the noise of `key`, with every setting given."""
        null_seq, null_pooled = self.text.encode([""])
        settings = self.settings
        router = self.router if len(self.experts) > 1 else None
        ensemble = Ensemble(
            self.experts, router, settings.expert, settings.recipe, null_seq[0], null_pooled[0]
        )
        latents = ensemble.sample(*text, settings.latent, key, sampler, callback=progress)
        return self.codec.decode(latents)


def load_router(folder: Path) -> Router:
    """A router that is ready to be asked."""
    router: Router = Router.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    router.requires_grad_(False).eval()
    return router


def load_codec(kind: str, source: str, tensors: Path | None = None) -> Codec:
    """The codec of a manifest: from its tensors if it is small, else from its named source."""
    if kind == PatchPCA.kind and tensors is not None:
        return PatchPCA.from_tensors(load_tensors(tensors))
    from paris_models.encoders import HunyuanVAE, WanVAE

    for large in (HunyuanVAE, WanVAE):
        if kind == large.kind:
            return cast(Codec, large.from_pretrained(source))
    raise ValueError(f"unknown codec {kind!r}")


def load_text(
    kind: str, source: str, tensors: Path | None = None, length: int = 512
) -> TextEncoder:
    """The text encoder of a manifest: from its tensors if it is small, else from its source."""
    if kind == HashedWords.kind and tensors is not None:
        return HashedWords.from_tensors(load_tensors(tensors))
    from paris_models.encoders import T5Clip

    if kind != T5Clip.kind:
        raise ValueError(f"unknown text encoder {kind!r}")
    encoder: TextEncoder = T5Clip.from_pretrained(source, length=length)
    return encoder


def generate(
    release: LoadedRelease,
    text: tuple[torch.Tensor, torch.Tensor],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    top_k: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """A clip per encoded prompt, uint8 (n, 3, F, H, W); `text` as `release.text.encode` gives it.

    A function of text, seed and settings; prompt i starts from noise i of the seed. What is not
    given is the release's own default.
    """
    default = release.settings.sampler
    sampler = SamplerConfig(
        steps=default.steps if steps is None else steps,
        shift=default.shift,
        guidance=default.guidance if guidance is None else guidance,
        top_k=default.top_k if top_k is None else top_k,
    )
    key = hashlib.sha256(f"paris/sample/1 {seed}".encode()).digest()[:16]
    return release.sample(text, key, sampler, progress)


def load_release(folder: Path, *, resident: int = 1 << 30) -> LoadedRelease:
    """Read a release's index; models load on first use, at most `resident` experts at once."""
    index = json.loads((folder / INDEX).read_text("utf-8"))
    try:
        found = index["_paris"]
        if found["format"] != 1:
            raise ValueError(f"release format {found['format']}")
        expert = found["expert"]
        settings = ReleaseSettings(
            expert=ExpertConfig(**{**expert, "rope_axes": tuple(expert["rope_axes"])}),
            recipe=RecipeConfig(**found["recipe"]),
            sampler=SamplerConfig(**found["sampler"]),
            latent=tuple(found["latent"]),
            clip=tuple(found["clip"]),
        )
        count = int(found["experts"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{INDEX} is not that of a Paris release: {error}") from error
    return LoadedRelease(folder, settings, Experts(folder, count, resident))
