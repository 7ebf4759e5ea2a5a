"""`bytes`: what an update weighs on the line, and how much of the gain survives it.

One node trains a lineage of an expert of 5.1 million parameters; every update crosses as a file of
a codec and makes the next head by the reproducible merge. `gain_kept` is the share of the held-out
loss that the same lineage gains with exact float32 updates: same clips, noise, units and rates.
What topk leaves out is carried by the node: its next unit starts at the head plus the residual.
`bytes.mixed` sets rounds of dense and LoRA nodes beside rounds of dense nodes with the same
samples; `bytes.lora` counts the paper's expert. Arms run side by side, one per core::

    python -m benchmarks bytes --quick
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks.lineage_lab import Lab, Weights, middle_lab, piece, train
from benchmarks.table import Row, conditions, row
from paris_coordinator.merging import Part, merge_shares
from paris_models import lean
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codecs import Codec, decode, left_out, wire_bytes
from paris_models.codecs_layout import is_topk
from paris_models.config import LADDER
from paris_models.expert import parameter_shapes
from paris_models.merge import merge_files
from paris_models.plans import PLANS
from paris_models.train import weights
from paris_models.updates import make_update, statistics

Arm = Codec | Literal["dense-f16", "topk-32 alone"]
"""A codec; float16, which is none, for comparison; and topk without its residual."""
EXACT: Final[Codec] = "dense-f32"
CHOSEN: Final[Codec] = "topk-32"
FORGETFUL: Final = "topk-32 alone"
CURVE: Final[tuple[Arm, ...]] = (
    "topk-64", "topk-128", "topk-256", "int8", "dense-bf16", "dense-f16", FORGETFUL,
)  # fmt: skip
UNITS, STEPS, BATCH, SEEDS = 40, 10, 16, 3
ROUNDS, ROUND_STEPS = 4, 30
DENSE_ROUND: Final = ("float32",) * 4
MIXED_ROUNDS: Final[Mapping[str, tuple[str, ...]]] = {
    "": ("float32", "float32", "float32", "lora-64-bf16"),
    ".half": ("float32", "float32", "lora-32-bf16", "lora-64-bf16"),
    ".without": ("float32",) * 3,
}
"""Who trains beside whom, by the row's suffix; the last one sees three quarters of the samples."""
LORA_RATE: Final = 4.0
"""Times the recipe's rate, for the factors."""
QUICK_UNITS: Final = 6


@dataclass(frozen=True, slots=True)
class Found:
    """A lineage's end: its loss, the loss that it began with, and the size of its updates."""

    start: float
    end: float
    update: int

    @property
    def gain(self) -> float:
        """By how much the loss fell."""
        return self.start - self.end


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """The rows of the module's docstring; `quick` has fewer units, one seed and no curve."""
    units, seeds = (QUICK_UNITS, 1) if quick else (UNITS, SEEDS)
    arms: list[tuple[Arm, int]] = [(arm, seed) for seed in range(seeds) for arm in (EXACT, CHOSEN)]
    arms += [] if quick else [(arm, 0) for arm in CURVE]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lab = middle_lab(folder)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            tasks = {arm: pool.submit(lineage, folder, *arm, units) for arm in arms}
            turns = 2 if quick else ROUNDS
            plans = dict.fromkeys((DENSE_ROUND, *MIXED_ROUNDS.values()))
            rounds = {nodes: pool.submit(mixed, folder, nodes, turns) for nodes in plans}
            found = {arm: task.result() for arm, task in tasks.items()}
            gains = {nodes: task.result() for nodes, task in rounds.items()}
    rows = [*_rows(lab, found, units, seeds), *mixed_rows(gains)]
    facts = conditions(
        parameters=lab.expert.parameters, units=units, H=STEPS, B=BATCH, seeds=seeds,
        held_out_clips=len(lab.held), rounds=ROUNDS, round_H=ROUND_STEPS, mixed=MIXED_ROUNDS,
        lora_rate=LORA_RATE, optimiser="AdamW 1e-3, fresh in every unit; one cosine", threads=1,
    )  # fmt: skip
    return facts, rows


# ---------------------------------------------------------------- one node, one codec


def lineage(folder: Path, arm: Arm, seed: int, units: int) -> Found:
    """One node's lineage under an arm; `folder` has the lab's start."""
    lab = middle_lab(folder)
    head: Weights = lab.initial
    left: Weights | None = None
    size = 0
    with tempfile.TemporaryDirectory() as name:
        for turn in range(units):
            begin = head if left is None else {n: head[n] + left[n] for n in head}
            unit = piece(("bytes", seed), turn, units, steps=STEPS, batch=BATCH)
            result = weights(train(lab, begin, unit))
            head, left, size = send(head, result, arm, Path(name))
    return Found(lab.loss(lab.initial), lab.loss(head), size)


def send(
    parent: Weights, result: Weights, arm: Arm, folder: Path
) -> tuple[Weights, Weights | None, int]:
    """The next head, made from the update's file alone; what was left out; the file's size."""
    if arm == "dense-f16":
        half = {name: (result[name] - parent[name]).half() for name in parent}
        head = {name: parent[name] + half[name].float() for name in parent}
        return head, None, save(half, folder / "update")
    codec: Codec = CHOSEN if arm == FORGETFUL else arm
    wire = make_update(parent, result, codec)
    size = save(wire, folder / "update")
    save_tensors(parent, folder / "parent")
    merge_files(folder / "parent", [(folder / "update", 1.0, 1.0)], folder / "head")
    left = None
    if is_topk(codec) and arm != FORGETFUL:
        delta = {name: result[name] - parent[name] for name in parent}
        left = left_out(delta, wire, codec, shapes_of(parent))
    return load_tensors(folder / "head"), left, size


