"""The numeric self-test: toy steps under a plan, beside the updates that they must give.

A driver, a library or a card that computes wrongly wastes every unit that it trains. Therefore
three steps of a tiny expert are taken before the first one, and again after each change of these,
and their update is compared with the one that ships in `assets/numerics.json`, within the
tolerances that replays are judged by (docs/verification.md, segments of three steps)::

    all(found.passed for found in examine(["float32", "lora-16-nf4"], device="cuda"))
    python -m paris_models.selftest [--device cuda]      # what this machine finds, as JSON
    python -m paris_models.selftest --out FILE           # makes the answers again

Of each tensor up to `SAMPLE` evenly spaced values are kept, as 16-bit parts of the largest one.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from paris_models.assets import asset
from paris_models.config import DEMO_RECIPE, ExpertConfig, UnitConfig
from paris_models.expert import parameter_shapes
from paris_models.lean import new_state, state_tensors, train_step
from paris_models.numerics import drawn, toy_clips
from paris_models.plans import PLANS, numeric_case
from paris_models.replay import FAR, Apart, ratios

NAME: Final = "numerics.json"
EXPERT: Final = ExpertConfig(1, 4, 4, 1, 1, 1, 8, (2, 2, 4), 8, 8)
STEPS: Final = 3
BATCH: Final = 4
SAMPLE: Final = 48
LIMITS: Final[Mapping[str, tuple[float, float]]] = {
    "float32": (8.8e-4, 0.043),
    "bfloat16": (0.48, 3.3),
}
"""Tolerances by precision: of the whole update, and of the worst tensor."""
LARGEST: Final = 32767


@dataclass(frozen=True, slots=True)
class Found:
    """How far a case's update was from the published one, in all and in its worst tensor."""

    case: str
    rho: float
    tensor: float
    limit: float
    tensor_limit: float

    @property
    def passed(self) -> bool:
        """Whether this machine may train so."""
        return self.rho <= self.limit and self.tensor <= self.tensor_limit


def cases() -> list[str]:
    """All cases there are."""
    return ["float32", *dict.fromkeys(numeric_case(plan, "bfloat16") for plan in PLANS.values())]


def examine(wanted: Iterable[str], device: str = "cpu") -> list[Found]:
    """What this machine computes in these cases; `ValueError` for one that there is not.

    Leaves torch's number of threads and its kernels as they were.
    """
    known = json.loads(asset(NAME).read_text("utf-8"))["cases"]
    return [_examined(case, known, device) for case in wanted]


def _examined(case: str, known: Mapping[str, Any], device: str) -> Found:
    if case not in known:
        raise ValueError(f"there is no numeric test {case[:40]!r}")
    rho, tensor = FAR, FAR
    limits = LIMITS[_precision(case)]
    answer = _read(known[case])
    try:
        update = changed(case, device)
    except (ArithmeticError, RuntimeError, TypeError):  # an operation or a dtype is missing here
        return Found(case, rho, tensor, *limits)
    if update.keys() == answer.keys():
        parts = {f"weights.{n}": _apart(update[n], answer[n]) for n in answer}
        rho, tensor = ratios(parts)
    return Found(case, rho, tensor, *limits)


def changed(case: str, device: str = "cpu") -> dict[str, np.ndarray[Any, Any]]:
    """The sampled update of a case's toy steps, float64 by the name of what is trained."""
    plan = PLANS["float32" if case in LIMITS else case]
    unit = UnitConfig(b"paris/selftest/1", steps=STEPS, batch=BATCH, dtype=_precision(case))
    shapes = parameter_shapes(EXPERT)
    weights = {n: 0.1 * drawn(1, slot, shape) for slot, (n, shape) in enumerate(shapes.items())}
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        state = new_state(plan, EXPERT, DEMO_RECIPE, weights, key=unit.key, device=device)
        begin, clips = _values(state_tensors(state)), toy_clips(EXPERT, BATCH)
        while state.step < unit.steps:
            train_step(state, clips, unit)
        end = _values(state_tensors(state))
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
    return {name: end[name] - begin[name] for name in end}


def _precision(case: str) -> Literal["float32", "bfloat16"]:
    return "float32" if case == "float32" else "bfloat16"


def _values(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Samples of the weights, with what a Kahan residual holds of them."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("weights."):
            plain = name.removeprefix("weights.")
            exact = tensor.detach().cpu().double().flatten().clone()
            if (rest := tensors.get(f"optimiser.residual.{plain}")) is not None:
                exact += rest.cpu().double().flatten()
            found[plain] = exact[:: -(-len(exact) // SAMPLE)].numpy()
    return found


def _apart(update: np.ndarray[Any, Any], answer: np.ndarray[Any, Any]) -> Apart:
    off = update - answer if update.shape == answer.shape else np.full(1, FAR)
    return Apart(float(off @ off), float(answer @ answer), len(answer))


def _read(stored: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    values, at, found = np.frombuffer(base64.b64decode(stored["values"]), "<i2"), 0, {}
    for name, count, scale in stored["tensors"]:
        found[name] = values[at : at + count] * float.fromhex(scale)
        at += count
    return found


def answers() -> dict[str, Any]:
    """What `assets/numerics.json` holds, made on this machine."""
    made = {}
    for case in cases():
        update = changed(case)
        scales = {n: float(np.abs(v).max(initial=0)) / LARGEST or 1.0 for n, v in update.items()}
        whole = [np.rint(values / scales[n]).astype("<i2") for n, values in update.items()]
        made[case] = {
            "tensors": [[n, len(update[n]), scales[n].hex()] for n in update],
            "values": base64.b64encode(np.concatenate(whole).tobytes()).decode(),
        }
    return {"version": 1, "cases": made}


def main(words: Sequence[str] | None = None) -> int:
    """Run the test or make its answers; 1 when a case failed."""
    parser = argparse.ArgumentParser(description="The numeric self-test.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(words)
    if asked.out is not None:
        asked.out.write_text(json.dumps(answers()) + "\n", "utf-8")
        return 0
    found = examine(cases(), asked.device)
    sys.stdout.write(json.dumps([{**asdict(one), "passed": one.passed} for one in found]) + "\n")
    return 0 if all(one.passed for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
