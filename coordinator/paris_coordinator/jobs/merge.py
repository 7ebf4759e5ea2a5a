"""The merge job: published scalars times accepted updates into the fp32 master, and the same test.

The arithmetic is `paris_models.merge` (bit-reproducible); the merged head is judged on the secret
clips like a contribution, with the margin that the policy names for merges. A merge that is worse
is still written, so that its numbers can be published; the caller does not make it a head::

    merge({"job": "merge", "parent": …, "inputs": [{"path", "weight", "scale"}], "out": …, …})
    # {"root": …, "numbers": [["delta", …], …], "worse": false}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paris_coordinator.jobs.common import (
    expert_schema,
    gated,
    genesis_of,
    held_out,
    record,
    root_of,
)
from paris_coordinator.judging import PairedLoss, is_worse, numbers
from paris_models.config import ExpertConfig, RecipeConfig
from paris_models.evaluate import held_out_losses, paired
from paris_models.merge import merge_files
from paris_protocol.canonical import real
from paris_protocol.errors import ParisError
from paris_protocol.records import Policy

Json = dict[str, Any]

STANDARD_ERRORS = 3.0
"""Where the job names no policy: worse by three standard errors, without a margin."""
CLIPS = 256


def merge(job: Json) -> Json:
    """{"root", "numbers", "worse"}; `out` holds the merged head.

    Raises ParisError("tensor.values") when the result is not finite: nothing is left at `out`.
    """
    genesis, out = genesis_of(job["genesis"]), Path(job["out"])
    config, recipe = (
        ExpertConfig.from_record(genesis.expert),
        RecipeConfig.from_record(genesis.recipe),
    )
    parent = gated(Path(job["parent"]), expert_schema(config, "F32"))
    inputs = [
        (Path(i["path"]), float.fromhex(i["weight"]), float.fromhex(i["scale"]))
        for i in job["inputs"]
    ]
    merge_files(Path(job["parent"]), inputs, out)
    head = gated(out, expert_schema(config, "F32"))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in head.values()):
        out.unlink()
        raise ParisError("tensor.values", "the merged head")
    policy = record(Policy, job["policy"]) if "policy" in job else None
    count = policy.margins.clips if policy else CLIPS
    held = held_out(
        Path(job["private"]), count=count, secret=str(job["secret"]), salt=root_of(parent)
    )
    before = held_out_losses(parent, config, recipe, held.clips, held.key)
    after = held_out_losses(head, config, recipe, held.clips, held.key)
    pair = paired(before, after)
    loss = PairedLoss(pair.delta, pair.se, pair.n, pair.before, pair.after)
    errors = real(policy.margins.standard_errors) if policy else STANDARD_ERRORS
    margin = real(policy.margins.merge_damage) if policy else 0.0
    found = numbers(
        delta=loss.delta, se=loss.se, n=loss.n, before=loss.before, after=loss.after, margin=margin
    )
    return {
        "root": root_of(head),
        "numbers": [list(number) for number in found],
        "worse": is_worse(loss, errors, margin),
    }
