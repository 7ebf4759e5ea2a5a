"""`step`: one training step beside a bare diffusers loop of the same model, data and mathematics.

The bare loop is what somebody would write who needs no reproducibility: `torch.randn` noise, a
loss, `backward`, clipping, torch's fused AdamW. Ours draws counter-based noise per slot and trains
as a node's trainer does. `step.cpu.*` has AdamW on both sides; the row `step.muon.demo` is the
demo's own recipe, Muon on matrices, beside the same bare loop. Each side is a process of its own
with one thread; they take their steps in turn, and seconds are of the processor, so that a busy
machine slows both. Memory is the peak resident set of those processes, above what they hold after
their imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from benchmarks.table import Row, conditions, middle, row

SIZES = {"demo": (96, 4), "5M": (8, 8), "38M": (2, 3)}
"""Clips per step, and steps per turn."""
REPEATS, QUICK_REPEATS = 15, 3
FRAMES, SIDE, WORDS = 3, 4, 6
"""Latent frames, tokens along a side, text tokens."""
BARE = "bare diffusers loop, AdamW"


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """`step.cpu.<size>` in samples per core-second and `step.memory.<size>` in MB."""
    repeats = QUICK_REPEATS if quick else REPEATS
    rows: list[Row] = []
    for size, (batch, steps) in SIZES.items():
        kinds = ("adamw", "bare", "muon") if size == "demo" else ("adamw", "bare")
        rates, peaks = _in_turn(size, batch, kinds, steps, repeats)
        rows += _rows(size, batch, rates, peaks)
    facts = conditions(
        sizes=list(SIZES), B=[b for b, _ in SIZES.values()], n=repeats, threads=1, dtype="float32",
        steps=[s for _, s in SIZES.values()],
        tokens=f"{FRAMES * SIDE**2} of video, {WORDS} of text",
    )  # fmt: skip
    return facts, rows


def _rows(
    size: str, batch: int, rates: Mapping[str, list[float]], peaks: Mapping[str, float]
) -> list[Row]:
    n, bare = len(rates["bare"]), middle(rates["bare"])[0]
    rows = []
    for kind, where, what in (("adamw", "cpu", "AdamW"), ("muon", "muon", "Muon on matrices")):
        if kind not in rates:
            continue
        ours, spread = middle(rates[kind])
        rows.append(
            row(
                f"step.{where}.{size}", f"training with {what}, batch {batch}", ours=ours,
                spread=spread, better="higher", unit="samples per core-second", n=n,
                alternative=bare, alternative_name=BARE,
            )
        )  # fmt: skip
    rows.append(
        row(
            f"step.memory.{size}", f"peak of a training process, AdamW, batch {batch}",
            ours=peaks["adamw"], better="lower", unit="MB above imports", n=1,
            alternative=peaks["bare"], alternative_name=BARE,
        )
    )  # fmt: skip
    return rows


def stepper(size: str, batch: int, kind: str) -> Callable[[], None]:
    """A function that takes one step on synthetic clips of the size's shape."""
    import torch

    torch.set_num_threads(1)
    from paris_models.config import DEMO_RECIPE, LADDER, UnitConfig
    from paris_models.expert import build_expert
    from paris_models.pages import keep_pages
    from paris_models.train import new_state, train_step

    config, clips = LADDER[size], _clips(size)
    if kind == "bare":
        return bare_stepper(config, clips, batch)
    keep_pages()
    recipe = replace(DEMO_RECIPE, batch=batch, optimiser="muon" if kind == "muon" else "adamw")
    state = new_state(config, recipe, dict(build_expert(config, seed=0).state_dict()))
    unit = UnitConfig(key=b"benchmark of 16b", steps=1 << 20, batch=batch, rate_shape="constant")

    def ours() -> None:
        train_step(state, clips, unit)

    return ours


