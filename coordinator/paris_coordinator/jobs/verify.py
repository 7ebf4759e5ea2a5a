"""The verify job: measure a contribution layer by layer, in order of cost, until one refuses.

The conclusions are those of `paris_coordinator.judging`; this file opens the update (behind the
strict gate), recomputes its root, and runs parent and candidate on secret clips. What depends on
the parent alone is kept for the next contribution to the same head::

    verify({"job": "verify", "genesis": …, "update": …, "parent": …, …})["layers"][0]["passed"]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paris_coordinator import judging
from paris_coordinator.jobs.common import (
    CODEC_DTYPE,
    HeldOut,
    Weights,
    expert_schema,
    gated,
    genesis_of,
    held_out,
    record,
    root_of,
)
from paris_coordinator.jobs.measure import downhill, reach
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.evaluate import held_out_losses, paired
from paris_models.train import new_state, state_tensors
from paris_models.updates import apply_update, cosine, statistics
from paris_protocol.canonical import decimal
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, Commitment, Contribution, Genesis, Layer, Policy
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root

Json = dict[str, Any]


@dataclass(slots=True)
class Parent:
    """A head and what has been measured of it; one is kept between jobs."""

    name: tuple[str, ...]
    config: ExpertConfig
    recipe: RecipeConfig
    weights: Weights
    start_root: str
    held: HeldOut
    losses: torch.Tensor
    down: Weights


@dataclass(frozen=True, slots=True)
class Case:
    """One contribution with the records it is judged by."""

    genesis: Genesis
    policy: Policy
    assignment: Assignment
    commitment: Commitment | None
    contribution: Contribution
    job: Json


_kept: list[Parent] = []


def verify(job: Json) -> Json:
    """{"layers": […], "norm": real | null, "relative": real | null}; a refusal stands last."""
    case = _case(job)
    layers: list[Layer] = []
    norm = relative = None
    structure, update = _structure(case)
    layers.append(structure)
    if update is not None:
        parent = _parent(case)
        layers.append(_commitments(case, parent))
        if layers[-1].passed:
            numbers = _numbers(case, parent, update)
            norm, relative = decimal(numbers.norm), decimal(numbers.relative)
            history = [float(value) for value in job.get("history", ())]
            layers.append(judging.statistics(numbers, history, case.policy.margins))
        if layers[-1].passed and layers[-1].layer == "L2":
            layers.append(_damage(case, parent, update))
    found = [layer.model_dump(mode="json") for layer in layers]
    return {"layers": found, "norm": norm, "relative": relative}


def _case(job: Json) -> Case:
    commitment = job.get("commitment")
    return Case(
        genesis=genesis_of(job["genesis"]),
        policy=record(Policy, job["policy"]),
        assignment=record(Assignment, job["assignment"]),
        commitment=None if commitment is None else record(Commitment, commitment),
        contribution=record(Contribution, job["contribution"]),
        job=job,
    )


def _structure(case: Case) -> tuple[Layer, Weights | None]:
    """L0, cheapest first: claims, header, then finite values and the root of the data."""
    claims = judging.claims(case.assignment, case.contribution)
    if not claims.passed:
        return claims, None
    config = ExpertConfig.from_record(case.genesis.expert)
    schema = expert_schema(config, CODEC_DTYPE[case.assignment.update_codec])
    try:
        update = gated(Path(case.job["update"]), schema)
    except ParisError as error:
        if error.code != "tensor.header":
            raise
        return judging.failed("L0", "structure.schema", claims.numbers), None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in update.values()):
        return judging.failed("L0", "structure.values", claims.numbers), None
    if root_of(update) != case.contribution.update.root:
        return judging.failed("L0", "structure.digest", claims.numbers), None
    tensors = judging.numbers(
        tensors=len(update), parameters=sum(t.numel() for t in update.values())
    )
    return judging.passed("L0", claims.numbers + tensors), update


def _commitments(case: Case, parent: Parent) -> Layer:
    states = case.commitment.states if case.commitment is not None else ()
    return judging.commitments(
        case.assignment,
        case.commitment,
        case.contribution,
        start_root=parent.start_root,
        states_root=states_root(states),
    )


def _numbers(case: Case, parent: Parent, update: Weights) -> judging.UpdateNumbers:
    found = statistics(update, parent.weights)
    unit = UnitConfig.from_record(case.assignment, unit_key(case.assignment.seed))
    state = new_state(parent.config, parent.recipe, parent.weights)
    schema = expert_schema(parent.config, CODEC_DTYPE[case.assignment.update_codec])
    copies = {
        str(other["id"]): cosine(update, gated(Path(other["path"]), schema))
        for other in case.job.get("others", ())
        if other["node"] != case.assignment.node
    }
    return judging.UpdateNumbers(
        norm=found.norm,
        relative=found.relative,
        reach=reach(found.norm, state, unit),
        max_abs=found.max_abs,
        descent=cosine(update, parent.down),
        copies=copies,
    )


def _damage(case: Case, parent: Parent, update: Weights) -> Layer:
    candidate = apply_update(parent.weights, update)
    after = held_out_losses(
        candidate, parent.config, parent.recipe, parent.held.clips, parent.held.key
    )
    pair = paired(parent.losses, after)
    loss = judging.PairedLoss(pair.delta, pair.se, pair.n, pair.before, pair.after)
    return judging.damage(loss, case.policy.margins, case.assignment.round)


def _parent(case: Case) -> Parent:
    """The head that the assignment names, measured once; damage to it is the coordinator's."""
    job, root = case.job, case.assignment.parent.weights.root
    name = (root, str(job["private"]), str(job["secret"]), str(case.policy.margins.clips))
    for kept in _kept:
        if kept.name == name:
            return kept
    config = ExpertConfig.from_record(case.genesis.expert)
    recipe = RecipeConfig.from_record(case.genesis.recipe)
    weights = gated(Path(job["parent"]), expert_schema(config, "F32"))
    if root_of(weights) != root:
        raise ParisError("state.corrupt", str(job["parent"]))
    held = held_out(
        Path(job["private"]), count=case.policy.margins.clips, secret=str(job["secret"]), salt=root
    )
    parent = Parent(
        name=name,
        config=config,
        recipe=recipe,
        weights=weights,
        start_root=root_of(state_tensors(new_state(config, recipe, weights))),
        held=held,
        losses=held_out_losses(weights, config, recipe, held.clips, held.key),
        down=downhill(weights, config, recipe, held.clips, held.key),
    )
    _kept[:] = [*_kept[-2:], parent]
    return parent
