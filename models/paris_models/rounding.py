"""Bfloat16 weights that do not lose small updates: stochastic rounding and a Kahan residual.

The random bits of stochastic rounding are counter-based: Philox4x32-10 on the device that rounds,
seeded from the unit's key, the step and the parameter's number by the unit's own streams. They are
integers, so that every device draws the same, and depend on nothing that was drawn before::

    round_to(weight, exact, seed_of(unit.key, step, index))     # weight: bfloat16, exact: float32
    add_with_residual(weight, residual, update)                 # both bfloat16, update: float32
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from paris_models import noise

CHUNK: Final = 1 << 17
"""Values that are rounded at once; a multiple of the eight that a counter gives."""
_LOW: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)


class Seed(NamedTuple):
    """Two 32-bit words of key, and the two upper words of the counter."""

    key: tuple[int, int]
    upper: tuple[int, int]


def seed_of(key: bytes, step: int, index: int) -> Seed:
    """The seed of parameter number `index` at a step; `ValueError` for a key not of 16 bytes."""
    first, second = (int(w) for w in noise.words_batch(key, noise.ROUNDING, step, (index,), 2)[0])
    return Seed((first & _LOW, first >> 32), (second & _LOW, second >> 32))


def philox(seed: Seed, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Words of the counters start … start + count, (count, 4) of int64 below 2³²."""
    block = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x0, x1 = block & _LOW, (block >> 32) & _LOW
    x2, x3 = torch.full_like(block, seed.upper[0]), torch.full_like(block, seed.upper[1])
    k0, k1 = seed.key
    for _ in range(10):
        # The products wrap around as int64; their bits are those of the unsigned ones.
        left, right = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((right >> 32) & _LOW) ^ x1 ^ k0, right & _LOW,
            ((left >> 32) & _LOW) ^ x3 ^ k1, left & _LOW,
        )  # fmt: skip
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((x0, x1, x2, x3), dim=1)


def bits16(seed: Seed, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random 16-bit values of places start … start + count, (count,) of int32.

    `start` is a multiple of eight; the value of a place does not depend on how places are cut.
    """
    words = philox(seed, start // 8, -(-count // 8), device)
    pairs = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    return pairs.flatten()[:count].to(torch.int32)


@torch.no_grad()
def round_to(weight: Tensor, exact: Tensor, seed: Seed) -> None:
    """Set bfloat16 `weight` to float32 `exact`, up or down with the odds that keep the mean.

    Magnitudes are rounded: 16 random bits are added below the ones that stay, then cut off.
    """
    if weight.dtype != torch.bfloat16 or exact.dtype != torch.float32:
        raise ValueError("float32 is rounded to bfloat16")
    flat, source = weight.view(-1), exact.contiguous().view(-1)
    for start in range(0, flat.numel(), CHUNK):
        piece = source[start : start + CHUNK].view(torch.int32)
        drawn = piece + bits16(seed, start, piece.numel(), piece.device)
        flat[start : start + CHUNK] = (drawn & -0x10000).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def add_with_residual(weight: Tensor, residual: Tensor, update: Tensor) -> None:
    """Add a float32 `update` to bfloat16 weight + residual, which keep 16 bits of it together."""
    exact = weight.float().add_(residual).add_(update)
    weight.copy_(exact)
    residual.copy_(exact.sub_(weight))
