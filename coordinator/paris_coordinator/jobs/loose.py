"""The loose job: measure an update file that nobody handed in, by the steps of the verify job.

Nothing was committed for it, so L1 refuses (`commitment.missing`); unlike a verdict this goes on
after a refusal as long as there is something to measure, because the operator wants to see it::

    loose({"job": "loose", "update": path, "parent": path, …})["layers"]      # as `verify` answers
"""

from __future__ import annotations

from typing import Any

from paris_coordinator.jobs import verify as steps

Json = dict[str, Any]


def loose(job: Json) -> Json:
    """{"layers": […]}: L0, then L1 to L3 if the file could be opened."""
    case, spent = steps._case(job), steps.Spent()
    structure, update = steps._structure(case)
    layers = [structure]
    if update is not None:
        parent = steps._parent(case)
        numbers = steps._numbers(case, parent, update, spent)
        layers.append(steps._commitments(case, parent))
        layers.append(steps._statistics(case, numbers))
        layers.append(steps._damage(case, parent, update, spent)[0])
    return {"layers": [layer.model_dump(mode="json") for layer in layers]}
