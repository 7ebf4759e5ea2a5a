"""The measuring half of `calibrate`: the same segments under every kernel of this machine.

What can be emulated here: threads, instruction sets, the attention's backend, algorithms that are
not deterministic. Each kernel runs in a process of its own, because most switches are read when the
libraries start. `paris_coordinator.tolerances` compares the results, those of other machines too::

    found = measure(of_prepared(folder), pairs=4, steps=(3, 5), dtypes=("float32",), device="cpu")

A result holds no weights: each tensor's change is a linear sketch (64 sums of randomly signed
elements), so that differences of sketches estimate differences of updates, for experts of any size.
Half of the segments begin at the parent with a fresh optimiser, the same bits everywhere; the
others begin at a state that this machine has trained to, and are compared on this machine only.
Refused with `recipe.invalid`: no network at the given place.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from paris_coordinator.config import State
from paris_coordinator.genesis import read_prepared
from paris_coordinator.jobs.common import root_of
from paris_coordinator.tolerances import (
    FORMAT,
    as_text,
    as_toml,
    compare,
    read_results,
    table,
    tolerances,
)
from paris_models import lean, noise
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.plans import PLANS, Plan
from paris_models.replay import model_class, replay
from paris_models.shards import ClipTable, read_shards
from paris_protocol.envelope import open_genesis, unseal
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore, write_atomic
from paris_protocol.records import ExpertSpec, Policy, Recipe

Json = dict[str, Any]

WARM: Final = 20
"""Steps that are trained before a segment that does not begin at the parent."""
SKETCH: Final = 64
KEY: Final = b"paris/calibrate1"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute the same thing: threads, environment, attention backend, determinism."""

    name: str
    threads: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    attention: str = "flash"
    kernels: str = "reference"


