"""The router job: train it on the cached latents of all clusters, independent of the experts.

Shards are public, the private clips (held out from training) only measure: accuracy and calibration
over t go into the report. The folder gets its name when it is complete::

    train({"job": "router", "genesis": …, "shards": [[0, path], …], "private": …, …})["report"]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paris_coordinator.jobs.common import genesis_of, new_folder
from paris_models.config import RecipeConfig, RouterConfig
from paris_models.router import train_router
from paris_models.shards import ClipTable, concatenate, read_shards
from paris_protocol.streams import unit_key

Json = dict[str, Any]


def train(job: Json) -> Json:
    """{"report": {…}}; `out` is a diffusers-style folder with config.json and safetensors."""
    genesis = genesis_of(job["genesis"])
    clips, labels = labelled(job["shards"])
    router, report = train_router(
        RouterConfig.from_record(genesis.router),
        RecipeConfig.from_record(genesis.recipe),
        clips,
        labels,
        unit_key(job["seed"]),
        patch=genesis.expert.patch,
        experts=len(genesis.clusters),
        held=labelled(job["private"]),
    )
    with new_folder(Path(job["out"])) as folder:
        router.save_pretrained(folder, safe_serialization=True)
    return {"report": report}


def labelled(files: list[list[Any]]) -> tuple[ClipTable, torch.Tensor]:
    """All clips of [[expert, path], …] and the expert of each, (n,) int64."""
    tables = [read_shards([Path(path)]) for _, path in files]
    labels = [torch.full((len(t),), int(e)) for t, (e, _) in zip(tables, files, strict=True)]
    return concatenate(tables), torch.cat(labels)
