"""The replay audit: train a committed segment again and compare what it changed.

A unit commits to its states at steps 0, k, 2k, … and the last one. An audited segment starts from
an opened state (the first from the parent itself), takes the same steps, and must end in the
committed state: in equal bits on a machine of the same numeric class, else within a calibrated
tolerance. Updates are compared, never weights: whole weights of two strangers are alike, because
they share their parent::

    found = audit_segments(config, recipe, unit, clips, parent, roots, {3: opened}, [3],
                           exact=True, limits=None, root_of=root_of)
    found[0].passed, found[0].rho                    # True, 0.0

Opened states that are not the committed ones fail; they raise nothing. A segment that does not
exist, or a state that was not opened, is the caller's mistake: `ValueError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.lean import State as Training
from paris_models.lean import load_state_tensors, new_state, state_tensors, train_step
from paris_models.plans import PLANS, Plan
from paris_models.shards import Clips

FAR: Final = 1e9
"""Stands for a distance that has no number: another state than the committed one, NaN."""
OWN: Final = PLANS["float32"]
SMALL: Final = 0.1
"""A tensor that moves less than this part of the whole's RMS is compared with that part."""

State = Mapping[str, Tensor]
RootOf = Callable[[State], str]
Told = Callable[[int], None] | None
"""Hears of each step that was taken: replays of large experts take long."""


@dataclass(frozen=True, slots=True)
class SegmentFound:
    """One replayed segment: ‖replay − claim‖ / ‖replay‖ of its update, and the worst tensor's.

    With `exact` the limits are 0; a claim whose end is known by its root alone has distance 0 or
    `FAR`.
    """

    index: int
    exact: bool
    rho: float
    tensor: float
    limit: float
    tensor_limit: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Apart:
    """One tensor: ‖replayed − claimed‖² and ‖replayed − begin‖² in float64, and its elements."""

    off: float
    moved: float
    count: int


def model_class(config: ExpertConfig, recipe: RecipeConfig, plan: Plan = OWN) -> str:
    """The name under which tolerances of this model are calibrated.

    Such as flux-319392-muon-x0; under another plan than the network's own flux-319392-adafactor.
    """
    own = f"{recipe.optimiser}-{recipe.objective}"
    return f"flux-{config.parameters}-{own if plan.optimiser == 'recipe' else plan.name}"


def committed_steps(unit: UnitConfig) -> tuple[int, ...]:
    """Steps whose states are committed: 0, k, 2k, … and the last."""
    return (*range(0, unit.steps, unit.commit_every or unit.steps), unit.steps)


def replay(state: Training, clips: Clips, unit: UnitConfig, last: int, told: Told = None) -> None:
    """Take the unit's steps from `state.step` up to step `last`, in place.

    Raises what `train_step` raises: `ArithmeticError` for a loss that is not finite.
    """
    while state.step < last:
        train_step(state, clips, unit)
        if told is not None:
            told(state.step)


def train_whole(
    config: ExpertConfig,
    recipe: RecipeConfig,
    unit: UnitConfig,
    clips: Clips,
    parent: State,
    root_of: RootOf,
    *,
    device: str = "cpu",
    plan: Plan = OWN,
) -> tuple[Training, list[str]]:
    """The unit from its parent to its end, and the roots of all its committed states."""
    state = new_state(plan, config, recipe, parent, key=unit.key, device=device)
    roots = [root_of(state_tensors(state))]
    for step in committed_steps(unit)[1:]:
        replay(state, clips, unit, step)
        roots.append(root_of(state_tensors(state)))
    return state, roots


