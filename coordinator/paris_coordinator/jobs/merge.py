"""The merge job: published scalars times accepted updates into the fp32 master, and the same test.

The arithmetic is `paris_models.merge` (bit-reproducible); the merged head is judged on the secret
clips like a contribution, with the margin that the policy names for merges. A merge that is worse
is tried with half the step (all weights × ½), then without each input in turn, the others' scalars
unchanged, and the best of these that is not worse is taken. Failing that, the whole merge is still
written, so that its numbers can be published; the caller does not make it a head::

    merge({"job": "merge", "parent": …, "inputs": [{"path", "weight", "scale"}], "out": …, …})
    # {"root": …, "numbers": [["delta", …], …, ["step", "1"], ["left_out", "0"]], "worse": false,
    #  "inputs": [[0, weight, scale], [2, weight, scale]], "left_out": [1]}
    revert({"job": "revert", "removed": [{"path", "weight", "scale"}], …})    # {"root", "numbers"}
    average({"job": "average", "average": …, "head": …, "decay": "0x1.9p-1", "out": …})   # {"root"}

`inputs` are the places in the job's list that are really in `out`, with the scalars (hex floats)
that belong into the signed `Merge`: never the ones that were asked for. `left_out` are the places
that were not merged; their work is `unpublished`. Number `step` is 1 or 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paris_coordinator.jobs.common import (
    HeldOut,
    Weights,
    check_update,
    expert_schema,
    gated,
    genesis_of,
    header_of,
    held_out,
    record,
    root_of,
)
from paris_coordinator.judging import PairedLoss, is_worse, numbers
from paris_models.config import ExpertConfig, RecipeConfig
from paris_models.ema import average_files
from paris_models.evaluate import held_out_losses, paired
from paris_models.merge import merge_files, revert_files
from paris_protocol.canonical import real
from paris_protocol.errors import ParisError
from paris_protocol.net.folder import file_root
from paris_protocol.records import Policy

Json = dict[str, Any]

STANDARD_ERRORS = 3.0
"""Where the job names no policy: worse by three standard errors, without a margin."""
CLIPS = 256


@dataclass(frozen=True, slots=True)
class Variant:
    """Which inputs are merged, by their places in the job's list, and with which step."""

    places: tuple[int, ...]
    step: float = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """A merged head's root, its paired loss, and whether that is worse than the parent's."""

    root: str
    loss: PairedLoss
    worse: bool


class _Bench:
    """What all variants of one merge have in common: the parent, its losses, the test."""

    def __init__(self, job: Json, name: str) -> None:
        genesis = genesis_of(job["genesis"])
        self.config = ExpertConfig.from_record(genesis.expert)
        self.recipe = RecipeConfig.from_record(genesis.recipe)
        self.parent, self.out = Path(job["parent"]), Path(job["out"])
        self.inputs = [
            (Path(i["path"]), float.fromhex(i["weight"]), float.fromhex(i["scale"]))
            for i in job[name]
        ]
        parent = gated(self.parent, expert_schema(self.config, "F32"))
        for path, _, _ in self.inputs:
            check_update(path, self.config)  # nothing maps a file that did not pass the gate
        self.policy = record(Policy, job["policy"]) if "policy" in job else None
        count = self.policy.margins.clips if self.policy else CLIPS
        self._held: HeldOut = held_out(
            Path(job["private"]), count=count, secret=str(job["secret"]), salt=root_of(parent)
        )
        self._before = self._losses(parent)

    def _losses(self, weights: Weights) -> torch.Tensor:
        held = self._held
        return held_out_losses(weights, self.config, self.recipe, held.clips, held.key)

    @property
    def margin(self) -> float:
        return real(self.policy.margins.merge_damage) if self.policy else 0.0

    def written(self) -> Found:
        """What `out` holds; refuses values that are not finite and leaves nothing then."""
        head = gated(self.out, expert_schema(self.config, "F32"))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in head.values()):
            self.out.unlink()
            raise ParisError("tensor.values", "the merged head")
        pair = paired(self._before, self._losses(head))
        loss = PairedLoss(pair.delta, pair.se, pair.n, pair.before, pair.after)
        errors = real(self.policy.margins.standard_errors) if self.policy else STANDARD_ERRORS
        return Found(root_of(head), loss, is_worse(loss, errors, self.margin))

    def scaled(self, variant: Variant) -> list[tuple[Path, float, float]]:
        """Inputs of a variant with their weights; × ½ is exact."""
        chosen = (self.inputs[place] for place in variant.places)
        return [(path, variant.step * weight, scale) for path, weight, scale in chosen]

    def merged(self, variant: Variant) -> Found:
        """Writes a variant to `out` and judges it."""
        merge_files(self.parent, self.scaled(variant), self.out)
        return self.written()


