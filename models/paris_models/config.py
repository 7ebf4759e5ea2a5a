"""Numbers that describe a network's models: expert, recipe, router, sampler and unit of work.

Frozen dataclasses of plain ints and floats that mirror the signed records field by field, so that
nothing in this package needs the protocol. Values that cannot work are refused with `ValueError`.
This module imports no torch: a machine can be measured against the ladder without loading it::

    config = LADDER["demo"]                       # or ExpertConfig.from_record(genesis.expert)
    config.parameters                             # 319392
    UnitConfig.from_record(assignment, key)       # key: 16 bytes, from the assignment's seed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final, Literal, Self, get_args, get_type_hints

Objective = Literal["velocity", "x0"]
Kind = Literal["t2v", "i2v_head", "i2v_tail", "i2v_loop"]
"""What a conditioned expert is given in training: nothing, the first frame, the last, or both."""
FRAMES_ALONE: Final[Mapping[Kind, frozenset[str]]] = MappingProxyType(
    {
        "t2v": frozenset(),
        "i2v_head": frozenset({"first"}),
        "i2v_tail": frozenset({"last"}),
        "i2v_loop": frozenset({"first", "last"}),
    }
)
"""The frames, encoded alone, that each kind gives: tensors of the shards."""
PAPER_CONDITIONS: Final[tuple[tuple[Kind, int], ...]] = (
    ("t2v", 1), ("i2v_head", 5), ("i2v_loop", 1), ("i2v_tail", 1),
)  # fmt: skip
"""Open-Sora 2.0's kinds and weights."""


@dataclass(frozen=True, slots=True)
class _Mirror:
    """A dataclass that can be read from any object with attributes of the same names."""

    @classmethod
    def from_record(cls, record: object) -> Self:
        """Copy the fields of `record`; decimal strings become floats, lists become tuples.

        Raises `AttributeError` for a missing field, `ValueError` for a value that cannot work.
        """
        types = get_type_hints(cls)
        return cls(**{f.name: _plain(getattr(record, f.name), types[f.name]) for f in fields(cls)})


def _plain(value: Any, wanted: Any) -> Any:
    if wanted is float:
        return float(value)
    if wanted is int:
        return int(value)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class ExpertConfig(_Mirror):
    """Arguments of diffusers' `FluxTransformer2DModel` and the latent patch packed into a token.

    `out_channels` is latent channels × patch²; `in_channels` is the same, or more by the packed
    condition (mask and reference latents: (channels + 1) × patch²; 132 = 64 + 68 in the paper).
    """

    patch: int
    in_channels: int
    out_channels: int
    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    rope_axes: tuple[int, int, int]
    text_dim: int
    pooled_dim: int

    def __post_init__(self) -> None:
        if self.patch < 1 or self.out_channels % self.patch**2:
            raise ValueError("out_channels must be latent channels × patch²")
        if self.in_channels not in (self.out_channels, self.out_channels + self.condition_size):
            raise ValueError("in_channels must be out_channels, or that plus the packed condition")
        if sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes):
            raise ValueError("rope_axes must be even and sum to head_dim")

    @property
    def width(self) -> int:
        """Size of a token inside the network."""
        return self.heads * self.head_dim

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents (n, C, T, H, W)."""
        return self.out_channels // self.patch**2

    @property
    def condition_size(self) -> int:
        """Columns of a packed condition token: (C + 1) × patch²."""
        return (self.latent_channels + 1) * self.patch**2

    @property
    def conditioned(self) -> bool:
        """Whether the expert takes a condition (first frame given) beside the noisy latents."""
        return self.in_channels != self.out_channels

    @property
    def parameters(self) -> int:
        """Number of parameters in closed form (equal to `expert.parameter_count`, F8)."""
        d, out, square = self.width, self.out_channels, self.width**2
        outer = (self.in_channels + self.text_dim + self.pooled_dim + 256 + 6) * d + 2 * square
        last = 2 * square + 2 * d + out * d + out
        double = 36 * square + 30 * d + 4 * self.head_dim
        single = 15 * square + 11 * d + 2 * self.head_dim
        return outer + last + self.double_blocks * double + self.single_blocks * single


@dataclass(frozen=True, slots=True)
class RecipeConfig(_Mirror):
    """Objective and optimiser of a network.

    `objective` also names the law of text dropout. "velocity" is the paper's:
    sequence and pooled text are dropped independently, each with probability √null_text. "x0" is
    the small network's: both together. `null_text` is the probability that both
    are null, in either case. `t_shift` 1 means no time shift, 0 the shift by latent size.

    `conditions` are the kinds that a conditioned expert trains with and their weights, none means
    text alone; each condition is dropped with probability `null_image`. `time_path` "float32" gives
    the embedding times that were not rounded to the hidden dtype. `ema` is the decay per merged
    step of the released average, 0 for none.
    """

    objective: Objective = "velocity"
    sigma_min: float = 1e-5
    t_mean: float = 0.0
    t_std: float = 1.0
    t_shift: float = 0.0
    null_text: float = 0.1
    batch: int = 96
    optimiser: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-5
    matrix_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-15
    weight_decay: float = 0.0
    momentum: float = 0.95
    clip_norm: float = 1.0
    conditions: tuple[tuple[Kind, int], ...] = ()
    null_image: float = 0.0
    time_path: Literal["hidden", "float32"] = "hidden"
    ema: float = 0.0

    def __post_init__(self) -> None:
        pairs = tuple((kind, int(weight)) for kind, weight in self.conditions)  # JSON has lists
        object.__setattr__(self, "conditions", pairs)
        kinds = [kind for kind, _ in pairs]
        if len(set(kinds)) < len(kinds) or set(kinds) - set(get_args(Kind)):
            raise ValueError(f"conditions name each of {', '.join(get_args(Kind))} at most once")
        if any(weight < 1 for _, weight in pairs):
            raise ValueError("the weight of a condition is at least 1")
        if not (0 <= self.null_image < 1 and 0 <= self.ema < 1):
            raise ValueError("null_image and ema lie in [0, 1)")
        if not (0 <= self.null_text < 1 and 0 <= self.sigma_min < 1 and self.t_shift >= 0):
            raise ValueError("null_text and sigma_min lie in [0, 1), t_shift is not negative")
        if self.t_std <= 0 or self.clip_norm <= 0 or self.batch < 1:
            raise ValueError("t_std, clip_norm and batch must be positive")


DEMO_RECIPE: Final = RecipeConfig(
    objective="x0", sigma_min=0.0, t_mean=0.8, t_shift=1.0, null_text=0.1, batch=96,
    optimiser="muon", lr=3e-3, matrix_lr=0.03, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01,
)  # fmt: skip
"""The recipe that works at 0.3 M parameters; the defaults are the paper's."""


