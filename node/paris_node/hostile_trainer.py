"""A hostile volunteer's trainer, for demos and tests: training that is not the assigned one.

Each lie is committed to as consistently as the liar can: the committed states are the ones that its
training went through, and are kept for openings. Which lie a unit gets stands in its work folder::

    python -m paris_node.hostile_trainer             # orders and reports as in paris_node.trainer
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from paris_models import lean, train
from paris_models.config import UnitConfig
from paris_models.shards import ClipTable
from paris_node.trainer import Asked, Json, Say, Service, serve, train_unit
from paris_node.unit import Order, Unit

NOTE: Final = "attack"


class Liar(Unit):
    """Trains with a unit that it has changed."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        self.config = self.changed(self.config)

    def changed(self, config: UnitConfig) -> UnitConfig:
        """The unit that is trained instead."""
        return config

    def pretend(self) -> float:
        """A step that is counted and not taken."""
        self.state.step += 1
        self.losses.append(self.losses[-1])
        if self.committing:
            self.commit()
        return self.losses[-1]


class SkipSteps(Liar):
    """Takes only the first half of each segment's steps."""

    def step(self) -> float:
        """See `Unit`."""
        every = self.config.commit_every
        return self.pretend() if 2 * (self.state.step % every) >= every else super().step()


class Reorder(Liar):
    """Draws data, noise and times from another key."""

    def changed(self, config: UnitConfig) -> UnitConfig:
        """See `Liar`."""
        return replace(config, key=hashlib.sha256(config.key).digest()[:16])


class HalfRate(Liar):
    """Trains at half the learning rate: the result looks better, for it changed less."""

    def changed(self, config: UnitConfig) -> UnitConfig:
        """See `Liar`."""
        halves = {"rate_start": config.rate_start / 2, "rate_end": config.rate_end / 2}
        return replace(config, **halves)  # type: ignore[arg-type]


class HalfBatch(Liar):
    """Trains on half of each batch and claims all of it."""

    def changed(self, config: UnitConfig) -> UnitConfig:
        """See `Liar`."""
        return replace(config, batch=max(1, config.batch // 2))


class OwnData(Liar):
    """Trains on clips of its own under the assigned captions: the assigned ones, backwards."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        assert isinstance(self.clips, ClipTable)
        self.clips = replace(self.clips, latents=torch.flip(self.clips.latents, dims=(2,)))


class Extrapolate(Liar):
    """Trains a quarter of the unit and goes on in the same direction without training."""

    @cached_property
    def begin(self) -> dict[str, torch.Tensor]:
        """What it began with."""
        return lean.weights(self.order.state(self.parent))

    def step(self) -> float:
        """See `Unit`."""
        if 4 * self.state.step < self.config.steps:
            return super().step()
        pace = train.rate_multiplier(self.config, self.state.step) / max(1, self.state.step)
        with torch.no_grad():
            for name, tensor in lean.weights(self.state).items():
                tensor.add_((tensor - self.begin[name]) * pace)
        return self.pretend()


KINDS: Final[dict[str, type[Unit]]] = {
    "skip-steps": SkipSteps,
    "reorder": Reorder,
    "rate": HalfRate,
    "half-batch": HalfBatch,
    "own-data": OwnData,
    "extrapolate": Extrapolate,
}
"""Attacks that happen while training, and only a replay sees."""


def noted(work: Path) -> str:
    """The attack that a unit's work folder names; "" for none."""
    note = work / NOTE
    return note.read_text("utf-8") if note.exists() else ""


class HostileService(Service):
    """The real service with other training."""

    def train(self, value: Json, order: Order, say: Say, begin: str) -> bool:
        """See `Service`."""
        kind = KINDS.get(noted(order.work), Unit)
        return train_unit(order, say, Asked(self._save_asked, self._way_asked), begin, kind)


if __name__ == "__main__":
    serve(HostileService)
