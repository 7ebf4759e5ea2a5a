"""What verification costs beside the contribution that it verifies, counted and in CPU-seconds.

One honest unit is trained, handed in, judged and replayed for real. What depends on the head alone
(the parent's losses, the direction downhill) is shared by the units of a round, a replay by its
rate: 1 in probation, the floor in steady state::

    found = measured(lab, {"two looks": margins})    # CPU-seconds and samples of each part
    lora(folder)                                     # CPU-seconds of gate, finite values and root
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.verify_attacks import drawn
from benchmarks.verify_lab import Lab, Work
from benchmarks.verify_learn import drop, write_policy
from paris_coordinator.jobs import verify as judge
from paris_coordinator.jobs.common import gated, root_of
from paris_models.checkpoint import save_tensors, schema_of
from paris_models.numerics import numeric_class
from paris_protocol.audit import states_to_open

Json = dict[str, Any]

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
    begin = time.process_time()
    keep = states_to_open(places, exact=True)
    work = lab.work(assignment, keep=keep, numerics=own)
    training = time.process_time() - begin
    found = {}
    for name, wanted in margins.items():
        write_policy(lab, dict(wanted))
        found[name] = verification(lab, work, places)
        found[name]["contribution"] = training
    drop([work])
    return found


def verification(lab: Lab, work: Work, places: Sequence[int]) -> Json:
    """CPU-seconds and forward-equivalents of judging and replaying one unit."""
    judge._kept.clear()
    judged = []
    for _ in ("cold", "warm"):  # the second one finds what is known of the head
        begin = time.process_time()
        refusal, answer = lab.judge(work)
        judged.append((time.process_time() - begin, answer["cost"]["equivalents"]))
        assert not refusal, refusal
    begin = time.process_time()
    audit = lab.audit(work, places)
    replaying = time.process_time() - begin
    assert audit["passed"] and audit["exact"], audit
    (cold, cold_counted), (warm, warm_counted) = judged
    return {
        "judging": warm,
        "parent": max(0.0, cold - warm),
        "replay": replaying,
        "counted": {
            "contribution": answer["cost"]["contribution"],
            "judging": warm_counted,
            "parent": cold_counted - warm_counted,
            "replay": 3 * len(places) * lab.size.every * lab.size.batch,
        },
    }


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
    begin = time.process_time()
    update = gated(path, schema)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in update.values())
    root_of(update)
    seconds = time.process_time() - begin
    path.unlink()
    return seconds
