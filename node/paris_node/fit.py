"""What a unit of work needs, before anything is downloaded: memory, disk, download and upload.

Pure arithmetic on a network's numbers, or on the built-in ladder of sizes when there is no network
yet; estimates, and named so. Nothing here loads torch::

    need = need_of(LADDER["demo"], RecipeConfig(), tokens=54)
    need.memory_mb, need.fits(memory_mb=4000, disk_mb=20000)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from paris_models.config import LADDER, ExpertConfig, RecipeConfig
from paris_protocol.records import Genesis

BASE_MB: Final = 700
"""What the trainer's process takes before any weights: interpreter, torch, diffusers."""
ACTIVATIONS: Final = 34
"""Float32 values that a block keeps per token and channel for its backward pass."""
LADDER_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class Need:
    """What one unit needs, in MB; `download_mb` is a first unit, of which shards stay cached."""

    parameters: int
    memory_mb: int
    download_mb: int
    upload_mb: int
    disk_mb: int

    def fits(self, memory_mb: int, disk_mb: int) -> bool:
        """Whether a machine with this much free has room for it."""
        return self.memory_mb <= memory_mb and self.disk_mb <= disk_mb


def need_of(
    expert: ExpertConfig,
    recipe: RecipeConfig,
    *,
    tokens: int,
    shard_bytes: int = 0,
    update_bytes: int = 4,
) -> Need:
    """The need of one unit: `tokens` of video and text, `shard_bytes` of clips in it.

    Memory: parent, weights and gradients in float32, the optimiser (two moments; Muon one), the
    activations of a batch without recomputation, the clips, and the process itself.
    """
    p = expert.parameters
    moments = 1 if recipe.optimiser == "muon" else 2
    blocks = expert.double_blocks + expert.single_blocks
    live = recipe.batch * tokens * expert.width * blocks * ACTIVATIONS
    memory = 4 * (p * (3 + moments) + live) + 2 * shard_bytes
    head, update, state = 4 * p, update_bytes * p, 4 * p * (1 + moments)
    return Need(
        parameters=p,
        memory_mb=BASE_MB + _mb(memory),
        download_mb=_mb(head + shard_bytes),
        upload_mb=_mb(update),
        disk_mb=_mb(2 * head + 2 * state + 2 * update + shard_bytes),
    )


def need_of_network(genesis: Genesis, units: int = 1, update_bytes: int = 4) -> Need:
    """The largest need of any unit, when a round deals a cluster's shards out to `units`."""
    shares = [
        sum(shard.file.blob.size for shard in cluster.shards) // max(1, units)
        for cluster in genesis.clusters
    ]
    expert = ExpertConfig.from_record(genesis.expert)
    codec = genesis.codec
    tokens = codec.frames * codec.height * codec.width // expert.patch**2 + genesis.text.length
    recipe = RecipeConfig.from_record(genesis.recipe)
    return need_of(
        expert, recipe, tokens=tokens, shard_bytes=max(shares, default=0), update_bytes=update_bytes
    )


def ladder() -> dict[str, Need]:
    """The needs of the built-in sizes at batch 1 and 512 tokens."""
    recipe = RecipeConfig(batch=1)
    return {name: need_of(expert, recipe, tokens=LADDER_TOKENS) for name, expert in LADDER.items()}


def table(needs: Mapping[str, Need], memory_mb: int, disk_mb: int) -> list[str]:
    """The needs as lines of text, with whether each fits a machine with this much free."""
    lines = [f"{'size':12}{'parameters':>16}{'memory':>12}{'download':>10}{'upload':>10}  fits"]
    for size, need in needs.items():
        numbers = f"{need.memory_mb:>12,}{need.download_mb:>10,}{need.upload_mb:>10,}"
        mark = "yes" if need.fits(memory_mb, disk_mb) else "no"
        lines.append(f"{size[:12]:12}{need.parameters:>16,}{numbers}  {mark}")
    return lines


def _mb(size: int) -> int:
    return -(-size // (1 << 20))