def bare_stepper(
    config: Any, clips: Any, batch: int, device: Any = "cpu", dtype: Any = None
) -> Callable[[], None]:
    """The same step as a plain loop, the demo's recipe but for Muon; autocast to a `dtype`."""
    import torch
    from diffusers import FluxTransformer2DModel

    from paris_models.latents import image_ids, pack

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=config.in_channels, out_channels=config.out_channels,
        num_layers=config.double_blocks, num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim, num_attention_heads=config.heads,
        joint_attention_dim=config.text_dim, pooled_projection_dim=config.pooled_dim,
        guidance_embeds=False, axes_dims_rope=config.rope_axes,
    ).to(device)  # fmt: skip
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, fused=True
    )
    kind, text = torch.device(device).type, clips.null_seq.shape[0]
    img_ids = image_ids(*clips.shape[1:], config.patch).to(device)
    txt_ids = torch.zeros(text, 3, device=device)

    def step() -> None:
        rows = torch.randint(len(clips), (batch,))
        x0 = pack(clips.latents[rows], config.patch).to(device)
        noise, t = torch.randn_like(x0), torch.sigmoid(torch.randn(batch, device=device) + 0.8)
        mix, caption = t[:, None, None], clips.caption[rows]
        dropped = torch.rand(batch) < 0.1
        tokens = (1 - mix) * x0 + mix * noise
        if config.conditioned:
            zeros = tokens.new_zeros(*tokens.shape[:2], config.condition_size)
            tokens = torch.cat([tokens, zeros], dim=-1)
        seq = torch.where(dropped[:, None, None], clips.null_seq, clips.text_seq[caption])
        pooled = torch.where(dropped[:, None], clips.null_pooled, clips.text_pooled[caption])
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            out = model(
                hidden_states=tokens, timestep=t, encoder_hidden_states=seq.to(device),
                pooled_projections=pooled.to(device), img_ids=img_ids, txt_ids=txt_ids,
                return_dict=False,
            )[0]  # fmt: skip
        loss = (out.float() - x0).square().mean()
        if not torch.isfinite(loss):
            raise ArithmeticError("the loss is not finite")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def _clips(size: str) -> Any:
    import torch

    from paris_models.config import LADDER
    from paris_models.shards import ClipTable

    config, generator = LADDER[size], torch.Generator().manual_seed(0)
    side = SIDE * config.patch
    return ClipTable(
        torch.randn(64, config.latent_channels, FRAMES, side, side, generator=generator),
        torch.arange(64) % 8,
        torch.randn(8, WORDS, config.text_dim, generator=generator),
        torch.randn(8, config.pooled_dim, generator=generator),
        torch.zeros(WORDS, config.text_dim), torch.zeros(config.pooled_dim),
    )  # fmt: skip


def _in_turn(
    size: str, batch: int, kinds: tuple[str, ...], steps: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Samples per core-second of each kind's turns, and its peak in MB."""
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        sides = {kind: stack.enter_context(_side(size, batch, kind)) for kind in kinds}
        for side in sides.values():
            _ask(side, 2)  # what is made at the first step is no part of it
        for turn in range(repeats):
            for kind in kinds if turn % 2 else reversed(kinds):
                rates[kind].append(steps * batch / _ask(sides[kind], steps))
        peaks = {kind: _ask(side, 0) for kind, side in sides.items()}
        for side in sides.values():
            cast(IO[str], side.stdin).close()
    return rates, peaks


def _side(size: str, batch: int, kind: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.step", size, str(batch), kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _ask(side: subprocess.Popen[str], steps: int) -> float:
    """Seconds of the processor for so many steps; for 0 the peak so far in MB."""
    writer, reader = cast(IO[str], side.stdin), cast(IO[str], side.stdout)
    writer.write(f"{steps}\n")
    writer.flush()
    return float(reader.readline())


def _serve(size: str, batch: int, kind: str) -> None:
    """Take as many steps as each line of standard input asks for."""
    # Imports, their lazy parts included, are the same for both and no part of the step.
    import paris_models.train

    assert paris_models.train
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _peak_mb()
    take = stepper(size, batch, kind)
    for line in sys.stdin:
        begin = time.process_time()
        for _ in range(int(line)):
            take()
        print(time.process_time() - begin if int(line) else _peak_mb() - before, flush=True)


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
