"""Which training plans a node asks to train by: those that fit now, best first. Pure.

What fits is arithmetic on what is free at the moment (`paris_models.fitting`), so that a node whose
memory went away asks for the next plan, one tier down, at its next unit. A plan under which memory
ran out in spite of that is left out for a day. An owner who names a plan gets that one or none:
`machine.plan` where the network does not take it, `machine.too-small` with the bytes that lack::

    offers = offers_for(genesis, policy, facts)
    [offer.plan.name for offer in chosen(offers, "auto", without={"adafactor"})]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from paris_models.fitting import Facts, Offer, offers_of
from paris_models.plans import PLANS, Plan, need_of
from paris_node.config import AUTO
from paris_node.fit import codecs_of, work_of_network
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, Genesis, Policy

LEFT_OUT: Final = 86_400.0
"""Seconds for which a plan under which memory ran out is not tried again."""


def offers_for(genesis: Genesis, policy: Policy, facts: Facts, forced: str = AUTO) -> list[Offer]:
    """The plans that the network takes, on this machine, best first.

    A plan that the owner named is shown alone, whatever it costs in time.
    """
    config, work = work_of_network(
        genesis, policy.plan.steps, policy.plan.units, codecs_of(policy), policy.commit_every
    )
    taken = [plan for name, plan in PLANS.items() if name in codecs_of(policy)]
    if forced == AUTO:
        return offers_of(config, work, facts, taken)
    if forced not in codecs_of(policy):
        names = ", ".join(plan.name for plan in taken)
        raise ParisError("machine.plan", f"it takes {names}, not {forced}")
    return offers_of(config, work, facts, [PLANS[forced]])


def chosen(
    offers: Sequence[Offer], forced: str = AUTO, without: Collection[str] = ()
) -> list[Offer]:
    """The offers to ask for, best first; `machine.too-small` with its bytes if there is none."""
    found = [one for one in offers if one.fits and (forced != AUTO or one.plan.name not in without)]
    if not found:
        tried = [one for one in offers if one.plan.name not in without] or list(offers)
        least = min(tried, key=lambda one: one.device)
        short = "memory ran out" if least.fits else least.why
        raise ParisError("machine.too-small", f"{least.plan.name} ({least.device:,} bytes) {short}")
    return found


def swap_for(plan: Plan, genesis: Genesis, steps: int, facts: Facts) -> int:
    """How many blocks have to wait in host memory for a plan to fit what is free."""
    config, work = work_of_network(genesis, steps, 1, {})
    [offer] = offers_of(config, work, facts, [plan])
    return offer.plan.swap


def room_for_unit(plan: Plan, genesis: Genesis, assignment: Assignment) -> int:
    """Bytes of disk that a unit takes beside what it downloads: states and updates."""
    codecs = {plan.name: str(assignment.update_codec)}
    config, work = work_of_network(genesis, assignment.steps, 1, codecs, assignment.commit_every)
    need = need_of(plan, config, work)
    return need.disk - need.download


def left_out(failed: Mapping[str, float], now: float) -> set[str]:
    """Plans under which memory ran out (name -> when) not so long ago."""
    return {name for name, at in failed.items() if now - at < LEFT_OUT}


def fell(before: str | None, now: str) -> bool:
    """Whether a plan is further down than the one before it."""
    order = list(PLANS)
    return before in order and order.index(now) > order.index(str(before))
