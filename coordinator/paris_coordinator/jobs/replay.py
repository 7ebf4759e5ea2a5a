"""The jobs of the replay audit: replay opened segments, name this machine, know a unit's answer.

`replay` decides nothing about keys or standing; it says what the replay shows, for the report. An
update that is not what the last committed state made is found as well, when that state is opened or
replayed: honest states beside another result are no proof of work::

    replay({"job": "replay", "assignment": …, "states": [[3, path]], "segments": [3], …})
    # {"segments": [Segment…], "passed": true, "exact": true, "numerics": "…", "code": ""}
    numerics({"job": "numerics", "genesis": path, "dtype": "float32", "threads": 1, …})
    answer({"job": "answer", "assignment": …, "parent": path, "shards": […], …})

Behind the place of the last state stands the residual that the unit began with, if it did.

Codes: `audit.mismatch`, `audit.state` (opened bytes that are not the committed ones, `passed` false
in both cases), `audit.tolerance` (nothing calibrated for this replay: no segment, `passed` true,
and nothing is proved). A damaged parent is the coordinator's own fault: `state.corrupt`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from paris_coordinator.jobs.common import (
    Weights,
    cost,
    dense_of,
    expert_schema,
    gated,
    genesis_of,
    record,
    root_of,
    update_of,
)
from paris_models import lean
from paris_models.checkpoint import schema_of
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.numerics import numeric_class
from paris_models.plans import Plan, plan_of
from paris_models.replay import (
    FAR,
    SegmentFound,
    audit_segments,
    committed_steps,
    model_class,
    train_whole,
)
from paris_models.shards import Clips, read_training
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
    clips: Clips
    residual: Weights | None = None

    @property
    def start(self) -> Mapping[str, torch.Tensor]:
        """What training begins with: the parent, and what the node's last update left out."""
        if self.residual is None:
            return self.parent
        return lean.start_of(self.parent, self.residual)

    def fresh(self) -> lean.State:
        """The state that training begins with."""
        return lean.start_state(self.plan, self.config, self.recipe, self.start, key=self.unit.key)

    @property
    def plan(self) -> Plan:
        """How the unit is trained."""
        return plan_of(self.assignment.plan)


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
    paths = {int(place): Path(path) for place, path in job["states"]}
    begun = paths.pop(len(commitment.states), None)
    if what.assignment.residual is not None and begun is None:
        return {**answer, "code": "audit.tolerance"}
    what, sound = _begun(what, begun, commitment)
    opened, damaged = _opened(paths, what, commitment)
    if damaged or not sound:
        return {**answer, "passed": False, "code": "audit.state"}
    found = audit_segments(
        what.config, what.recipe, what.unit, what.clips, what.start, commitment.states, opened,
        job["segments"], exact=exact, limits=limits, root_of=root_of, plan=what.plan,
    )  # fmt: skip
    passed = all(one.passed for one in found) and _made_the_update(what, commitment, opened)
    segments = [_segment(one).model_dump(mode="json") for one in found]
    code = "" if passed else "audit.mismatch"
    return {**answer, "segments": segments, "passed": passed, "code": code}


def numerics(job: Json) -> Json:
    """{"numerics", "model"}: this process' numeric class for the network's own batch.

    `plan`: under which training plan, float32 if it is not named; `model` is the name of that
    model's tolerances under it.
    """
    genesis = genesis_of(job["genesis"])
    config, recipe = (
        ExpertConfig.from_record(genesis.expert),
        RecipeConfig.from_record(genesis.recipe),
    )
    plan = plan_of(str(job.get("plan", "float32")))
    found = numeric_class(
        config,
        recipe,
        batch=int(job.get("batch", recipe.batch)),
        dtype=str(job["dtype"]),
        threads=int(job["threads"]),
        kernels=str(job["kernels"]),
        plan=plan,
    )
    return {"numerics": found, "model": model_class(config, recipe, plan)}


def answer(job: Json) -> Json:
    """{"states": roots, "update_root", "numerics"}: the whole unit, from the assignment alone.

    With `update`, the file that was handed in, also `rho`: how far it is from this machine's, over
    the length of this machine's.
    """
    what = _training(job)
    if what.assignment.residual is not None:
        raise ParisError("audit.state", "what the unit began with is not known here")
    state, roots = train_whole(
        what.config, what.recipe, what.unit, what.clips, what.parent, root_of, plan=what.plan
    )
    codec = what.assignment.update_codec
    update = lean.update_of(what.plan, what.parent, lean.state_tensors(state), codec)
    numerics = _numerics(what.config, what.recipe, what.assignment)
    found = {"states": roots, "update_root": root_of(update), "numerics": numerics}
    if job.get("update"):
        claimed = update_of(Path(job["update"]), codec, what.config)
        own = dense_of(update, codec, what.config)
        apart = sum(float((own[n] - claimed[n]).double().square().sum()) for n in own)
        length = sum(float(tensor.double().square().sum()) for tensor in own.values())
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
        clips=read_training(
            [Path(path) for path in job["shards"]],
            [shard.bucket for shard in assignment.shards],
            {number: bucket.batch for number, bucket in enumerate(genesis.buckets, 1)},
        ),
    )


def _numerics(config: ExpertConfig, recipe: RecipeConfig, assignment: Assignment) -> str:
    return numeric_class(
        config,
        recipe,
        batch=assignment.batch,
        dtype=assignment.dtype,
        threads=assignment.threads,
        kernels=assignment.kernels,
        plan=plan_of(assignment.plan),
    )


def _limits(rules: AuditRules, what: Training) -> tuple[float, float] | None:
    model = model_class(what.config, what.recipe, what.plan)
    found = tolerance_for(rules, what.assignment.dtype, model, what.assignment.commit_every)
    return None if found is None else (real(found.rho), real(found.tensor))


def _begun(what: Training, path: Path | None, commitment: Commitment) -> tuple[Training, bool]:
    """The training with what it began with beside its parent, and whether it did begin so.

    `path` is the opened residual; the first committed state has to be the fresh one of
    parent + residual, which L1 could not see.
    """
    if path is None:
        return what, True
    try:
        what = replace(what, residual=gated(path, expert_schema(what.config, "F32")))
    except ParisError as error:
        if error.code != "tensor.header":
            raise
        return what, False
    assert what.residual is not None
    if root_of(what.residual) != what.assignment.residual:
        return what, False
    return what, root_of(lean.state_tensors(what.fresh())) == commitment.states[0]


def _opened(
    states: Mapping[int, Path], what: Training, commitment: Commitment
) -> tuple[dict[int, Weights], bool]:
    """The opened states behind the gate, and whether any is not the committed one."""
    schema = schema_of(lean.state_tensors(what.fresh()))
    opened: dict[int, Weights] = {}
    for place, path in states.items():
        try:
            opened[place] = gated(path, schema)
        except ParisError as error:
            if error.code != "tensor.header":
                raise
            return {}, True
        if root_of(opened[place]) != commitment.states[place]:
            return {}, True
    return opened, False


def _made_the_update(what: Training, commitment: Commitment, opened: Mapping[int, Weights]) -> bool:
    """The committed update is what the last state makes, encoded, as far as that is known."""
    last = opened.get(len(committed_steps(what.unit)) - 1)
    if last is None:
        return True
    codec, begun = what.assignment.update_codec, what.residual
    try:
        update = lean.update_of(what.plan, what.parent, last, codec, begun)
        left = lean.rest_of(what.plan, what.parent, last, update, codec, begun)
    except ValueError:  # values that no update can carry
        return False
    if commitment.residual != (None if left is None else root_of(left)):
        return False
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
