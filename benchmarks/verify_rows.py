"""The rows of `verify` from what its parts found. Pure, so that a test can feed it anything.

Ids are those of design.md §7; the others are informative and have no limit::

    rows({"gross": [{"kind": "flip", "refusal": "L2 …", "alike": True}], …})
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any, Final

from benchmarks.table import Row, middle, row

Json = dict[str, Any]

GROSS: Final = ("random weights", "noise", "loud noise", "flip", "x3", "noise latents", "8 clips")
COPIES: Final = ("unchanged", "copy")
QUIET: Final = ("lazy", "tenth of noise", "wrong cluster", "shuffled captions")
CLIPPED: Final = ("noise x10", "flip x5")
UNITS: Final = 2
"""Units of a round (as in the demo), which share what is measured of their head."""
FLOOR: Final = 0.05
"""The audit rate of steady state (trust §2.5)."""


def facts(found: Json, amounts: Json) -> Json:
    """What stands above the table."""
    return {
        "network": "72,352 parameters, Muon, x0, 40 steps x 16, k=5, m=2; cost: 319,392 parameters",
        "reference_unit": "H=500, B=16, m=2, k=5, 256 secret clips, looks at 64 and 128",
        "units_of_a_round": UNITS,
        "seeds_of_thresholds": "learn early, learn late from 0; those of the calibration",
        "seeds_of_figures": "gross, quiet, segment, power, honest, lineage; each from 0",
        "n": amounts,
        "cpu_seconds": found["seconds"],
        "margins": {"early": found["learn"], "late": found["late"]},
        "tolerances": [
            [one["dtype"], one["steps"], one["rho"], one["tensor"]] for one in found["calibrate"]
        ],
        "hostile_refused": [one["refused"] for one in runs_of(found, "")],
        "hostile_accepted": [one["accepted"] for one in runs_of(found, "")],
        "honest_refused": honest_refused(found),
        "refused_by": refusals(found["gross"]),
    }


def rows(found: Json) -> list[Row]:
    """All rows."""
    return [
        *caught(found["gross"]),
        *replayed(found),
        *false_rejects(found),
        *costs(found["cost"]),
        *hostile(runs_of(found, "late"), ""),
        *hostile(runs_of(found, "early"), ".early"),
        *silent(found["quiet"]),
        *powers(found["power"]),
    ]


def part(values: Sequence[bool]) -> float:
    """Share of the true ones."""
    return sum(values) / len(values)


def refusals(found: Sequence[Json]) -> Json:
    """For each kind: how many each layer and code refused."""
    table: dict[str, dict[str, int]] = {}
    for one in found:
        counts = table.setdefault(one["kind"], {})
        counts[one["refusal"] or "accepted"] = counts.get(one["refusal"] or "accepted", 0) + 1
    return table


def caught(found: Sequence[Json]) -> list[Row]:
    """Gross damage and copies."""
    gross = [one for one in found if one["kind"] in GROSS]
    made = [
        row(
            "verify.gross", "gross damage refused by L0 to L3", n=len(gross),
            ours=part([bool(one["refusal"]) for one in gross]), better="higher", unit="share",
            alternative=part([not one["alike"] for one in gross]),
            alternative_name="whole-weight cosine > 0.9",
        )
    ]  # fmt: skip
    for kind in COPIES:
        some = [one for one in found if one["kind"] == kind]
        by_l2 = [one["refusal"].startswith("L2") for one in some]
        made.append(
            row(
                f"verify.{kind}", "refused by L2", ours=part(by_l2), n=len(some),
                better="higher", unit="share",
                alternative=part([not one["alike"] for one in some]),
                alternative_name="whole-weight cosine > 0.9",
            )
        )  # fmt: skip
    return made


def replayed(found: Json) -> list[Row]:
    """Cheating in audited segments: equal bits, and within the tolerance."""
    full, half = found["segments float32"], found["segments bfloat16"]
    both = [one["exact"] and one["near"] for one in full]
    return [
        row(
            "verify.replay", "cheating in an audited segment caught: equal bits and tolerance",
            ours=part(both), better="higher", unit="share", n=len(full),
            spread=min(one["rho"] for one in full),
        ),
        row(
            "verify.replay.bfloat16", "the same in bfloat16, by equal bits",
            ours=part([one["exact"] for one in half]), better="higher", unit="share", n=len(half),
            alternative=part([one["near"] for one in half]), alternative_name="by tolerance",
        ),
    ]  # fmt: skip


def honest_refused(found: Json) -> list[str]:
    """Why honest contributions were refused, one entry each."""
    every = [one for name, some in found.items() if name.startswith("honest ") for one in some]
    reasons = [one["refusal"] or one["audit"] for one in every]
    reasons += [one["refusal"] for one in found["gross"] if one["kind"] == "honest"]
    reasons += [reason for one in runs_of(found, "") for reason in one["honest_refused"]]
    return [reason for reason in reasons if reason]


def false_rejects(found: Json) -> list[Row]:
    """Honest work refused by any layer or any audit."""
    every = [one for name, some in found.items() if name.startswith("honest ") for one in some]
    plain = sum(one["kind"] == "honest" for one in found["gross"])
    in_runs = sum(one["honest"] for one in runs_of(found, ""))
    near = [one for one in every if not one["exact"]]
    return [
        row(
            "verify.false_rejects", "honest contributions refused by any layer or replay",
            ours=float(len(honest_refused(found))), better="lower", unit="count",
            n=len(every) + plain + in_runs,
        ),
        row(
            "verify.false_rejects.near", "of these, replayed within a tolerance: largest rho",
            ours=max((one["rho"] or 0.0 for one in near), default=None), better="lower",
            unit="rho", n=len(near),
        ),
    ]  # fmt: skip


def share(found: Json, rate: float) -> dict[str, float]:
    """Verification over contribution, where a replay happens at `rate`."""
    shares = {}
    for name, part in (("measured", found), ("counted", found["counted"])):
        whole = part["judging"] + part["parent"] / UNITS + rate * part["replay"]
        shares[name] = whole / part["contribution"]
    return shares


def costs(found: Json) -> list[Row]:
    """Verification over contribution, and the first layers of a LoRA."""
    made = []
    for name, suffix in (
        ("reference", ""),
        ("reference, all clips", ".all_clips"),
        ("demo", ".demo"),
    ):
        for id, rate in (("verify.cost", FLOOR), ("verify.cost_probation", 1.0)):
            shares = share(found[name], rate)
            for kind, tail in (("measured", ""), ("counted", ".counted")):
                made.append(
                    row(
                        id + suffix + tail, f"{name} unit, audits at {rate}, {kind}",
                        ours=shares[kind], better="lower", n=1,
                        unit="CPU-s / CPU-s" if kind == "measured" else "forward passes",
                        alternative=1.0, alternative_name="training it twice",
                    )
                )  # fmt: skip
    seconds, spread = middle(found["lora"])
    made.append(
        row(
            "verify.l0_lora", "L0 and L1 of 0.45 GB of LoRA factors", ours=seconds, spread=spread,
            better="lower", unit="CPU-s", n=len(found["lora"]),
        )
    )  # fmt: skip
    return made


def runs_of(found: Json, when: str) -> list[Json]:
    """The runs in order, late or early ones or both."""
    return [found[name] for name in sorted(found) if name.startswith(f"runs {when}")]


def hostile(runs: Sequence[Json], suffix: str) -> list[Row]:
    """How much worse a run ends than the clean one, or than plain averaging: means over runs."""

    def worse(kind: str, than: str = "clean") -> list[float]:
        return [one["losses"][kind] / one["losses"][than] - 1 for one in runs]

    def one(id: str, what: str, values: list[float]) -> Row:
        gains = [1 - run["losses"]["clean"] / run["losses"]["start"] for run in runs]
        return row(
            id + suffix, what, ours=mean(values), spread=middle(values)[1], better="lower",
            unit="share of the loss", n=len(values), alternative=mean(gains),
            alternative_name="gain of the clean run",
        )  # fmt: skip

    if not runs:
        return []
    clipped = {kind: worse(kind) for kind in CLIPPED}
    return [
        one("verify.hostile_quarter", "1 of 4 hostile, all layers", worse("all layers")),
        one(
            "verify.clip_only", "1 of 4 hostile, clip and weights alone: the worse of the two",
            max(clipped.values(), key=mean),
        ),
        *(
            one(f"verify.clip_only.{kind.replace(' ', '_')}", kind, values)
            for kind, values in clipped.items()
        ),
        one("verify.clean_penalty", "clip and weights on a clean run", worse("clean", "average")),
    ]  # fmt: skip


def silent(found: Sequence[Json]) -> list[Row]:
    """Quiet cheating, per layer."""
    made = []
    for kind in QUIET:
        some = [one for one in found if one["kind"] == kind]
        name = kind.replace(" ", "_")
        made += [
            row(
                f"verify.{name}.l3", f"{kind}: refused by L0 to L3", n=len(some),
                ours=part([bool(one["refusal"]) for one in some]), better="higher", unit="share",
            ),
            row(
                f"verify.{name}.l4", f"{kind}: caught by the audit of two segments", n=len(some),
                ours=part([bool(one["audit"]) for one in some]), better="higher", unit="share",
            ),
        ]  # fmt: skip
    return made


def powers(found: Json) -> list[Row]:
    """A rate of 1.05: caught in one audited segment of k steps; alternative: its rho / limit."""
    return [
        row(
            f"verify.rate105.{name.replace(' ', '.k')}", "rate x1.05 in one audited segment",
            ours=part([one["caught"] for one in some]), better="higher", unit="share", n=len(some),
            alternative=mean(one["rho"] for one in some) / some[0]["limit"],
            alternative_name="rho / limit",
        )
        for name, some in found.items()
    ]  # fmt: skip
