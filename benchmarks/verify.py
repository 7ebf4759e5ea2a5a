"""`verify`: what the layers catch, what honest nodes suffer, and what it costs.

Every figure comes from the coordinator's own functions (`jobs.verify`, `jobs.replay`, `judging`,
`merging`) on a small network of rendered clips (`verify_lab`). Thresholds are learnt on the seeds
"learn …" and by the calibration's; the figures are of other seeds. The parts run as processes
of their own, two at a time, one thread each::

    python -m benchmarks verify [--quick] [--json]
    python -m benchmarks.verify gross FOLDER 0 44          # one part: its name, folder, from, to
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.table import Row, conditions

Json = dict[str, Any]
Found = dict[str, Any]

DTYPES: Final = ("float32", "bfloat16")
STEPS: Final = (1, 5, 20)
MACHINES: Final = ("plain", "avx2", "same", "two threads")


@dataclass(frozen=True, slots=True)
class Amounts:
    """How many seeds each part takes."""

    learn: int = 24
    pairs: int = 2
    late_learn: int = 10
    gross: int = 43
    quiet: int = 10
    segments: int = 38
    half: int = 10
    power: int = 6
    honest: tuple[int, int, int, int] = (44, 84, 100, 24)
    honest_half: tuple[int, int, int, int] = (4, 20, 24, 0)
    late: int = 2
    early: int = 1
    rounds: int = 4


QUICK: Final = Amounts(
    learn=10, late_learn=10, pairs=1, gross=2, quiet=1, segments=1, half=1, power=1,
    honest=(1, 1, 1, 1), honest_half=(0, 1, 1, 0), late=1, early=0, rounds=2,
)  # fmt: skip


def run(quick: bool) -> tuple[Json, list[Row]]:
    """All parts and the rows of design.md §7, with the informative ones."""
    from benchmarks.verify_rows import facts, rows

    amounts = QUICK if quick else Amounts()
    with tempfile.TemporaryDirectory(prefix="paris-verify-") as name:
        folder = Path(name)
        found = measure(folder, amounts)
    return conditions(**facts(found, asdict(amounts))), rows(found)


def measure(folder: Path, amounts: Amounts) -> Found:
    """What every part found, by its name."""
    from benchmarks.verify_learn import add_tolerances

    small, demo = folder / "small", folder / "demo"
    small.mkdir()
    demo.mkdir()
    plan: list[tuple[str, list[str]]] = [
        *(
            (f"honest {kernels}", ["honest", str(small), kernels, str(full), str(half)])
            for kernels, full, half in zip(
                MACHINES, amounts.honest, amounts.honest_half, strict=True
            )
        ),
        *(
            (f"runs {when} {i}", ["runs", str(small), when, str(i), str(amounts.rounds)])
            for when, count in (("late", amounts.late), ("early", amounts.early))
            for i in range(count)
        ),
        ("gross", ["gross", str(small), str(amounts.gross)]),
        ("segments float32", ["segments", str(small), "float32", str(amounts.segments)]),
        ("segments bfloat16", ["segments", str(small), "bfloat16", str(amounts.half)]),
        ("power", ["power", str(small), str(amounts.power)]),
        ("quiet", ["quiet", str(small), str(amounts.quiet)]),
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        ready = pool.submit(part, ["prepare", str(small)])
        waiting = {"prepare": ready, "cost": pool.submit(part, ["cost", str(demo)])}
        ready.result()
        for name in ("calibrate", "learn"):
            amount = amounts.pairs if name == "calibrate" else amounts.learn
            waiting[name] = pool.submit(part, [name, str(small), str(amount)])
        waiting["late"] = pool.submit(part, ["late", str(small), str(amounts.late_learn)])
        for name in ("learn", "late"):
            waiting[name].result()
        add_tolerances(small, waiting["calibrate"].result()["found"])
        waiting |= {name: pool.submit(part, arguments) for name, arguments in plan}
        answers = {name: future.result() for name, future in waiting.items()}
    seconds = {name: round(answer["cpu"], 1) for name, answer in answers.items()}
    return {name: answer["found"] for name, answer in answers.items()} | {"seconds": seconds}


def part(arguments: list[str]) -> Json:
    """One part in a process of its own: what it found, and its CPU-seconds."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.verify", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: Json = json.loads(done.stdout.splitlines()[-1])
    return answer