def save(tensors: Weights, path: Path) -> int:
    """Writes a file and says how large it is."""
    save_tensors(tensors, path)
    return path.stat().st_size


def shapes_of(tensors: Weights) -> dict[str, tuple[int, ...]]:
    """Names and shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ---------------------------------------------------------------- rounds of several nodes


def mixed(folder: Path, nodes: tuple[str, ...], rounds: int) -> float:
    """The gain of rounds in which each node trains by its plan, merged as the coordinator does."""
    lab = middle_lab(folder)
    head = lab.initial
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            head = merged_round(lab, head, nodes, (turn, rounds), Path(name))
    return lab.loss(lab.initial) - lab.loss(head)


def merged_round(
    lab: Lab, head: Weights, nodes: tuple[str, ...], turn: tuple[int, int], folder: Path
) -> Weights:
    """One round: every node's update in a file of its codec, weighed, clipped and merged."""
    parts = []
    for number, name in enumerate(nodes):
        codec: Codec = "lora-int8" if PLANS[name].rank else EXACT
        wire = make_update(head, planned(lab, head, name, number, turn), codec)
        save_tensors(wire, folder / str(number))
        norm = statistics(decode(wire, codec, shapes_of(head)), head).norm
        parts.append(Part(str(number), ROUND_STEPS, norm))
    save_tensors(head, folder / "parent")
    inputs = [(folder / s.contribution, s.weight, s.scale) for s in merge_shares(parts)]
    merge_files(folder / "parent", inputs, folder / "head")
    return load_tensors(folder / "head")


def planned(
    lab: Lab, head: Weights, name: str, number: int, turn: tuple[int, int]
) -> dict[str, Tensor]:
    """What a node has trained by its plan: the expert's weights, or factors."""
    plan = PLANS[name]
    unit = piece(
        ("mixed", number), *turn, steps=ROUND_STEPS, batch=BATCH,
        rate=LORA_RATE if plan.rank else 1.0, dtype=plan.compute,
    )  # fmt: skip
    own = lab.clips.rows(torch.arange(number, len(lab.clips), len(DENSE_ROUND)))
    state = lean.new_state(plan, lab.expert, lab.recipe, head, key=unit.key)
    while state.step < unit.steps:
        lean.train_step(state, own, unit)
    return lean.weights(state)


# ---------------------------------------------------------------- rows


def mixed_rows(gains: Mapping[tuple[str, ...], float]) -> list[Row]:
    """The gains of rounds with LoRA nodes, and without these nodes, beside rounds all dense."""
    return [
        row(
            f"bytes.mixed{suffix}", f"gain of rounds of {', '.join(nodes)}",
            ours=gains[nodes] / gains[DENSE_ROUND], better="higher", unit="share", n=1,
            alternative=1.0, alternative_name=f"rounds of {len(DENSE_ROUND)} dense nodes",
        )
        for suffix, nodes in MIXED_ROUNDS.items()
    ]  # fmt: skip


def _rows(lab: Lab, found: dict[tuple[Arm, int], Found], units: int, seeds: int) -> list[Row]:
    shapes = shapes_of(lab.initial)
    checkpoint, head = wire_bytes("dense-bf16", shapes), wire_bytes(EXACT, shapes)
    rows: list[Row] = []
    for arm in dict.fromkeys(arm for arm, _ in found if arm != EXACT):
        suffix = "" if arm == CHOSEN else f".{arm.replace(' ', '-')}"
        runs = [seed for seed in range(seeds) if (arm, seed) in found]
        shares = [found[arm, seed].gain / found[EXACT, seed].gain for seed in runs]
        rows += [
            row(
                f"bytes.update{suffix}", f"a unit's update under {arm}",
                ours=float(found[arm, 0].update), better="lower", unit="bytes", n=units,
                alternative=float(checkpoint), alternative_name="the expert in bfloat16",
            ),
            row(
                f"bytes.gain_kept{suffix}", f"held-out gain of a lineage under {arm}",
                ours=fmean(shares), better="higher", unit="share", n=len(runs),
                spread=(max(shares) - min(shares)) / 2 if len(runs) > 1 else None,
                alternative=1.0, alternative_name="exact float32 updates",
            ),
        ]  # fmt: skip
    rows.append(
        row(
            "bytes.head_follow", f"following {units} heads by merging their inputs",
            ours=float(units * found[CHOSEN, 0].update), better="lower", unit="bytes", n=units,
            alternative=float(units * head), alternative_name="downloading every head",
        )
    )  # fmt: skip
    return [*rows, lora_row("lora-int8"), lora_row("lora-int16", ".int16")]


def lora_row(codec: Codec, suffix: str = "") -> Row:
    """Factors of rank 32 of the paper's expert beside its bfloat16 checkpoint, counted."""
    shapes = parameter_shapes(LADDER["paper"])
    return row(
        f"bytes.lora{suffix}", f"LoRA factors of rank 32 of the paper's expert under {codec}",
        ours=float(wire_bytes(codec, shapes, 32)), better="lower", unit="bytes", n=1,
        alternative=float(wire_bytes("dense-bf16", shapes)),
        alternative_name="the expert in bfloat16",
    )  # fmt: skip
