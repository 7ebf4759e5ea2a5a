"""LoRA on a frozen expert whose Linears are kept in 16, 8 or 4 bits, in torch alone.

A frozen Linear keeps what is stored, never its float weights: they are made for a product and
dropped, in forward and again in backward. "float8" is e4m3 with a scale per row; "nf4" has two
4-bit normal quantiles per byte and a scale per 64 weights (QLoRA, Dettmers et al. 2023). The factor
A of a module comes from the unit's key, B starts at zero: the expert begins as its base.
What cannot be stored is refused with `ValueError`::

    factors = adapt(model, "nf4", rank=32, key=unit.key)      # {"….to_q.a": A, "….to_q.b": B, …}
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from paris_models import noise
from paris_models.plans import NF4_BLOCK, Base

FLOAT8_MOST: Final = 448.0
_OFFSET: Final = 0.9677083


def normal_levels() -> tuple[float, ...]:
    """The 16 levels of nf4: quantiles of a normal, eight above zero, seven below, and zero."""
    steps = NormalDist().inv_cdf
    above = [steps(_OFFSET + (0.5 - _OFFSET) * i / 8) for i in range(8)]
    below = [-steps(_OFFSET + (0.5 - _OFFSET) * i / 7) for i in range(7)]
    return tuple(sorted(level / above[0] for level in (*below, 0.0, *above)))


LEVELS: Final = normal_levels()


def stored(weight: Tensor, base: Base) -> tuple[Tensor, ...]:
    """A matrix as it is kept: values, and scales where the base has them."""
    exact = weight.float()
    if base == "float8":
        scale = (exact.abs().amax(dim=1, keepdim=True) / FLOAT8_MOST).clamp_(min=1e-12)
        return (exact / scale).to(torch.float8_e4m3fn), scale
    if base == "nf4":
        if exact.numel() % NF4_BLOCK:
            raise ValueError(f"a matrix of {exact.numel()} weights is not whole blocks of 64")
        groups = exact.view(-1, NF4_BLOCK)
        scale = groups.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12)
        levels = torch.tensor(LEVELS, device=weight.device)
        codes = torch.bucketize(groups / scale, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        packed = codes.view(-1, 2)
        return packed[:, 0] << 4 | packed[:, 1], scale
    return (weight.to(torch.bfloat16),)


def dense(kept: tuple[Tensor, ...], base: Base, shape: tuple[int, int]) -> Tensor:
    """The bfloat16 matrix that `stored` keeps."""
    if base == "float8":
        return (kept[0].float() * kept[1]).to(torch.bfloat16)
    if base == "nf4":
        packed, scale = kept
        codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1).to(torch.int32)
        levels = torch.tensor(LEVELS, device=packed.device)
        values = levels.index_select(0, codes).view(-1, NF4_BLOCK)
        return values.mul_(scale).to(torch.bfloat16).view(shape)
    return kept[0]


class _Product(torch.autograd.Function):
    """x Wᵀ with W frozen and stored; only what is stored is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Base, shape: tuple[int, int], *kept: Tensor) -> Tensor:
        ctx.base, ctx.shape = base, shape
        ctx.save_for_backward(*kept)
        return x @ dense(kept, base, shape).mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept = ctx.saved_tensors  # a checkpointed block gives them once
        return gradients[0] @ dense(kept, ctx.base, ctx.shape), None, None, *[None] * len(kept)


class FrozenLinear(nn.Module):
    """A Linear that is not trained, with trained factors beside it where it has a rank.

    Takes (…, in), gives bfloat16 (…, out): x Wᵀ + bias + (x Aᵀ) Bᵀ; A (r, in), B (out, r).
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, base: Base, a: Tensor | None) -> None:
        super().__init__()
        self.base, self.shape = base, (linear.out_features, linear.in_features)
        for number, tensor in enumerate(stored(linear.weight.detach(), base)):
            self.register_buffer(f"kept{number}", tensor)
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.bfloat16))
        self.a = None if a is None else nn.Parameter(a)
        self.b = None if a is None else nn.Parameter(a.new_zeros(self.shape[0], len(a)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.to(torch.bfloat16)
        kept = tuple(t for name, t in self.named_buffers() if name.startswith("kept"))
        out = cast(Tensor, _Product.apply(x, self.base, self.shape, *kept))
        if self.bias is not None:
            out = out + self.bias
        if self.a is None or self.b is None:
            return out
        inner = functional.linear(x, self.a.to(x.dtype))
        return out + functional.linear(inner, self.b.to(x.dtype))


def adapt(model: nn.Module, base: Base, rank: int, key: bytes) -> dict[str, nn.Parameter]:
    """Freeze an expert in place and give the Linears of its blocks factors, except modulation.

    Returns the factors by name, in the order of the modules. Linears outside the blocks stay as
    they are, frozen.
    """
    drawn = first_factors({n: tuple(p.shape) for n, p in model.named_parameters()}, rank, key)
    model.requires_grad_(False)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    factors: dict[str, nn.Parameter] = {}
    for name, linear in linears.items():
        if "transformer_blocks." not in name:
            continue
        a = drawn.get(f"{name}.a")
        where, _, last = name.rpartition(".")
        frozen = FrozenLinear(linear, base, None if a is None else a.to(linear.weight.device))
        setattr(model.get_submodule(where), last, frozen)
        if frozen.a is not None and frozen.b is not None:
            factors |= {f"{name}.a": frozen.a, f"{name}.b": frozen.b}
    return factors


def first_factors(
    shapes: Mapping[str, tuple[int, ...]], rank: int, key: bytes
) -> dict[str, Tensor]:
    """The factors that a unit of this key begins with, whatever the weights beside them are.

    `shapes` are the expert's parameters in the order of its modules (`expert.parameter_shapes`).
    """
    if rank < 1:
        raise ValueError("a rank is at least 1")
    linears = [n for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2]
    factors: dict[str, Tensor] = {}
    for index, name in enumerate(linears):
        if "transformer_blocks." in name and ".norm" not in name:
            module, (outs, ins) = name.removesuffix(".weight"), shapes[name]
            factors[f"{module}.a"] = _first(key, index, rank, ins)
            factors[f"{module}.b"] = torch.zeros(outs, rank)
    return factors


def _first(key: bytes, index: int, rank: int, n: int) -> Tensor:
    """A of module `index`, uniform in ±1/√in, as a Linear of that size would begin."""
    drawn = torch.from_numpy(noise.uniforms(key, noise.FACTORS, 0, index, rank * n))
    first: Tensor = ((2 * drawn - 1) / n**0.5).float().view(rank, n)
    return first
