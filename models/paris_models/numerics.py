"""The numeric class of a machine: which bits a short training gives here.

Two machines whose classes are equal (same library, instruction set, threads and kernels, found out
by trying) compute equal bits, so that a replay may demand them; between others a tolerance decides.
The self-test trains the network's own shapes for two steps on numbers from the counter-based
streams; experts of many blocks are cut to one of each kind::

    numeric_class(config, recipe, batch=96, dtype="float32", threads=1, kernels="reference")
    deterministic("reference")            # torch refuses operations that have no deterministic form
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from typing import Final

import torch

from paris_models import noise
from paris_models.checkpoint import raw_items
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import parameter_shapes
from paris_models.lean import new_state, state_tensors, train_step
from paris_models.plans import PLANS, Plan
from paris_models.shards import ClipTable
from paris_models.train import deterministic

__all__ = ["deterministic", "numeric_class"]

STEPS: Final = 2
KEY: Final = b"paris/numerics/1"
FRAMES, SIDE, WORDS = 3, 4, 6
"""Latent frames, tokens along a side, and text tokens of the self-test's clips."""


@lru_cache(maxsize=8)
def numeric_class(
    config: ExpertConfig,
    recipe: RecipeConfig,
    *,
    batch: int,
    dtype: str,
    threads: int,
    kernels: str,
    device: str = "cpu",
    plan: Plan = PLANS["float32"],
) -> str:
    """64 hex digits that name the bits which training gives on this machine and build.

    Leaves torch's number of threads and its kernels as they were. Swapping blocks changes no bit,
    and so no class. `ValueError` for a unit that cannot be (`UnitConfig`).
    """
    unit = UnitConfig(
        key=KEY, steps=STEPS, batch=batch, threads=threads,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        kernels="reference" if kernels == "reference" else "fast",
    )  # fmt: skip
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        bits = _trained(replace(plan, swap=0), _shallow(config), recipe, unit, device)
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
    facts = {
        "bits": bits,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "dtype": dtype,
        "threads": threads,
        "kernels": kernels,
        "batch": batch,
    }
    if plan.optimiser != "recipe":
        facts["plan"] = plan.name
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _shallow(config: ExpertConfig) -> ExpertConfig:
    """At most one double and two single blocks: the same kernels, for an expert of any depth."""
    return replace(
        config,
        double_blocks=min(1, config.double_blocks),
        single_blocks=min(2, config.single_blocks),
    )


def _trained(
    plan: Plan, config: ExpertConfig, recipe: RecipeConfig, unit: UnitConfig, device: str
) -> str:
    """SHA-256 of the whole training state after the unit's steps."""
    weights = {
        name: 0.1 * drawn(1, slot, shape)
        for slot, (name, shape) in enumerate(parameter_shapes(config).items())
    }
    state = new_state(plan, config, recipe, weights, key=unit.key, device=device)
    clips = toy_clips(config, unit.batch)
    while state.step < unit.steps:
        train_step(state, clips, unit)
    found = hashlib.sha256()
    for _name, _dtype, _shape, data in raw_items(state_tensors(state)):
        found.update(data)
    return found.hexdigest()


def toy_clips(config: ExpertConfig, n: int) -> ClipTable:
    """`n` clips of standard normal latents and text."""
    side = SIDE * config.patch
    text = drawn(2, 0, (2, WORDS, config.text_dim))
    pooled = drawn(2, 1, (2, config.pooled_dim))
    return ClipTable(
        latents=drawn(2, 2, (n, config.latent_channels, FRAMES, side, side)),
        caption=torch.zeros(n, dtype=torch.int64),
        text_seq=text[:1],
        text_pooled=pooled[:1],
        null_seq=text[1],
        null_pooled=pooled[1],
        first=drawn(2, 3, (n, config.latent_channels, 1, side, side)),
        last=drawn(2, 4, (n, config.latent_channels, 1, side, side)),
    )


def drawn(step: int, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normals of this file's own stream."""
    count = int(torch.Size(shape).numel())
    drawn = noise.normals(KEY, noise.NOISE, step, slot, count)
    return torch.from_numpy(drawn.copy()).reshape(shape)
