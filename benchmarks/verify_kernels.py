"""Other machines for `verify`: the same work in a process with another instruction set or threads.

The child reads orders as JSON, trains under the kernels of its environment, and leaves files in the
lab's folder: whole units, committed and handed in::

    works = elsewhere(folder, "avx2", [{"seed": "honest 7", "keep": [2, 3]}])
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.verify_lab import Lab, Work, plain, unit_of
from paris_models.numerics import numeric_class
from paris_protocol.records import Assignment, Commitment, Contribution

Json = dict[str, Any]

AVX2: Final = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
PLAIN: Final = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}
PATIENT: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait do not burn the other process' time."""
KERNELS: Final[Mapping[str, tuple[Mapping[str, str], int]]] = {
    "same": ({}, 1),
    "two threads": ({}, 2),
    "avx2": (AVX2, 1),
    "plain": (PLAIN, 1),
}
"""Name → environment and threads of the machine that trains; the auditor is "same"."""


def elsewhere(folder: Path, kernels: str, orders: Sequence[Json]) -> list[Work]:
    """What a process with these kernels hands in; an order is {"seed", "changes", "keep"}."""
    environment, threads = KERNELS[kernels]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.verify_kernels",
            str(folder),
            str(threads),
        ],
        input=json.dumps(list(orders)),
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **PATIENT, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [_read(one) for one in json.loads(done.stdout.splitlines()[-1])]


def _read(made: Json) -> Work:
    return Work(
        Assignment.model_validate_json(json.dumps(made["assignment"])),
        Commitment.model_validate_json(json.dumps(made["commitment"])),
        Contribution.model_validate_json(json.dumps(made["contribution"])),
        Path(made["update"]),
        {int(place): Path(path) for place, path in made["states"].items()},
    )


def main() -> None:
    """The child: orders on standard input, what was made of them on standard output."""

    lab, threads = Lab(Path(sys.argv[1])), int(sys.argv[2])
    made: list[Json] = []
    for order in json.load(sys.stdin):
        assignment = lab.assignment(order["seed"], **order.get("changes", {}))
        unit = replace(unit_of(assignment), threads=threads)
        numerics = numeric_class(
            lab.size.expert, lab.size.recipe, batch=unit.batch, dtype=unit.dtype,
            threads=threads, kernels=unit.kernels,
        )  # fmt: skip
        work = lab.work(assignment, unit=unit, keep=order.get("keep", ()), numerics=numerics)
        made.append(
            {
                "assignment": plain(work.assignment), "commitment": plain(work.commitment),
                "contribution": plain(work.contribution), "update": str(work.update),
                "states": {place: str(path) for place, path in work.states.items()},
            }
        )  # fmt: skip
    print(json.dumps(made))


if __name__ == "__main__":
    main()
