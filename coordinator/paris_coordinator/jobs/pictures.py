"""The pictures job: what the first clips of a cluster look like, from its public shards alone.

A picture shows a clip's first, middle and last frame side by side, as the small codec decodes them.
The folder gets its name when it is complete::

    pictures({"job": "pictures", "codec": path, "shards": [path, …], "count": 24, "out": folder})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from paris_coordinator.jobs.common import new_folder
from paris_models.checkpoint import load_tensors
from paris_models.codec import PatchPCA

Json = dict[str, Any]

LARGEST: Final = 384
"""Pixels of a picture's longer side, at most."""


def pictures(job: Json) -> Json:
    """{"count": n}; `out` holds 0.png, 1.png, … in the order of the shards and their clips."""
    codec = PatchPCA.from_tensors(load_tensors(Path(job["codec"])))
    left, done = int(job["count"]), 0
    with new_folder(Path(job["out"])) as folder:
        for shard in job["shards"]:
            latents = load_tensors(Path(shard))["latents"][: left - done]
            for clip in codec.decode(latents):
                _strip(clip).save(folder / f"{done}.png")
                done += 1
            if done == left:
                break
    return {"count": done}


def _strip(clip: Tensor) -> Image.Image:
    """A uint8 clip (3, F, H, W) as one picture."""
    count = clip.shape[1]
    frames = [clip[:, place] for place in sorted({0, count // 2, count - 1})]
    picture = Image.fromarray(torch.cat(frames, 2).permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((LARGEST, LARGEST))
    return picture
