"""Small prepared networks for the tests of `prepare`: recipes, clips and what came out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from paris_models.assets import asset
from paris_models.video import encode_mp4
from paris_models.worlds import CAPTIONS, render

BUCKETS = """
[[buckets]]
frames = 1
side = 24
batch = 7
[[buckets]]
frames = 5
side = 34
aspects = ["2:1", "1:2"]
"""
"""24×24 images, and 24×48 and 48×24 clips of five frames, on the smoke recipe."""


def smoke(folder: Path, more: str = "", clips: str = "", text: str = "") -> Path:
    """The smoke recipe in batches of 16, with few held-out clips."""
    folder.mkdir(parents=True, exist_ok=True)
    words = asset("smoke.toml").read_text()
    words = words.replace("validation = 128", "validation = 5").replace("audit = 64", "audit = 3")
    words = words.replace("[codec]", f"[clips]\nbatch = 16\n{clips}\n{more}\n[codec]")
    words = words.replace("[text]", f"[text]\n{text}")
    for name in ("codec", "text", "initial"):
        shutil.copy(asset(f"{name}.safetensors"), folder)
    (folder / "recipe.toml").write_text(words)
    return folder / "recipe.toml"


def put(folder: Path, name: str, data: torch.Tensor | bytes, caption: str, **said: str) -> None:
    """A video, with its words in the list."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(
        data if isinstance(data, bytes) else encode_mp4(data, 8, lossless=True)
    )
    line = {"video": name, "caption": caption, "source": "drawn", "licence": "CC0-1.0", **said}
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def put_worlds(folder: Path, n: int, seed: int = 11) -> torch.Tensor:
    """`n` rendered clips with their captions; returns their pixels."""
    clips, captions = render(n, seed)
    for i, clip in enumerate(clips):
        put(folder, f"{i:05d}.mp4", clip, CAPTIONS[int(captions[i])])
    return clips


def put_sizes(folder: Path, n: int = 12) -> None:
    """Images, wide and upright clips beside what is there."""
    clips, captions = render(2 * n, 12)
    for i in range(n):
        words = CAPTIONS[int(captions[i])]
        Image.fromarray(clips[i, :, 0].permute(1, 2, 0).numpy()).save(folder / "image.png")
        put(folder, f"image{i}.png", (folder / "image.png").read_bytes(), words)
        (folder / "image.png").unlink()
        wide = torch.cat([clips[i], clips[i + n]], 3)[:, :6]
        put(folder, f"wide{i}.mp4", wide, words)
        put(folder, f"tall{i}.mp4", wide.transpose(2, 3), words)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lines(out: Path) -> list[dict[str, Any]]:
    """The provenance table."""
    table = (out / "private" / "provenance.jsonl").read_text()
    return [json.loads(line) for line in table.splitlines()]


def skipped(out: Path) -> dict[str, str]:
    """Name and code of what was left out."""
    return {skip["name"]: skip["code"] for skip in json.loads((out / "skipped.json").read_text())}


def shards(out: Path) -> list[dict[str, Any]]:
    """What `prepared.json` says of all shards."""
    described = json.loads((out / "prepared.json").read_text())
    return [shard for cluster in described["clusters"] for shard in cluster["shards"]]


def still(clip: torch.Tensor) -> torch.Tensor:
    """The clip's first frame for its whole length."""
    return torch.from_numpy(np.repeat(clip[:, :1].numpy(), clip.shape[1], axis=1))
