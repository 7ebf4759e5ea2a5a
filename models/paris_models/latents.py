"""Latents (n, C, T, H, W) and the tokens that a transformer reads.

A token holds a patch × patch square of one latent frame in the order (channel, row, column); its
id is (frame, row, column) from zero, without scaling by the frame rate.
Sizes that the patch does not divide are refused with `ValueError`::

    tokens = pack(x, 2)                            # (n, 16, 9, 32, 32) -> (n, 2304, 64)
    x == unpack(tokens, (16, 9, 32, 32), 2)
    ids = image_ids(9, 32, 32, 2)                  # (2304, 3)
"""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
"""(C, T, H, W) of one clip's latents."""


def pack(x: Tensor, patch: int) -> Tensor:
    """Latents (n, C, T, H, W) as tokens (n, T·H/p·W/p, C·p²)."""
    n, channels, frames, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"{height} × {width} latents cannot be cut into patches of {patch}")
    rows, columns = height // patch, width // patch
    x = x.reshape(n, channels, frames, rows, patch, columns, patch)
    x = x.permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(n, frames * rows * columns, channels * patch**2)


def unpack(tokens: Tensor, shape: Shape, patch: int) -> Tensor:
    """Tokens (n, N, C·p²) as latents (n, *shape); the inverse of `pack`."""
    channels, frames, height, width = shape
    rows, columns = height // patch, width // patch
    x = tokens.reshape(len(tokens), frames, rows, columns, channels, patch, patch)
    x = x.permute(0, 4, 1, 2, 5, 3, 6)
    return x.reshape(len(tokens), *shape)


def image_ids(frames: int, height: int, width: int, patch: int) -> Tensor:
    """Positions (frame, row, column) of the tokens of T × H × W latents, (N, 3) float32."""
    axes = (torch.arange(frames), torch.arange(height // patch), torch.arange(width // patch))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).float()


def condition(mask: Tensor, reference: Tensor, patch: int) -> Tensor:
    """Packed condition of a 132-input expert, (n, N, (C+1)·p²).

    `mask` (n, 1, T, H, W) is one where `reference` (n, C, T, H, W) holds known latents.
    """
    return pack(torch.cat([mask, reference * mask], dim=1), patch)


def first_frame_condition(first: Tensor, frames: int, patch: int) -> Tensor:
    """Condition of image-to-video: the separately encoded first frame (n, C, 1, H, W) is known."""
    n, channels, _, height, width = first.shape
    reference = first.new_zeros(n, channels, frames, height, width)
    reference[:, :, :1] = first
    mask = first.new_zeros(n, 1, frames, height, width)
    mask[:, :, 0] = 1
    return condition(mask, reference, patch)
