"""Before a node asks for work: which plans it can train by now, and whether its numbers are right.

Memory is looked at anew each time, so that a node whose memory went away asks for a smaller plan at
its next unit and says so (`plan.fallback` in the log, `plan` in `status`). Whether this machine
computes rightly is tested once, and again when torch, the driver or the device is another one: who
fails is told (`machine.numerics`) before it leases anything::

    plans = await ready.plans(policy)                  # (): the network's own plan, as ever
    await ready.prove(policy, plans)
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from paris_models.plans import PLANS, Plan, numeric_case
from paris_node.config import AUTO
from paris_node.machine import Device, look
from paris_node.planning import chosen, fell, left_out, offers_for
from paris_protocol.errors import ParisError
from paris_protocol.records import Policy

if TYPE_CHECKING:
    from paris_node.journal import Journal
    from paris_node.kit import Kit

PLAN: Final = "plan"
"""Fact in the journal: the plan that was asked for last, and what it took the place of."""
SHORT: Final = "plans.short"
"""Fact: when memory ran out under which plan."""
PROVED: Final = "numerics"
"""Fact: which numeric tests were passed, and with which torch, driver and device."""


class Ready:
    """See the module."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self._wrong: tuple[str, ParisError] | None = None

    # ------------------------------------------------------------ plans

    async def plans(self, policy: Policy) -> tuple[str, ...]:
        """The plans to ask for, best first; () where the network has one way to train.

        Refuses what `planning` refuses: `machine.plan` and `machine.too-small`.
        """
        kit, forced = self.kit, self.kit.settings.plan
        if forced == AUTO and not policy.plans:
            return ()
        _, facts = await asyncio.to_thread(look, kit.machine, kit.settings.device, kit.folder)
        offers = offers_for(kit.genesis, policy, facts, forced)
        without = left_out(json.loads(kit.journal.fact(SHORT) or "{}"), kit.clock())
        names = tuple(one.plan.name for one in chosen(offers, forced, without))
        reasons = {one.plan.name: one.why for one in offers}
        self._tell(names[0], reasons)
        return names

    def _tell(self, name: str, reasons: dict[str, str]) -> None:
        kit, known = self.kit, plan_told(self.kit.journal)
        before = known.get("name")
        if before == name:
            return
        told = {"name": name, "instead_of": None, "why": ""}
        if fell(before, name):
            why = reasons.get(str(before)) or "memory ran out"
            told = {"name": name, "instead_of": before, "why": why}
            extra = {"plan": name, "instead_of": before, "why": why}
            kit.log.warning("plan.fallback", extra=extra)
        else:
            kit.log.info("plan.chosen", extra={"plan": name})
        kit.journal.set_fact(PLAN, json.dumps(told))

    def ran_short(self, plan: Plan) -> None:
        """Remember that memory ran out under a plan."""
        kit = self.kit
        known = json.loads(kit.journal.fact(SHORT) or "{}")
        kit.journal.set_fact(SHORT, json.dumps({**known, plan.name: kit.clock()}))
        kit.log.warning("plan.too-small", extra={"plan": plan.name})

    # ------------------------------------------------------------ numbers

    async def prove(self, policy: Policy, plans: Sequence[str]) -> None:
        """Pass the numeric tests of what will be trained, or `machine.numerics`."""
        kit = self.kit
        device = await asyncio.to_thread(kit.machine.device, kit.settings.device)
        of, cases = fingerprint(device), cases_of(policy.dtype, plans)
        if self._wrong is not None and self._wrong[0] == of:
            raise self._wrong[1]
        known = json.loads(kit.journal.fact(PROVED) or "{}")
        done = set(known.get("cases", ())) if known.get("of") == of else set()
        if lacking := [case for case in cases if case not in done]:
            where = "cuda" if device.kind == "cuda" else kit.settings.device
            found = await kit.trainer.test(where, lacking)
            if wrong := [one for one in found if not one["passed"]]:
                told = ", ".join(f"{one['case']}: {one['rho']:.2g} apart" for one in wrong)
                self._wrong = of, ParisError("machine.numerics", f"{told}; {of}"[:300])
                kit.log.error("numerics.wrong", extra={"detail": told, "of": of})
                raise self._wrong[1]
            kit.log.info("numerics.right", extra={"cases": lacking, "of": of})
            done |= set(lacking)
            kit.journal.set_fact(PROVED, json.dumps({"of": of, "cases": sorted(done)}))


def cases_of(dtype: str, plans: Sequence[str]) -> list[str]:
    """The numeric tests of plans, and of the network's own precision."""
    wanted = [numeric_case(PLANS[name], dtype) for name in ("float32", *plans)]
    return list(dict.fromkeys(["float32", *wanted]))


def fingerprint(device: Device) -> str:
    """What numbers depend on: torch, driver and device."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    return f"torch {torch}, {device.name}, driver {device.driver or 'none'}"


def plan_told(journal: Journal) -> dict[str, Any]:
    """The plan that was asked for last: `name`, `instead_of`, `why`; empty before the first."""
    known: dict[str, Any] = json.loads(journal.fact(PLAN) or "{}")
    return known
