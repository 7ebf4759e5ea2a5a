"""What verification costs beside the contribution that it verifies, counted and in CPU-seconds.

One honest unit is trained, handed in, judged and replayed for real. What depends on the head alone
(the parent's losses, the direction downhill) is shared by the units of a round, a replay by its
rate: 1 in probation, the floor in steady state::

    found = measured(lab, {"two looks": margins})    # CPU-seconds and samples of each part
    lora(folder)                                     # CPU-seconds of gate, finite values and root
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import torch

from benchmarks.verify_attacks import drawn
from benchmarks.verify_lab import Lab, Work
from benchmarks.verify_learn import drop, write_policy
from paris_coordinator.jobs import verify as judge
from paris_coordinator.jobs.common import Schema, gated, root_of
from paris_models.checkpoint import save_tensors, schema_of
from paris_models.numerics import numeric_class
from paris_protocol.audit import states_to_open

Json = dict[str, Any]
T = TypeVar("T")

REPEATS: Final = 5
LORA: Final = (32, 3072, 570)
"""Rank, width and number of the adapted matrices: .45 GB of float32."""


def measured(lab: Lab, margins: Mapping[str, Json]) -> dict[str, Json]:
    """What one unit costs, and its verification under each of the margins, by their names."""
    size = lab.size
    own = numeric_class(
        size.expert, size.recipe, batch=size.batch, dtype="float32", threads=1, kernels="reference"
    )
    assignment = lab.assignment("cost")
    places = drawn(lab, assignment)
    keep = states_to_open(places, exact=True)
    training, work = seconds(lambda: lab.work(assignment, keep=keep, numerics=own))
    found = {}
    for name, wanted in margins.items():
        write_policy(lab, dict(wanted))
        found[name] = verification(lab, work, places)
        found[name]["contribution"] = training
    drop([work])
    return found


def verification(lab: Lab, work: Work, places: Sequence[int]) -> Json:
    """CPU-seconds and forward-equivalents of judging and replaying one unit, medians."""
    parts: dict[str, list[float]] = {"judging": [], "parent": [], "replay": []}
    for _ in range(REPEATS):
        judge._kept.clear()
        cold, first = seconds(lambda: lab.judge(work))
        warm, again = seconds(lambda: lab.judge(work))  # finds what is known of the head
        replaying, audit = seconds(lambda: lab.audit(work, places))
        assert first[0] == again[0] == "" and audit["passed"] and audit["exact"], (first, audit)
        parts["judging"].append(warm)
        parts["parent"].append(max(0.0, cold - warm))
        parts["replay"].append(replaying)
    cold_cost, warm_cost = first[1]["cost"], again[1]["cost"]
    return {name: median(values) for name, values in parts.items()} | {
        "counted": {
            "contribution": warm_cost["contribution"],
            "judging": warm_cost["equivalents"],
            "parent": cold_cost["equivalents"] - warm_cost["equivalents"],
            "replay": 3 * len(places) * lab.size.every * lab.size.batch,
        },
    }


def seconds(do: Callable[[], T]) -> tuple[float, T]:
    """CPU-seconds of a call, and what it returned."""
    begin = time.process_time()
    found = do()
    return time.process_time() - begin, found


def lora(folder: Path) -> float:
    """CPU-seconds of L0 and L1 on 0.45 GB of LoRA factors: gate, finite values, root."""
    path = folder / "lora.safetensors"
    source = torch.Generator().manual_seed(0)
    rank, width, matrices = LORA
    factor = torch.randn(rank, width, generator=source)
    tensors = {f"blocks.{i}.lora_{side}": factor + i for i in range(matrices) for side in "AB"}
    schema = schema_of(tensors)
    save_tensors(tensors, path)
    del tensors
    taken, _ = seconds(lambda: first_layers(path, schema))
    path.unlink()
    return taken


def first_layers(path: Path, schema: Schema) -> str:
    """What L0 and L1 do with a file, before anything else is known of it."""
    update = gated(path, schema)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in update.values())
    return root_of(update)
