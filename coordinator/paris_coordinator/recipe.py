"""The recipe file: one TOML file that says everything about a network before it is signed.

Its sections carry the names of the genesis manifest's fields (docs/recipe.md lists them all). What
is not understood or does not fit together is refused with `recipe.invalid` and the field's name;
combinations that the parts' licences forbid with `recipe.licence`::

    recipe = load_recipe(Path("demo.toml"))
    recipe.records()["expert"]              # the fields of records.ExpertSpec, ready for JSON
    recipe.file(recipe.codec.file)          # files are named relative to the recipe
"""

from __future__ import annotations

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from paris_coordinator.planning import FACTORS, Offer, fault
from paris_coordinator.recipe_audit import Audit, Positive, Section
from paris_coordinator.recipe_clips import (
    Buckets,
    Clips,
    Clusters,
    Filters,
    Geometry,
    HeldOut,
    Shards,
)
from paris_coordinator.recipe_objective import Objective
from paris_models.config import (
    FRAMES_ALONE,
    LADDER,
    ExpertConfig,
    RecipeConfig,
    RouterConfig,
    SamplerConfig,
)
from paris_models.rows import Store
from paris_protocol.canonical import decimal
from paris_protocol.errors import ParisError
from paris_protocol.records import UpdateCodec

MAX_BYTES: Final = 1 << 20
MOST_BUCKETS: Final = 256
VAE_CELL: Final = 8
"""Pixels per latent of the published video VAEs."""
SMALL: Final = ("patch-pca", "hashed-words", "pixel-statistics")
"""Encoders that are made here and have no source to be loaded from."""


class Codec(Section):
    """Pixels to latents. `file` pins a patch-PCA codec; without it one is fitted on the clips."""

    kind: Literal["patch-pca", "hunyuan-vae", "wan-vae"]
    source: str = ""
    fingerprint: str | None = None
    channels: int = Field(default=16, ge=1)
    patch: int = Field(default=6, ge=1)
    block: int = Field(default=4, ge=1)
    fit_clips: int = Field(default=3000, ge=1)
    file: str | None = None


class Text(Section):
    """Captions to vectors. `file` pins a word table; without it one is made for the captions.

    `store` says how sequences stand in the shards (`paris_models.rows`).
    """

    kind: Literal["hashed-words", "t5-clip"]
    source: str = ""
    fingerprint: str | None = None
    length: int = Field(default=512, ge=1)
    dim: int = Field(default=4096, ge=1)
    pooled_dim: int | None = None
    file: str | None = None
    store: Store = "float32"


class Features(Section):
    """What clips are clustered by."""

    kind: Literal["pixel-statistics", "dinov2"] = "pixel-statistics"
    source: str = ""
    fingerprint: str | None = None


class Expert(Section):
    """A size of the ladder by name, or every argument by itself."""

    size: str | None = None
    patch: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    double_blocks: int | None = None
    single_blocks: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    rope_axes: tuple[int, int, int] | None = None
    text_dim: int | None = None
    pooled_dim: int | None = None

    def config(self) -> ExpertConfig:
        """The expert's configuration; `ValueError` when it cannot be one."""
        given = self.model_dump(exclude={"size"}, exclude_none=True)
        if self.size is None:
            missing = ExpertConfig.__dataclass_fields__.keys() - given.keys()
            if missing:
                raise ValueError(f"expert: name a size, or also {', '.join(sorted(missing))}")
            return ExpertConfig(**given)
        if given:
            raise ValueError("expert: either a size or the single fields")
        if self.size not in LADDER:
            raise ValueError(f"expert.size: one of {', '.join(LADDER)}")
        return LADDER[self.size]


class Initial(Section):
    """The common initial checkpoint: a safetensors file, or fresh weights from a seed."""

    file: str | None = None
    seed: int = Field(default=0, ge=0)
    origin: Literal["scratch", "flux.1-schnell", "flux.1-dev", "open-sora-v2"] = "scratch"


class Router(Section):
    """The router's shape and training length."""

    width: int = Field(ge=12)
    blocks: int = Positive
    heads: int = Positive
    batch: int = Positive
    steps: int = Positive
    lr: float = Field(gt=0)


class Sampler(Section):
    """Defaults of generation."""

    steps: int = Field(default=50, ge=1)
    shift: float = Field(default=0.0, ge=0)
    guidance: float = Field(default=7.5, ge=0)
    top_k: int = Field(default=1, ge=1)


