"""The judge of the demo's videos: a small 3-D CNN trained on real clips, and what it can measure.

It tells world, colour, motion and shape of a rendered clip, so that "all factors right" can be
counted, and its 64 features give a *stand-in* for the Fréchet video distance. Both are named as
stand-ins wherever they are printed: neither is comparable with I3D's FVD or with other data::

    judge = Judge.load(assets / "judge.safetensors")
    report = judge.score(clips, captions)     # {"all_right": .99, "motion": 1.0, …, "fvd": 20.1}
    judge.floors(clips, captions, codec)      # real, codec round trip, frozen first frame
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from paris_models.checkpoint import load_tensors
from paris_models.codec import fingerprint, pixels
from paris_models.worlds import factors

NAME: Final = "stand-in: small 3-D CNN trained on rendered clips of the demo's worlds"
FACTORS: Final = ("world", "colour", "motion", "shape")
CLASSES: Final = (3, 6, 12, 9)
FEATURES: Final = 64
STEPS: Final = 700
BATCH: Final = 64


class RoundTrip(Protocol):
    """The part of a codec that the floors need."""

    def encode(self, clips: Tensor) -> Tensor:
        """Clips as latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as clips."""


def targets(captions: Tensor) -> tuple[Tensor, ...]:
    """Class of each factor; motions and shapes are counted across the worlds."""
    world, colour, motion, shape = factors(captions)
    return world, colour, world * 4 + motion, world * 3 + shape


class Perception(nn.Module):
    """Pixels (n, 3, 9, 24, 24) to 64 features, and these to the four factors."""

    def __init__(self) -> None:
        super().__init__()

        def conv(i: int, o: int, kernel: Any, stride: Any, pad: Any) -> nn.Module:
            layer = nn.Conv3d(i, o, kernel, stride, pad)
            return nn.Sequential(layer, nn.BatchNorm3d(o), nn.ReLU())

        self.body = nn.Sequential(
            conv(3, 24, (1, 4, 4), (1, 2, 2), (0, 1, 1)),
            conv(24, 48, 3, 2, 1),
            conv(48, 96, 3, 2, 1),
            nn.Flatten(),
            nn.Linear(96 * 27, FEATURES),
        )
        self.heads = nn.Linear(FEATURES, sum(CLASSES))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features (n, 64) and the logits of each factor."""
        features = self.body(x)
        return features, self.heads(functional.relu(features)).split(CLASSES, 1)


class Judge:
    """A trained `Perception` and the features of the reference clips, per world."""

    def __init__(self, net: Perception, mean: Tensor, covariance: Tensor) -> None:
        self.net, self.mean, self.covariance = net.eval(), mean, covariance

    @classmethod
    def train(
        cls,
        clips: tuple[Tensor, Tensor],
        reference: tuple[Tensor, Tensor],
        *,
        steps: int = STEPS,
        seed: int = 5,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """Train on real clips with their captions; the reference gives the statistics."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = Perception()
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
        for step in range(steps):
            rows = torch.randint(len(clips[0]), (BATCH,), generator=generator)
            x = pixels(clips[0][rows])
            x = x + 0.04 * torch.randn(x.shape, generator=generator)
            loss = torch.zeros(())
            for logits, wanted in zip(net(x)[1], targets(clips[1][rows]), strict=True):
                loss = loss + functional.cross_entropy(logits, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
            if progress is not None:
                progress("judge", step + 1, steps)
        empty = torch.zeros(4, FEATURES, FEATURES, dtype=torch.float64)
        judge = cls(net, empty[:, 0].clone(), empty)
        features, _ = judge.perceive(reference[0])
        world = factors(reference[1])[0]
        groups = [features, *(features[world == k] for k in range(3))]
        judge.mean = torch.stack([group.double().mean(0) for group in groups])
        judge.covariance = torch.stack([torch.cov(group.double().T) for group in groups])
        return judge

    @torch.no_grad()
    def perceive(self, clips: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features (n, 64) of uint8 clips and the predicted class of each factor (n,)."""
        parts = [self.net(pixels(part)) for part in clips.split(256)]
        features = torch.cat([part[0] for part in parts])
        logits = zip(*(part[1] for part in parts), strict=True)
        return features, tuple(torch.cat(factor).argmax(1) for factor in logits)

    def right(self, clips: Tensor, captions: Tensor) -> Tensor:
        """Which factors of which clip are those of its caption, bool (4, n)."""
        predicted = self.perceive(clips)[1]
        return torch.stack([p == t for p, t in zip(predicted, targets(captions), strict=True)])

    def score(self, clips: Tensor, captions: Tensor) -> dict[str, float]:
        """Accuracy per factor, share with all factors right, stand-in FVD, and n.

        `captions` are indices into `worlds.CAPTIONS`. `fvd_<k>` and `all_right_<k>` are those of
        world k; the distance depends on n and is compared at equal n only.
        """
        features, predicted = self.perceive(clips)
        right = torch.stack([p == t for p, t in zip(predicted, targets(captions), strict=True)])
        report = {name: _mean(row) for name, row in zip(FACTORS, right, strict=True)}
        report |= {"all_right": _mean(right.all(0)), "n": float(len(clips))}
        report["fvd"] = self.distance(features, 0)
        world = factors(captions)[0]
        for k in range(3):
            if int((world == k).sum()) > 1:
                report[f"all_right_{k}"] = _mean(right.all(0)[world == k])
                report[f"fvd_{k}"] = self.distance(features[world == k], k + 1)
        return report

    def distance(self, features: Tensor, group: int = 0) -> float:
        """Fréchet distance to the reference: |μ₁−μ₂|² + Tr(Σ₁+Σ₂−2(Σ₁Σ₂)^½); group k+1: world k."""
        found = features.double()
        covariance = torch.cov(found.T).numpy()
        reference = self.covariance[group].numpy()
        roots = np.sqrt(np.linalg.eigvals(covariance @ reference).real.clip(0)).sum()
        shift = float((found.mean(0) - self.mean[group]).square().sum())
        return shift + float(np.trace(covariance) + np.trace(reference) - 2 * roots)

    def floors(
        self, clips: Tensor, captions: Tensor, codec: RoundTrip
    ) -> dict[str, dict[str, float]]:
        """Scores of real clips, of their codec round trip and of their frozen first frame."""
        frozen = clips[:, :, :1].expand_as(clips)
        return {
            "real": self.score(clips, captions),
            "codec": self.score(codec.decode(codec.encode(clips)), captions),
            "frozen_frame": self.score(frozen, captions),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tensors."""
        return fingerprint(self.tensors(), NAME)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that makes the judge, for a safetensors file."""
        named = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        return named | {"mean": self.mean, "covariance": self.covariance}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The judge of `tensors()`; raises `ValueError` when they do not fit."""
        net = Perception()
        weights = {n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")}
        try:
            net.load_state_dict(weights)
            return cls(net, tensors["mean"], tensors["covariance"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"not the tensors of a judge: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """The judge of a safetensors file that this project made."""
        return cls.from_tensors(load_tensors(path))


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())
