"""Which training plan a unit is asked for: what the network takes, what the node can do. Pure.

A network takes its own plan, float32 under the policy's dtype and codec, and those that
`Policy.plans` names (`paris_models.plans` says what each one is). Refused: a node whose plans are
all foreign here (`machine.plan`), and offers that cannot be (`recipe.invalid`)::

    rules = choose(policy, request.plans)        # the first of the node's that the policy takes
    rules.plan, rules.dtype, rules.update_codec, rules.rate
    check(policy)                                # before it is signed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from pydantic import Field

from paris_coordinator.recipe_audit import Section
from paris_models.plans import PLANS, plan_of
from paris_protocol.canonical import decimal, real
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, PlanRules, Policy, UpdateCodec

OWN: Final = "float32"
"""The plan that every network takes."""
FACTORS: Final = "lora-"
"""How codecs of factors begin."""


class Offer(Section):
    """A table `[[plans]]` of the recipe: a plan that the network takes beside its own."""

    plan: str = Field(max_length=200)
    dtype: Literal["float32", "bfloat16"]
    codec: UpdateCodec
    rate: float = Field(default=1.0, gt=0)

    def rules(self) -> PlanRules:
        """The same as it stands in a policy."""
        return PlanRules(
            plan=self.plan, dtype=self.dtype, update_codec=self.codec, rate=decimal(self.rate)
        )


def able(plans: Sequence[str]) -> Sequence[str]:
    """The plans of a lease request; a node that names none can do the network's own."""
    return plans or (OWN,)


def choose(policy: Policy, plans: Sequence[str]) -> PlanRules:
    """The node's most preferred plan that the policy takes, or ParisError("machine.plan")."""
    own = PlanRules(plan=OWN, dtype=policy.dtype, update_codec=policy.update_codec, rate="1")
    taken = {rules.plan: rules for rules in (own, *policy.plans)}
    for name in able(plans):
        if name in taken:
            return taken[name]
    raise ParisError("machine.plan", f"it takes {', '.join(taken)}")


def plan_name(record: Assignment) -> str:
    """The plan of a unit, by the name that it has today."""
    return plan_of(record.plan).name


def kind(record: Assignment) -> tuple[str, str, bool]:
    """Units of one kind have updates of comparable norms, others do not.

    The kind is a plan, a codec, and whether the unit makes up for what an update left out.
    """
    return plan_name(record), record.update_codec, record.residual is not None


def check(policy: Policy) -> None:
    """That the policy's plans can be, or ParisError("recipe.invalid") with the field's name."""
    whole = policy.commit_every >= policy.plan.steps
    if found := fault(policy.plans, policy.update_codec, whole):
        raise ParisError("recipe.invalid", f"policy.{found}")


def fault(offers: Sequence[PlanRules], codec: str | None, whole: bool) -> str:
    """What cannot be about these offers, "" if nothing.

    `codec` is the network's own, `whole` says that units commit to their start and end alone, as
    plans need whose states in between nobody could upload (`Plan.audit`, "sub-round").
    """
    if (codec or "").startswith(FACTORS):
        return f"update_codec: {codec} carries factors, and {OWN} trains none"
    seen = {OWN}
    for offer in offers:
        if offer.plan in seen or offer.plan not in PLANS:
            why = "is taken already" if offer.plan in seen else f"is none of {', '.join(PLANS)}"
            return f"plans: {offer.plan} {why}"
        seen.add(offer.plan)
        plan = PLANS[offer.plan]
        if offer.dtype != plan.compute:
            return f"plans: {offer.plan} computes in {plan.compute}"
        if offer.update_codec.startswith(FACTORS) != bool(plan.rank):
            return f"plans: {offer.plan} cannot send {offer.update_codec}"
        if real(offer.rate) <= 0:
            return f"plans: the rate of {offer.plan} is not positive"
        if plan.audit == "sub-round" and not whole:
            return f"plans: {offer.plan} needs a commit_every of all the unit's steps"
    return ""
