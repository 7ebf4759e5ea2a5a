"""The samples job: short videos of the current heads for the status page and the release.

With a router, prompts are sampled as a user would; before there is one, prompt i is given to expert
i mod K, so that every expert is seen. The folder gets its name when it is complete::

    samples({"job": "samples", "genesis": …, "heads": [path, …], "router": None,
             "codec": path, "text": path, "prompts": ["a red ball moves left"], "out": folder,
             "seed": hex})              # {"files": ["sample-0.mp4"]}
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from paris_coordinator.jobs.bundle import optional, settings_of
from paris_coordinator.jobs.common import expert_schema, gated, genesis_of, new_folder
from paris_models.codec import Codec
from paris_models.expert import expert_from
from paris_models.releases import (
    LoadedRelease,
    ReleaseSettings,
    load_codec,
    load_router,
    load_text,
)
from paris_models.router import Router
from paris_models.text import TextEncoder
from paris_models.video import write_mp4
from paris_protocol.records import Genesis
from paris_protocol.streams import unit_key

Json = dict[str, Any]

SMALLEST = 192
"""Pixels; smaller clips are enlarged to at least this height, so that people can see them."""


def samples(job: Json) -> Json:
    """{"files": […]} in the order of the prompts."""
    genesis = genesis_of(job["genesis"])
    settings = settings_of(genesis)
    schema = expert_schema(settings.expert, "F32")
    experts = [
        expert_from(settings.expert, gated(Path(head), schema)).eval() for head in job["heads"]
    ]
    release = _LiveRelease(settings, experts, genesis, job)
    key, prompts = unit_key(job["seed"]), list(job["prompts"])
    if job.get("router"):
        clips = release.sample(release.text.encode(prompts), key, settings.sampler)
    else:
        clips = torch.cat(
            [
                _LiveRelease(settings, [experts[i % len(experts)]], genesis, job).sample(
                    release.text.encode([prompt]), key, settings.sampler
                )
                for i, prompt in enumerate(prompts)
            ]
        )
    names = [f"sample-{i}.mp4" for i in range(len(prompts))]
    frames, height, _, fps = settings.clip
    with new_folder(Path(job["out"])) as folder:
        for name, clip in zip(names, clips, strict=True):
            write_mp4(folder / name, clip[:, :frames], fps, scale=max(1, -(-SMALLEST // height)))
    return {"files": names}


class _LiveRelease(LoadedRelease):
    """The current heads as if they were released, with parts from the coordinator's own files."""

    def __init__(
        self, settings: ReleaseSettings, experts: Sequence[Any], genesis: Genesis, job: Json
    ) -> None:
        super().__init__(Path(), settings, experts)
        self._genesis, self._job = genesis, job

    @cached_property
    def router(self) -> Router:
        """The router that was trained last."""
        return load_router(Path(self._job["router"]))

    @cached_property
    def codec(self) -> Codec:
        """The genesis' codec."""
        codec = self._genesis.codec
        return load_codec(codec.kind, codec.source, optional(self._job.get("codec")))

    @cached_property
    def text(self) -> TextEncoder:
        """The genesis' text encoder."""
        text = self._genesis.text
        return load_text(text.kind, text.source, optional(self._job.get("text")), text.length)