def merge(job: Json) -> Json:
    """See above; `out` holds the merged head.

    Raises ParisError("tensor.values") when the result is not finite: nothing is left at `out`.
    """
    bench = _Bench(job, "inputs")
    whole = Variant(tuple(range(len(bench.inputs))))
    taken, found = whole, bench.merged(whole)
    if found.worse:
        taken, found = _rescued(bench, whole)
    left_out = sorted(set(whole.places) - set(taken.places))
    how = [["step", f"{taken.step:g}"], ["left_out", str(len(left_out))]]
    return {
        "root": found.root,
        "numbers": [*_numbers(bench, found), *how],
        "worse": found.worse,
        "inputs": [
            [place, weight.hex(), scale.hex()]
            for place, (_, weight, scale) in zip(taken.places, bench.scaled(taken), strict=True)
        ],
        "left_out": left_out,
    }


def _rescued(bench: _Bench, whole: Variant) -> tuple[Variant, Found]:
    """The first remedy that is not worse than the parent; else the whole merge, which is."""
    half = Variant(whole.places, 0.5)
    found = bench.merged(half)
    if not found.worse:
        return half, found
    # The culprit is the input without which the loss falls farthest.
    sound = [(f.loss.delta, v) for v in _without_one(whole) if not (f := bench.merged(v)).worse]
    best = min(sound, key=lambda each: each[0])[1] if sound else whole
    return best, bench.merged(best)


def _without_one(whole: Variant) -> Iterator[Variant]:
    if len(whole.places) > 1:
        for gone in whole.places:
            yield Variant(tuple(place for place in whole.places if place != gone))


def _numbers(bench: _Bench, found: Found) -> list[list[str]]:
    loss = found.loss
    listed = numbers(
        delta=loss.delta,
        se=loss.se,
        n=loss.n,
        before=loss.before,
        after=loss.after,
        margin=bench.margin,
    )
    return [list(number) for number in listed]


def revert(job: Json) -> Json:
    """Takes merged inputs out of a head: {"root", "numbers"}; `out` holds the result.

    `removed` repeats the scalars of the merge. What it does to the held-out loss is told, and is no
    reason not to do it. Raises ParisError("tensor.values") as `merge` does.
    """
    bench = _Bench(job, "removed")
    revert_files(bench.parent, bench.inputs, bench.out)
    found = bench.written()
    return {"root": found.root, "numbers": _numbers(bench, found)}


def average(job: Json) -> Json:
    """The running average after a merge: {"root"}; `out` holds it, written a tensor at a time.

    `average` is the file of the one before, `head` the merged head, `decay` (hex float) the share
    of the one before. Raises ParisError("tensor.values") as `merge` does.
    """
    config = ExpertConfig.from_record(genesis_of(job["genesis"]).expert)
    before, head, out = (Path(job[name]) for name in ("average", "head", "out"))
    for path in (before, head):
        header_of(path, expert_schema(config, "F32"))
    try:
        average_files(before, head, float.fromhex(job["decay"]), out)
    except ValueError as error:
        raise ParisError("tensor.values", str(error)) from error
    return {"root": file_root([out])}
