"""Lineages for `bytes` and `lineage`: rendered clips of one world, an expert, and paired losses.

A lineage is trained by units from head to head, its rate along one cosine over all units. Clips,
noise, times and the held-out draw follow from seeds, so two lineages of a seed differ only in what
is asked about::

    lab = middle_lab(folder)                                 # 5.1 M parameters, AdamW
    state = train(lab, lab.initial, piece(lab, ("a unit", 0), 0, 40, steps=10, batch=16))
    lab.loss(weights(state))                             # mean over the held-out clips
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

import paris_models
from paris_models import worlds
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codec import PatchPCA
from paris_models.config import DEMO_RECIPE, LADDER, ExpertConfig, RecipeConfig, UnitConfig
from paris_models.evaluate import held_out_losses
from paris_models.expert import build_expert
from paris_models.initial import clip_table
from paris_models.shards import ClipTable
from paris_models.text import HashedWords
from paris_models.train import TrainState, new_state, train_step, weights

Weights = dict[str, Tensor]

MIDDLE: Final = ExpertConfig(2, 64, 64, 1, 2, 2, 128, (16, 56, 56), 768, 768)
"""The ladder's 5M without a condition, with a second single block and narrower text: 5.10 M."""
MIDDLE_RECIPE: Final = replace(DEMO_RECIPE, optimiser="adamw", lr=1e-3, batch=16)
INITIAL_STEPS: Final = 400
"""On clips of all worlds: a start that has much to learn of each."""
CLIPS, HELD_CLIPS = 1500, 500
"""Of one world."""
END: Final = 0.02
HELD_KEY: Final = b"held out clips k"


@dataclass(frozen=True, slots=True)
class Lab:
    """An expert, the clips of its world, and the start of its lineage."""

    expert: ExpertConfig
    recipe: RecipeConfig
    clips: ClipTable
    held: ClipTable
    initial: Weights

    def losses(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The held-out loss of each clip, (n,) float64: the same noise and times for everybody."""
        found = held_out_losses(weights, self.expert, self.recipe, self.held, HELD_KEY)
        return found.double()

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Its mean."""
        return float(self.losses(weights).mean())


def middle_lab(folder: Path) -> Lab:
    """The lab of 5.1 M parameters; its start is trained here, or found in `folder`."""
    clips, captions = worlds.render(len(worlds.WORLDS) * (CLIPS + HELD_CLIPS), seed=901)
    codec = PatchPCA.fit(clips[:2000], channels=16)
    words = HashedWords.fit(worlds.CAPTIONS, length=6, dim=MIDDLE.text_dim)
    table = clip_table(clips, captions, codec, words)
    start = folder / "initial.safetensors"
    if start.exists():
        return _lab(MIDDLE, MIDDLE_RECIPE, table, 0, load_tensors(start))
    fresh = {n: p.detach() for n, p in build_expert(MIDDLE, seed=0).named_parameters()}
    unit = UnitConfig(key("initial"), INITIAL_STEPS, 32, warmup=20)
    everything = table.rows(torch.arange(len(worlds.WORLDS) * CLIPS))
    lab = _lab(MIDDLE, MIDDLE_RECIPE, table, 0, fresh)
    trained = copied(weights(train(replace(lab, clips=everything), fresh, unit)))
    save_tensors(trained, start)
    return replace(lab, initial=trained)


def demo_lab() -> Lab:
    """The demo's expert, recipe and start, on the clips of its third world."""
    assets = Path(paris_models.__file__).parent / "assets"
    codec = PatchPCA.from_tensors(load_tensors(assets / "codec.safetensors"))
    words = HashedWords.from_tensors(load_tensors(assets / "text.safetensors"))
    clips, captions = worlds.render(len(worlds.WORLDS) * (CLIPS + HELD_CLIPS), seed=901)
    table = clip_table(clips, captions, codec, words)
    initial = load_tensors(assets / "initial.safetensors")
    return _lab(LADDER["demo"], DEMO_RECIPE, table, 2, initial)


def _lab(
    expert: ExpertConfig, recipe: RecipeConfig, table: ClipTable, world: int, initial: Weights
) -> Lab:
    mine = torch.arange(CLIPS + HELD_CLIPS) * len(worlds.WORLDS) + world
    return Lab(expert, recipe, table.rows(mine[:CLIPS]), table.rows(mine[CLIPS:]), initial)


def key(*name: object) -> bytes:
    """16 bytes that follow from a name."""
    return sha256(repr(name).encode()).digest()[:16]


def copied(tensors: Mapping[str, Tensor]) -> Weights:
    """Copies of tensors that training would change."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def peak(turn: int, turns: int) -> float:
    """The rate's multiplier at the start of a turn, on one cosine over all of them."""
    return END + (1 - END) / 2 * (1 + math.cos(math.pi * turn / turns))


def piece(
    name: tuple[object, ...],
    turn: int,
    turns: int,
    *,
    steps: int,
    batch: int,
    rate: float = 1.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> UnitConfig:
    """A unit whose rate follows its piece of the lineage's cosine, warmed up as in the demo."""
    start, end = rate * peak(turn, turns), rate * peak(turn + 1, turns)
    warmup = max(2, round(0.03 * steps))
    return UnitConfig(key(*name, turn), steps, batch, start, end, warmup=warmup, dtype=dtype)


def train(
    lab: Lab,
    start: Mapping[str, Tensor],
    unit: UnitConfig,
    carried: tuple[Mapping[str, Tensor], int] | None = None,
) -> TrainState:
    """The state after a unit; `carried` is an optimiser's state and the steps behind it."""
    state = new_state(lab.expert, replace(lab.recipe, batch=unit.batch), start)
    if carried is not None:
        state.optimiser.load(*carried)
    while state.step < unit.steps:
        train_step(state, lab.clips, unit)
    return state
