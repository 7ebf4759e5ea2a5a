"""Honest contributions of other machines: judged by all layers and replayed here.

Each machine is a process with its own kernels (`verify_kernels`); whether equal bits are demanded
or the tolerance decides follows from the numeric self-tests, as in the coordinator::

    found = honest(lab, "avx2", {"float32": 20, "bfloat16": 4})
    # [{"refusal": "", "audit": "", "exact": False, "rho": 6e-6}, …]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.verify_attacks import drawn
from benchmarks.verify_kernels import elsewhere
from benchmarks.verify_lab import Lab
from benchmarks.verify_learn import context, drop
from paris_protocol.audit import states_to_open

Json = dict[str, Any]


def honest(lab: Lab, kernels: str, counts: Mapping[str, int]) -> list[Json]:
    """What every layer says of honest units of one kind of machine, so many of each dtype."""
    orders = []
    for dtype, count in counts.items():
        for number in range(count):
            seed, changes = f"honest {kernels} {dtype} {number}", {"dtype": dtype}
            places = drawn(lab, lab.assignment(seed, **changes))
            keep = states_to_open(places, exact=False)
            orders.append({"seed": seed, "changes": changes, "keep": keep})
    found, known = [], context(lab)
    for work in elsewhere(lab.folder, kernels, orders):
        refusal, _ = lab.judge(work, **known)
        audit = lab.audit(work, drawn(lab, work.assignment))
        rho = max((float(one["rho"]) for one in audit["segments"]), default=None)
        found.append(
            {"refusal": refusal, "audit": audit["code"], "exact": audit["exact"], "rho": rho}
        )
        drop([work])
    return found
