"""Training plans as data, and what each one needs: memory by part, disk, bytes on the line, FLOPs.

A plan says how an expert's weights are kept, what is trained, and where gradients and optimiser
live. Everything here is arithmetic on an `ExpertConfig` and a `Work`; no torch is loaded. Bytes
and FLOPs are exact counts, except the constants below that carry the word measured or estimated::

    need = need_of(PLANS["adafactor"], LADDER["paper"], Work(tokens=2304, text=512))
    need.device / 2**30, need.weights, need.activations        # GiB on the device, bytes by part
    need_of(with_swap(PLANS["adafactor"], 20), LADDER["paper"], work).host
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal

from paris_models.codecs_layout import CODECS, LORA, per_weight
from paris_models.config import ExpertConfig

Base = Literal["float32", "bfloat16", "float8", "nf4"]

BYTES: Final[Mapping[Base, float]] = MappingProxyType(
    {"float32": 4.0, "bfloat16": 2.0, "float8": 1.0, "nf4": 0.5}
)
"""Bytes of a weight; float8 has a float32 scale per row beside it, nf4 one per 64 weights."""
NF4_BLOCK: Final = 64
MOMENT_BLOCK: Final = 256
"""Values that share a float32 scale where moments are kept in 8 bits."""
LORA_STATE: Final = 12
"""Bytes of a value in the factors: float32, with two moments in float32."""

KEPT: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {"float32": (96.9, 84.4), "bfloat16": (56.5, 50.3)}
)
"""Bytes that a double and a single block keep per token and channel for backward; measured."""
INPUT: Final[Mapping[str, float]] = MappingProxyType({"float32": 4.0, "bfloat16": 4.0})
"""What a checkpointed block keeps per token and channel: its input, which autocast widens."""
OUTER: Final[Mapping[str, float]] = MappingProxyType({"float32": 16.0, "bfloat16": 10.0})
"""The same for what stands before and after the blocks; measured."""
WORKING: Final[Mapping[str, float]] = MappingProxyType({"float32": 40.0, "bfloat16": 24.0})
"""Gradients of activations that live at once inside a block's backward pass; measured."""
UPDATE: Final = 16
"""Bytes per value of the largest parameter while it is updated in backward: gradient, float32
copy, step, squares."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How an expert is trained.

    `base` is how its weights are kept; with a `rank` they are frozen and LoRA factors (float32)
    are trained. `fused` updates each parameter inside backward and frees its gradient; such a
    plan clips per parameter and saves whole steps only. `host_state` keeps optimiser state in
    host memory, `narrow` AdamW's moments in 8 bits; `swap` blocks wait there too while others
    compute. "recipe" is the network's own optimiser on float32 weights, which is `train.py` as it
    is.
    """

    name: str
    base: Base
    optimiser: Literal["recipe", "adamw", "adafactor"]
    rank: int = 0
    rounding: Literal["none", "stochastic", "kahan"] = "none"
    fused: bool = True
    host_state: bool = False
    narrow: bool = False
    checkpoint: bool = True
    swap: int = 0

    @property
    def audit(self) -> Literal["segment", "sub-round"]:
        """What an auditor replays: any k-step segment, or a sub-round from a published head.

        Opening a state in the middle of a full run in bfloat16 would cost its whole optimiser;
        a sub-round starts from a head that everybody has, with a fresh optimiser, and its last
        state alone is opened.
        """
        return "segment" if self.rank or self.base == "float32" else "sub-round"

    @property
    def compute(self) -> Literal["float32", "bfloat16"]:
        """The precision of activations."""
        return "float32" if self.base == "float32" else "bfloat16"


