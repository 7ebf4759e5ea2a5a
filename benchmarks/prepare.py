"""`prepare`: videos encoded per second, beside a straightforward loop of the same work.

The encoders are the real classes (Wan VAE, T5 with CLIP, DINOv2) at small size with random weights.
The loop decodes a clip, resizes it, encodes video, first frame, caption and feature one by one and
saves them; it has the better of one and two threads. Ours is `prepare` with two workers, to the
last file; starting is left out on both sides (ours counts from the first batch of captions on, one
of six or more). The limit is decoding and encoding alone, in the batches that `prepare` uses, in
two processes at once that have everything in memory and write nothing. What we and the loop made
is compared before anything is printed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from benchmarks.table import Row, conditions, middle, row
from benchmarks.tiny_encoders import recipe, save_all
from paris_coordinator.prepare import prepare
from paris_models.encoders import Dino, T5Clip, WanVAE
from paris_models.shards import ClipTable, read_shards
from paris_models.video import Geometry, encode_mp4, read_clip
from paris_models.worlds import CAPTIONS, render

GEOMETRY = Geometry(frames=9, height=64, width=64, fps=8)
LENGTH = 256
BATCH = 16
WORKERS = 2
Tensors = dict[str, torch.Tensor]


def write_folder(folder: Path, n: int, seed: int) -> Path:
    """`n` captioned clips of 9 frames, 192 × 192 pixels, H.264 as people send it."""
    folder.mkdir()
    clips, captions = render(n, seed)
    for i, clip in enumerate(clips):
        name = folder / f"{i:05d}.mp4"
        name.write_bytes(encode_mp4(clip, GEOMETRY.fps, scale=8))
        name.with_suffix(".txt").write_text(CAPTIONS[int(captions[i])])
    return folder


class Loop:
    """What one writes first: everything clip by clip, nothing kept from one to the next."""

    def __init__(self, sources: dict[str, Path]) -> None:
        self.plain = AutoencoderKLWan.from_pretrained(sources["codec"]).eval()
        config = self.plain.config
        self.mean = torch.tensor(config.latents_mean)[:, None, None, None]
        self.spread = torch.tensor(config.latents_std)[:, None, None, None]
        self.vae = WanVAE.from_pretrained(str(sources["codec"]))
        self.text = T5Clip.from_pretrained(str(sources["text"]), length=LENGTH)
        self.dino = Dino.from_pretrained(str(sources["features"]))

    @torch.no_grad()
    def latents(self, clip: torch.Tensor) -> torch.Tensor:
        """As with diffusers alone."""
        found = self.plain.encode(clip.float() / 127.5 - 1).latent_dist.mode()
        latents: torch.Tensor = (found - self.mean) / self.spread
        return latents

    def __call__(self, paths: Sequence[Path], out: Path) -> float:
        """Seconds for these videos, each saved to a file of its own."""
        begin = time.perf_counter()
        for path in paths:
            clip = read_clip(path, GEOMETRY)[None]
            seq, pooled = self.text.encode([path.with_suffix(".txt").read_text()])
            made = {
                "latents": self.latents(clip),
                "first": self.latents(clip[:, :, :1]),
                "features": self.dino(clip),
                "text_seq": seq,
                "text_pooled": pooled,
            }
            save_file(made, out / f"{path.stem}.safetensors")
        return time.perf_counter() - begin


# ---------------------------------------------------------------- the limit

_loop: Loop | None = None


def _begin(sources: dict[str, Path]) -> None:
    global _loop
    torch.set_num_threads(1)
    _loop = Loop(sources)


def _parts(paths: Sequence[Path], captions: Sequence[str]) -> dict[str, float]:
    """Seconds of decoding and of each encoder, in batches, on one thread of a spawned process."""
    assert _loop is not None
    loop, found = _loop, dict[str, float]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        made = work()
        found[name] = time.perf_counter() - begin
        return made

    clips = timed("decode", lambda: torch.stack([read_clip(p, GEOMETRY) for p in paths]))
    timed("video", lambda: loop.vae.encode(clips))
    timed("first", lambda: loop.vae.encode_first(clips))
    timed("text", lambda: loop.text.encode(captions))
    timed("feature", lambda: loop.dino(clips))
    return found


def limits(
    sources: dict[str, Path], paths: Sequence[Path], n: int
) -> tuple[list[float], dict[str, float]]:
    """Clips per second of two processes that only decode and encode, and ms per clip by part."""
    captions = sorted({path.with_suffix(".txt").read_text() for path in paths})
    context = get_context("spawn")
    rates = []
    with ProcessPoolExecutor(WORKERS, context, _begin, (sources,)) as pool:
        for _ in range(n + 1):  # once to warm up
            jobs = [
                pool.submit(_parts, paths[i::WORKERS], captions[i::WORKERS]) for i in range(WORKERS)
            ]
            found = [job.result() for job in jobs]
            rates.append(len(paths) / max(sum(part.values()) for part in found))
    each = {name: 1000 * sum(part[name] for part in found) / len(paths) for name in found[0]}
    return rates[1:], each


@contextmanager
def threads(count: int) -> Any:
    """So many threads for torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def prepared(written: Path, folder: Path, out: Path) -> float:
    """Seconds of `prepare` with two workers, from its first sign of life on."""
    begun: list[float] = []
    prepare(written, folder, out, lambda *_: begun.append(time.perf_counter()), workers=WORKERS)
    return time.perf_counter() - begun[0]


