"""The verify job: measure a contribution layer by layer, in order of cost, until one refuses.

The conclusions are those of `paris_coordinator.judging` and `.sequential`; this file opens the
update (behind the strict gate), recomputes its root, and runs parent and candidate on secret clips.
What depends on the parent alone is kept for the next contribution to the same head, and measured no
further than a contribution needs it::

    verify({"job": "verify", "genesis": …, "update": …, "parent": …, …})["layers"][0]["passed"]

Optional in the job: `history`, relative norms of the round's accepted updates; `blocks`, for each
block the numbers `block.<name>` of the expert's accepted updates; `previous`, the head before the
parent. In the answer `private` are L3's exact numbers, for the ledger (the verdict tells the bucket
alone), and `cost` counts samples (`jobs.common.cost`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paris_coordinator import judging, sequential
from paris_coordinator.jobs.common import (
    CODEC_DTYPE,
    HeldOut,
    Weights,
    cost,
    expert_schema,
    gated,
    genesis_of,
    held_out,
    record,
    root_of,
)
from paris_coordinator.jobs.measure import CLIPS, downhill, farthest, reach
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.evaluate import held_out_losses, paired
from paris_models.train import new_state, state_tensors
from paris_models.updates import apply_update, cosine, make_update, spectrum, statistics
from paris_protocol.canonical import decimal, real
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, Commitment, Contribution, Genesis, Layer, Policy
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root

Json = dict[str, Any]


@dataclass(slots=True)
class Spent:
    """Samples that a job has used: through a forward pass alone, and with its gradient."""

    forward: int = 0
    trained: int = 0


@dataclass(slots=True)
class Parent:
    """A head and what has been measured of it; the last few are kept between jobs."""

    name: tuple[str, ...]
    config: ExpertConfig
    recipe: RecipeConfig
    weights: Weights
    start_root: str
    held: HeldOut
    losses: torch.Tensor
    down: Weights | None = None

    def downhill(self, spent: Spent) -> Weights:
        """The optimiser's own first step on secret clips (L2's direction)."""
        if self.down is None:
            self.down = downhill(
                self.weights, self.config, self.recipe, self.held.clips, self.held.key
            )
            spent.trained += min(CLIPS, len(self.held.clips))
        return self.down

    def losses_of(self, weights: Weights, among: range, spent: Spent) -> torch.Tensor:
        """Losses of any weights on a part of the secret clips."""
        spent.forward += len(among)
        return held_out_losses(
            weights, self.config, self.recipe, self.held.clips, self.held.key, among=among
        )

    def own_losses(self, count: int, spent: Spent) -> torch.Tensor:
        """The head's losses on the first `count` clips, each measured once."""
        if len(self.losses) < count:
            more = self.losses_of(self.weights, range(len(self.losses), count), spent)
            self.losses = torch.cat([self.losses, more])
        return self.losses[:count]


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
    """{"layers", "norm", "relative", "private", "cost"}; a refusal stands last among the layers."""
    case, spent = _case(job), Spent()
    layers: list[Layer] = []
    norm = relative = loss = None
    structure, update = _structure(case)
    layers.append(structure)
    if update is not None:
        parent = _parent(case)
        layers.append(_commitments(case, parent))
        if layers[-1].passed:
            numbers = _numbers(case, parent, update, spent)
            norm, relative = decimal(numbers.norm), decimal(numbers.relative)
            layers.append(_statistics(case, numbers))
        if layers[-1].passed and layers[-1].layer == "L2":
            layer, loss = _damage(case, parent, update, spent)
            layers.append(layer)
    return {
        "layers": [layer.model_dump(mode="json") for layer in layers],
        "norm": norm,
        "relative": relative,
        "private": None if loss is None else dict(judging.exact(loss)),
        "cost": cost(case.assignment, forward=spent.forward, trained=spent.trained),
    }


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


def _numbers(case: Case, parent: Parent, update: Weights, spent: Spent) -> judging.UpdateNumbers:
    found = statistics(update, parent.weights)
    unit = UnitConfig.from_record(case.assignment, unit_key(case.assignment.seed))
    ways = farthest(new_state(parent.config, parent.recipe, parent.weights), unit)
    whole, blocks = reach(found.norm, found.blocks, ways)
    spectral, rank = spectrum(update)
    schema = expert_schema(parent.config, CODEC_DTYPE[case.assignment.update_codec])
    copies = {
        str(other["id"]): cosine(update, gated(Path(other["path"]), schema))
        for other in case.job.get("others", ())
        if other["node"] != case.assignment.node
    }
    return judging.UpdateNumbers(
        norm=found.norm,
        relative=found.relative,
        reach=whole,
        max_abs=found.max_abs,
        descent=cosine(update, parent.downhill(spent)),
        copies=copies,
        blocks=blocks,
        lineage=_along_the_lineage(case, parent, update),
        spectral=spectral,
        rank=rank,
        least_rank=judging.RANK_LOW if parent.recipe.optimiser == "muon" else 0.0,
    )


def _along_the_lineage(case: Case, parent: Parent, update: Weights) -> float:
    """Cosine with what the last merge changed; NaN at the first head."""
    before = case.job.get("previous")
    if before is None:
        return math.nan
    previous = gated(Path(before), expert_schema(parent.config, "F32"))
    return cosine(update, make_update(previous, parent.weights, "dense-f32"))


def _statistics(case: Case, numbers: judging.UpdateNumbers) -> Layer:
    history = [real(value) for value in map(str, case.job.get("history", ()))]
    lineage = {
        str(name): [real(str(value)) for value in values]
        for name, values in case.job.get("blocks", {}).items()
    }
    return judging.statistics(numbers, history, case.policy.margins, lineage)


def _damage(
    case: Case, parent: Parent, update: Weights, spent: Spent
) -> tuple[Layer, judging.PairedLoss]:
    """L3 in looks: more clips only while the answer is open."""
    margins, turn = case.policy.margins, case.assignment.round
    margin, errors = judging.damage_margin(margins, turn), real(margins.standard_errors)
    candidate = apply_update(parent.weights, update)
    after = torch.empty(0)
    for look in sequential.plan(margins.looks, len(parent.held.clips), errors):
        more = parent.losses_of(candidate, range(len(after), look.clips), spent)
        after = torch.cat([after, more])
        pair = paired(parent.own_losses(look.clips, spent), after)
        bucket = sequential.conclude(pair.delta, pair.se, look, margin=margin, errors=errors)
        if bucket is not None:
            break
    loss = judging.PairedLoss(pair.delta, pair.se, pair.n, pair.before, pair.after)
    return judging.damage(loss, margins, turn, bucket), loss


def _parent(case: Case) -> Parent:
    """The head that the assignment names, read once; damage to it is the coordinator's."""
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
        losses=torch.empty(0),
    )
    _kept[:] = [*_kept[-2:], parent]
    return parent
