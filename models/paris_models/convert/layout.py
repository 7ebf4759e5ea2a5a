"""Which layout a file of weights has, how large its expert is, and its tensors by diffusers' names.

Three layouts are known: diffusers' own, the single files of Black Forest Labs (q, k and v in one
tensor), and those of Open-Sora (q, k and v apart, rotary pairs half a head apart, the condition in
a layer of its own). Refused with `ValueError`: anything else, and every tensor that is missing, too
many or of another shape, by name::

    source = Source.of(open_weights(path))
    source.config                      # the ExpertConfig that the tensors describe
    source.tensor("x_embedder.weight") # whatever the file calls it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import torch
from torch import Tensor

from paris_models.config import LADDER, ExpertConfig
from paris_models.convert import table
from paris_models.convert.files import WeightFiles
from paris_models.expert import parameter_shapes

Layout = Literal["diffusers", "bfl", "open-sora"]
RopeOrder = Literal["interleaved", "half-split"]
PREFIX: Final = "model.diffusion_model."
"""In front of every name in files that hold a whole pipeline, and in ComfyUI's."""
CONDITION: Final = "cond_in"
KNOWN: Final[dict[str, Layout]] = {
    "x_embedder.weight": "diffusers", "img_in.weight": "bfl"
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model's files, understood."""

    files: WeightFiles
    layout: Layout
    prefix: str
    config: ExpertConfig
    order: RopeOrder
    """How its rotary pairs stand, as its layout or its own metadata say."""

    @classmethod
    def of(cls, files: WeightFiles, order: RopeOrder | None = None) -> Source:
        """Recognise files. `order`, if given, is believed instead of the layout's habit."""
        names = files.places.keys()
        prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
        layout = next((KNOWN[mark] for mark in KNOWN if prefix + mark in names), None)
        if layout is None:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(f"these are not weights of a FLUX transformer: {first}, …")
        if layout == "bfl" and any(name.endswith(".q_proj.weight") for name in names):
            layout = "open-sora"
        habit: RopeOrder = "half-split" if layout == "open-sora" else "interleaved"
        stated = files.metadata.get("paris.rope", habit)
        if stated not in ("interleaved", "half-split"):
            raise ValueError(f"the file's paris.rope is {stated!r}")
        config = _config(files, layout, prefix)
        source = cls(files, layout, prefix, config, order or stated)  # type: ignore[arg-type]
        source._check()
        return source

    @property
    def guidance(self) -> bool:
        """Whether the file has FLUX.1-dev's guidance embedder."""
        return bool(self._guidance & self.files.places.keys())

    @property
    def condition_layer(self) -> bool:
        """Whether the file has Open-Sora's layer for the condition."""
        return self.prefix + CONDITION + ".weight" in self.files.places

    def tensor(self, name: str) -> Tensor:
        """A tensor of the expert, by diffusers' name and in diffusers' order of rows.

        Bitwise what the file holds, but for x_embedder.bias where two layers become one.
        """
        tensor = self.stored(name)
        if self.condition_layer and name.startswith("x_embedder."):
            extra = self.files.read(f"{self.prefix}{CONDITION}.{name.rpartition('.')[2]}")
            if name.endswith(".weight"):
                return torch.cat([tensor, extra.to(tensor.dtype)], dim=1)
            return (tensor.float() + extra.float()).to(tensor.dtype)
        if self.layout != "diffusers" and table.is_swapped(name):
            tensor = table.swap_halves(tensor)
        if self.order == "half-split" and table.is_rotary(name):
            tensor = table.to_interleaved(tensor, self.config.head_dim)
        return tensor

    def stored(self, name: str) -> Tensor:
        """The rows of a tensor of the expert in the order that the file has them."""
        return self.files.read(*self._where[name])

    def dtype(self, name: str) -> str:
        """The dtype of the rows of a tensor of the expert, as safetensors names it."""
        return self.files.places[self._where[name][0]].dtype

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the expert's tensors, as diffusers has them."""
        return parameter_shapes(self.config)

    @cached_property
    def _where(self) -> dict[str, tuple[str, int, int]]:
        """Diffusers' name -> the file's name, first row and the one after the last."""
        if self.layout == "diffusers":
            return {name: (name, 0, shape[0]) for name, shape in self.shapes.items()}
        found = {}
        for row in table.rows(self.config, fused=self.layout == "bfl"):
            begin = 0
            for part in row.parts:
                end = begin + self.shapes[part][0]
                found[part] = (self.prefix + row.name, begin, end)
                begin = end
        return found

    @property
    def _guidance(self) -> set[str]:
        modules = table.GUIDANCE.values() if self.layout == "diffusers" else table.GUIDANCE
        return {f"{self.prefix}{module}.{leaf}" for module in modules for leaf in table.LINEAR}

    def _check(self) -> None:
        """Every tensor is there, has its shape, and there are no others."""
        wanted: dict[str, tuple[int, ...]] = {}
        for part, (name, _, end) in self._where.items():
            wanted[name] = (max(end, wanted.get(name, (0,))[0]), *self.shapes[part][1:])
        if self.condition_layer:
            weight, width = f"{self.prefix}img_in.weight", self.config.width
            wanted[weight] = (width, self.config.out_channels)
            wanted[f"{self.prefix}{CONDITION}.weight"] = (width, self.config.condition_size)
            wanted[f"{self.prefix}{CONDITION}.bias"] = (width,)
        there = self.files.places.keys()
        if missing := sorted(wanted.keys() - there):
            raise ValueError(f"{_some(missing)} missing from a {self.layout} file")
        # A guidance embedder is whole or not there: a part of one is something unknown.
        embedder = self._guidance if self._guidance <= there else set()
        if more := sorted(there - wanted.keys() - embedder):
            raise ValueError(f"{_some(more)} unknown in a {self.layout} file")
        for name, shape in wanted.items():
            if self.files.shape(name) != shape:
                found = list(self.files.shape(name))
                raise ValueError(f"{name} has the shape {found}, expected {list(shape)}")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}: {len(names)} tensors"


