"""Makes the demo's assets: codec, word table, shared initial checkpoint and the judge's weights.

All four are functions of fixed seeds and of nothing else; the repository ships the result, so that
a demo need not spend these core-seconds again. The checkpoint is one demo expert trained on all
clips before there were clusters: every expert of the demo network starts from it::

    python -m paris_models.initial --out DIR        # prints what each part cost
    python -m paris_models.initial --out DIR --parts judge
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Final

import torch
from torch import Tensor

from paris_models import worlds
from paris_models.checkpoint import save_tensors
from paris_models.codec import PatchPCA
from paris_models.config import DEMO_RECIPE, LADDER, UnitConfig
from paris_models.expert import build_expert
from paris_models.judge import Judge
from paris_models.shards import ClipTable
from paris_models.text import HashedWords
from paris_models.train import new_state, train_step, weights

TRAIN: Final = (9000, 100)
"""Clips and rendering seed of the training set; the others must not share a seed with it."""
HELD_OUT: Final = (1536, 200)
JUDGE: Final = (7500, 300)
REFERENCE: Final = (1536, 400)
CODEC_CLIPS: Final = 3000
SAMPLES: Final = 174_000
INITIAL_RECIPE: Final = replace(DEMO_RECIPE, matrix_lr=0.02)
"""As the network's own recipe, but for the calmer rate of the matrices."""
PARTS: Final = ("initial", "judge")

Progress = Callable[[str, int, int], None]


def make_encoders(clips: Tensor) -> tuple[PatchPCA, HashedWords]:
    """The codec fitted on the first training clips and the table of the worlds' captions."""
    codec = PatchPCA.fit(clips[:CODEC_CLIPS], channels=32)
    return codec, HashedWords.fit(worlds.CAPTIONS, length=6, dim=64)


def clip_table(clips: Tensor, captions: Tensor, codec: PatchPCA, words: HashedWords) -> ClipTable:
    """Rendered clips as training reads them."""
    sequence, pooled = words.encode(worlds.CAPTIONS)
    null_sequence, null_pooled = words.encode([""])
    latents = codec.encode(clips)
    return ClipTable(
        latents, captions, sequence, pooled, null_sequence[0], null_pooled[0], None, None
    )


def train_initial(
    table: ClipTable, samples: int = SAMPLES, seed: int = 0, progress: Progress | None = None
) -> dict[str, Tensor]:
    """One demo expert on all clips: Muon .02, AdamW 3e-3, cosine to 2 %, warm-up 3 %."""
    config, recipe = LADDER["demo"], INITIAL_RECIPE
    steps = max(1, samples // recipe.batch)
    key = hashlib.sha256(f"paris demo initial {seed}".encode()).digest()[:16]
    unit = UnitConfig(key, steps, recipe.batch, warmup=max(2, round(0.03 * steps)))
    fresh = {name: p.detach() for name, p in build_expert(config, seed=seed).named_parameters()}
    state = new_state(config, recipe, fresh)
    while state.step < steps:
        train_step(state, table, unit)
        if progress is not None:
            progress("initial", state.step, steps)
    return {name: tensor.clone() for name, tensor in weights(state).items()}


def make_assets(
    out: Path,
    *,
    parts: Sequence[str] = PARTS,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Writes codec, text, initial and judge safetensors; returns core-seconds by part."""
    out.mkdir(parents=True, exist_ok=True)
    cost: dict[str, float] = {}
    begin = process_time()
    clips, captions = worlds.render(*TRAIN)
    codec, words = make_encoders(clips)
    cost["data"] = process_time() - begin
    if "initial" in parts:
        begin = process_time()
        made = train_initial(clip_table(clips, captions, codec, words), samples, seed, progress)
        save_tensors(codec.tensors(), out / "codec.safetensors")
        save_tensors(words.tensors(), out / "text.safetensors")
        save_tensors(made, out / "initial.safetensors")
        cost["initial"] = process_time() - begin
    if "judge" in parts:
        begin = process_time()
        judge = Judge.train(worlds.render(*JUDGE), worlds.render(*REFERENCE), progress=progress)
        save_tensors(judge.tensors(), out / "judge.safetensors")
        cost["judge"] = process_time() - begin
    return cost


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m paris_models.initial", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the four files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    def progress(part: str, done: int, total: int) -> None:
        if done % 100 == 0 or done == total:
            sys.stderr.write(f"{part} {done}/{total}\n")

    cost = make_assets(
        options.out,
        parts=options.parts,
        samples=options.samples,
        seed=options.seed,
        progress=progress,
    )
    rounded = {part: round(seconds, 1) for part, seconds in cost.items()}
    sys.stdout.write(json.dumps({"core_seconds": rounded}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