@dataclass(frozen=True, slots=True)
class Work:
    """One unit of work: `tokens` of video and `text` per clip, clips per step, steps, data.

    `codecs` says by plan how updates cross the network, where that is not `codec_for`'s.
    """

    tokens: int
    text: int
    batch: int = 1
    steps: int = 500
    commit_every: int = 100
    shard_bytes: int = 0
    codecs: Mapping[str, str] = field(default_factory=dict)
    moments: int = 2

    def __post_init__(self) -> None:
        if min(self.tokens, self.text, self.batch, self.steps, self.commit_every) < 1:
            raise ValueError("tokens, text, batch, steps and the interval must be positive")


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a plan needs: on the device by part, in host memory, on disk, on the line.

    `opening` is what one audit asks a node to upload, `hashed` what a unit's commitments read.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    swap: int
    host: int
    disk: int
    download: int
    upload: int
    opening: int
    hashed: int

    @property
    def device(self) -> int:
        """Device memory without the process's own overhead."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.swap


def _catalogue() -> dict[str, Plan]:
    full = [
        Plan("float32", "float32", "recipe", fused=False, checkpoint=False),
        Plan("adamw", "bfloat16", "adamw", rounding="kahan", fused=False),
        Plan("adamw-host", "bfloat16", "adamw", rounding="kahan", host_state=True),
        Plan("adamw-8bit", "bfloat16", "adamw", rounding="kahan", narrow=True),
        Plan("adafactor", "bfloat16", "adafactor", rounding="stochastic"),
    ]
    bases: tuple[tuple[str, Base], ...] = (
        ("bf16", "bfloat16"), ("fp8", "float8"), ("nf4", "nf4"),
    )  # fmt: skip
    lora = [
        Plan(f"lora-{rank}-{short}", base, "adamw", rank=rank, fused=False)
        for rank in (64, 32, 16)
        for short, base in bases
    ]
    return {plan.name: plan for plan in (*full, *lora)}


PLANS: Final[Mapping[str, Plan]] = MappingProxyType(_catalogue())
"""All plans, the one that learns most from a step first."""
_EARLIER: Final = re.compile(r"policy [0-9]{1,9}, [a-z-]{1,20}")
"""What assignments of version 0.1 named, when there was one way to train."""


def plan_of(name: str) -> Plan:
    """The plan that an assignment names; `ValueError` for a name that there is not."""
    plan = PLANS["float32"] if _EARLIER.fullmatch(name) else PLANS.get(name)
    if plan is None:
        raise ValueError(f"there is no training plan {name[:40]!r}")
    return plan


def numeric_case(plan: Plan, dtype: str) -> str:
    """Which numeric self-test tells whether a machine computes as a plan asks for.

    The network's own plan is tested in the precision of its units, adapters for each base.
    """
    if plan.optimiser == "recipe":
        return dtype
    return f"lora-16-{plan.name.rpartition('-')[2]}" if plan.rank else plan.name


def with_swap(plan: Plan, blocks: int) -> Plan:
    """The plan with so many blocks in host memory. Refuses a plan that cannot swap."""
    if blocks < 0 or (blocks and not ((plan.checkpoint and plan.fused) or plan.rank)):
        raise ValueError("only plans that update inside backward, or freeze the blocks, can swap")
    return replace(plan, swap=blocks)


def most_swap(plan: Plan, config: ExpertConfig) -> int:
    """How many blocks a plan can leave in host memory: all but two, which compute and arrive."""
    blocks = config.double_blocks + config.single_blocks
    return max(0, blocks - 2) if plan.rank or (plan.fused and plan.checkpoint) else 0


def swapped_blocks(config: ExpertConfig, swap: int) -> tuple[int, ...]:
    """Which blocks wait in host memory (double blocks first), spread so that copies hide."""
    blocks = config.double_blocks + config.single_blocks
    if not 0 <= swap <= max(0, blocks - 2):
        raise ValueError(f"{swap} of {blocks} blocks cannot be swapped; two stay on the device")
    return tuple((2 * i + 1) * blocks // (2 * swap) for i in range(swap))


def block_parameters(config: ExpertConfig) -> tuple[int, int]:
    """Parameters of a double and of a single block (science §5.1)."""
    d, square = config.width, config.width**2
    return 36 * square + 30 * d + 4 * config.head_dim, 15 * square + 11 * d + 2 * config.head_dim


def codec_for(plan: Plan, codecs: Mapping[str, str]) -> str:
    """The codec of a plan's updates; dense bfloat16, or int16 factors, where nobody said."""
    return codecs.get(plan.name) or ("lora-int16" if plan.rank else "dense-bf16")


