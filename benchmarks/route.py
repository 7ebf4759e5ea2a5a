"""`route`: a routed denoising step beside one expert's step, at the demo's size.

A step is what sampling does per Euler step, without guidance: for the routed one the router, the
choice and the chosen experts. `route.sampler` is a whole sampling beside the bare loop of one
expert. `route.one_resident` samples top-2 from a release folder of which one expert fits in memory,
so that an expert is loaded from disk for every evaluation: the worst case.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.table import Row, conditions, middle, row

CLIPS = 32
EXPERTS = 3
KEY = b"benchmark of 16b"
SHAPE = (32, 3, 4, 4)


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """`route.top1.demo`, `route.top2.demo`, `route.sampler`, `route.one_resident`."""
    import torch

    torch.set_num_threads(1)
    repeats, steps = (3, 4) if quick else (9, 20)
    parts = _Parts()
    one = parts.one_expert_step()
    rows = []
    for top_k in (1, 2):
        ours, alone = _in_turn(repeats, parts.routed_step(top_k), one)
        rows.append(
            _row(f"route.top{top_k}.demo", f"routed step, top-{top_k}", ours, alone, "step")
        )
    ours, alone = _in_turn(max(3, repeats // 3), parts.sampling(steps), parts.bare_sampling(steps))
    rows.append(_row("route.sampler", f"sampling, {steps} steps, top-1", ours, alone, "sampling"))
    with tempfile.TemporaryDirectory() as folder:
        parts.write(Path(folder))
        small, whole = (parts.resident(Path(folder), n, steps) for n in (1, EXPERTS))
        ours, all_in = _in_turn(max(3, repeats // 3), small, whole)
    what = f"top-2 sampling, {steps} steps, one expert resident"
    rows.append(_row("route.one_resident", what, ours, all_in, "sampling", "all experts resident"))
    facts = conditions(
        size="demo", clips=CLIPS, experts=EXPERTS, steps=steps, guidance=1, n=repeats, threads=1,
        weights="random", router="two blocks of width 32, random",
    )  # fmt: skip
    return facts, rows


def _row(
    id: str, what: str, ours: list[float], other: list[float], unit: str,
    name: str = "one expert alone",
) -> Row:  # fmt: skip
    mine, spread = middle(ours)
    return row(
        id, what, ours=mine, spread=spread, better="lower", unit=f"core-s per {unit}",
        n=len(ours), alternative=middle(other)[0], alternative_name=name,
    )  # fmt: skip


def _in_turn(
    repeats: int, ours: Callable[[], object], other: Callable[[], object]
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for round in range(repeats + 1):
        for found, work in zip(times, (ours, other), strict=True):
            begin = time.process_time()
            work()
            if round:  # the first one warms up
                found.append(time.process_time() - begin)
    return times


class _Parts:
    """Experts with random weights, a random router, noisy clips."""

    def __init__(self) -> None:
        import torch

        from paris_models.config import DEMO_RECIPE, LADDER, SamplerConfig
        from paris_models.ensemble import Ensemble
        from paris_models.expert import build_expert
        from paris_models.router import Router

        self.config, self.recipe = LADDER["demo"], DEMO_RECIPE
        self.experts = [build_expert(self.config, seed=k).eval() for k in range(EXPERTS)]
        torch.manual_seed(0)
        self.router = Router(EXPERTS, 32, 1, 32, 2, 2, 64).eval()
        self.seq, self.pooled = torch.randn(CLIPS, 6, 64), torch.randn(CLIPS, 64)
        self.x = torch.randn(CLIPS, *SHAPE)
        self.t = torch.full((CLIPS,), 0.5)
        self.sampler = SamplerConfig(20, 2.0, 1.0, 1)
        self.ensemble = Ensemble(
            self.experts, self.router, self.config, self.recipe, self.seq[0], self.pooled[0]
        )

    def routed_step(self, top_k: int) -> Callable[[], object]:
        def step() -> object:
            weights = self.ensemble.route(self.x, self.t, self.pooled, top_k)
            return self.ensemble.velocity(self.x, self.t, self.seq, self.pooled, weights, 1.0)

        return step

    def one_expert_step(self) -> Callable[[], object]:
        import torch

        from paris_models.expert import predict

        @torch.no_grad()
        def step() -> object:
            return predict(self.experts[0], self.config, self.x, self.t, self.seq, self.pooled)

        return step

    def sampling(self, steps: int) -> Callable[[], object]:
        from dataclasses import replace

        sampler = replace(self.sampler, steps=steps)
        return lambda: self.ensemble.sample(self.seq, self.pooled, SHAPE, KEY, sampler)

    def bare_sampling(self, steps: int) -> Callable[[], object]:
        """The loop that one would write by hand around one expert."""
        import torch

        from paris_models.expert import predict

        @torch.no_grad()
        def loop() -> object:
            x = torch.randn(CLIPS, *SHAPE)
            times = torch.linspace(1, 0, steps + 1)
            for now, then in pairwise(times):
                t = now.expand(CLIPS)
                x0 = predict(self.experts[0], self.config, x, t, self.seq, self.pooled)
                x = x + (then - now) * (x - x0) / now
            return x

        return loop

    def write(self, folder: Path) -> None:
        from paris_models.releases import ReleaseSettings, write_expert, write_index

        for k, expert in enumerate(self.experts):
            write_expert(folder / f"expert_{k}", self.config, dict(expert.state_dict()))
        self.router.save_pretrained(folder / "router")
        settings = ReleaseSettings(self.config, self.recipe, self.sampler, SHAPE, (9, 24, 24, 12))
        write_index(folder, settings, EXPERTS)

    def resident(self, folder: Path, resident: int, steps: int) -> Callable[[], object]:
        from dataclasses import replace

        from paris_models.ensemble import Ensemble
        from paris_models.releases import load_release

        release = load_release(folder, resident=resident)
        sampler = replace(self.sampler, steps=steps, top_k=2)

        def sample() -> object:
            ensemble = Ensemble(
                release.experts, release.router, self.config, self.recipe, self.seq[0],
                self.pooled[0],
            )  # fmt: skip
            return ensemble.sample(self.seq, self.pooled, SHAPE, KEY, sampler)

        return sample
