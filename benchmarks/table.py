"""Rows and conditions of a benchmark, and the two ways to print them.

A row is one measured figure beside its alternative of the same run; `ratio` is ours ÷ alternative,
and fields without a value are null::

    row("start.paris", "time of --help", ours=0.2, better="lower", unit="s", n=5, spread=0.01)
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, Literal

PACKAGES = ("paris-ddm", "torch", "diffusers", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; its id is stable from release to release."""

    id: str
    what: str
    ours: float | None
    alternative: float | None
    alternative_name: str | None
    ratio: float | None
    better: Literal["higher", "lower"]
    unit: str
    n: int
    spread: float | None


def row(
    id: str,
    what: str,
    *,
    ours: float | None,
    better: Literal["higher", "lower"],
    unit: str,
    n: int,
    spread: float | None = None,
    alternative: float | None = None,
    alternative_name: str | None = None,
) -> Row:
    """A row with its ratio filled in."""
    ratio = ours / alternative if ours is not None and alternative else None
    return Row(id, what, ours, alternative, alternative_name, ratio, better, unit, n, spread)


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median and spread (half of max − min) of repeated measurements."""
    return median(values), (max(values) - min(values)) / 2


def versions() -> dict[str, str]:
    """Versions of what was measured, as far as they are installed."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def conditions(**facts: Any) -> dict[str, Any]:
    """What a reader needs in order to measure the same again."""
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    return {**facts, "cores": os.cpu_count(), "OMP_NUM_THREADS": threads, "versions": versions()}


def as_json(name: str, facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """The machine-readable form: {"name", "conditions", "rows"}."""
    report = {"name": name, "conditions": facts, "rows": [asdict(r) for r in rows]}
    return json.dumps(report, indent=1, ensure_ascii=False)


def as_text(name: str, facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table for people."""
    lines = [name, ", ".join(f"{k}={v}" for k, v in facts.items() if k != "versions"), ""]
    head = ("id", "ours", "alternative", "ratio", "unit", "n", "±")
    cells = [head] + [
        (
            r.id,
            _short(r.ours),
            f"{_short(r.alternative)} {r.alternative_name or ''}".strip(),
            _short(r.ratio),
            f"{r.unit} ({r.better} is better)",
            str(r.n),
            _short(r.spread),
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines += [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
