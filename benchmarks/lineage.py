"""`lineage`: a lineage merged from volunteers' units beside one node with the same samples.

The demo's expert and recipe on one world. "One node" keeps its optimiser from start to end.
Volunteers train disjoint clips from the same head, and the next head is the mean of their updates,
times an outer step; rates follow one cosine over all rounds ("slice"). Arms differ in what becomes
of optimiser state (fresh, or carried: averaged like weights and handed to the next units), in
samples per step, and in how long a unit is. `lineage.share` is the part of one node's held-out
gain; `lineage.unit` is the worst unit beside the head it began with: above 0 it looks like damage::

    python -m benchmarks lineage --quick
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks.lineage_lab import END, Weights, copied, demo_lab, piece, train
from benchmarks.table import Row, conditions, row
from paris_models.config import UnitConfig
from paris_models.train import weights

ROUNDS, STEPS, BATCH, SEEDS = 6, 120, 96, 3
"""One node's: so many pieces of so many steps."""


@dataclass(frozen=True, slots=True)
class Arm:
    """How a lineage is trained; rounds × nodes × steps × batch samples in all."""

    name: str
    nodes: int
    steps: int
    batch: int
    rounds: int = ROUNDS
    carried: bool = False
    schedule: Literal["slice", "inside"] = "slice"
    outer: float = 1.0

    @property
    def samples(self) -> int:
        """Clips that all nodes see together."""
        return self.rounds * self.nodes * self.steps * self.batch

    @property
    def id(self) -> str:
        """As it stands in the rows."""
        return f"{self.nodes}.{self.name}"


ALONE: Final = Arm("node", 1, STEPS, BATCH, carried=True)


def fresh(nodes: int, **changes: Any) -> Arm:
    """Units as they are today: the batch of one node, and so fewer steps."""
    return replace(Arm("fresh", nodes, STEPS // nodes, BATCH), **changes)


def small(nodes: int, **changes: Any) -> Arm:
    """Units with as many steps as one node's pieces, and so fewer clips in each."""
    arm = Arm("small-batch-carried", nodes, STEPS, BATCH // nodes, carried=True)
    return replace(arm, **changes)


MAIN: Final = (fresh(2), small(2), fresh(4), small(4))
OTHERS: Final = (
    fresh(2, name="carried", carried=True),
    fresh(2, name="longer", rounds=ROUNDS // 2, steps=STEPS),
    fresh(2, name="inside", schedule="inside"),
    fresh(2, name="outer-1.3", outer=1.3),
    small(2, name="small-batch", carried=False),
    small(2, name="smaller-batch-carried", steps=2 * STEPS, batch=BATCH // 4),
    small(4, name="smaller-batch-carried", steps=2 * STEPS, batch=BATCH // 8),
    small(1, name="half-batch", steps=2 * STEPS, batch=BATCH // 2),
)
"""Measured with one seed. The last is one node: what small batches give without volunteers."""


@dataclass(frozen=True, slots=True)
class Found:
    """How much the loss fell, and each round's first unit beside its head, relative."""

    gain: float
    units: tuple[float, ...]


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """The rows of the module's docstring; `quick` has one seed and two volunteers only."""
    seeds = 1 if quick else SEEDS
    arms = MAIN[:2] if quick else MAIN
    jobs = [(arm, seed) for seed in range(seeds) for arm in (ALONE, *arms)]
    jobs += [] if quick else [(arm, 0) for arm in OTHERS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        tasks = {(arm.id, seed): pool.submit(lineage, arm, seed) for arm, seed in jobs}
        found = {name: task.result() for name, task in tasks.items()}
    facts = conditions(
        size="demo", rounds=ROUNDS, H=STEPS, B=BATCH, samples=ALONE.samples, seeds=seeds,
        optimiser="Muon on matrices, AdamW on the rest", schedule="slice unless named", threads=1,
    )  # fmt: skip
    return facts, rows(found)


def lineage(arm: Arm, seed: int) -> Found:
    """One lineage, and what it gained on the held-out clips."""
    lab = demo_lab()
    head, before = lab.initial, lab.losses(lab.initial)
    begin = float(before.mean())
    state: tuple[Mapping[str, Tensor], int] | None = None
    units = []
    for turn in range(arm.rounds):
        results, optimisers = [], []
        for node in range(arm.nodes):
            own = replace(lab, clips=lab.clips.rows(torch.arange(node, len(lab.clips), arm.nodes)))
            done = train(own, head, unit_of(arm, seed, node, turn), state)
            results.append(copied(weights(done)))
            optimisers.append(copied(done.optimiser.state()))
        after = lab.losses(results[0])
        units.append(float((after - before).mean() / before.mean()))
        moved = mean(results)
        head = {name: head[name] + arm.outer * (moved[name] - head[name]) for name in head}
        before = lab.losses(head)
        if arm.carried:
            state = mean(optimisers), (turn + 1) * arm.steps
    return Found(begin - float(before.mean()), tuple(units))


def unit_of(arm: Arm, seed: int, node: int, turn: int) -> UnitConfig:
    """A node's unit; one whose optimiser is carried needs no second warm-up."""
    name = ("lineage", seed, node)
    unit = piece(name, turn, arm.rounds, steps=arm.steps, batch=arm.batch)
    if arm.schedule == "inside":
        unit = replace(unit, rate_start=1.0, rate_end=END)
    return replace(unit, warmup=0) if arm.carried and turn else unit


def mean(tensors: Sequence[Mapping[str, Tensor]]) -> Weights:
    """The mean of several sets of tensors, name by name."""
    return {name: torch.stack([one[name] for one in tensors]).mean(0) for name in tensors[0]}


def rows(found: Mapping[tuple[str, int], Found]) -> list[Row]:
    """Two rows for each arm beside the one node."""
    made: list[Row] = []
    for arm in dict.fromkeys(arm for arm, _ in found if arm != ALONE.id):
        runs = [seed for name, seed in found if name == arm]
        shares = [found[arm, seed].gain / found[ALONE.id, seed].gain for seed in runs]
        worst = max(max(found[arm, seed].units) for seed in runs)
        alone = max(max(found[ALONE.id, seed].units) for seed in runs)
        made += [
            row(
                f"lineage.share.{arm}", "held-out gain of a lineage",
                ours=fmean(shares), better="higher", unit="share", n=len(runs),
                spread=(max(shares) - min(shares)) / 2 if len(runs) > 1 else None,
                alternative=1.0, alternative_name="one node, same samples",
            ),
            row(
                f"lineage.unit.{arm}", "loss of the worst unit above its head's, relative",
                ours=worst, better="lower", unit="share of the loss", n=len(runs),
                alternative=alone, alternative_name="one node's pieces",
            ),
        ]  # fmt: skip
    return made
