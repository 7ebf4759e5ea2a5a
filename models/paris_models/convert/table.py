"""The key map between diffusers' FLUX transformer and the files of BFL and of Open-Sora.

One table, read in both directions. A row says that a tensor of the other layout is the rows of one
or several diffusers tensors, one under another; what else differs is the order of rows inside a
part: the halves of the last modulation, and the rotary pairs of Open-Sora's files::

    for row in rows(config, fused=True):
        row.name, row.parts            # "double_blocks.0.img_attn.qkv.weight", (to_q, to_k, to_v)

BFL is Black Forest Labs. Diffusers' own `from_single_file` agrees with the map in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from paris_models.config import ExpertConfig

LINEAR: Final = ("weight", "bias")
OUTER: Final = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
GUIDANCE: Final = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
"""FLUX.1-dev's embedder of the guidance strength: experts have none, so it is left out."""
DOUBLE: Final = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
DOUBLE_SCALES: Final = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE: Final = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
SINGLE_SCALES: Final = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
Modules = dict[str, tuple[str, ...]]
IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

DOUBLE_FUSED: Final[Modules] = {
    "img_attn.qkv": tuple(f"attn.{part}" for part in IMAGE),
    "txt_attn.qkv": tuple(f"attn.{part}" for part in TEXT),
}
DOUBLE_SPLIT: Final[Modules] = {
    f"{stream}_attn.{letter}_proj": (f"attn.{part}",)
    for stream, parts in (("img", IMAGE), ("txt", TEXT))
    for letter, part in zip("qkv", parts, strict=True)
}
SINGLE_FUSED: Final[Modules] = {
    "linear1": (*(f"attn.{part}" for part in IMAGE), "proj_mlp"),
}
SINGLE_SPLIT: Final[Modules] = {
    "q_proj": ("attn.to_q",), "k_proj": ("attn.to_k",), "v_mlp": ("attn.to_v", "proj_mlp"),
}  # fmt: skip

ROTARY: Final = frozenset(
    {"to_q", "to_k", "add_q_proj", "add_k_proj", "norm_q", "norm_k", "norm_added_q", "norm_added_k"}
)
"""Modules whose rows are rotated in pairs: two rows side by side, or half a head apart."""
SWAPPED: Final = "norm_out.linear"
"""Diffusers has (scale, shift) where the others have (shift, scale)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor of the other layout, and the diffusers tensors that it holds, one under another."""

    name: str
    parts: tuple[str, ...]


def rows(config: ExpertConfig, *, fused: bool) -> Iterator[Row]:
    """All tensors of a BFL file (`fused`) or an Open-Sora file without its `cond_in`."""
    yield from _linear("", "", {name: (part,) for name, part in OUTER.items()})
    double: Modules = {name: (part,) for name, part in DOUBLE.items()}
    double |= DOUBLE_FUSED if fused else DOUBLE_SPLIT
    single: Modules = {name: (part,) for name, part in SINGLE.items()}
    single |= SINGLE_FUSED if fused else SINGLE_SPLIT
    for kind, ours, count, modules, scales in (
        ("double_blocks", "transformer_blocks", config.double_blocks, double, DOUBLE_SCALES),
        ("single_blocks", "single_transformer_blocks", config.single_blocks, single, SINGLE_SCALES),
    ):
        for i in range(count):
            yield from _linear(f"{kind}.{i}.", f"{ours}.{i}.", modules)
            for name, part in scales.items():
                yield Row(f"{kind}.{i}.{name}.scale", (f"{ours}.{i}.{part}.weight",))


def _linear(prefix: str, ours: str, modules: Modules) -> Iterator[Row]:
    for name, parts in modules.items():
        for leaf in LINEAR:
            yield Row(f"{prefix}{name}.{leaf}", tuple(f"{ours}{part}.{leaf}" for part in parts))


def is_rotary(name: str) -> bool:
    """Whether rows of this diffusers tensor are rotated in pairs."""
    return name.rsplit(".", 2)[-2] in ROTARY


def is_swapped(name: str) -> bool:
    """Whether the halves of this diffusers tensor stand the other way round elsewhere."""
    return name.rpartition(".")[0] == SWAPPED


def swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) ↔ (scale, shift), on the rows."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def to_interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows half-split → interleaved in each head: new[0::2] = old[:half], new[1::2] = the rest."""
    heads = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def to_half_split(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    heads = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)
