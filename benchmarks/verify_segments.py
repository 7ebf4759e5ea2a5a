"""Cheating inside an audited segment, and what the replay says of it.

The state at the segment's start is honest, so that nothing but the cheat is seen; the node trains
the segment's five steps in its own way and commits to where it arrives. What it finds is held
against equal bits, as between machines of one numeric class, and against the calibrated tolerance::

    found = segments(lab, ["segment 0"], "float32")   # [{"kind": …, "exact": True, "near": True}]
    found = power(lab, ["power 0"], "float32", 5)     # rate × 1.05 beside the tolerance
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.verify_attacks import generator, places
from benchmarks.verify_lab import Lab, Weights, hexed, root_of, unit_of
from paris_models.config import UnitConfig
from paris_models.replay import SegmentFound, audit_segments, model_class, replay
from paris_models.shards import ClipTable
from paris_models.train import load_state_tensors, state_tensors
from paris_protocol.audit import tolerance_for
from paris_protocol.canonical import real
from paris_protocol.records import Assignment

Json = dict[str, Any]

CHEATS = (
    "wrong data", "wrong order", "half batch", "rate x0.8", "rate x1.25", "lower precision",
    "skipped step", "skipped segment",
)  # fmt: skip
"""A bfloat16 unit has no lower precision to be computed in."""


def cheats(
    lab: Lab, assignment: Assignment, last: int
) -> dict[str, tuple[ClipTable, UnitConfig, int]]:
    """Each cheat as other clips, another unit, and the step after which it stops."""
    clips, unit = lab.own_clips(assignment), unit_of(assignment)
    order = torch.randperm(len(clips), generator=generator("order", assignment.seed))
    made = {
        "wrong data": (lab.clips(0, [(assignment.unit + 1) % 4]), unit, last),
        "wrong order": (clips.rows(order), unit, last),
        "half batch": (clips, replace(unit, batch=unit.batch // 2), last),
        "rate x0.8": (clips, faster(unit, 0.8), last),
        "rate x1.25": (clips, faster(unit, 1.25), last),
        "lower precision": (clips, replace(unit, dtype="bfloat16"), last),
        "skipped step": (clips, unit, last - 1),
        "skipped segment": (clips, unit, last - lab.size.every),
    }
    if assignment.dtype == "bfloat16":
        del made["lower precision"]
    return made


def faster(unit: UnitConfig, factor: float) -> UnitConfig:
    """The same unit at a multiple of its rate."""
    return replace(unit, rate_start=factor * unit.rate_start, rate_end=factor * unit.rate_end)


def run_on(
    lab: Lab, begin: Mapping[str, torch.Tensor], clips: ClipTable, unit: UnitConfig, last: int
) -> Weights:
    """The state after the unit's steps from `begin` to `last`."""
    state = lab.fresh()
    load_state_tensors(state, begin)
    replay(state, clips, unit, last)
    return {name: tensor.clone() for name, tensor in state_tensors(state).items()}


def limits(lab: Lab, dtype: str, steps: int) -> tuple[float, float] | None:
    """The tolerance that the policy has for such segments."""
    rules = lab.policy().audit
    assert rules is not None
    found = tolerance_for(rules, dtype, model_class(lab.size.expert, lab.size.recipe), steps)
    return None if found is None else (real(found.rho), real(found.tensor))


def segments(lab: Lab, seeds: Sequence[str], dtype: str) -> list[Json]:
    """Every cheat in one segment of each seed's unit, and whether either audit caught it."""
    found = []
    every = lab.size.every
    for seed in seeds:
        assignment = lab.assignment(seed, dtype=dtype)
        index = int(hexed("place", seed)[:8], 16) % (places(lab) - 1)
        start = state_tensors(lab.fresh())
        clips, unit = lab.own_clips(assignment), unit_of(assignment)
        begin = run_on(lab, start, clips, unit, index * every)
        last = (index + 1) * every
        for kind, (data, way, stop) in cheats(lab, assignment, last).items():
            end = run_on(lab, begin, data, way, stop) | {"step": torch.tensor([last])}
            near = audited(lab, assignment, index, begin, end)
            found.append(
                {"kind": kind, "exact": near.rho > 0, "near": not near.passed, "rho": near.rho}
            )
    return found


def audited(
    lab: Lab, assignment: Assignment, index: int, begin: Weights, end: Weights
) -> SegmentFound:
    """What the audit finds in this segment; a distance above 0 is not equal bits."""
    roots = [hexed(assignment.seed, place) for place in range(places(lab))]
    roots[index], roots[index + 1] = root_of(begin), root_of(end)
    [one] = audit_segments(
        lab.size.expert, lab.size.recipe, unit_of(assignment), lab.own_clips(assignment),
        lab.parent, roots, {index: begin, index + 1: end}, [index], exact=False,
        limits=limits(lab, assignment.dtype, lab.size.every), root_of=root_of,
    )  # fmt: skip
    return one


def power(lab: Lab, seeds: Sequence[str], dtype: str, steps: int) -> list[Json]:
    """A rate of 1.05 in segments of so many steps: is it outside the tolerance?"""
    found = []
    allowed = limits(lab, dtype, steps)
    assert allowed is not None
    for seed in seeds:
        assignment = lab.assignment(seed, dtype=dtype)
        clips = lab.own_clips(assignment)
        unit = replace(unit_of(assignment), commit_every=steps)
        begin = state_tensors(lab.fresh())
        end = run_on(lab, begin, clips, faster(unit, 1.05), steps)
        roots = [hexed(seed, i) for i in range(math.ceil(unit.steps / steps) + 1)]
        roots[:2] = root_of(begin), root_of(end)
        [one] = audit_segments(
            lab.size.expert, lab.size.recipe, unit, clips, lab.parent, roots, {1: end}, [0],
            exact=False, limits=allowed, root_of=root_of,
        )  # fmt: skip
        found.append({"caught": not one.passed, "rho": one.rho, "limit": allowed[0]})
    return found
