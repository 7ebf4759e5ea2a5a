"""Reading weights that may be larger than memory: a tensor at a time, from a file or its shards.

Refused with `ValueError` that names the file or the tensor: what is not a whole safetensors file,
shards that disagree with their index, dtypes other than the three plain ones, values that are not
finite. The strict header gate comes before this, as for every tensor file::

    files = open_weights(Path("FLUX.1-schnell"))       # a folder of diffusers, or a single file
    files.read("x_embedder.weight")                    # a copy; the file is closed again
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES: Final = ("F32", "BF16", "F16")
STEM: Final = "diffusion_pytorch_model"
"""How diffusers names the weights of a model in its folder."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is, its dtype and shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The tensors of one model by name, none of them loaded; `settings` is its config.json."""

    places: dict[str, Place]
    metadata: dict[str, str]
    settings: dict[str, Any]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows `begin` to `end` of a tensor, as a copy on the CPU; `ValueError` if not finite."""
        # Opened anew each time: pages of a mapped file that stays open count as memory in use.
        with safe_open(self.places[name].path, framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[begin:end].clone()
        if not is_finite(tensor):
            raise ValueError(f"{name} holds values that are not finite")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; `ValueError` when it is missing."""
        if name not in self.places:
            raise ValueError(f"the tensor {name} is missing")
        return self.places[name].shape


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; unlike `isfinite` this makes no copy of them."""
    low, high = tensor.aminmax()
    return math.isfinite(low) and math.isfinite(high)


def weight_paths(source: Path) -> list[Path]:
    """The tensor files of a model: a file, diffusers' folder of it, or a pipeline's folder."""
    if source.is_file():
        return [source]
    folder = model_folder(source)
    index = folder / f"{STEM}.safetensors.index.json"
    if not index.is_file():
        whole = folder / f"{STEM}.safetensors"
        if not whole.is_file():
            raise ValueError(f"{source} holds no {STEM}.safetensors and no index of its shards")
        return [whole]
    names = sorted(set(_index(index).values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"the shard {missing[0]} is missing from {folder}")
    return [folder / name for name in names]


def model_folder(source: Path) -> Path:
    """The folder with the model's config.json: `source`, or `transformer` in it."""
    for folder in (source, source / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{source} is neither a tensor file nor a folder with a config.json")


def open_weights(source: Path) -> WeightFiles:
    """All headers of a model's files, read and compared; no tensor is loaded."""
    places: dict[str, Place] = {}
    metadata: dict[str, str] = {}
    for path in weight_paths(source):
        for name, place in _header(path, metadata).items():
            if name in places:
                raise ValueError(f"{name} stands in two shards")
            places[name] = place
    settings: dict[str, Any] = {}
    if source.is_dir():
        folder = model_folder(source)
        settings = _json(folder / "config.json")
        index = folder / f"{STEM}.safetensors.index.json"
        if index.is_file() and (odd := sorted(_index(index).keys() ^ places.keys())):
            raise ValueError(f"index and shards disagree about {odd[0]}")
    return WeightFiles(places, metadata, settings)


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Place]:
    places = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata.update(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                places[name] = Place(path, part.get_dtype(), tuple(part.get_shape()))
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file: {error}") from error
    odd = sorted(name for name, place in places.items() if place.dtype not in DTYPES)
    if odd:
        dtype = places[odd[0]].dtype
        raise ValueError(f"{odd[0]} is {dtype}: only {', '.join(DTYPES)} files are converted")
    return places


def _index(path: Path) -> dict[str, str]:
    table = _json(path).get("weight_map")
    if not isinstance(table, dict) or not all(_is_plain(name) for name in table.values()):
        raise ValueError(f"{path.name} is not an index of shards")
    return table


def _is_plain(name: object) -> bool:
    """Whether an index names a file of its own folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value