class Plan(Section):
    """How a round is cut into units (records.RoundPlan)."""

    units: int = Positive
    steps: int = Positive
    rounds: int = Positive
    schedule: Literal["slice", "unit-cosine"]
    floor: float = Field(default=0.02, gt=0, le=1)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    close_after: int = Field(default=3600, ge=1)


class Margins(Section):
    """Limits of the layers L2 and L3 (records.Margins)."""

    damage: tuple[float, ...] = Field(min_length=1)
    merge_damage: float
    standard_errors: float = Field(ge=0)
    clips: int = Positive
    norm_high: float = Field(gt=0)
    norm_low: float = Field(ge=0)
    copy_cosine: float = Field(gt=0, le=1)
    noise_cosine: float = Field(ge=-1, le=1)
    source: str = Field(max_length=200)
    looks: tuple[int, ...] = ()
    block_z: float = Field(default=0.0, ge=0)


class Policy(Section):
    """Further fields of the first policy; what is not set has the coordinator's default."""

    dtype: Literal["float32", "bfloat16"] | None = None
    threads: int | None = Field(default=None, ge=1)
    update_codec: UpdateCodec | None = None
    commit_every: int | None = Field(default=None, ge=1)
    soft_deadline: int | None = Field(default=None, ge=1)
    hard_deadline: int | None = Field(default=None, ge=1)
    refusals_to_quarantine: int | None = Field(default=None, ge=1)


class Licence(Section):
    """A licence that binds a part of the network's output (records.Licence)."""

    part: str = Field(max_length=200)
    name: str = Field(max_length=200)
    url: str = Field(max_length=200)
    regions_excluded: tuple[str, ...] = ()


