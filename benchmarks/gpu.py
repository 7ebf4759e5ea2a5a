"""`gpu`: the one list of what wants a GPU, each part at most ten minutes of one card.

Needs PyTorch, diffusers and safetensors, and this repository. Without `--part` all parts run, one
process each, so that none finds what another left in memory. Nothing is skipped silently: what did
not run stands with its reason on the screen and in the result file, one per part::

    python -m benchmarks gpu --part memory      # writes benchmarks/results/gpu-memory-<device>.json
    python -m benchmarks gpu --quick            # every part with a toy on the CPU
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.table import Row, as_json, conditions

PARTS = (
    "memory", "lora", "swap", "step", "attention", "compile", "kernels", "replay", "experts",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def run(quick: bool, part: str = "", out: Path = RESULTS) -> tuple[dict[str, Any], list[Row]]:
    """Run one part, or all, and write a result file for each that had a GPU."""
    _find_packages()
    if part:
        return _one(part, quick, out)
    rows: list[Row] = []
    facts: dict[str, Any] = conditions(device="", not_run=[])
    for name in PARTS:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "gpu", "--json", "--part", name]
            + (["--quick"] if quick else []),
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        if done.returncode:
            facts["not_run"].append([name, f"its process ended with code {done.returncode}"])
            continue
        found = json.loads(done.stdout)
        rows += [Row(**fields) for fields in found["rows"]]
        facts["device"] = found["conditions"]["device"]
        facts["not_run"] += found["conditions"]["not_run"]
    return facts, rows


def _one(part: str, quick: bool, out: Path) -> tuple[dict[str, Any], list[Row]]:
    import torch

    from benchmarks.gpu_lab import CLIP, WORDS, Lab
    from benchmarks.gpu_parts import PARTS as FUNCTIONS

    lab = Lab.here(quick)
    if lab is None:
        why = "there is no GPU that torch can use"
        print(f"not run: {part}: {why}", file=sys.stderr)
        return conditions(device="none", not_run=[[part, why]]), []
    try:
        FUNCTIONS[part](lab)
    except torch.cuda.OutOfMemoryError as error:
        lab.skip(part, f"out of memory: {str(error).splitlines()[0]}")
    facts = conditions(
        device=lab.name, toy=lab.toy, not_run=[list(pair) for pair in lab.not_run],
        clip=f"latents of {CLIP[0]} frames, {CLIP[1]} × {CLIP[2]} tokens; {WORDS} of text",
        cuda=torch.version.cuda, weights="random",
    )  # fmt: skip
    if not lab.toy:
        device = re.sub(r"[^a-z0-9]+", "-", lab.name.lower()).strip("-")
        out.mkdir(parents=True, exist_ok=True)
        (out / f"gpu-{part}-{device}.json").write_text(as_json(f"gpu {part}", facts, lab.rows))
    return facts, lab.rows


def _find_packages() -> None:
    """Use this checkout's packages where none are installed."""
    try:
        import paris_models
    except ModuleNotFoundError:
        sys.path[:0] = [str(ROOT / name) for name in ("models", "protocol")]
    else:
        assert paris_models