def update_bytes(codec: str, config: ExpertConfig, rank: int = 0) -> int:
    """Bytes of an update as it crosses the network, but for its file's header and last bits.

    Factors have an exponent of a byte per row and column. Raises `ValueError` for a codec that
    there is not, or one of factors without a rank, and the other way round.
    """
    if codec not in CODECS or (codec in LORA) != bool(rank):
        raise ValueError(f"an update of rank {rank} does not travel as {codec[:40]!r}")
    if rank:
        width = 1 if codec == "lora-int8" else 2
        return width * lora_parameters(config, rank) + lora_parameters(config, 1)
    return math.ceil(per_weight(codec) * config.parameters)


def lora_parameters(config: ExpertConfig, rank: int) -> int:
    """Values of LoRA factors on all block Linears except modulation (science §7.1)."""
    per_rank = 36 * config.double_blocks + 17 * config.single_blocks
    return rank * config.width * per_rank


def forward_flops(config: ExpertConfig, tokens: int, text: int) -> int:
    """FLOPs of one clip's forward pass: Linears over all tokens, and attention (science §7.1)."""
    total, blocks = tokens + text, config.double_blocks + config.single_blocks
    linear = 24 * config.width**2 * total
    attention = 4 * total**2 * config.width
    outer = (
        2
        * config.width
        * (tokens * (config.in_channels + config.out_channels) + text * config.text_dim)
    )
    return blocks * (linear + attention) + outer


def step_flops(plan: Plan, config: ExpertConfig, work: Work) -> int:
    """FLOPs of a step: forward, backward (frozen weights need half of it), and recomputation."""
    passes = 1 + (1 if plan.rank else 2) + (1 if plan.checkpoint else 0)
    return passes * work.batch * forward_flops(config, work.tokens, work.text)


def moved_bytes(plan: Plan, config: ExpertConfig) -> int:
    """Bytes between host and device in a step: swapped blocks there, there again, and back."""
    swapped = _swapped_bytes(plan, config)
    blocks = (2 if plan.rank else 3) * sum(swapped)
    # Two moments in float32 and the residual in bfloat16, there and back.
    return blocks + (20 * config.parameters if plan.host_state else 0)


def state_bytes(plan: Plan, config: ExpertConfig, moments: int = 2) -> int:
    """Bytes of a state as it is saved: what is trained, its optimiser and its residual."""
    if plan.rank:
        return LORA_STATE * lora_parameters(config, plan.rank)
    p = config.parameters
    trained = int(BYTES[plan.base]) * p
    return trained + _optimiser_bytes(plan, config, moments)


def need_of(plan: Plan, config: ExpertConfig, work: Work) -> Need:
    """What a unit under this plan needs, in bytes; `ValueError` for a swap that cannot be."""
    swapped = _swapped_bytes(plan, config)
    p, trained = config.parameters, lora_parameters(config, plan.rank)
    optimiser = _optimiser_bytes(plan, config, work.moments)
    if plan.rank:
        gradients, own = 4 * trained, 4 * trained
    elif plan.fused:
        # Moments in 8 bits are read into float32 for the parameter that is updated.
        gradients, own = (UPDATE + 8 * plan.narrow) * largest_parameter(config), 0
    else:
        gradients, own = int(BYTES[plan.base]) * p, 0
    state = state_bytes(plan, config, work.moments)
    head = 4 * p  # heads are float32 masters
    update = update_bytes(codec_for(plan, work.codecs), config, plan.rank)
    # Float32 training keeps its parent in memory; other plans read it again when they hand in.
    parent = head if plan.base == "float32" else 0
    segment = plan.audit == "segment"
    commits = 1 + (math.ceil(work.steps / work.commit_every) if segment else 1)
    return Need(
        weights=_base_bytes(plan, config) - sum(swapped) + own,
        gradients=gradients,
        optimiser=0 if plan.host_state else optimiser,
        activations=_activation_bytes(plan, config, work),
        swap=2 * max(swapped, default=0),
        host=sum(swapped) + parent + 2 * work.shard_bytes + (optimiser if plan.host_state else 0),
        disk=head + 2 * state + 2 * update + work.shard_bytes,
        download=head + work.shard_bytes,
        upload=update,
        opening=2 * state if segment else state,
        hashed=commits * state,
    )


def largest_parameter(config: ExpertConfig) -> int:
    """Values of the largest single tensor: modulation of a double block, or text embedding."""
    modulation = 6 if config.double_blocks else 5
    return config.width * max(modulation * config.width, config.text_dim)