HUNYUAN: Final = Licence(
    part="codec: HunyuanVideo VAE",
    name="Tencent Hunyuan Community License",
    url="https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE",
    regions_excluded=("European Union", "United Kingdom", "South Korea"),
)
FLUX_DEV: Final = Licence(
    part="initial checkpoint: FLUX.1-dev",
    name="FLUX.1 [dev] Non-Commercial License",
    url="https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)


class Recipe(Section):
    """The whole file."""

    name: str = Field(min_length=1, max_length=200)
    preset: Literal["clean", "paper"] = "clean"
    notes: tuple[str, ...] = ()
    geometry: Geometry
    clips: Clips = Clips()
    buckets: tuple[Buckets, ...] = ()
    filters: Filters = Filters()
    codec: Codec
    text: Text
    features: Features = Features()
    clusters: Clusters
    shards: Shards
    held_out: HeldOut
    expert: Expert
    initial: Initial = Initial()
    recipe: Objective
    router: Router
    sampler: Sampler = Sampler()
    plan: Plan
    plans: tuple[Offer, ...] = ()
    margins: Margins | None = None
    policy: Policy = Policy()
    audit: Audit = Audit()
    licences: tuple[Licence, ...] = ()
    _folder: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        expert = self.expert.config()
        self.objective()
        RouterConfig.from_record(self.router)
        SamplerConfig.from_record(self.sampler)
        if expert.latent_channels != self.codec.channels:
            raise ValueError(
                f"codec.channels: {self.codec.channels}, the expert has {expert.latent_channels}"
            )
        if (expert.text_dim, expert.pooled_dim) != (self.text.dim, self.pooled_dim):
            raise ValueError("text.dim: the expert reads another size of text")
        if self.plan.units > self.shards.per_cluster:
            raise ValueError("shards.per_cluster: units of a round must have disjoint shards")
        every, codec = self.policy.commit_every, self.policy.update_codec
        whole = every is None or every >= self.plan.steps  # `init` knows the default
        if found := fault([offer.rules() for offer in self.plans], codec, whole):
            raise ValueError(found)
        if self.initial.file is None and any(o.codec.startswith(FACTORS) for o in self.plans):
            raise ValueError("initial.file: factors of a fresh expert would learn nothing")
        if len(self.shapes) > MOST_BUCKETS:
            raise ValueError(f"buckets: {len(self.shapes) - 1}, at most {MOST_BUCKETS - 1}")
        if self.sampler.top_k > self.clusters.count:
            raise ValueError("sampler.top_k: more than there are experts")
        for name in ("codec", "text", "features"):
            part = getattr(self, name)
            if part.kind not in SMALL and not part.source:
                raise ValueError(f"{name}.source: name a folder or a hub id")
        return self

    @property
    def pooled_dim(self) -> int:
        """Size of the pooled text."""
        return self.text.dim if self.text.pooled_dim is None else self.text.pooled_dim

    def objective(self) -> RecipeConfig:
        """The section `[recipe]` with what follows from the preset, the expert and the dtypes."""
        paper = self.preset == "paper" and self.expert.config().conditioned
        dtypes = {self.policy.dtype, *(offer.dtype for offer in self.plans)}
        return self.recipe.resolved(paper=paper, half="bfloat16" in dtypes)

    @property
    def frames_alone(self) -> frozenset[str]:
        """Which frames of a clip are given to experts in training: of `first` and `last`."""
        kinds = self.objective().conditions if self.expert.config().conditioned else ()
        return frozenset().union(*(FRAMES_ALONE[kind] for kind, _ in kinds))

    @cached_property
    def shapes(self) -> tuple[Geometry, ...]:
        """The sizes that clips are cut to, the network's own first; `ValueError` for two alike."""
        space = self.codec.patch if self.codec.kind == "patch-pca" else VAE_CELL
        cell = space * self.expert.config().patch
        found = [self.geometry]
        for bucket in self.buckets:
            found += bucket.shapes(self.geometry, cell)
        for index, shape in enumerate(found):
            if shape in found[:index]:
                size = f"{shape.frames}×{shape.height}×{shape.width}"
                raise ValueError(f"buckets: {size} is there twice")
        return tuple(found)

    @property
    def batches(self) -> tuple[int, ...]:
        """Clips per step of each of `shapes`."""
        own = self.recipe.batch
        more = [[bucket.batch or own] * len(bucket.aspects) for bucket in self.buckets]
        return own, *(batch for part in more for batch in part)

    def file(self, name: str) -> Path:
        """A file that the recipe names, relative to the recipe's folder."""
        return self._folder / name

    def check_licences(self) -> tuple[Licence, ...]:
        """All licences that bind; `recipe.licence` where the clean preset uses a bound part."""
        origin = self.initial.origin  # Open-Sora v2 was trained on from FLUX.1-dev
        bound = {
            "codec.kind hunyuan-vae": (self.codec.kind == "hunyuan-vae", HUNYUAN),
            f"initial.origin {origin}": (origin in ("flux.1-dev", "open-sora-v2"), FLUX_DEV),
        }
        used = {field: licence for field, (is_used, licence) in bound.items() if is_used}
        if used and self.preset != "paper":
            field, licence = next(iter(used.items()))
            raise ParisError("recipe.licence", f'{field}: {licence.name}; needs preset = "paper"')
        stated = {licence.part for licence in self.licences}
        return self.licences + tuple(x for x in used.values() if x.part not in stated)

    def records(self) -> dict[str, Any]:
        """The sections that enter the manifest and the policy as they are, reals as strings."""
        return {
            "name": self.name,
            "notes": list(self.notes),
            "geometry": _plain(self.geometry),
            "expert": _plain(self.expert.config()),
            "recipe": _plain(self.objective()),
            "router": _plain(self.router),
            "sampler": _plain(self.sampler),
            "plan": _plain(self.plan),
            "plans": [offer.rules().model_dump() for offer in self.plans],
            "margins": None if self.margins is None else _plain(self.margins),
            "policy": {k: v for k, v in _plain(self.policy).items() if v is not None},
            "audit": {k: v for k, v in _plain(self.audit).items() if v is not None},
            "licences": [_plain(licence) for licence in self.check_licences()],
        }


def _plain(section: Section | ExpertConfig | RecipeConfig) -> dict[str, Any]:
    """Fields as JSON values: floats as decimal strings, tuples as lists."""
    if isinstance(section, ExpertConfig | RecipeConfig):
        fields = {name: getattr(section, name) for name in section.__dataclass_fields__}
    else:
        fields = section.model_dump()
    return {name: _value(value) for name, value in fields.items()}


def _value(value: Any) -> Any:
    if isinstance(value, float):
        return decimal(value)
    if isinstance(value, dict):
        return {name: _value(part) for name, part in value.items()}
    return [_value(part) for part in value] if isinstance(value, tuple | list) else value


def load_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises `recipe.invalid` (naming the field) or `recipe.licence`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ParisError("recipe.invalid", f"{path.name} is larger than 1 MiB")
        table = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise ParisError("recipe.invalid", f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ParisError("recipe.invalid", f"{path.name}: {error}") from error
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        words = str(first["msg"]).removeprefix("Value error, ")
        raise ParisError("recipe.invalid", f"{field}: {words}" if field else words) from error
    recipe._folder = path.resolve().parent
    for section in ("codec", "text", "initial"):
        name = getattr(recipe, section).file
        if name is not None and not recipe.file(name).is_file():
            raise ParisError("recipe.invalid", f"{section}.file: no file {name} beside the recipe")
    recipe.check_licences()
    return recipe
