"""The thresholds of `verify`: measured on seeds of their own, written into the lab's policy.

Honest units of the seeds "learn …" give the margins of L2 and L3 by the rules below; the command
`paris-coordinator calibrate` gives the tolerances of L4. No seed of these appears in a figure::

    margins = learn(lab, units=24)         # policy and context of the lab's phase
    refusal, answer = lab.judge(work, **context(lab))
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from benchmarks.verify_lab import NOW, Lab, Work, plain
from paris_coordinator.calibration import Source, measure
from paris_coordinator.judging import BLOCK
from paris_coordinator.tolerances import compare, tolerances
from paris_models.replay import model_class
from paris_protocol.canonical import decimal
from paris_protocol.records import Policy

Json = dict[str, Any]

DIRECTION: Final = 0.4
"""Part of the least honest direction that is demanded, as in the demo's recipe."""
CLEAR: Final = 4.0
"""Noise points anywhere with a deviation of 1/√parameters. Where honest updates are not this many
deviations downhill, as late in training, direction tells nothing and its test is switched off."""
DAMAGE: Final = 2.0
"""Times the worst honest δ − 3 SE that is allowed …"""
LEAST_DAMAGE: Final = 0.01
"""… and at least this part of the parent's loss."""
KNOWN: Final = 8
"""Honest updates of the round that a judge knows already."""
BLOCK_Z: Final = 2.0
"""Times the worst honest z of a block, at least 8."""
CALIBRATED: Final = (1, 5, 20)
"""Steps of the calibrated segments."""
OPEN: Final = {
    "damage": ["9"], "merge_damage": "9", "standard_errors": "3", "clips": 256, "norm_high": "2",
    "norm_low": "0.5", "copy_cosine": "0.9", "noise_cosine": "-1", "source": "nothing learnt yet",
}  # fmt: skip
"""Margins that refuse next to nothing, with every clip looked at."""
AUDIT: Final = {
    "chain": "0" * 64, "chain_length": 1 << 16, "segments": 2, "rate": "10", "floor": "0.05",
    "probation": 10, "probation_weight": "0.25", "vesting": 20, "answer_within": 600,
    "retry_within": 600, "auditors": 0, "canary": "0",
}  # fmt: skip


def learn(lab: Lab, units: int) -> Json:
    """Write the margins of a phase, and what a judge of this head knows; returns the margins."""
    write_policy(lab, OPEN)
    works = [lab.work(lab.assignment(f"learn {lab.phase} {i}")) for i in range(units)]
    found = [numbers_of(lab.judge(work)[1]) for work in works]
    blocks = [name for name in found[0] if name.startswith(BLOCK)]
    known: Json = {
        "history": [one["relative"] for one in found[:KNOWN]],
        "blocks": {
            name.removeprefix(BLOCK): [one[name] for one in found[:KNOWN]] for name in blocks
        },
    }
    context_file(lab).write_text(json.dumps(known))
    z = [numbers_of(lab.judge(work, **known)[1])["block_z"] for work in works[KNOWN:]]
    worst = max(one["delta"] - 3 * one["se"] for one in found)
    least = min(one["descent"] for one in found)
    clear = CLEAR / math.sqrt(lab.size.expert.parameters)
    margins = {
        "damage": [decimal(max(DAMAGE * worst, LEAST_DAMAGE * found[0]["before"]), 3)],
        "noise_cosine": decimal(DIRECTION * least, 3) if least > clear else "-1",
        "block_z": decimal(max(8.0, BLOCK_Z * max(z, default=0.0)), 3),
        "looks": [64, 128],
        "source": f"seeds learn {lab.phase} 0 to {units - 1}",
    }
    drop(works)
    write_policy(lab, OPEN | margins)
    return margins


def context_file(lab: Lab) -> Path:
    """Where that is kept."""
    return lab.folder / f"context-{lab.phase}.json"


def context(lab: Lab) -> Json:
    """What a judge of this phase knows of the round and the lineage."""
    known: Json = json.loads(context_file(lab).read_text())
    return known


def numbers_of(answer: Json) -> dict[str, float]:
    """All numbers of a judgement, L3's private ones among them."""
    found = {k: float(v) for layer in answer["layers"] for k, v in layer["numbers"]}
    return found | {k: float(v) for k, v in (answer["private"] or {}).items()}


def calibrated(lab: Lab, pairs: int, dtypes: tuple[str, ...]) -> list[Json]:
    """The tolerances that the calibration command finds on this machine."""
    source = Source(
        expert=lab.genesis.expert,
        recipe=lab.genesis.recipe,
        initial=lab.head,
        shards=(lab.shard(0, 0),),
        dtype="float32",
        every=lab.size.every,
    )
    found = measure(source, pairs=pairs, steps=CALIBRATED, dtypes=dtypes, device="cpu")
    model = model_class(lab.size.expert, lab.size.recipe)
    made = tolerances(compare(found), model=model, source="calibration of this run")
    return [plain(one) for one in made]


def write_policy(lab: Lab, margins: Json) -> None:
    """The policy of the lab's phase with these margins, and no tolerances yet."""
    value: Json = {
        "number": 1, "previous": None, "since": NOW, "coordinator_keys": [], "addresses": [],
        "bootstraps": [], "margins": margins, "dtype": "float32", "threads": 1,
        "kernels": "reference", "update_codec": "dense-f32", "commit_every": lab.size.every,
        "soft_deadline": 60, "hard_deadline": 120, "refusals_to_quarantine": 3,
        "min_version": "0.1.0", "audit": AUDIT,
        "plan": {
            "units": 4, "steps": lab.size.steps, "rounds": 4, "schedule": "unit-cosine",
            "floor": "0.02", "warmup": "0.1", "close_after": 60,
        },
    }  # fmt: skip
    policy = Policy.model_validate_json(json.dumps(value))
    lab.policy_file.write_text(policy.model_dump_json())


def add_tolerances(folder: Path, found: list[Json]) -> None:
    """Put tolerances into the policies of all phases."""
    for path in folder.glob("policy-*.json"):
        policy = json.loads(path.read_text())
        policy["audit"]["tolerances"] = found
        path.write_text(json.dumps(policy))


def drop(works: list[Work]) -> None:
    """Deletes the files of contributions that are done with."""
    for work in works:
        for path in (work.update, *work.states.values()):
            path.unlink(missing_ok=True)
