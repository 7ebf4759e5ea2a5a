"""What follows from measured numbers: a contribution is judged layer by layer.

The worker process measures (it opens files and runs models); this module concludes. It is pure:
anyone can repeat a verdict from the numbers it publishes. The layers stand in order of cost and
the first failure ends the judgement:

* L0 structure: the update is what was signed, for the steps that were assigned.
* L1 commitments: the training states were committed before the result was handed in.
* L2 statistics: size, direction and originality of the update.
* L3 paired held-out loss: a damage detector with a margin, never a score (an "improve or reject"
  rule refuses honest units and rewards lazy ones).

It refuses to conclude from layers that are missing or out of order::

    layers = [passed("L0"), passed("L1"), passed("L2"), damage(paired, margins, round=0)]
    accepted, code = decide(layers, policy, round=0)      # (True, "accepted")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final, Literal

from paris_protocol.canonical import decimal, real
from paris_protocol.lineage import committed_steps
from paris_protocol.records import (
    Assignment,
    Commitment,
    Contribution,
    Layer,
    Margins,
    Number,
    Policy,
)

ACCEPTED: Final = "accepted"
ORDER: Final = ("L0", "L1", "L2", "L3")
HISTORY_NEEDED: Final = 3
"""So many honest norms of the same round make a median worth comparing with."""
REACH_HIGH: Final = 1.0
"""No run of the assigned optimiser moves farther than the sum of its step sizes."""
REACH_LOW: Final = 0.01
"""Honest units go .1 to .5 of that way; a hundredth is no training."""

LayerName = Literal["L0", "L1", "L2", "L3"]


@dataclass(frozen=True, slots=True)
class UpdateNumbers:
    """What L2 looks at.

    `relative` is the update's norm over its parent's; `reach` the norm over the farthest that the
    assigned steps can move; `descent` the cosine between the update and the optimiser's
    own first step on held-out clips; `copies` the cosine with each earlier update of other nodes.
    """

    norm: float
    relative: float
    reach: float
    max_abs: float
    descent: float
    copies: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PairedLoss:
    """The same clips, noise and times for parent and candidate: mean difference and its SE."""

    delta: float
    se: float
    n: int
    before: float
    after: float


def numbers(**values: float) -> tuple[Number, ...]:
    """The finite ones of `values` as a verdict carries them, in the order given."""
    return tuple((k, decimal(float(v))) for k, v in values.items() if math.isfinite(v))


def passed(layer: LayerName, found: tuple[Number, ...] = ()) -> Layer:
    """A layer without objection."""
    return Layer(layer=layer, passed=True, code="", numbers=found)


def failed(layer: LayerName, code: str, found: tuple[Number, ...] = ()) -> Layer:
    """A layer that refuses, with the catalogue's code."""
    return Layer(layer=layer, passed=False, code=code, numbers=found)


def claims(assignment: Assignment, contribution: Contribution) -> Layer:
    """L0, the part that needs no file: the claimed work is the assigned work."""
    found = numbers(steps=contribution.steps, samples=contribution.samples)
    wanted = (assignment.steps, assignment.steps * assignment.batch)
    if (contribution.steps, contribution.samples) != wanted:
        return failed("L0", "structure.steps", found)
    return passed("L0", found)


def commitments(
    assignment: Assignment,
    commitment: Commitment | None,
    contribution: Contribution,
    *,
    start_root: str,
    states_root: str,
) -> Layer:
    """L1: the commitment is of this assignment, begins at the parent and ends in this update.

    `start_root` is the recomputed root of the parent's fresh training state, `states_root` the
    RFC 6962 root over the committed state roots.
    """
    if commitment is None:
        return failed("L1", "commitment.missing")
    expected = len(committed_steps(assignment.steps, assignment.commit_every))
    found = numbers(states=len(commitment.states), expected=expected)
    consistent = (
        commitment.assignment == contribution.assignment
        and commitment.steps == assignment.steps
        and len(commitment.states) == expected
        and commitment.states_root == states_root
        and commitment.update_root == contribution.update.root
    )
    if not consistent:
        return failed("L1", "commitment.mismatch", found)
    if assignment.optimiser_state == "fresh" and commitment.states[0] != start_root:
        return failed("L1", "commitment.start", found)
    return passed("L1", found)


