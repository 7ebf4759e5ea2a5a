"""Small experts and changes for the tests of codecs, and their factors."""

from __future__ import annotations

import torch
from torch import Tensor

from paris_models.checkpoint import raw_bytes
from paris_models.codecs import lora_modules

SHAPES: dict[str, tuple[int, ...]] = {
    "context_embedder.weight": (0, 3),
    "proj_out.bias": (3,),
    "proj_out.weight": (40, 13),
    "single_transformer_blocks.0.norm.linear.weight": (10, 4),
    "single_transformer_blocks.0.proj_mlp.weight": (30, 12),
    "transformer_blocks.1.attn.to_q.bias": (1,),
    "transformer_blocks.1.attn.to_q.weight": (9, 20),
}


def change(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """A change of all tensors whose sizes differ from tensor to tensor."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=g) * 10.0 ** -float(torch.rand((), generator=g) * 3)
        for name, shape in shapes.items()
    }


def factors(seed: int, rank: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Factors of all modules, of one rank."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for module, (out, into) in lora_modules(shapes).items():
        made[f"{module}.a"] = torch.randn(rank, into, generator=g)
        made[f"{module}.b"] = torch.randn(out, rank, generator=g) * 1e-3
    return made


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and raw_bytes(one[n]) == raw_bytes(other[n])
        for n in one
    )
