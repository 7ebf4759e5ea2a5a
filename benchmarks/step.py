"""`step`: one training step beside a bare diffusers loop of the same model, data and optimiser.

The bare loop is what somebody would write who needs no reproducibility: `torch.randn` noise, a
loss, `backward`, torch's own fused AdamW on everything. Ours draws counter-based noise per slot and
takes Muon for the matrices (the demo's recipe). Both run in one process, in turn, one thread;
memory is the peak resident set of a process of its own, above what it holds after its imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.table import Row, conditions, middle, row

BATCH = 96
SIZES = {"demo": (BATCH, 10)}
QUICK = {"demo": (BATCH, 3)}
KINDS = ("paris", "bare")


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """`step.cpu.<size>` in samples/s and `step.memory.<size>` in MB."""
    sizes = QUICK if quick else SIZES
    repeats = 3 if quick else 7
    rows = []
    for size, (batch, steps) in sizes.items():
        ours, bare = _samples_per_second(size, batch, steps, repeats)
        mine, spread = middle(ours)
        rows.append(
            row(
                f"step.cpu.{size}", f"training, batch {batch}", ours=mine, spread=spread,
                better="higher", unit="samples per core-second", n=repeats,
                alternative=middle(bare)[0], alternative_name="bare diffusers loop, AdamW",
            )
        )  # fmt: skip
        memory = {kind: _memory(size, batch, kind) for kind in KINDS}
        rows.append(
            row(
                f"step.memory.{size}", f"peak of a training process, batch {batch}",
                ours=memory["paris"], better="lower", unit="MB above imports", n=1,
                alternative=memory["bare"], alternative_name="bare diffusers loop, AdamW",
            )
        )  # fmt: skip
    facts = conditions(
        sizes=list(sizes), B=BATCH, steps=[s for _, s in sizes.values()], n=repeats,
        optimiser="Muon on matrices, AdamW on the rest; bare: AdamW", threads=1, dtype="float32",
    )  # fmt: skip
    return facts, rows


def stepper(size: str, batch: int, kind: str) -> Callable[[], None]:
    """A function that takes one step on synthetic clips of the size's shape."""
    import torch

    torch.set_num_threads(1)
    from paris_models.config import DEMO_RECIPE, LADDER, UnitConfig
    from paris_models.expert import build_expert
    from paris_models.latents import image_ids, pack
    from paris_models.shards import ClipTable
    from paris_models.train import new_state, train_step

    config = LADDER[size]
    latent = (config.latent_channels, 3, 4 * config.patch, 4 * config.patch)
    generator = torch.Generator().manual_seed(0)
    clips = ClipTable(
        torch.randn(512, *latent, generator=generator), torch.arange(512) % 8,
        torch.randn(8, 6, config.text_dim, generator=generator),
        torch.randn(8, config.pooled_dim, generator=generator),
        torch.zeros(6, config.text_dim), torch.zeros(config.pooled_dim),
    )  # fmt: skip
    model = build_expert(config, seed=0)
    if kind == "paris":
        recipe = replace(DEMO_RECIPE, batch=batch)
        state = new_state(config, recipe, dict(model.state_dict()))
        unit = UnitConfig(key=b"benchmark of 16b", steps=1 << 20, batch=batch)
        return lambda: void(train_step(state, clips, unit))

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    img_ids, txt_ids = image_ids(*latent[1:], config.patch), torch.zeros(6, 3)

    def bare() -> None:
        rows = torch.randint(len(clips), (batch,))
        x0 = pack(clips.latents[rows], config.patch)
        noise, t = torch.randn_like(x0), torch.sigmoid(torch.randn(batch) + 0.8)
        mix = t[:, None, None]
        out = model(
            hidden_states=(1 - mix) * x0 + mix * noise, timestep=t,
            encoder_hidden_states=clips.text_seq[clips.caption[rows]],
            pooled_projections=clips.text_pooled[clips.caption[rows]],
            img_ids=img_ids, txt_ids=txt_ids, return_dict=False,
        )[0]  # fmt: skip
        loss = (out - x0).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return bare


def void(_value: object) -> None:
    """Drops a result."""


def _samples_per_second(
    size: str, batch: int, steps: int, repeats: int
) -> tuple[list[float], list[float]]:
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steppers = {kind: stepper(size, batch, kind) for kind in KINDS}
    for take in steppers.values():
        take()
    for _ in range(repeats):
        for kind, take in steppers.items():
            begin = time.process_time()
            for _ in range(steps):
                take()
            found[kind].append(steps * batch / (time.process_time() - begin))
    return found["paris"], found["bare"]


def _memory(size: str, batch: int, kind: str) -> float:
    """Peak resident MB of a process that takes three steps, above its peak after imports."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", size, str(batch), kind],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1])["mb"])


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _measure(size: str, batch: int, kind: str) -> None:
    # Imports, their lazy parts included, are the same for both and no part of the step.
    import paris_models.train

    assert paris_models.train
    seen = [before := _resident_mb()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            seen.append(_resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    take = stepper(size, batch, kind)
    for _ in range(3):
        take()
    done.set()
    watcher.join()
    print(json.dumps({"mb": max(seen) - before}))


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])