@dataclass(frozen=True, slots=True)
class RouterConfig(_Mirror):
    """Shape and training length of the router: `steps` × `batch` samples at peak rate `lr`."""

    width: int
    blocks: int
    heads: int
    batch: int
    steps: int
    lr: float

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width < 12 or self.width % 2:
            raise ValueError("router width must be even, at least 12 and a multiple of heads")
        if min(self.blocks, self.batch, self.steps) < 1:
            raise ValueError("router blocks, batch and steps must be positive")


@dataclass(frozen=True, slots=True)
class SamplerConfig(_Mirror):
    """Defaults of generation: Euler steps, time shift (0: by latent size), guidance, top-k."""

    steps: int = 50
    shift: float = 0.0
    guidance: float = 7.5
    top_k: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.top_k < 1 or self.shift < 0:
            raise ValueError("steps and top_k must be positive, shift not negative")


@dataclass(frozen=True, slots=True)
class UnitConfig:
    """One unit of work: with the step number, all that training depends on besides the data."""

    key: bytes
    steps: int
    batch: int
    rate_start: float = 1.0
    rate_end: float = 0.02
    rate_shape: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    commit_every: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1
    kernels: Literal["reference", "fast"] = "reference"

    def __post_init__(self) -> None:
        if len(self.key) != 16:
            raise ValueError("the key of a unit has 16 bytes")
        if min(self.steps, self.batch, self.threads) < 1 or self.warmup < 0:
            raise ValueError("steps, batch and threads must be positive, warmup not negative")

    @classmethod
    def from_record(cls, assignment: Any, key: bytes) -> Self:
        """Read a unit from an assignment; `key` is derived from its seed by the protocol."""
        rate = assignment.rate
        return cls(
            key=key,
            steps=int(assignment.steps),
            batch=int(assignment.batch),
            rate_start=float(rate.start),
            rate_end=float(rate.end),
            rate_shape=rate.shape,
            warmup=int(rate.warmup),
            commit_every=int(assignment.commit_every),
            dtype=assignment.dtype,
            threads=int(assignment.threads),
            kernels=assignment.kernels,
        )


def _flux(double: int, single: int, heads: int, in_channels: int = 132) -> ExpertConfig:
    return ExpertConfig(2, in_channels, 64, double, single, heads, 128, (16, 56, 56), 4096, 768)


LADDER: Final[Mapping[str, ExpertConfig]] = MappingProxyType(
    {
        "demo": ExpertConfig(1, 32, 32, 1, 2, 4, 16, (4, 6, 6), 64, 64),
        "5M": _flux(1, 1, 2),
        "38M": _flux(2, 4, 4),
        "287M": _flux(4, 8, 8),
        "950M": _flux(6, 12, 12),
        "2.2B": _flux(8, 16, 16),
        "5.2B": _flux(12, 24, 20),
        "paper": _flux(19, 38, 24),
        "paper-64": _flux(19, 38, 24, 64),
    }
)
"""Named sizes of one architecture; "paper-64" takes no condition."""
