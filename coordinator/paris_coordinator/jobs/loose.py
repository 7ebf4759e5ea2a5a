"""The loose job: measure an update file that nobody handed in, by the steps of the verify job.

Nothing was committed for it, so L1 refuses (`commitment.missing`); unlike a verdict this goes on
after a refusal as long as there is something to measure, because the operator wants to see it::

    loose({"job": "loose", "update": path, "parent": path, …})["layers"]      # as `verify` answers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paris_coordinator.jobs import verify as steps
from paris_coordinator.jobs.common import check_update, header_of, shapes_of
from paris_coordinator.planning import choose
from paris_models.codecs_layout import LORA, Codec, lora_modules
from paris_models.config import ExpertConfig
from paris_models.plans import PLANS
from paris_protocol.errors import ParisError
from paris_protocol.records import PlanRules, Policy

Json = dict[str, Any]


def loose(job: Json) -> Json:
    """{"layers": […]}: L0, then L1 to L3 if the file could be opened."""
    case, spent = steps._case(job), steps.Spent()
    structure, update = steps._structure(case)
    layers = [structure]
    if update is not None:
        parent = steps._parent(case)
        state = case.fresh(parent)
        numbers = steps._numbers(case, parent, state, update, spent)
        layers.append(steps._commitments(case, parent, state))
        layers.append(steps._statistics(case, numbers))
        layers.append(steps._damage(case, parent, update, spent)[0])
    return {"layers": [layer.model_dump(mode="json") for layer in layers]}


def offered(policy: Policy, path: Path, config: ExpertConfig) -> PlanRules:
    """The plan and codec under which a file that nobody handed in is measured.

    One that the policy takes, if it can; what no codec could have written is left to layer L0.
    """
    own = choose(policy, ())
    try:
        codec = check_update(path, config)
    except ParisError:
        return own
    rank = _rank(path, codec, config)
    if not rank:
        return own.model_copy(update={"update_codec": codec})
    taken = [rules for rules in policy.plans if PLANS[rules.plan].rank == rank]
    others = [
        PlanRules(plan=plan.name, dtype=plan.compute, update_codec=codec, rate="1")
        for plan in PLANS.values()
        if plan.rank == rank
    ]
    found = next(iter((*taken, *others)), own)
    return found if found is own else found.model_copy(update={"update_codec": codec})


def _rank(path: Path, codec: Codec, config: ExpertConfig) -> int:
    """The rank of the factors in a checked file; 0 where it holds none."""
    if codec not in LORA:
        return 0
    values: int = header_of(path, None).tensors[f"{codec}.values"][1][0]
    return values // sum(out + into for out, into in lora_modules(shapes_of(config)).values())
