"""`start`: wall time of `--help` of the three programs, beside a Python that only starts."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from benchmarks.table import Row, conditions, middle, row

COMMANDS = {
    "paris": ["-m", "paris_models.commands.cli"],
    "paris-node": ["-m", "paris_node.cli"],
    "paris-coordinator": ["-m", "paris_coordinator.cli"],
}


def _seconds(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - begin


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """One warm-up per command, then `n` starts each, taken in turn with the bare interpreter."""
    n = 3 if quick else 10
    rows = []
    for name, module in COMMANDS.items():
        _seconds([*module, "--help"])
        ours, bare = [], []
        for _ in range(n):
            ours.append(_seconds([*module, "--help"]))
            bare.append(_seconds(["-c", "import typer"]))
        ours_s, spread = middle(ours)
        rows.append(
            row(
                f"start.{name}",
                f"wall time of `{name} --help`",
                ours=ours_s,
                spread=spread,
                better="lower",
                unit="s",
                n=n,
                alternative=middle(bare)[0],
                alternative_name="python -c 'import typer'",
            )
        )
    return conditions(n=n, limit_s=0.3), rows