def audit_segments(
    config: ExpertConfig,
    recipe: RecipeConfig,
    unit: UnitConfig,
    clips: Clips,
    parent: State,
    roots: Sequence[str],
    opened: Mapping[int, State],
    segments: Sequence[int],
    *,
    exact: bool,
    limits: tuple[float, float] | None,
    root_of: RootOf,
    device: str = "cpu",
    told: Told = None,
    plan: Plan = OWN,
) -> list[SegmentFound]:
    """Replay the segments of a unit against its committed `roots`; one finding each, in order.

    `opened`: states by their place among the roots; each has the names and shapes of a state. With
    `exact` a segment needs its first state, else also its last one and `limits` for rho and tensor.
    """
    if not exact and limits is None:
        raise ValueError("a replay that need not be exact needs limits")
    rho_limit, tensor_limit = (0.0, 0.0) if exact or limits is None else limits
    steps = committed_steps(unit)
    if len(roots) != len(steps):
        raise ValueError(f"{len(roots)} roots for {len(steps)} committed states")
    found = []
    for index in segments:
        if not 0 <= index < len(steps) - 1:
            raise ValueError(f"segment {index} of {len(steps) - 1}")
        needed = [i for i in (index, index + 1) if i in opened]
        if (index and index not in opened) or not (exact or index + 1 in opened):
            raise ValueError(f"the states of segment {index} were not opened")
        rho = tensor = FAR
        if all(_is_committed(opened[i], steps[i], roots[i], root_of) for i in needed):
            state = new_state(plan, config, recipe, parent, key=unit.key, device=device)
            begin = opened.get(index) or _copy(state_tensors(state))
            rho, tensor = _distance(
                state, begin, opened.get(index + 1), clips, unit, steps[index + 1],
                roots[index + 1], root_of, told,
            )  # fmt: skip
        passed = rho <= rho_limit and tensor <= tensor_limit
        found.append(SegmentFound(index, exact, rho, tensor, rho_limit, tensor_limit, passed))
    return found


def _is_committed(state: State, step: int, root: str, root_of: RootOf) -> bool:
    """The opened bytes are the committed ones and stand at the step that their place says."""
    stated = state.get("step")
    return (
        stated is not None
        and stated.numel() == 1
        and int(stated) == step
        and root_of(state) == root
    )


def _distance(
    state: Training,
    begin: State,
    claim: State | None,
    clips: Clips,
    unit: UnitConfig,
    last: int,
    root: str,
    root_of: RootOf,
    told: Told,
) -> tuple[float, float]:
    """Replays from `begin` and says how far the claimed end is: (0, 0) for equal bits."""
    try:
        load_state_tensors(state, begin)
        replay(state, clips, unit, last, told)
    except (ArithmeticError, ValueError):
        return FAR, FAR
    end = state_tensors(state)
    if root_of(end) == root:
        return 0.0, 0.0
    return distance(begin, end, claim) if claim is not None else (FAR, FAR)


def distance(begin: State, replayed: State, claimed: State) -> tuple[float, float]:
    """How far two ends of one segment are apart: rho of the weights' update, and the worst tensor.

    rho = ‖D_replay − D_claim‖ / ‖D_replay‖ over all `weights.*`, where D is end − begin. The worst
    tensor is the largest such ratio of any single tensor's change, the optimiser's among them: it
    steers the next segment. Tensors that hardly move are compared with `SMALL` of the RMS of their
    kind. `FAR` where a value is not finite.
    """
    return ratios({n: _apart(begin[n], t, claimed[n]) for n, t in replayed.items() if n != "step"})


def ratios(parts: Mapping[str, Apart]) -> tuple[float, float]:
    """`distance` from the squares of its tensors."""
    rho, worst = 0.0, 0.0
    for prefix in ("weights.", "optimiser."):
        kind = [part for name, part in parts.items() if name.startswith(prefix)]
        moved = sum(part.moved for part in kind)
        count = sum(part.count for part in kind)
        if prefix == "weights.":
            rho = _ratio(sum(part.off for part in kind), moved)
        for part in kind:
            least = SMALL**2 * moved * part.count / count
            worst = max(worst, _ratio(part.off, max(part.moved, least)))
    return rho, worst


def _apart(begin: Tensor, replayed: Tensor, claimed: Tensor) -> Apart:
    end = replayed.detach().cpu().double()
    off = (end - claimed.cpu().double()).square().sum()
    return Apart(float(off), float((end - begin.cpu().double()).square().sum()), end.numel())


def _ratio(apart: float, moved: float) -> float:
    if apart == 0.0:
        return 0.0
    ratio = math.sqrt(apart / moved) if moved > 0 else FAR
    return min(ratio, FAR) if math.isfinite(ratio) else FAR


def _copy(tensors: State) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
