"""The verify job: measure a contribution layer by layer, in order of cost, until one refuses.

The conclusions are those of `paris_coordinator.judging` and `.sequential`; this file opens the
update (behind the strict gate), recomputes its root, decodes it to a dense change of the float32
master, whatever plan and codec it is of, and runs parent and candidate on secret clips.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paris_coordinator import judging, sequential
from paris_coordinator.jobs.common import (
    HeldOut,
    Weights,
    check_update,
    cost,
    dense_of,
    expert_schema,
    gated,
    genesis_of,
    held_out,
    record,
    root_of,
    update_of,
    wire_of,
)
from paris_coordinator.jobs.measure import CLIPS, Slope, direction, downhill, farthest, reach
from paris_models import lean
from paris_models.codecs import encode
from paris_models.codecs_layout import is_topk
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.evaluate import held_out_losses, paired
from paris_models.plans import Plan, plan_of
from paris_models.updates import (
    UpdateStats,
    apply_update,
    cosine,
    make_update,
    spectrum,
    statistics,
)
from paris_protocol.canonical import decimal, real
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, Commitment, Contribution, Genesis, Layer, Policy
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root

Json = dict[str, Any]

SPARSE = 0.01
"""A block with less of a topk update's squared norm has too few values for a size of its own."""


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
    held: HeldOut
    losses: torch.Tensor
    down: Slope | None = None
    roots: dict[str, str] = field(default_factory=dict)

    def start_root(self, state: lean.State, plan: Plan) -> str:
        """The root of a unit's fresh state; only that of adapters differs between units."""
        if plan.rank:
            return root_of(lean.state_tensors(state))
        if plan.name not in self.roots:
            self.roots[plan.name] = root_of(lean.state_tensors(state))
        return self.roots[plan.name]

    def downhill(self, spent: Spent) -> Slope:
        """Where down is on the secret clips (L2's direction)."""
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

    @property
    def plan(self) -> Plan:
        """How the unit was trained."""
        return plan_of(self.assignment.plan)

    @property
    def unit(self) -> UnitConfig:
        """The unit of work."""
        return UnitConfig.from_record(self.assignment, unit_key(self.assignment.seed))

    def fresh(self, parent: Parent) -> lean.State:
        """The state that the unit's training began with."""
        return lean.start_state(
            self.plan, parent.config, parent.recipe, parent.weights, key=self.unit.key
        )


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
        state = case.fresh(parent)
        layers.append(_commitments(case, parent, state))
        if layers[-1].passed:
            numbers = _numbers(case, parent, state, update, spent)
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
    """L0, cheapest first: claims, header, finite values, the root of the data, and what it means.

    The header has to be that of the assigned codec, for factors with the rank of the plan.
    """
    claims = judging.claims(case.assignment, case.contribution)
    if not claims.passed:
        return claims, None
    config = ExpertConfig.from_record(case.genesis.expert)
    codec = case.assignment.update_codec

    def refused(code: str) -> tuple[Layer, None]:
        return judging.failed("L0", code, claims.numbers), None

    try:
        wire = wire_of(Path(case.job["update"]), codec, config, case.plan.rank)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in wire.values()):
            return refused("structure.values")
        if root_of(wire) != case.contribution.update.root:
            return refused("structure.digest")
        update = dense_of(wire, codec, config)
    except ParisError as error:
        if error.code != "tensor.header":
            raise
        return refused("structure.schema")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in update.values()):
        return refused("structure.values")
    tensors = judging.numbers(tensors=len(wire), parameters=sum(t.numel() for t in wire.values()))
    return judging.passed("L0", claims.numbers + tensors), update


def _commitments(case: Case, parent: Parent, state: lean.State) -> Layer:
    states = case.commitment.states if case.commitment is not None else ()
    return judging.commitments(
        case.assignment,
        case.commitment,
        case.contribution,
        start_root=None
        if case.assignment.residual  # nobody but the node has it, unless an audit asks for it
        else parent.start_root(state, case.plan),
        states_root=states_root(states),
    )


def _numbers(
    case: Case, parent: Parent, state: lean.State, update: Weights, spent: Spent
) -> judging.UpdateNumbers:
    found = statistics(update, parent.weights)
    whole, blocks = reach(found.norm, found.blocks, farthest(state, case.unit))
    spectral, rank = spectrum(update)
    copies = {
        str(other["id"]): cosine(update, _as_sent(case, parent, Path(other["path"])))
        for other in case.job.get("others", ())
        if other["node"] != case.assignment.node
    }
    # The largest values alone have no rank that a limit could be set for.
    full = case.plan.optimiser == "recipe" and not is_topk(case.assignment.update_codec)
    return judging.UpdateNumbers(
        norm=found.norm,
        relative=found.relative,
        reach=whole,
        max_abs=found.max_abs,
        descent=cosine(update, _down(case, parent, state, update, spent)),
        copies=copies,
        blocks=_comparable(case, found, blocks),
        lineage=_along_the_lineage(case, parent, update),
        spectral=spectral,
        rank=rank,
        least_rank=judging.RANK_LOW if full and parent.recipe.optimiser == "muon" else 0.0,
        least_reach=judging.REACH_LOW_FACTORS if case.plan.rank else judging.REACH_LOW,
    )


def _as_sent(case: Case, parent: Parent, path: Path) -> Weights:
    """Another's update as this one's codec would have sent it.

    Of the largest values alone, two honest updates hardly share any; a copy shares them all.
    """
    other = update_of(path, check_update(path, parent.config), parent.config)
    codec = case.assignment.update_codec
    return dense_of(encode(codec, other), codec, parent.config) if is_topk(codec) else other


def _down(case: Case, parent: Parent, state: lean.State, update: Weights, spent: Spent) -> Weights:
    """The first step of the unit's own plan, of a topk update only at the values that it sends."""
    step = direction(parent.downhill(spent), state)
    if is_topk(case.assignment.update_codec):
        return {name: torch.where(update[name] != 0, t, 0.0) for name, t in step.items()}
    return step


def _comparable(case: Case, found: UpdateStats, blocks: dict[str, float]) -> dict[str, float]:
    """The blocks whose size tells something: of a topk update the larger ones."""
    if not is_topk(case.assignment.update_codec):
        return blocks
    least = math.sqrt(SPARSE) * found.norm
    return {name: reach for name, reach in blocks.items() if found.blocks[name] > least}


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
        name=name, config=config, recipe=recipe, weights=weights, held=held, losses=torch.empty(0)
    )
    _kept[:] = [*_kept[-2:], parent]
    return parent
