"""The parts of `gpu`: what each one measures, as functions of a `Lab` that add rows to it.

A part is at most ten minutes of one GPU. What a card has no room for is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu_lab import GIB, KEY, Lab
from benchmarks.step import bare_stepper
from benchmarks.table import row
from paris_models import lean
from paris_models.config import RecipeConfig
from paris_models.expert import expert_from, predict
from paris_models.plans import PLANS, Plan, most_swap, step_flops, with_swap
from paris_models.replay import distance

BACKENDS = ("native", "_native_flash", "_native_efficient", "_native_cudnn")
PAPER = "paper"


def memory(lab: Lab) -> None:
    """Peaks of full plans at 11.9 billion parameters beside `plans.need_of`, and their steps."""
    for name in ("adafactor", "adamw-8bit", "adamw-host"):
        _plan(lab, "memory", PLANS[name])


def lora(lab: Lab) -> None:
    """The same of LoRA of rank 32 on a base of 16, 8 and 4 bits."""
    for name in ("lora-32-bf16", "lora-32-fp8", "lora-32-nf4"):
        _plan(lab, "lora", PLANS[name])


def swap(lab: Lab) -> None:
    """Adafactor at 11.9 billion parameters with more and more blocks in host memory."""
    most = most_swap(PLANS["adafactor"], lab.config(PAPER))
    for blocks in sorted({min(n, most) for n in (0, 8, 20, 35)}):
        _plan(lab, "swap", with_swap(PLANS["adafactor"], blocks), f"adafactor+{blocks}")


def step(lab: Lab) -> None:
    """A step beside a bare loop of the same mathematics in bfloat16 autocast; its MFU."""
    plan, size = PLANS["float32"], _largest(lab)
    if size is None:
        return
    config, clips, batch = lab.config(size), lab.clips(size), 2

    def alone(begin: Callable[[], Callable[[], object]]) -> tuple[float, float | None]:
        lab.clear()
        return lab.seconds(begin()), lab.peak

    def begin() -> Callable[[], object]:
        state = lab.state(plan, size)
        unit = replace(lab.unit(plan, batch), dtype="bfloat16")
        return lambda: lean.train_step(state, clips, unit)

    ours, mine = alone(begin)
    bare, theirs = alone(lambda: bare_stepper(config, clips, batch, lab.device, torch.bfloat16))
    name = "bare diffusers loop, AdamW, bfloat16 autocast"
    lab.rows.append(
        row(
            f"gpu.step.{size}", f"training, batch {batch}", ours=batch / ours, better="higher",
            unit="samples/s", n=5, alternative=batch / bare, alternative_name=name,
        )
    )  # fmt: skip
    _mfu(lab, f"gpu.mfu.{size}", step_flops(plan, config, lab.work(batch)), ours)
    if mine and theirs:
        lab.rows.append(
            row(
                f"gpu.step.memory.{size}", "peak of the allocator", ours=mine / GIB, n=1,
                better="lower", unit="GiB", alternative=theirs / GIB, alternative_name=name,
            )
        )  # fmt: skip


def attention(lab: Lab) -> None:
    """Attention backends of torch, each beside the one that torch chooses itself."""
    chosen = None
    for backend in BACKENDS:
        try:
            seconds = _variant(lab, lambda model, b=backend: model.set_attention_backend(b))
        except (RuntimeError, ValueError, ImportError) as error:
            lab.skip(f"attention {backend}", str(error).splitlines()[0])
            continue
        chosen = chosen or seconds
        _ratio(lab, f"gpu.attention.{backend.lstrip('_')}", seconds, chosen, "native")
    lab.toy_model().set_attention_backend("native")  # the choice is the whole process's


def compiled(lab: Lab) -> None:
    """Blocks compiled once and used again, beside blocks as they are."""
    if lab.device.type != "cuda":
        lab.skip("compile", "the toy is not compiled: a compiler takes longer than all of it")
        return
    plain = _variant(lab, lambda model: None)
    fast = _variant(lab, lambda model: model.compile_repeated_blocks())
    _ratio(lab, "gpu.compile", fast, plain, "eager")


def kernels(lab: Lab) -> None:
    """Deterministic kernels beside the quickest, and whether two deterministic runs are equal."""
    fast = _variant(lab, lambda model: None, kernels="fast")
    slow = _variant(lab, lambda model: None, kernels="reference")
    _ratio(lab, "gpu.kernels.reference", slow, fast, "fast")
    for kind in ("reference", "fast"):
        first, second = (_trained(lab, lab.device, "float32", kind) for _ in range(2))
        _apart(lab, f"gpu.kernels.repeat.{kind}", first, second, "the same again")


def replay(lab: Lab) -> None:
    """How far ends of one unit are apart across precisions, kernels and devices."""
    cpu = torch.device("cpu")
    own = _trained(lab, cpu, "float32", "reference")
    for dtype in ("float32", "bfloat16"):
        for kind in ("reference", "fast"):
            found = _trained(lab, lab.device, dtype, kind)
            _apart(lab, f"gpu.replay.{dtype}.{kind}", own, found, "CPU float32, reference")
    again = [_trained(lab, lab.device, "bfloat16", "reference") for _ in range(2)]
    _apart(lab, "gpu.replay.bfloat16.same", again[0], again[1], "the same again")


@torch.no_grad()
def experts(lab: Lab) -> None:
    """Four experts by turns with one on the device, beside four that are all there."""
    size = "2.2B"
    config, table = lab.config(size), lab.clips(size)
    x, t = table.latents[:1].to(lab.device), torch.full((1,), 0.5, device=lab.device)
    seq, pooled = (
        tensor.to(lab.device) for tensor in table.text(torch.zeros(1, dtype=torch.int64))
    )
    drawn = {n: w.to(torch.bfloat16) for n, w in lab.weights(size).items()}
    model: Any = expert_from(config, drawn).eval()
    pinned = lab.device.type == "cuda"
    home = [{n: w.cpu() for n, w in drawn.items()} for _ in range(4)]
    if pinned:
        home = [{n: w.pin_memory() for n, w in weights.items()} for weights in home]
    turns = count()

    def forward() -> Tensor:
        with torch.autocast(lab.device.type, torch.bfloat16):
            return predict(model, config, x, t, seq, pooled)

    def by_turns() -> Tensor:
        weights = home[next(turns) % len(home)]
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name], non_blocking=True)
        return forward()

    resident = lab.seconds(forward)
    _ratio(lab, "gpu.experts.by_turns", lab.seconds(by_turns), resident, "all on the device")


PARTS: Final[Mapping[str, Callable[[Lab], None]]] = MappingProxyType(
    {f.__name__: f for f in (memory, lora, swap, step, attention, kernels, replay, experts)}
    | {"compile": compiled}
)


def _plan(lab: Lab, part: str, plan: Plan, label: str = "") -> None:
    """Peak and seconds per step of a plan at the paper's size."""
    label = label or plan.name
    if not lab.fits(label, plan, PAPER):
        return
    clips, unit = lab.clips(PAPER), lab.unit(plan)
    state = lab.state(plan, PAPER)
    seconds = lab.seconds(lambda: lean.train_step(state, clips, unit), repeats=3, warm=1)
    peak = lab.peak
    if peak is None:
        lab.skip(f"peak of {label}", "this device's allocator has no such figure")
    lab.rows.append(
        row(
            f"gpu.{part}.peak.{label}", "peak of the allocator", better="lower", unit="GiB", n=1,
            ours=peak / GIB if peak else None, alternative_name="the plan's arithmetic",
            alternative=lab.predicted(plan, PAPER) / GIB,
        )
    )  # fmt: skip
    lab.rows.append(
        row(f"gpu.{part}.seconds.{label}", "a step of one clip", ours=seconds, better="lower",
            unit="s", n=3)
    )  # fmt: skip
    _mfu(lab, f"gpu.{part}.mfu.{label}", step_flops(plan, lab.config(PAPER), lab.work()), seconds)


