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
    AuditReport,
    Commitment,
    Contribution,
    Layer,
    Margins,
    Number,
    Policy,
)

LayerName = Literal["L0", "L1", "L2", "L3", "L4", "L5"]

ACCEPTED: Final = "accepted"
ORDER: Final[tuple[LayerName, ...]] = ("L0", "L1", "L2", "L3")
HISTORY_NEEDED: Final = 3
"""So many honest norms of the same round make a median worth comparing with."""
REACH_HIGH: Final = 1.0
"""No run of the assigned optimiser moves farther than the sum of its step sizes."""
REACH_LOW: Final = 0.01
"""Honest units go .1 to .5 of that way; a hundredth is no training."""
REACH_LOW_FACTORS: Final = 0.001
"""The same for LoRA: both factors at their farthest are a product that no training comes near
(honest units at the demo's size: .008 to .03 of it)."""
BLOCKS_NEEDED: Final = 8
"""So many accepted updates of the lineage make a block's own distribution."""
BLOCK_SPREAD: Final = 0.1
"""Least spread of a block's norms (in logarithms) that is believed: ten per cent."""
RANK_LOW: Final = 0.1
"""Muon's updates have .65 to .76 of the full effective rank, AdamW's .21 to .25 (and less when
wider): only the former have a limit."""
BLOCK: Final = "block."
"""Prefix of L2's numbers per block: norm over the farthest that the assigned steps can move it."""
FAR: Final = 1e9


@dataclass(frozen=True, slots=True)
class UpdateNumbers:
    """What L2 looks at.

    `relative` is the update's norm over its parent's; `reach` the norm over the farthest that the
    assigned steps can move; `descent` the cosine between the update and the optimiser's
    own first step on held-out clips; `copies` the cosine with each earlier update of other nodes.
    `blocks` are the reaches of the single blocks. Reported, and refused by none: `lineage`, the
    cosine with what the last merge changed, and `spectral`, the largest singular value over the
    Frobenius norm. `rank` is the effective rank over the full one, a mean over the matrices, and
    `least_rank` its limit: 0 but where the optimiser itself makes every update one of full rank.
    """

    norm: float
    relative: float
    reach: float
    max_abs: float
    descent: float
    copies: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)
    lineage: float = math.nan
    spectral: float = math.nan
    rank: float = math.nan
    least_rank: float = 0.0
    least_reach: float = REACH_LOW


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
    start_root: str | None,
    states_root: str,
) -> Layer:
    """L1: the commitment is of this assignment, begins at the parent and ends in this update.

    `start_root` is the recomputed root of the fresh training state, None where that is known to
    nobody here; `states_root` the RFC 6962 root over the committed state roots.
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
    fresh = assignment.optimiser_state == "fresh" and start_root is not None
    if fresh and commitment.states[0] != start_root:
        return failed("L1", "commitment.start", found)
    return passed("L1", found)


def block_z(blocks: Mapping[str, float], lineage: Mapping[str, Sequence[float]]) -> float:
    """Largest robust z of a block's reach among those of the lineage's accepted updates, ≥ 0.

    On logarithms, so that half and double are equally far: |x − median| / (1.4826 · MAD), the
    denominator at least `BLOCK_SPREAD`. Blocks with fewer than `BLOCKS_NEEDED` are passed over.
    """
    largest = 0.0
    for name, reach in blocks.items():
        known = [math.log(value) for value in lineage.get(name, ()) if value > 0]
        if len(known) < BLOCKS_NEEDED:
            continue
        middle = median(known)
        spread = max(BLOCK_SPREAD, 1.4826 * median(abs(value - middle) for value in known))
        z = abs(math.log(reach) - middle) / spread if reach > 0 else FAR
        largest = max(largest, z)
    return largest


def statistics(
    update: UpdateNumbers,
    history: Sequence[float],
    margins: Margins,
    lineage: Mapping[str, Sequence[float]] | None = None,
) -> Layer:
    """L2: too small, too large, somebody else's, or not pointing where training goes.

    With three or more relative norms of the same round known, the update is compared with their
    median; until then only with what the assigned steps can reach. Noise of a plausible norm has a
    `descent` of 0 ± 1/√parameters, honest units have much more (the policy names the limit and its
    source), a sign-flipped update as much less than 0. A multiple of an honest update within the
    norms passes here; so does a unit with fewer steps: L3 or the replay audit must see those.
    `lineage`: for each block the numbers `block.<name>` of the expert's accepted updates.
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
        lineage=update.lineage,
        spectral=update.spectral,
        rank=update.rank,
        **{BLOCK + name: value for name, value in update.blocks.items()},
    )
    largest_z, limit_z = block_z(update.blocks, lineage or {}), real(margins.block_z)
    found += numbers(block_z=largest_z)
    low, high = real(margins.norm_low), real(margins.norm_high)
    if update.norm == 0.0 or update.reach < update.least_reach:
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
    if update.rank < update.least_rank:
        return failed("L2", "statistics.rank", found)
    if 0 < limit_z < largest_z:
        return failed("L2", "statistics.block", found)
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