KERNELS: Final = (
    Kernel("reference"),
    Kernel("2 threads", threads=2),
    Kernel("4 threads", threads=4),
    Kernel("ATen default", environment={"ATEN_CPU_CAPABILITY": "default"}),
    Kernel("ATen AVX2", environment={"ATEN_CPU_CAPABILITY": "avx2"}),
    Kernel("oneDNN AVX2", environment={"DNNL_MAX_CPU_ISA": "AVX2"}),
    Kernel("MKL AVX2", environment={"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    Kernel("MKL compatible", environment={"MKL_CBWR": "COMPATIBLE"}),
    Kernel("OpenBLAS Haswell", environment={"OPENBLAS_CORETYPE": "Haswell"}),
    Kernel("attention math", attention="math"),
    Kernel("not deterministic", kernels="fast"),
)
"""What a CPU can emulate; which of them changes bits is found out by running them."""
ON_DEVICE: Final = (
    Kernel("reference"),
    Kernel("attention math", attention="math"),
    Kernel("not deterministic", kernels="fast"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """What is trained: a network's models, an initial checkpoint, the clips of one cluster."""

    expert: ExpertSpec
    recipe: Recipe
    initial: Path
    shards: tuple[Path, ...]
    dtype: str
    every: int
    plan: Plan = PLANS["float32"]

    @property
    def model(self) -> str:
        """The model class of its tolerances: they hold for one model under one training plan."""
        config = ExpertConfig.from_record(self.expert)
        return model_class(config, RecipeConfig.from_record(self.recipe), self.plan)

    def under(self, name: str) -> Source:
        """The same under another training plan, at that one's precision.

        `recipe.invalid` for a plan that there is not.
        """
        if name not in PLANS:
            raise ParisError("recipe.invalid", f"there is no plan {name}")
        plan = PLANS[name]
        own = plan.optimiser == "recipe"
        return replace(self, plan=plan, dtype=self.dtype if own else plan.compute)


def of_prepared(folder: Path) -> Source:
    """The network that a prepared folder describes; its first cluster's clips."""
    described = read_prepared(folder)
    policy = described["policy"]
    return Source(
        expert=ExpertSpec.model_validate_json(json.dumps(described["expert"])),
        recipe=Recipe.model_validate_json(json.dumps(described["recipe"])),
        initial=folder / described["initial"]["path"],
        shards=tuple(folder / shard["path"] for shard in described["clusters"][0]["shards"]),
        dtype=policy.get("dtype", "float32"),
        every=int(policy.get("commit_every", 5)),
    )


def of_state(folder: Path) -> Source:
    """The network of a coordinator's state folder; `recipe.invalid` if there is none."""
    state = State(folder)
    if not state.exists:
        raise ParisError("recipe.invalid", f"there is no network in {folder}")
    opened, store = open_genesis(state.genesis_file.read_bytes()), BlobStore(state.store)
    newest = max(state.policy.glob("*.json"), key=lambda path: int(path.stem))
    policy = unseal(newest.read_bytes(), Policy, opened.id, None).record
    genesis = opened.record
    return Source(
        expert=genesis.expert,
        recipe=genesis.recipe,
        initial=store.path(genesis.initial.blob),
        shards=tuple(store.path(shard.file.blob) for shard in genesis.clusters[0].shards),
        dtype=policy.dtype,
        every=policy.commit_every,
    )


def calibrated(
    source: Source,
    *,
    pairs: int,
    steps: Sequence[int] | None,
    dtypes: Sequence[str] | None,
    device: str,
    others: Sequence[Path],
    measure_only: bool,
    factor: float | None,
) -> tuple[Json, str, str]:
    """All of `calibrate`: facts for programs, a table for people, and the file that is asked for.

    The file holds the tolerances as TOML, or this machine's results as JSON (`measure_only`).
    `recipe.invalid` for a dtype that there is not, or that the plan does not compute in, and for
    files that hold no results.
    """
    wanted = tuple(dtypes or (source.dtype,))
    known = {"float32", "bfloat16"} if source.plan.optimiser == "recipe" else {source.dtype}
    if not set(wanted) <= known:
        raise ParisError("recipe.invalid", f"dtype {', '.join(wanted)}")
    foreign = [result for path in others for result in read_results(_read(path), source.model)]
    found = measure(
        source, pairs=pairs, steps=steps or (source.every,), dtypes=wanted, device=device
    )
    compared = compare([*found, *foreign])
    rows = table(compared)
    name = f"calibrate: {len(found)} kernels, {len({one['machine'] for one in found + foreign})}"
    limits = tolerances(
        compared, model=source.model, factor=factor, source=f"{name} builds and machines"
    )
    facts = {"model": source.model, "kernels": rows, "tolerances": [t.model_dump() for t in limits]}
    return facts, as_text(rows), json.dumps(found) if measure_only else as_toml(limits)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ParisError("recipe.invalid", str(error)) from error


# ---------------------------------------------------------------- measuring, in a process each


def measure(
    source: Source, *, pairs: int, steps: Sequence[int], dtypes: Sequence[str], device: str
) -> list[Json]:
    """Results of `pairs` segments under every kernel of this machine (module docstring)."""
    found = []
    with tempfile.TemporaryDirectory(prefix="paris-calibrate-") as name:
        for kernel in KERNELS if device == "cpu" else ON_DEVICE:
            order = {
                "expert": source.expert.model_dump(mode="json"),
                "recipe": source.recipe.model_dump(mode="json"),
                "initial": str(source.initial),
                "shards": [str(path) for path in source.shards],
                "pairs": pairs,
                "steps": sorted(steps),
                "dtypes": list(dtypes),
                "device": device,
                "begins": name,
                "plan": source.plan.name,
                "kernel": kernel.name,
                "threads": kernel.threads,
                "attention": kernel.attention,
                "kernels": kernel.kernels,
            }
            found.append(_in_a_process(order, kernel, Path(name)))
    return found


def _in_a_process(order: Json, kernel: Kernel, folder: Path) -> Json:
    """Runs one kernel; the first one, the reference, leaves the states that later ones begin at."""
    asked, answered = folder / "order.json", folder / "result.json"
    asked.write_text(json.dumps(order))
    command = [sys.executable, "-m", "paris_coordinator.calibration", str(asked), str(answered)]
    quiet = {"OMP_NUM_THREADS": str(kernel.threads), "DIFFUSERS_VERBOSITY": "error"}
    environment = {**os.environ, **quiet, **kernel.environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ParisError("internal", f"{kernel.name}: {ended.stderr.strip()[-300:]}")
    result: Json = json.loads(answered.read_bytes())
    return result


def perform(order: Json) -> Json:
    """One kernel's results, in this process."""
    config = ExpertConfig.from_record(ExpertSpec.model_validate_json(json.dumps(order["expert"])))
    recipe = RecipeConfig.from_record(Recipe.model_validate_json(json.dumps(order["recipe"])))
    clips = read_shards([Path(path) for path in order["shards"]])
    parent = load_tensors(Path(order["initial"]))
    device, plan = str(order["device"]), PLANS[order["plan"]]
    runs = []
    with _attention(str(order["attention"])):
        for dtype in order["dtypes"]:
            for pair in range(int(order["pairs"])):
                unit = UnitConfig(
                    key=(KEY[:-2] + pair.to_bytes(2, "big")),
                    steps=WARM + max(order["steps"]),
                    batch=recipe.batch,
                    rate_shape="constant",
                    dtype=dtype,
                    threads=int(order["threads"]),
                    kernels=order["kernels"],
                )
                state = lean.new_state(plan, config, recipe, parent, key=unit.key, device=device)
                if pair % 2:
                    begin = Path(order["begins"]) / f"{dtype}-{pair}.safetensors"
                    _warm(state, clips, unit, begin)
                runs += list(_segment(state, clips, unit, order["steps"], pair))
    return {
        "format": FORMAT,
        "machine": _machine(device),
        "kernel": order["kernel"],
        "model": model_class(config, recipe, plan),
        "runs": runs,
    }


def _warm(state: lean.State, clips: ClipTable, unit: UnitConfig, begin: Path) -> None:
    """The reference trains to the state and keeps it, all others begin at its very bits."""
    if not begin.exists():
        replay(state, clips, unit, WARM)
        save_tensors(lean.state_tensors(state), begin)
    lean.load_state_tensors(state, load_tensors(begin))


def _segment(
    state: lean.State, clips: ClipTable, unit: UnitConfig, steps: Sequence[int], pair: int
) -> Iterator[Json]:
    """The segment's change after each number of steps, as sketches."""
    begin = {name: tensor.detach().clone() for name, tensor in lean.state_tensors(state).items()}
    first, start = state.step, root_of(begin)
    for count in steps:
        replay(state, clips, unit, first + count)
        end = lean.state_tensors(state)
        yield {
            "dtype": unit.dtype,
            "pair": pair,
            "steps": count,
            "begin": start,
            "end": root_of(end),
            "tensors": {
                name: [tensor.numel(), _packed(sketch(tensor - begin[name]))]
                for name, tensor in end.items()
                if name != "step"
            },
        }


class _attention:
    """Attention by torch's mathematical form, or by its fused kernel."""

    def __init__(self, backend: str) -> None:
        self._context: Any = None
        if backend == "math":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            self._context = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._context is not None:
            self._context.__exit__(*error)


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}, torch {torch.__version__}"


def sketch(change: Tensor) -> Tensor:
    """A tensor's change as at most `SKETCH` sums of its elements with random signs, float32.

    Linear, and its squared norm estimates the tensor's; small tensors stand as they are.
    """
    flat = change.detach().cpu().double().flatten()
    if flat.numel() <= SKETCH:
        return flat.float()
    places, signs = _projection(flat.numel())
    return torch.zeros(SKETCH, dtype=torch.float64).index_add_(0, places, flat * signs).float()


@lru_cache(maxsize=64)
def _projection(count: int) -> tuple[Tensor, Tensor]:
    """For each element the sum it goes into, and its sign."""
    words = noise.words_batch(KEY, noise.SAMPLE, 0, [0], count)[0]
    signs = (words >> np.uint64(63)).astype(np.float64) * 2 - 1
    places = (words % np.uint64(SKETCH)).astype(np.int64)
    return torch.from_numpy(places), torch.from_numpy(signs)


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def main() -> None:
    """`python -m paris_coordinator.calibration ORDER RESULT`: one kernel's share of `measure`."""
    order = json.loads(Path(sys.argv[1]).read_bytes())
    write_atomic(Path(sys.argv[2]), json.dumps(perform(order)).encode())


if __name__ == "__main__":
    main()