def _config(files: WeightFiles, layout: Layout, prefix: str) -> ExpertConfig:
    """The expert that the tensors' shapes describe."""
    ours = layout == "diffusers"

    def sizes(name: str, axes: int = 2) -> tuple[int, ...]:
        shape = files.shape(prefix + name)
        if len(shape) != axes or not all(shape):
            raise ValueError(f"{name} has the shape {list(shape)}, expected {axes} axes")
        return shape

    def outer(bfl: str) -> tuple[int, ...]:
        return sizes(f"{table.OUTER[bfl] if ours else bfl}.weight")

    double = _blocks(files, f"{prefix}{'transformer_blocks' if ours else 'double_blocks'}.")
    single = _blocks(files, f"{prefix}{'single_transformer_blocks' if ours else 'single_blocks'}.")
    if not double:
        raise ValueError("the file has no double blocks")
    scale = "img_attn.norm.query_norm"
    first = f"transformer_blocks.0.{table.DOUBLE_SCALES[scale]}.weight"
    (head,) = sizes(first if ours else f"double_blocks.0.{scale}.scale", 1)
    width, inputs = outer("img_in")
    if f"{prefix}{CONDITION}.weight" in files.places:
        inputs += sizes(f"{CONDITION}.weight")[1]
    if not head or width % head:
        raise ValueError(f"the width {width} is no multiple of a head's {head}")
    outputs = outer("final_layer.linear")[0]
    # A packed condition has one channel more than the latents: C·p² + p² columns.
    patch = round((inputs - 2 * outputs) ** 0.5) if inputs > 2 * outputs else 2
    text, pooled = outer("txt_in")[1], outer("vector_in.in_layer")[1]
    shape = (inputs, outputs, double, single, width // head, head)
    for known in LADDER.values():
        if _numbers(known) == (*shape, text, pooled):
            return known
    return ExpertConfig(patch, *shape, _axes(files.settings, head), text, pooled)


def _numbers(config: ExpertConfig) -> tuple[int, ...]:
    return (
        config.in_channels, config.out_channels, config.double_blocks, config.single_blocks,
        config.heads, config.head_dim, config.text_dim, config.pooled_dim,
    )  # fmt: skip


def _axes(settings: Mapping[str, Any], head: int) -> tuple[int, int, int]:
    """How a head's rows are shared by time, height and width: stated, or FLUX's 16 : 56 : 56."""
    stated = settings.get("axes_dims_rope", [head // 8, head * 7 // 16, head * 7 // 16])
    if not isinstance(stated, list) or len(stated) != 3 or not all(type(x) is int for x in stated):
        raise ValueError(f"axes_dims_rope is {stated!r}, expected three numbers")
    return (stated[0], stated[1], stated[2])


def _blocks(files: WeightFiles, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(found[1]) for name in files.places if (found := pattern.match(name))}
    return len(numbers)
