"""The small declared codec: a causal patch-PCA between pixels and latents, and how codecs are made.

Patches of the first frame and blocks of the following frames are projected onto their leading
principal components; the latents of the first frame depend on nothing else. It is a stand-in for
a video VAE at demo size and says so in the manifest. What it cannot represent is refused with
`ValueError`::

    codec = PatchPCA.fit(clips, channels=32)          # uint8 (n, 3, 9, 24, 24)
    latents = codec.encode(clips)                     # (n, 32, 3, 4, 4) float32
    again = PatchPCA.from_tensors(codec.tensors())    # codec.decode(latents) -> uint8 clips
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from paris_models.checkpoint import raw_bytes


class Codec(Protocol):
    """What every codec offers; `prepare` and the generation of videos use nothing else."""

    kind: str
    channels: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the weights and settings."""

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (T, H, W) of a clip."""

    def encode(self, clips: Tensor) -> Tensor:
        """uint8 clips (n, 3, F, H, W) as float32 latents (n, C, T', H', W'), scale applied."""

    def encode_first(self, clips: Tensor) -> Tensor:
        """Latents (n, C, 1, H', W') of the first frame, encoded alone."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as uint8 clips."""


def pixels(clips: Tensor) -> Tensor:
    """uint8 clips as float32 in [−1, 1]."""
    return clips.float() / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """Floats in [−1, 1] (clamped) as uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fingerprint(tensors: Mapping[str, Tensor], settings: str = "") -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of the tensors, in order of their names."""
    total = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()


class Projection(NamedTuple):
    """Leading components of one kind of patch: mean (P,), basis (P, C), scale (C,)."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, patches: Tensor, channels: int) -> Projection:
        """Components by falling variance, each divided by the root of its standard deviation.

        One gain makes the whole of unit spread. The largest entry of a component is positive, so
        that the basis does not depend on the solver's choice of sign.
        """
        rows = patches.reshape(-1, patches.shape[-1]).double()
        if rows.shape[1] < channels:
            raise ValueError(f"patches of {rows.shape[1]} values have no {channels} components")
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((rows - mean).T))
        values, vectors = values[-channels:].flip(0), vectors[:, -channels:].flip(1)
        peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * peak.sign()
        scale = values.clamp(min=1e-8) ** -0.25
        gain = ((rows - mean) @ vectors * scale).std()
        return cls(mean.float(), vectors.float(), (scale / gain).float())

    def encode(self, patches: Tensor) -> Tensor:
        """Patches (…, P) as coefficients (…, C)."""
        return (patches - self.mean) @ self.basis * self.scale

    def decode(self, coefficients: Tensor) -> Tensor:
        """Coefficients (…, C) as patches (…, P)."""
        return coefficients / self.scale @ self.basis.T + self.mean


class PatchPCA:
    """p × p patches of frame 0 and p × p × b blocks of the frames after it, C components each."""

    kind = "patch-pca"

    def __init__(self, first: Projection, rest: Projection, patch: int, block: int) -> None:
        self.first, self.rest, self.patch, self.block = first, rest, patch, block
        self.channels = first.basis.shape[1]

    @classmethod
    def fit(cls, clips: Tensor, channels: int, patch: int = 6, block: int = 4) -> Self:
        """Fit on uint8 clips (n, 3, 1 + k·block, H, W)."""
        x = pixels(clips)
        first = Projection.fit(cut(x[:, :, :1], patch, 1), channels)
        return cls(first, Projection.fit(cut(x[:, :, 1:], patch, block), channels), patch, block)

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (T, H, W): T = 1 + (frames − 1) / block, H and W by the patch."""
        if (frames - 1) % self.block or height % self.patch or width % self.patch:
            cell = f"{self.block}×{self.patch}×{self.patch}"
            raise ValueError(f"{frames}×{height}×{width} cannot be cut into one frame and {cell}")
        return 1 + (frames - 1) // self.block, height // self.patch, width // self.patch

    def encode(self, clips: Tensor) -> Tensor:
        """uint8 clips (n, 3, F, H, W) as float32 latents (n, C, T, H, W)."""
        self.latent_grid(*clips.shape[2:])
        x = pixels(clips)
        z = self.first.encode(cut(x[:, :, :1], self.patch, 1))
        if x.shape[2] > 1:
            z = torch.cat([z, self.rest.encode(cut(x[:, :, 1:], self.patch, self.block))], 1)
        return z.permute(0, 4, 1, 2, 3).contiguous()

    def encode_first(self, clips: Tensor) -> Tensor:
        """Latents (n, C, 1, H, W) of the first frame; by causality those of `encode`."""
        return self.encode(clips[:, :, :1])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, C, T, H, W) as uint8 clips (n, 3, 1 + (T − 1)·block, H, W)."""
        z = latents.permute(0, 2, 3, 4, 1)
        x = paste(self.first.decode(z[:, :1]), self.patch, 1)
        if z.shape[1] > 1:
            x = torch.cat([x, paste(self.rest.decode(z[:, 1:]), self.patch, self.block)], 2)
        return to_bytes(x)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tensors."""
        return fingerprint(self.tensors(), self.kind)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that makes the codec, for a safetensors file."""
        named = {f"first.{k}": v for k, v in self.first._asdict().items()}
        named |= {f"rest.{k}": v for k, v in self.rest._asdict().items()}
        named["patch_block"] = torch.tensor([self.patch, self.block])
        return {name: tensor.contiguous() for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The codec of `tensors()`; raises `ValueError` when they do not fit together."""
        try:
            first, rest = (
                Projection(*(tensors[f"{part}.{name}"] for name in Projection._fields))
                for part in ("first", "rest")
            )
            patch, block = (int(v) for v in tensors["patch_block"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the tensors of a patch-PCA codec: {error}") from error
        area = 3 * patch * patch
        if first.basis.shape[0] != area or rest.basis.shape[0] != area * block:
            raise ValueError("the codec's basis does not fit its patch size")
        return cls(first, rest, patch, block)


def cut(x: Tensor, patch: int, block: int) -> Tensor:
    """(n, 3, F, H, W) as patches (n, F/b, H/p, W/p, 3·b·p²), values in order (colour, t, y, x)."""
    n, colours, frames, height, width = x.shape
    grid = (frames // block, height // patch, width // patch)
    x = x.reshape(n, colours, grid[0], block, grid[1], patch, grid[2], patch)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n, *grid, -1)


def paste(patches: Tensor, patch: int, block: int) -> Tensor:
    """The inverse of `cut`."""
    n, frames, rows, columns, _ = patches.shape
    x = patches.reshape(n, frames, rows, columns, 3, block, patch, patch)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(n, 3, frames * block, rows * patch, columns * patch)
