"""The bundle job: the models' part of a release, as folders that plain diffusers can load.

The rest (texts, lineage, signature, proof) is put around it by `paris_coordinator.release` in the
process that holds the key::

    bundle({"job": "bundle", "genesis": …, "heads": [path, …], "router": folder,
            "codec": path | None, "text": path | None, "out": folder})
    # {"experts": [root, …], "router_root": root}
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from paris_coordinator.jobs.common import expert_schema, gated, genesis_of, new_folder, root_of
from paris_models.checkpoint import load_tensors
from paris_models.config import ExpertConfig, RecipeConfig, SamplerConfig
from paris_models.releases import Part, ReleaseSettings, write_expert, write_index, write_part
from paris_protocol.records import Genesis

Json = dict[str, Any]


def settings_of(genesis: Genesis) -> ReleaseSettings:
    """What sampling needs, from the genesis."""
    codec, clip = genesis.codec, genesis.geometry
    return ReleaseSettings(
        expert=ExpertConfig.from_record(genesis.expert),
        recipe=RecipeConfig.from_record(genesis.recipe),
        sampler=SamplerConfig.from_record(genesis.sampler),
        latent=(codec.channels, codec.frames, codec.height, codec.width),
        clip=(clip.frames, clip.height, clip.width, clip.fps),
    )


def bundle(job: Json) -> Json:
    """Write the folder (it gets its name when it is complete); the roots of experts and router."""
    genesis = genesis_of(job["genesis"])
    settings = settings_of(genesis)
    roots = []
    with new_folder(Path(job["out"])) as folder:
        for index, head in enumerate(job["heads"]):
            weights = gated(Path(head), expert_schema(settings.expert, "F32"))
            roots.append(root_of(weights))
            write_expert(folder / f"expert_{index}", settings.expert, weights)
        shutil.copytree(job["router"], folder / "router")
        codec, text = genesis.codec, genesis.text
        write_part(
            folder / "codec",
            Part(codec.kind, codec.source, codec.fingerprint, {"channels": codec.channels}),
            optional(job.get("codec")),
        )
        write_part(
            folder / "text",
            Part(
                text.kind,
                text.source,
                text.fingerprint,
                {"length": text.length, "dim": text.dim, "pooled_dim": text.pooled_dim},
            ),
            optional(job.get("text")),
        )
        write_index(folder, settings, len(roots))
        router = load_tensors(folder / "router" / "diffusion_pytorch_model.safetensors")
        return {"experts": roots, "router_root": root_of(router)}


def optional(path: str | None) -> Path | None:
    """A path of a job that may be null."""
    return None if path is None else Path(path)