def _base_bytes(plan: Plan, config: ExpertConfig) -> int:
    """Weights as the plan keeps them: only Linears of the blocks are kept in 8 or 4 bits."""
    double, single = _block_bytes(plan, config)
    here, there = block_parameters(config)
    blocks = config.double_blocks * here + config.single_blocks * there
    outer = 4 if plan.base == "float32" else 2
    inside = config.double_blocks * double + config.single_blocks * single
    return inside + outer * (config.parameters - blocks)


def _block_bytes(plan: Plan, config: ExpertConfig) -> tuple[int, int]:
    """Bytes of a double and of a single block: d² and rows of their Linears, and the small rest."""
    double, single = block_parameters(config)
    return _kept(plan, config, double, 36, 30), _kept(plan, config, single, 15, 11)


def _kept(plan: Plan, config: ExpertConfig, parameters: int, squares: int, rows: int) -> int:
    if plan.base in ("float32", "bfloat16"):
        return int(BYTES[plan.base]) * parameters
    linear = squares * config.width**2
    scales = rows * config.width if plan.base == "float8" else linear // NF4_BLOCK
    return int(linear * BYTES[plan.base]) + 4 * scales + 2 * (parameters - linear)


def _swapped_bytes(plan: Plan, config: ExpertConfig) -> list[int]:
    double, single = _block_bytes(plan, config)
    where = swapped_blocks(config, plan.swap)
    return [double if index < config.double_blocks else single for index in where]


def _optimiser_bytes(plan: Plan, config: ExpertConfig, moments: int) -> int:
    """Moments and residual; Adafactor's are a row and a column of each matrix."""
    if plan.rank:
        return 8 * lora_parameters(config, plan.rank)
    p = config.parameters
    residual = 2 * p if plan.rounding == "kahan" else 0
    if plan.optimiser == "recipe":
        return 4 * moments * p
    if plan.narrow:
        return residual + 2 * p + 8 * moment_blocks(config)
    return residual + (8 * p if plan.optimiser == "adamw" else 4 * factored_values(config))


def factored_values(config: ExpertConfig) -> int:
    """Values of Adafactor's second moments: rows + columns of matrices, vectors as they are."""
    d, heads = config.width, config.head_dim
    double = 2 * (6 * d + d) + 8 * (2 * d) + 4 * (5 * d) + 30 * d + 4 * heads
    single = 4 * d + 3 * (2 * d) + 5 * d + 6 * d + 11 * d + 2 * heads
    outer = (config.in_channels + config.text_dim + config.pooled_dim + 256) + 4 * d + 4 * d
    outer += 6 * d + (2 * d + d) + 2 * d + (config.out_channels + d) + config.out_channels
    return outer + config.double_blocks * double + config.single_blocks * single


def moment_blocks(config: ExpertConfig) -> int:
    """Scales of one moment in 8 bits: each tensor is cut into blocks of `MOMENT_BLOCK`."""
    d, head, text, pooled = config.width, config.head_dim, config.text_dim, config.pooled_dim
    double = 2 * [6 * d * d, 6 * d, 4 * d * d, 4 * d, 4 * d * d, d] + 8 * [d * d, d] + 4 * [head]
    single = [3 * d * d, 3 * d, 4 * d * d, 4 * d, 5 * d * d, d] + 3 * [d * d, d] + 2 * [head]
    outer = [config.in_channels * d, text * d, pooled * d, 256 * d] + 2 * [d * d] + 6 * [d]
    outer += [2 * d * d, 2 * d, config.out_channels * d, config.out_channels]
    return (
        sum(-(-n // MOMENT_BLOCK) for n in outer)
        + config.double_blocks * sum(-(-n // MOMENT_BLOCK) for n in double)
        + config.single_blocks * sum(-(-n // MOMENT_BLOCK) for n in single)
    )


def _activation_bytes(plan: Plan, config: ExpertConfig, work: Work) -> int:
    """Kept for backward, and the gradients inside one block."""
    double, single = KEPT[plan.compute]
    per_block = [double] * config.double_blocks + [single] * config.single_blocks
    if plan.checkpoint:
        kept = INPUT[plan.compute] * len(per_block) + max(per_block)
    else:
        kept = sum(per_block)
    channels = work.batch * (work.tokens + work.text) * config.width
    return int(channels * (kept + OUTER[plan.compute] + WORKING[plan.compute]))