def largest_difference(out: Path, made: Path) -> float:
    """Between our tables and the loop's files, over all clips that both have."""
    tables: dict[str, ClipTable] = {}
    worst, compared = 0.0, 0
    places: dict[str, int] = {}
    for line in (out / "private" / "provenance.jsonl").read_text().splitlines():
        entry = json.loads(line)
        name = entry["file"]
        place = places[name] = places.get(name, -1) + 1
        other = made / f"{Path(entry['name']).stem}.safetensors"
        if not other.exists():
            continue
        table = tables.setdefault(name, read_shards([out / name]))
        theirs, caption = load_file(other), int(table.caption[place])
        assert table.first is not None and table.features is not None
        ours: Tensors = {
            "latents": table.latents[place],
            "first": table.first[place],
            "features": table.features[place],
            "text_seq": table.text_seq[caption],
            "text_pooled": table.text_pooled[caption],
        }
        worst = max(worst, *(float((ours[k] - theirs[k][0]).abs().max()) for k in ours))
        compared += 1
    if compared != len(list(made.iterdir())) or worst > 1e-3:
        raise RuntimeError(f"{compared} clips compared, largest difference {worst}")
    return worst


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Ours and the loop in turn, `n` times."""
    many, looped, n = (128, 16, 1) if quick else (384, 24, 3)
    clips = "allow_unlicensed = true\n[filters]\ncut = 0\nstill = 0"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sources = save_all(root / "encoders")
        written = root / "recipe.toml"
        written.write_text(recipe(sources, side=64, batch=BATCH, length=LENGTH, clips=clips))
        folder = write_folder(root / "clips", many, 2)
        paths = sorted(folder.glob("*.mp4"))
        captions = len({path.with_suffix(".txt").read_text() for path in paths})
        loop = Loop(sources)
        ours, theirs, difference = [], [], 0.0
        for turn in range(n):
            out, made = root / f"out{turn}", root / f"loop{turn}"
            ours.append(many / prepared(written, folder, out))
            made.mkdir()
            times = []
            for count in (1, 2):
                with threads(count):
                    loop(paths[:2], made)
                    times.append(looped / loop(paths[:looped], made))
            theirs.append(max(times))
            difference = max(difference, largest_difference(out, made))
        best, parts = limits(sources, paths[: 4 * WORKERS * BATCH], n)
    rate, spread = middle(ours)
    facts = conditions(
        clips=many,
        captions=captions,
        clip="9×64×64 of 192×192 files",
        tokens=LENGTH,
        workers=WORKERS,
        largest_difference=difference,
        limit_ms={k: round(v, 2) for k, v in parts.items()},
    )

    def beside(id: str, what: str, name: str, others: Sequence[float]) -> Row:
        return row(
            id, what, ours=rate, spread=spread, better="higher", unit="clips/s", n=n,
            alternative=middle(others)[0], alternative_name=name,
        )  # fmt: skip

    return facts, [
        beside("prepare.loop", "prepare beside a loop on two cores", "loop, clip by clip", theirs),
        beside(
            "prepare.limit", "prepare beside decoding and encoding alone", "limit",
            best,
        ),
    ]  # fmt: skip