# ---------------------------------------------------------------- the parts, in their processes


def prepare(folder: Path) -> Any:
    """Makes the small network."""
    from benchmarks.verify_lab import Lab

    Lab(folder).prepare()


def calibrate(folder: Path, pairs: str) -> Any:
    """Tolerances for honest replays on other kernels."""
    from benchmarks.verify_lab import Lab
    from benchmarks.verify_learn import calibrated

    return calibrated(Lab(folder), int(pairs), DTYPES)


def learn(folder: Path, units: str) -> Any:
    """Margins early in training."""
    from benchmarks.verify_lab import Lab
    from benchmarks.verify_learn import learn

    return learn(Lab(folder), int(units))


def late(folder: Path, units: str) -> Any:
    """Trains the head on, and learns the margins there."""
    from benchmarks.verify_lab import Lab
    from benchmarks.verify_learn import learn
    from benchmarks.verify_runs import Runs

    lab = Lab(folder)
    lab.mature()
    runs = Runs(lab, "", 4, late=True)
    return learn(runs.lab_at(runs.start, 0), int(units))


def gross(folder: Path, count: str) -> Any:
    """Gross damage, copies and honest work through L0 to L3."""
    from benchmarks.verify_attacks import gross
    from benchmarks.verify_lab import Lab

    return gross(Lab(folder), [f"gross {i}" for i in range(int(count))])


def quiet(folder: Path, count: str) -> Any:
    """Quiet cheating through L0 to L3 and an audit."""
    from benchmarks.verify_attacks import quiet
    from benchmarks.verify_lab import Lab

    return quiet(Lab(folder), [f"quiet {i}" for i in range(int(count))])


def segments(folder: Path, dtype: str, count: str) -> Any:
    """Cheating inside audited segments."""
    from benchmarks.verify_lab import Lab
    from benchmarks.verify_segments import segments

    return segments(Lab(folder), [f"segment {i}" for i in range(int(count))], dtype)


def power(folder: Path, count: str) -> Any:
    """A rate of 1.05 beside the tolerances, by dtype and steps."""
    from benchmarks.verify_lab import Lab
    from benchmarks.verify_segments import power

    lab, seeds = Lab(folder), [f"power {i}" for i in range(int(count))]
    return {
        f"{dtype} {steps}": power(lab, seeds, dtype, steps) for dtype in DTYPES for steps in STEPS
    }


def honest(folder: Path, kernels: str, full: str, half: str) -> Any:
    """Honest units of one kind of machine."""
    from benchmarks.verify_honest import honest
    from benchmarks.verify_lab import Lab

    counts = dict(zip(DTYPES, (int(full), int(half)), strict=True))
    return honest(Lab(folder), kernels, counts)


def runs(folder: Path, when: str, number: str, rounds: str) -> Any:
    """Whole runs with one hostile node of four."""
    from benchmarks.verify_lab import Lab
    from benchmarks.verify_runs import Runs

    one = Runs(Lab(folder), f"lineage {when} {number}", int(rounds), late=when == "late")
    return {"losses": one.all(), **asdict(one.judgements)}


def cost(folder: Path) -> Any:
    """Cost of the reference unit and of the demo's own, and of a LoRA's first layers."""
    from benchmarks.verify_cost import lora, measured
    from benchmarks.verify_lab import DEMO, REFERENCE, Lab
    from benchmarks.verify_learn import OPEN

    Lab(folder, REFERENCE).prepare()
    margins = OPEN | {"damage": ["0.03"], "noise_cosine": "0.01"}
    looking = {"reference": margins | {"looks": [64, 128]}, "reference, all clips": margins}
    found: Json = dict(measured(Lab(folder, REFERENCE), looking))
    own = Lab(folder, DEMO)
    own.sign()
    found |= measured(own, {"demo": margins | {"looks": [64, 128]}})
    return found | {"lora": [lora(folder) for _ in range(3)]}


PARTS: Final[dict[str, Callable[..., Any]]] = {
    one.__name__: one
    for one in (prepare, calibrate, learn, late, gross, quiet, segments, power, honest, runs, cost)
}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    answer = PARTS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    print(json.dumps({"found": answer, "cpu": sum(os.times()[:4])}))
