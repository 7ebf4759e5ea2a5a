"""What the parts of `gpu` share: the device, random experts of a size, clips, and fair clocks.

Steps are timed between two synchronisations after warm-up, the median of several counts; peaks are
those of the device's allocator. Weights and clips are random, never zeros: a card multiplies zeros
faster. Without a GPU (`toy`) everything runs at a toy's size and no peak is measured::

    lab = Lab.here(quick=False)
    state = lab.state(PLANS["adafactor"], "paper")
    lab.seconds(lambda: lab.step(state)), lab.peak
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Row
from paris_models import lean
from paris_models.config import LADDER, ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import build_expert, parameter_shapes
from paris_models.fitting import HOST_PROCESS, Facts, known, offer_of
from paris_models.plans import Plan, Work, need_of
from paris_models.shards import ClipTable

KEY = b"benchmark of 16b"
GIB = 1 << 30
TOY = ExpertConfig(1, 8, 8, 2, 3, 2, 8, (2, 2, 4), 12, 10)
CLIP = (9, 16, 16)
"""Latent frames and tokens along the sides of 33 frames at 256²: 2304 tokens."""
WORDS = 512


@dataclass(frozen=True, slots=True)
class Random(Mapping[str, Tensor]):
    """Weights of an expert, drawn on the device when asked for, so that the host never has all."""

    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        return 0.02 * torch.randn(self.shapes[name], device=self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(slots=True)
class Lab:
    """A device, and whatever could not run on it, with the reason."""

    device: torch.device
    name: str
    toy: bool
    quick: bool
    not_run: list[tuple[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    before: int = 0

    @classmethod
    def here(cls, quick: bool) -> Lab | None:
        """The first GPU, or the CPU with a toy when `quick`; None where neither is to be had."""
        if quick:
            torch.set_num_threads(1)
            return cls(torch.device("cpu"), "CPU", toy=True, quick=True)
        if not torch.cuda.is_available():
            return None
        return cls(torch.device("cuda"), torch.cuda.get_device_name(), toy=False, quick=False)

    def skip(self, what: str, why: str) -> None:
        """Say what was not measured and why; it stands in the result file too."""
        self.not_run.append((what, why))
        print(f"not run: {what}: {why}", file=sys.stderr, flush=True)

    def config(self, size: str) -> ExpertConfig:
        """The ladder's expert, or the toy."""
        return TOY if self.toy else LADDER[size]

    def work(self, batch: int = 1) -> Work:
        """A clip of 33 frames at 256² with 512 tokens of text, or a toy's."""
        return Work(8, 4, batch) if self.toy else Work(CLIP[0] * CLIP[1] * CLIP[2], WORDS, batch)

    def clips(self, size: str) -> ClipTable:
        """Two random clips with their texts."""
        config, work = self.config(size), self.work()
        frames, high, wide = (2, 2, 2) if self.toy else CLIP
        side = config.patch
        return ClipTable(
            torch.randn(2, config.latent_channels, frames, high * side, wide * side),
            torch.zeros(2, dtype=torch.int64), torch.randn(1, work.text, config.text_dim),
            torch.randn(1, config.pooled_dim), torch.zeros(work.text, config.text_dim),
            torch.zeros(config.pooled_dim),
        )  # fmt: skip

    def weights(self, size: str) -> Random:
        """Random weights of a size."""
        return Random(parameter_shapes(self.config(size)), self.device)

    def fits(self, what: str, plan: Plan, size: str, batch: int = 1) -> bool:
        """Whether the plan's arithmetic leaves it room here; says so where it does not."""
        if self.toy:
            return True
        need = offer_of(plan, self.config(size), self.work(batch), self.facts())
        free, ram = torch.cuda.mem_get_info()[0], _free_ram()
        if need.device > free:
            self.skip(what, f"needs {need.device / GIB:.1f} GiB of the GPU, {free / GIB:.1f} free")
        elif need.need.host + HOST_PROCESS > ram:
            host = need.need.host / GIB
            self.skip(what, f"needs {host:.1f} GiB of host memory, {ram / GIB:.1f} are free")
        else:
            return True
        return False

    def facts(self) -> Facts:
        """This device as the plans' arithmetic sees it."""
        tflops, watts = known(self.name, os.cpu_count() or 1)
        big = 1 << 50
        return Facts(self.name, "cuda", big, big, big, 1e9, 1e9, tflops, watts)

    def state(self, plan: Plan, size: str, recipe: RecipeConfig | None = None) -> lean.State:
        """A fresh expert under a plan; the peak counts from before it."""
        self.clear()
        return lean.new_state(
            plan, self.config(size), recipe or RecipeConfig(), self.weights(size), key=KEY,
            device=self.device.type,
        )  # fmt: skip

    def toy_model(self) -> Any:
        """The smallest expert."""
        return build_expert(TOY, seed=0)

    def unit(self, plan: Plan, batch: int = 1, kernels: str = "fast") -> UnitConfig:
        """A long unit of a plan's precision."""
        return UnitConfig(
            KEY, steps=1000, batch=batch, rate_shape="constant", dtype=plan.compute,
            kernels="reference" if kernels == "reference" else "fast",
        )  # fmt: skip

    def clear(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    @property
    def peak(self) -> float | None:
        """Peak bytes of the allocator since `clear`, or None where it has no such figure."""
        if self.device.type != "cuda":
            return None
        return float(torch.cuda.max_memory_allocated() - self.before)

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
        """Median seconds of one call, after warm-up."""
        for _ in range(warm):
            work()
        found = []
        for _ in range(1 if self.quick else repeats):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begin)
        return median(found)

    def predicted(self, plan: Plan, size: str, batch: int = 1) -> float:
        """Bytes on the device by the plan's arithmetic, without the process's own."""
        return float(need_of(plan, self.config(size), self.work(batch)).device)


def _free_ram() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