def statistics(update: UpdateNumbers, history: Sequence[float], margins: Margins) -> Layer:
    """L2: too small, too large, somebody else's, or not pointing where training goes.

    With three or more relative norms of the same round known, the update is compared with their
    median; until then only with what the assigned steps can reach. Noise of a plausible norm has a
    `descent` of 0 ± 1/√parameters, honest units have much more (the policy names the limit and its
    source), a sign-flipped update as much less than 0. A multiple of an honest update within the
    norms passes here; so does a unit with fewer steps: L3 or the replay audit must see those.
    """
    closest = max(update.copies.values(), default=0.0)
    found = numbers(
        norm=update.norm,
        relative=update.relative,
        reach=update.reach,
        max_abs=update.max_abs,
        descent=update.descent,
        closest=closest,
        others=len(update.copies),
    )
    low, high = real(margins.norm_low), real(margins.norm_high)
    if update.norm == 0.0 or update.reach < REACH_LOW:
        return failed("L2", "statistics.zero", found)
    if update.reach > REACH_HIGH:
        return failed("L2", "statistics.norm", found)
    if len(history) >= HISTORY_NEEDED:
        ratio = update.relative / median(history)
        found += numbers(ratio=ratio, known=len(history))
        if ratio > high:
            return failed("L2", "statistics.norm", found)
        if ratio < low:
            return failed("L2", "statistics.zero", found)
    if closest > real(margins.copy_cosine):
        return failed("L2", "statistics.copy", found)
    least = real(margins.noise_cosine)  # -1 switches the test off
    if update.descent < least:
        uphill = update.descent < -abs(least)
        return failed("L2", "statistics.direction" if uphill else "statistics.noise", found)
    return passed("L2", found)


def damage_margin(margins: Margins, round: int) -> float:
    """The margin that belongs to a round; the last one named serves all later rounds."""
    return real(margins.damage[min(round, len(margins.damage) - 1)])


def is_worse(paired: PairedLoss, standard_errors: float, margin: float) -> bool:
    """Significantly worse than the parent by more than the margin, or a loss that is no number."""
    if not (math.isfinite(paired.delta) and math.isfinite(paired.se)):
        return True
    return paired.delta - standard_errors * paired.se > margin


def damage(paired: PairedLoss, margins: Margins, round: int) -> Layer:
    """L3: refuse iff delta − standard_errors · SE > margin of the round (testbed T2)."""
    margin = damage_margin(margins, round)
    found = numbers(
        delta=paired.delta,
        se=paired.se,
        n=paired.n,
        before=paired.before,
        after=paired.after,
        margin=margin,
    )
    worse = is_worse(paired, real(margins.standard_errors), margin)
    return failed("L3", "loss.damage", found) if worse else passed("L3", found)


def decide(layers: Sequence[Layer], policy: Policy, round: int = 0) -> tuple[bool, str]:
    """The verdict that follows from the layers: (accepted, code of the first refusal).

    L3 is concluded again from its numbers, so that the policy in force is what decides. Raises
    ValueError when a layer is missing or out of order: there is no verdict then.
    """
    for expected, layer in zip(ORDER, layers, strict=False):
        if layer.layer != expected:
            raise ValueError(f"layer {layer.layer} stands where {expected} belongs")
        if not layer.passed:
            return False, layer.code
    if len(layers) != len(ORDER):
        raise ValueError("a contribution is accepted by all four layers or not at all")
    found = dict(layers[-1].numbers)
    margin = damage_margin(policy.margins, round)
    delta, se = real(found["delta"]), real(found["se"])
    if delta - real(policy.margins.standard_errors) * se > margin:
        return False, "loss.damage"
    return True, ACCEPTED
