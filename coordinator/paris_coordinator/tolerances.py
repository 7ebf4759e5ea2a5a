"""The concluding half of `calibrate`: results become distances, distances become tolerances.

All results of one segment are compared with one another, whichever kernel or machine they are of;
for each dtype and number of steps the worst distance times a safety factor is the tolerance that a
policy publishes. Refused with `recipe.invalid`: a results file that is none::

    pairs = compare([*measure(…), *read_results(text)])
    as_toml(tolerances(pairs, model="flux-319392-muon-x0", source="…"))      # for a recipe
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np

from paris_models.replay import Apart, ratios
from paris_protocol.canonical import decimal
from paris_protocol.errors import ParisError
from paris_protocol.records import Tolerance

Json = dict[str, Any]

FORMAT: Final = 1
FACTORS: Final = {"float32": 50.0, "bfloat16": 5.0}
"""Safety factors over the worst honest pair.

In bfloat16 a distance is the sum of very many roundings, much the same for all kernels measured,
and deviations are near: 5, as in trust §2.2. In float32 it has a long tail, because AdamW's first
step divides a gradient near zero by itself, so that one such element moves differently; and every
deviation that matters is hundreds of times farther away.
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two results of one segment, and how far they are apart."""

    first: str
    second: str
    dtype: str
    steps: int
    equal: bool
    rho: float
    tensor: float


def compare(results: Sequence[Json]) -> list[Pair]:
    """Every two results of the same segment (dtype, steps, and bits at its beginning)."""
    runs: dict[tuple[Any, ...], list[tuple[str, Json]]] = {}
    for result in results:
        for run in result["runs"]:
            key = (run["dtype"], run["steps"], run["pair"], run["begin"])
            runs.setdefault(key, []).append((f"{result['kernel']} ({result['machine']})", run))
    found = []
    for (dtype, steps, *_), group in runs.items():
        for (first, a), (second, b) in combinations(group, 2):
            equal = a["end"] == b["end"]
            rho, tensor = (0.0, 0.0) if equal else _apart(a["tensors"], b["tensors"])
            found.append(Pair(first, second, dtype, steps, equal, rho, tensor))
    return found


def _unpacked(text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def _apart(first: Json, second: Json) -> tuple[float, float]:
    parts = {}
    for name, (count, text) in first.items():
        a, b = _unpacked(text), _unpacked(second[name][1])
        parts[name] = Apart(float(((a - b) ** 2).sum()), float((a**2).sum()), count)
    return ratios(parts)


def tolerances(
    pairs: Sequence[Pair], *, model: str, source: str, factor: float | None = None
) -> list[Tolerance]:
    """For each dtype and number of steps: `factor` (of the dtype, if None) × the worst pair.

    Only pairs of different bits count; where there are none, nothing was calibrated.
    """
    found = []
    apart = [pair for pair in pairs if not pair.equal]
    for dtype, steps in sorted({(pair.dtype, pair.steps) for pair in apart}):
        group = [p for p in apart if (p.dtype, p.steps) == (dtype, steps)]
        safety = FACTORS[dtype] if factor is None else factor
        found.append(
            Tolerance(
                dtype="bfloat16" if dtype == "bfloat16" else "float32",
                model=model,
                steps=steps,
                rho=decimal(safety * max(pair.rho for pair in group), 3),
                tensor=decimal(safety * max(pair.tensor for pair in group), 3),
                factor=decimal(safety),
                pairs=len(group),
                source=source[:200],
            )
        )
    return found


def table(pairs: Sequence[Pair]) -> list[Json]:
    """For each kernel, dtype and steps: its pairs with the first result, equal bits, worst."""
    rows: dict[tuple[str, str, int], list[Pair]] = {}
    first = pairs[0].first if pairs else ""
    for pair in pairs:
        if pair.first == first:
            rows.setdefault((pair.second, pair.dtype, pair.steps), []).append(pair)
    return [
        {
            "kernel": kernel,
            "dtype": dtype,
            "steps": steps,
            "equal_bits": all(pair.equal for pair in group),
            "rho": max(pair.rho for pair in group),
            "tensor": max(pair.tensor for pair in group),
        }
        for (kernel, dtype, steps), group in rows.items()
    ]


def as_text(rows: Sequence[Json]) -> str:
    """`table` for people."""
    lines = []
    for row in rows:
        apart = f"rho {row['rho']:.2e}, worst tensor {row['tensor']:.2e}"
        bits = "the same bits" if row["equal_bits"] else apart
        lines.append(f"{row['dtype']:9s} {row['steps']:3d} steps  {row['kernel']}: {bits}")
    return "\n".join(lines)


def as_toml(found: Sequence[Tolerance]) -> str:
    """The tolerances as they stand in a recipe or in the operator's policy file."""
    lines = []
    for one in found:
        lines.append("[[audit.tolerances]]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in one.model_dump().items()]
        lines.append("")
    return "\n".join(lines)


def read_results(text: bytes, model: str) -> list[Json]:
    """What `calibrate --measure-only` wrote elsewhere; `recipe.invalid` for anything else."""
    try:
        found = json.loads(text)
        if not found or any(one["format"] != FORMAT for one in found):
            raise ValueError("of another version, or empty")
        if {one["model"] for one in found} != {model}:
            raise ValueError(f"results of another model than {model}")
        compare([found[0], *found])
    except (ValueError, KeyError, TypeError) as error:
        raise ParisError("recipe.invalid", f"no results of a calibration: {error}") from error
    return list(found)