def damage(paired: PairedLoss, margins: Margins, round: int, bucket: int | None = None) -> Layer:
    """L3: refuse iff delta − standard_errors · SE > margin of the round (testbed T2).

    The layer tells the bucket alone (−1 better, 0 no evidence, 1 worse), lest a node climb the
    secret clips by their exact losses; those are kept apart (`exact`) until the clips retire.
    `bucket` is what a sequential test concluded; without one the fixed test is taken.
    """
    margin = damage_margin(margins, round)
    if bucket is None:
        errors = real(margins.standard_errors)
        better = paired.delta + errors * paired.se < 0
        bucket = 1 if is_worse(paired, errors, margin) else -1 if better else 0
    found = numbers(n=paired.n, margin=margin, bucket=bucket)
    return failed("L3", "loss.damage", found) if bucket > 0 else passed("L3", found)


def exact(paired: PairedLoss) -> tuple[Number, ...]:
    """The numbers of L3 that are not published before the secret clips retire."""
    return numbers(
        delta=paired.delta, se=paired.se, n=paired.n, before=paired.before, after=paired.after
    )


def audit(reports: Sequence[AuditReport]) -> Layer:
    """L4 from the reports that decide it: all of one mind, none if nothing was opened in time.

    A report without segments proves nothing (no tolerance was calibrated for that replay): the
    layer passes with `segments` 0, which raises nobody's standing. One that fails without segments
    says that the opened bytes are not the committed states.
    """
    if not reports:
        return failed("L4", "audit.unanswered")
    found = [segment for report in reports for segment in report.segments]
    listed = numbers(
        segments=len({segment.index for segment in found}),
        exact=all(segment.exact for segment in found) and bool(found),
        rho=max((real(segment.rho) for segment in found), default=0.0),
        tensor=max((real(segment.tensor) for segment in found), default=0.0),
        limit=max((real(segment.limit) for segment in found), default=0.0),
        tensor_limit=max((real(segment.tensor_limit) for segment in found), default=0.0),
        reports=len(reports),
    )
    if all(report.passed for report in reports):
        return passed("L4", listed)
    return failed("L4", "audit.mismatch" if found else "audit.state", listed)


def canary(commitment: Commitment, states: Sequence[str], update_root: str) -> Layer:
    """L5: the committed roots against those of an answer that was computed here, bit for bit."""
    pairs = zip(commitment.states, states, strict=False)
    equal = sum(claimed == known for claimed, known in pairs)
    found = numbers(states=len(states), equal=equal)
    same = tuple(states) == commitment.states and update_root == commitment.update_root
    return passed("L5", found) if same else failed("L5", "canary.mismatch", found)


def decide(
    layers: Sequence[Layer], policy: Policy, round: int = 0, also: Sequence[LayerName] = ()
) -> tuple[bool, str]:
    """The verdict that follows from the layers: (accepted, code of the first refusal).

    `also`: layers beyond the first four that this contribution has to pass, L4 when it was drawn
    for an audit and L5 when it was a canary. L3 follows from its bucket, whatever the layer says of
    itself. Raises ValueError when a layer is missing or out of order: there is no verdict then.
    """
    order = (*ORDER, *also)
    for expected, layer in zip(order, layers, strict=False):
        if layer.layer != expected:
            raise ValueError(f"layer {layer.layer} stands where {expected} belongs")
        if not layer.passed:
            return False, layer.code
    if len(layers) != len(order):
        raise ValueError(f"a contribution is accepted by {', '.join(order)} or not at all")
    if real(dict(layers[3].numbers)["bucket"]) > 0:
        return False, "loss.damage"
    return True, ACCEPTED
