"""How a round of one expert is cut into units: shards, learning rate, seed. Pure functions.

Units of a round have disjoint shards, and only shards of the expert's own cluster (isolation). The
learning rate is a slice of one cosine over the whole lineage (``slice``) or a full decay inside
every unit (``unit-cosine``)::

    deal(cluster.shards, units=2, turn=3)      # [(shard 1, shard 3), (shard 0, shard 2)]
    rate(plan, turn=0)                         # Rate(start="1", end=…, shape="cosine", warmup=4)
    seed(network, expert, turn, unit, root, n) # 64 hex digits, public
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from paris_protocol.canonical import decimal, digest, real
from paris_protocol.errors import ParisError
from paris_protocol.records import Genesis, Rate, RoundPlan, Shard

MEMORY_COPIES = 6
"""Weights, gradient, two moments, the parent and the update: the least that float32 holds."""
DISK_COPIES, LEAST_DISK_COPIES = 3, 2
"""Heads' worth of disk: parent, state and update in float32; at least a parent and its next."""


def deal(shards: Sequence[Shard], units: int, turn: int) -> list[tuple[Shard, ...]]:
    """The shards of each unit of round `turn`: dealt like cards, moved on by one every round.

    A cluster with fewer shards than planned units gives fewer units; a unit is never empty.
    """
    count = min(units, len(shards))
    hands: list[list[Shard]] = [[] for _ in range(count)]
    for position, shard in enumerate(shards):
        hands[(position + turn) % count].append(shard)
    return [tuple(hand) for hand in hands]


def peak(plan: RoundPlan, turn: int) -> float:
    """Multiplier at the start of round `turn` of R: floor + (1 - floor)/2 · (1 + cos(π turn/R))."""
    floor = real(plan.floor)
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * turn / max(1, plan.rounds)))


def rate(plan: RoundPlan, turn: int, factor: float = 1.0) -> Rate:
    """The learning-rate multiplier of a unit of round `turn`, warm-up in steps.

    `factor` is what the policy asks of a training plan beside the network's own.
    """
    start, end = (
        (peak(plan, turn), peak(plan, turn + 1))
        if plan.schedule == "slice"
        else (1.0, real(plan.floor))
    )
    share = real(plan.warmup)
    warmup = min(plan.steps, max(2, round(share * plan.steps))) if share > 0 else 0
    return Rate(
        start=decimal(factor * start), end=decimal(factor * end), shape="cosine", warmup=warmup
    )


def seed(network: str, expert: int, turn: int, unit: int, parent_root: str, number: int) -> str:
    """The seed of an assignment: SHA-256 of public things only, so that anyone can recompute it."""
    return digest(["paris/seed/1", network, expert, turn, unit, parent_root, number])


def least_memory_mb(genesis: Genesis) -> int:
    """The least memory in MiB with which a unit of this network can be trained at all."""
    return MEMORY_COPIES * genesis.initial.blob.size >> 20


def check_fit(genesis: Genesis, memory_mb: int, disk_mb: int, *, lean: bool = False) -> None:
    """Refuses a machine that can hold no expert of the network: ParisError("machine.too-small").

    `lean`: under another plan than float32. What that needs the node has found out by itself.
    """
    need = least_memory_mb(genesis)
    if memory_mb < need and not lean:
        raise ParisError("machine.too-small", f"{memory_mb} MiB of memory, at least {need} needed")
    shard = max((s.file.blob.size for c in genesis.clusters for s in c.shards), default=0)
    copies = LEAST_DISK_COPIES if lean else DISK_COPIES
    need = (copies * genesis.initial.blob.size + shard) >> 20
    if disk_mb < need:
        raise ParisError("machine.too-small", f"{disk_mb} MiB of disk, at least {need} needed")


def release_number(version: str) -> tuple[int, ...]:
    """`"0.1.0"` as (0, 1, 0) for comparing; anything that is not digits counts as 0."""
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split("."))
