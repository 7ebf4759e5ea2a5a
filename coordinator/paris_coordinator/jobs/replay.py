"""The jobs of the replay audit: replay opened segments, name this machine, know a unit's answer.

`replay` decides nothing about keys or standing; it says what the replay shows, for the report. An
update that is not what the last committed state made is found as well, when that state is opened or
replayed: honest states beside another result are no proof of work::

    replay({"job": "replay", "assignment": …, "states": [[3, path]], "segments": [3], …})
    # {"segments": [Segment…], "passed": true, "exact": true, "numerics": "…", "code": ""}
    numerics({"job": "numerics", "genesis": path, "dtype": "float32", "threads": 1, …})
    answer({"job": "answer", "assignment": …, "parent": path, "shards": […], …})

Codes: `audit.mismatch`, `audit.state` (opened bytes that are not the committed ones, `passed` false
in both cases), `audit.tolerance` (nothing calibrated for this replay: no segment, `passed` true,
and nothing is proved). A damaged parent is the coordinator's own fault: `state.corrupt`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paris_coordinator.jobs.common import (
    CODEC_DTYPE,
    Weights,
    cost,
    expert_schema,
    gated,
    genesis_of,
    record,
    root_of,
)
from paris_models.checkpoint import schema_of
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.numerics import numeric_class
from paris_models.replay import (
    FAR,
    SegmentFound,
    audit_segments,
    committed_steps,
    model_class,
    train_whole,
)
from paris_models.shards import ClipTable, read_shards
from paris_models.train import new_state, state_tensors, weights
from paris_models.updates import make_update
from paris_protocol.audit import tolerance_for
from paris_protocol.canonical import decimal, real
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, AuditRules, Commitment, Segment
from paris_protocol.streams import unit_key

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Training:
    """What a unit's training is a function of."""

    config: ExpertConfig
    recipe: RecipeConfig
    assignment: Assignment
    unit: UnitConfig
    parent: Weights
    clips: ClipTable


def replay(job: Json) -> Json:
    """What a replay of `job["segments"]` finds (module docstring)."""
    what = _training(job)
    commitment = record(Commitment, job["commitment"])
    own = _numerics(what.config, what.recipe, what.assignment)
    exact = job.get("numerics") == own and what.unit.kernels == "reference"
    limits = None if exact else _limits(record(AuditRules, job["audit"]), what)
    places = committed_steps(what.unit)
    steps = sum(places[i + 1] - places[i] for i in job["segments"])
    spent = cost(what.assignment, forward=0, trained=steps * what.unit.batch)
    answer: Json = {"segments": [], "passed": True, "exact": exact, "numerics": own, "cost": spent}
    if not exact and limits is None:
        return {**answer, "code": "audit.tolerance"}
    opened, damaged = _opened(job["states"], what, commitment)
    if damaged:
        return {**answer, "passed": False, "code": "audit.state"}
    found = audit_segments(
        what.config, what.recipe, what.unit, what.clips, what.parent, commitment.states, opened,
        job["segments"], exact=exact, limits=limits, root_of=root_of,
    )  # fmt: skip
    passed = all(one.passed for one in found) and _made_the_update(what, commitment, opened)
    segments = [_segment(one).model_dump(mode="json") for one in found]
    code = "" if passed else "audit.mismatch"
    return {**answer, "segments": segments, "passed": passed, "code": code}


def numerics(job: Json) -> Json:
    """{"numerics": digest}: this process' numeric class for the network's own batch."""
    genesis = genesis_of(job["genesis"])
    recipe = RecipeConfig.from_record(genesis.recipe)
    found = numeric_class(
        ExpertConfig.from_record(genesis.expert),
        recipe,
        batch=int(job.get("batch", recipe.batch)),
        dtype=str(job["dtype"]),
        threads=int(job["threads"]),
        kernels=str(job["kernels"]),
    )
    return {"numerics": found}


def answer(job: Json) -> Json:
    """{"states": roots, "update_root", "numerics"}: the whole unit, from the assignment alone.

    With `update`, the file that was handed in, also `rho`: how far it is from this machine's, over
    the length of this machine's.
    """
    what = _training(job)
    state, roots = train_whole(
        what.config, what.recipe, what.unit, what.clips, what.parent, root_of
    )
    update = make_update(what.parent, weights(state), what.assignment.update_codec)
    own = _numerics(what.config, what.recipe, what.assignment)
    found = {"states": roots, "update_root": root_of(update), "numerics": own}
    if job.get("update"):
        schema = expert_schema(what.config, CODEC_DTYPE[what.assignment.update_codec])
        claimed = gated(Path(job["update"]), schema)
        apart = sum(float((update[n] - claimed[n]).double().square().sum()) for n in update)
        length = sum(float(tensor.double().square().sum()) for tensor in update.values())
        found["rho"] = decimal(min(FAR, math.sqrt(apart / max(length, 1e-300))))
    return found


def _training(job: Json) -> Training:
    genesis, assignment = genesis_of(job["genesis"]), record(Assignment, job["assignment"])
    config = ExpertConfig.from_record(genesis.expert)
    parent = gated(Path(job["parent"]), expert_schema(config, "F32"))
    if root_of(parent) != assignment.parent.weights.root:
        raise ParisError("state.corrupt", str(job["parent"]))
    return Training(
        config=config,
        recipe=RecipeConfig.from_record(genesis.recipe),
        assignment=assignment,
        unit=UnitConfig.from_record(assignment, unit_key(assignment.seed)),
        parent=parent,
        clips=read_shards([Path(path) for path in job["shards"]]),
    )


def _numerics(config: ExpertConfig, recipe: RecipeConfig, assignment: Assignment) -> str:
    return numeric_class(
        config,
        recipe,
        batch=assignment.batch,
        dtype=assignment.dtype,
        threads=assignment.threads,
        kernels=assignment.kernels,
    )


def _limits(rules: AuditRules, what: Training) -> tuple[float, float] | None:
    model = model_class(what.config, what.recipe)
    found = tolerance_for(rules, what.assignment.dtype, model, what.assignment.commit_every)
    return None if found is None else (real(found.rho), real(found.tensor))


def _opened(
    states: list[list[Any]], what: Training, commitment: Commitment
) -> tuple[dict[int, Weights], bool]:
    """The opened states behind the gate, and whether any is not the committed one."""
    schema = schema_of(state_tensors(new_state(what.config, what.recipe, what.parent)))
    opened: dict[int, Weights] = {}
    for place, path in states:
        try:
            opened[int(place)] = gated(Path(path), schema)
        except ParisError as error:
            if error.code != "tensor.header":
                raise
            return {}, True
        if root_of(opened[int(place)]) != commitment.states[int(place)]:
            return {}, True
    return opened, False


def _made_the_update(what: Training, commitment: Commitment, opened: Mapping[int, Weights]) -> bool:
    """The update that was committed is last state − parent, as far as the last state is known."""
    last = opened.get(len(committed_steps(what.unit)) - 1)
    if last is None:
        return True
    prefix = "weights."
    result = {n.removeprefix(prefix): t for n, t in last.items() if n.startswith(prefix)}
    update = make_update(what.parent, result, what.assignment.update_codec)
    return root_of(update) == commitment.update_root


def _segment(found: SegmentFound) -> Segment:
    return Segment(
        index=found.index,
        exact=found.exact,
        rho=decimal(found.rho),
        tensor=decimal(found.tensor),
        limit=decimal(found.limit),
        tensor_limit=decimal(found.tensor_limit),
        passed=found.passed,
    )