def _mfu(lab: Lab, id: str, flops: int, seconds: float) -> None:
    peak = lab.facts().tflops * 1e12
    lab.rows.append(
        row(
            id, "FLOPs of a step by its arithmetic, per second", ours=flops / seconds / 1e12,
            better="higher", unit="TFLOP/s", n=1, alternative=peak / 1e12,
            alternative_name="the maker's dense 16-bit peak",
        )
    )  # fmt: skip


def _largest(lab: Lab) -> str | None:
    """The largest size that trains in float32 here."""
    for size in ("2.2B", "950M", "287M"):
        if lab.fits(f"float32 at {size}", PLANS["float32"], size, batch=2):
            return size
    return None


def _variant(lab: Lab, change: Callable[[Any], object], kernels: str = "fast") -> float:
    """Seconds per step of adafactor at 950 million parameters, its model changed."""
    plan = replace(PLANS["adafactor"], checkpoint=False)
    clips, unit = lab.clips("950M"), lab.unit(plan, 2, kernels)
    state = lab.state(plan, "950M")
    change(state.model)
    return lab.seconds(lambda: lean.train_step(state, clips, unit))


def _ratio(lab: Lab, id: str, ours: float, other: float, name: str) -> None:
    lab.rows.append(
        row(id, "a step", ours=ours, better="lower", unit="s", n=5, alternative=other,
            alternative_name=name)
    )  # fmt: skip


def _trained(lab: Lab, device: torch.device, dtype: str, kernels: str) -> list[dict[str, Tensor]]:
    """States before and after five steps at 5 million parameters, from the same weights."""
    plan, size = PLANS["float32"], "5M"
    torch.manual_seed(0)
    cpu = replace(lab, device=torch.device("cpu"))
    weights, clips = dict(cpu.weights(size)), cpu.clips(size)
    state = lean.new_state(
        plan, lab.config(size), RecipeConfig(lr=1e-3), weights, key=KEY, device=device.type
    )
    half = "bfloat16" if dtype == "bfloat16" else "float32"
    unit = replace(lab.unit(plan, 2, kernels), dtype=half)
    kept = []
    for steps in (0, 5):
        for _ in range(steps):
            lean.train_step(state, clips, unit)
        kept.append({n: t.detach().cpu().clone() for n, t in lean.state_tensors(state).items()})
    return kept


def _apart(
    lab: Lab, id: str, one: list[dict[str, Tensor]], other: list[dict[str, Tensor]], name: str
) -> None:
    rho, worst = distance(one[0], one[1], other[1])
    lab.rows.append(
        row(id, f"distance of two ends, beside {name}", ours=rho, better="lower", n=1,
            unit=f"rho; worst tensor {worst:.3g}")
    )  # fmt: skip
