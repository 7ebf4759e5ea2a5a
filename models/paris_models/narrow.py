"""AdamW's moments in 8 bits: codes in blocks of 256 values that share a scale, in torch alone.

Both scales are of powers, finer near zero: the first moment is scale · sign(c) · (c/127)², rounded
to the nearest; the second is scale · (c/255)⁴, rounded up or down with the odds that keep its mean,
because a decay of a thousandth per step is less than half a code and would never happen. Its random
bits are the counter-based ones of `rounding`. A code of the second moment is never zero in a block
that has one, so that no step divides by nothing::

    state = fresh((3072, 64), device)              # four tensors: codes and scales of both moments
    mean, square = read(state, shape)              # float32
    write(state, mean, square, seed_of(unit.key, step, index))
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from paris_models.plans import MOMENT_BLOCK
from paris_models.rounding import CHUNK, Seed, bits16

_SIGNED: Final = 127
_SQUARE: Final = 255


def fresh(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Moments that are zero: `exp_avg` int8 and `exp_avg_sq` uint8 (n,), `…_scale` (blocks,)."""
    n = prod(shape)
    blocks = -(-n // MOMENT_BLOCK)
    return {
        "exp_avg": torch.zeros(n, dtype=torch.int8, device=device),
        "exp_avg_scale": torch.zeros(blocks, device=device),
        "exp_avg_sq": torch.zeros(n, dtype=torch.uint8, device=device),
        "exp_avg_sq_scale": torch.zeros(blocks, device=device),
    }


def read(state: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Both moments as float32 of a parameter's shape."""
    codes = state["exp_avg"].float().div_(_SIGNED)
    mean = _scaled(codes.mul_(codes.abs()), state["exp_avg_scale"])
    levels = _levels(state["exp_avg_sq"].device)
    square = _scaled(levels[state["exp_avg_sq"].int()], state["exp_avg_sq_scale"])
    return mean.view(shape), square.view(shape)


@torch.no_grad()
def write(state: Mapping[str, Tensor], mean: Tensor, square: Tensor, seed: Seed) -> None:
    """Keep float32 moments, piece by piece: what a piece becomes does not depend on the cut."""
    flat_mean, flat_square = mean.reshape(-1), square.reshape(-1)
    for start in range(0, flat_mean.numel(), CHUNK):
        here = slice(start, start + CHUNK)
        blocks = slice(start // MOMENT_BLOCK, (start + CHUNK) // MOMENT_BLOCK)
        part, scale = _normal(flat_mean[here])
        state["exp_avg_scale"][blocks] = scale
        codes = part.abs().sqrt_().mul_(_SIGNED).round_().copysign_(part)
        state["exp_avg"][here] = codes.to(torch.int8)
        part, scale = _normal(flat_square[here])
        state["exp_avg_sq_scale"][blocks] = scale
        state["exp_avg_sq"][here] = _rounded(part, bits16(seed, start, len(part), part.device))


def _rounded(part: Tensor, drawn: Tensor) -> Tensor:
    """Codes (n,) uint8 of second moments in [0, 1]: the level below, or the one above it."""
    levels = _levels(part.device)
    below = part.sqrt().sqrt_().mul_(_SQUARE).floor_().clamp_(0, _SQUARE - 1).int()
    low, high = levels[below], levels[below + 1]
    odds = (part - low).div_(high - low)
    up = drawn.float().mul_(2.0**-16) < odds
    return (below + up).clamp_(min=1).to(torch.uint8)


def _levels(device: torch.device) -> Tensor:
    exact = torch.arange(_SQUARE + 1, dtype=torch.float64).div_(_SQUARE)
    return (exact**4).float().to(device)


def _blocks(flat: Tensor) -> Tensor:
    return functional.pad(flat, (0, -flat.numel() % MOMENT_BLOCK)).view(-1, MOMENT_BLOCK)


def _normal(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n,) by their block's largest magnitude, and those (blocks,)."""
    blocks = _blocks(flat)
    scale = blocks.abs().amax(dim=1)
    normal = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return normal.view(-1)[: flat.numel()], scale


def _scaled(flat: Tensor, scale: Tensor) -> Tensor:
    return _blocks(flat).mul(scale[:, None]).view(-1)[: flat.numel()]
