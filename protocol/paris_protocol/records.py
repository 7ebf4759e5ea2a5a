"""The nouns of Paris: every statement that is signed, as frozen and strict pydantic records.

Each is the predicate of an in-toto Statement v1 inside a DSSE envelope (`paris_protocol.envelope`).
No floats stand in signed records: reals are decimal strings, merge scalars are hex floats, times are
unix seconds. The id of a statement is the SHA-256 of its DSSE pre-authentication encoding.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, 64 lower-case hex digits."""
KeyId = Annotated[str, StringConstraints(pattern=r"^ed25519:[0-9a-f]{64}$")]
"""`ed25519:` and the 32-byte public key in hex; it names a key and *is* the key."""
Real = Annotated[
    str, StringConstraints(pattern=r"^-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?(e-?[0-9]{1,3})?$")
]
"""A real number as a decimal string, such as `0.03` or `1e-15`."""
HexFloat = Annotated[str, StringConstraints(pattern=r"^-?0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}$")]
"""A float as `float.hex()` prints it: every bit is signed."""
Time = Annotated[int, Field(ge=0, le=1 << 40)]
"""Unix seconds."""
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Short = Annotated[str, StringConstraints(max_length=200)]
Path = Annotated[
    str,
    StringConstraints(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$", max_length=200
    ),
]
Number = tuple[Short, Real]
"""A named measurement inside a verdict."""
UpdateCodec = Literal[
    "dense-f32", "dense-bf16", "int8", "topk-32", "topk-64", "topk-128", "topk-256",
    "lora-int16", "lora-int8",
]  # fmt: skip
"""How an update crosses the network (SPEC.md, section Updates)."""


class Record(BaseModel):
    """What all records share: frozen, strict, no unknown fields.

    `LATER` names the optional fields that came after version 0.1. They are left out of the signed
    text while they have their default, so that a reader one version behind still reads it.
    """

    LATER: ClassVar[frozenset[str]] = frozenset()
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        value: dict[str, Any] = handler(self)
        for name in self.LATER:
            if getattr(self, name) == type(self).model_fields[name].default:
                value.pop(name, None)
        return value


class Statement(Record):
    """A record that is signed: its type name, version and size limit in bytes."""

    TYPE: ClassVar[str]
    MAX_BYTES: ClassVar[int] = 64 << 10
    protocol: Literal[1] = 1


# ---------------------------------------------------------------- shared parts


class BlobRef(Record):
    """A content-addressed blob: SHA-256 of its canonical manifest, and its size in bytes."""

    id: Digest
    size: Count


class TensorFile(Record):
    """A safetensors blob: where its bytes are, and the Merkle root over its tensors."""

    blob: BlobRef
    root: Digest


class Shard(Record):
    """A safetensors file of cached clips, all of one bucket: 0 is the network's own geometry,
    n > 0 is `Genesis.buckets[n - 1]`."""

    LATER = frozenset({"bucket"})
    file: TensorFile
    clips: Count
    bucket: Count = 0


class Head(Record):
    """A published state of an expert: merges so far, weights, and the merge that made it."""

    round: Count
    weights: TensorFile
    merge: Digest | None = None


# ---------------------------------------------------------------- genesis


class Licence(Record):
    """A licence that applies to a part of the network's output."""

    part: Short
    name: Short
    url: Short
    regions_excluded: tuple[Short, ...] = ()


class Geometry(Record):
    """One clip in pixels: frames × height × width, and frames per second."""

    frames: Count
    height: Count
    width: Count
    fps: Count


class Codec(Record):
    """How pixels become latents of shape (channels, frames, height, width)."""

    kind: Literal["patch-pca", "hunyuan-vae", "wan-vae"]
    source: Short
    fingerprint: Digest
    channels: Count
    frames: Count
    height: Count
    width: Count
    file: TensorFile | None = None


class Text(Record):
    """How captions become a sequence (length, dim) and a pooled vector (pooled_dim)."""

    kind: Literal["hashed-words", "t5-clip"]
    source: Short
    fingerprint: Digest
    length: Count
    dim: Count
    pooled_dim: Count
    file: TensorFile | None = None


class ExpertSpec(Record):
    """Arguments of diffusers' FluxTransformer2DModel, and the latent patch packed into a token."""

    patch: Count
    in_channels: Count
    out_channels: Count
    double_blocks: Count
    single_blocks: Count
    heads: Count
    head_dim: Count
    rope_axes: tuple[Count, Count, Count]
    text_dim: Count
    pooled_dim: Count


class RouterSpec(Record):
    """The router's shape and its training length in samples."""

    width: Count
    blocks: Count
    heads: Count
    batch: Count
    steps: Count
    lr: Real


class Bucket(Record):
    """Clips of another size than the network's own: in pixels, as latents, and clips per step."""

    geometry: Geometry
    latent: tuple[Count, Count, Count, Count]
    batch: Count


class Recipe(Record):
    """Objective and optimiser; the same for every unit of a network.

    `conditions` are the weights of the kinds of condition that a conditioned expert trains with,
    none of them means text alone; `null_image` drops a condition. `time_path` says in which
    precision times reach the embedding; `ema` is the decay per merged step of the released
    average, 0 releases the heads themselves.
    """

    LATER = frozenset({"conditions", "null_image", "time_path", "ema"})
    objective: Literal["velocity", "x0"]
    sigma_min: Real
    t_mean: Real
    t_std: Real
    t_shift: Real
    null_text: Real
    batch: Count
    optimiser: Literal["adamw", "muon"]
    lr: Real
    matrix_lr: Real
    beta1: Real
    beta2: Real
    eps: Real
    weight_decay: Real
    momentum: Real
    clip_norm: Real
    conditions: tuple[tuple[Literal["t2v", "i2v_head", "i2v_tail", "i2v_loop"], Count], ...] = ()
    null_image: Real = "0"
    time_path: Literal["hidden", "float32"] = "hidden"
    ema: Real = "0"


class Sampler(Record):
    """Defaults of generation: Euler steps, time shift, guidance, experts per step."""

    steps: Count
    shift: Real
    guidance: Real
    top_k: Count


class Cluster(Record):
    """A part of the data: its expert's index, clips, prior and the shards."""

    index: Count
    clips: Count
    prior: Real
    centroid: tuple[Real, ...]
    shards: tuple[Shard, ...]


class Genesis(Statement):
    """What never changes; its statement id is the network id, so the id pins the root key."""

    TYPE: ClassVar[str] = "genesis"
    LATER = frozenset({"buckets"})
    MAX_BYTES: ClassVar[int] = 4 << 20
    name: Short
    created: Time
    root_key: KeyId
    geometry: Geometry
    codec: Codec
    text: Text
    features: Short
    expert: ExpertSpec
    initial: TensorFile
    recipe: Recipe
    router: RouterSpec
    sampler: Sampler
    clusters: tuple[Cluster, ...]
    licences: tuple[Licence, ...]
    notes: tuple[Short, ...] = ()
    buckets: tuple[Bucket, ...] = ()


# ---------------------------------------------------------------- policy and people


class RoundPlan(Record):
    """How a round of one expert is cut into units."""

    units: Count
    steps: Count
    rounds: Count
    schedule: Literal["slice", "unit-cosine"]
    floor: Real
    warmup: Real
    close_after: Count


class Margins(Record):
    """Limits of the layers L2 and L3; `damage[r]` belongs to round r, the last one to all later.

    `looks`: clips after which the sequential test of L3 may stop, `clips` being the last look;
    `block_z`: largest robust z of a block's norm against the lineage's own, 0 switches it off.
    """

    LATER = frozenset({"looks", "block_z"})

    damage: tuple[Real, ...]
    merge_damage: Real
    standard_errors: Real
    clips: Count
    norm_high: Real
    norm_low: Real
    copy_cosine: Real
    noise_cosine: Real
    source: Short
    looks: tuple[Count, ...] = ()
    block_z: Real = "0"


class Tolerance(Record):
    """How far an honest replay on other kernels may be from the claim; measured, never guessed.

    For one dtype, model class and number of steps: limits on ‖replay − claim‖ / ‖replay‖ of a
    segment's update, for all tensors together and for the worst one, = factor · the worst of
    `pairs` honest pairs.
    """

    dtype: Literal["float32", "bfloat16"]
    model: Short
    steps: Count
    rho: Real
    tensor: Real
    factor: Real
    pairs: Count
    source: Short


class AuditRules(Record):
    """The replay audit L4 and what hangs on it: standing, vesting, weights (trust D8, §2.4, §2.5).

    A node with n replay-verified contributions in a row is audited at the rate
    max(floor, min(1, rate / (n + 1))), on `segments` segments; `chain` is the head of the hash chain
    of `chain_length` secrets. Fewer than `probation` in a row is probation: such nodes have at most
    `probation_weight` of a merge. A contribution vests `vesting` merges after its own. An opening
    is due `answer_within` seconds after it was asked for, and once more `retry_within` later.
    `auditors`: 0 means that the coordinator replays, 3 that volunteers do, two of three.
    """

    chain: Digest
    chain_length: Count
    segments: Count
    rate: Real
    floor: Real
    probation: Count
    probation_weight: Real
    vesting: Count
    answer_within: Count
    retry_within: Count
    auditors: Literal[0, 3]
    canary: Real
    tolerances: tuple[Tolerance, ...] = ()


class PlanRules(Record):
    """A training plan that the network takes beside its own, and how its units are asked for.

    `plan` is a name of `paris_models.plans`; `rate` multiplies the recipe's peak rates.
    """

    plan: Short
    dtype: Literal["float32", "bfloat16"]
    update_codec: UpdateCodec
    rate: Real


class Policy(Statement):
    """Numbered, hash-linked statement for everything that may change.

    A release needs `witness_quorum` cosignatures of `witnesses`. Inputs of merges are kept for
    `inputs_kept` seconds, for ever if it is 0. `dtype` and `update_codec` are those of the
    network's own plan, float32; `plans` are the others that it takes.
    """

    TYPE: ClassVar[str] = "policy"
    LATER = frozenset({"audit", "witnesses", "witness_quorum", "inputs_kept", "plans"})
    number: Count
    previous: Digest | None
    since: Time
    coordinator_keys: tuple[KeyId, ...]
    addresses: tuple[Short, ...]
    bootstraps: tuple[Short, ...]
    plan: RoundPlan
    margins: Margins
    dtype: Literal["float32", "bfloat16"]
    threads: Count
    kernels: Literal["reference", "fast"]
    update_codec: UpdateCodec
    commit_every: Count
    soft_deadline: Count
    hard_deadline: Count
    refusals_to_quarantine: Count
    min_version: Short
    audit: AuditRules | None = None
    witnesses: tuple[KeyId, ...] = ()
    witness_quorum: Count = 0
    inputs_kept: Count = 0
    plans: tuple[PlanRules, ...] = ()


class Registration(Statement):
    """A node makes itself known; names and hardware are not in it (privacy)."""

    TYPE: ClassVar[str] = "registration"
    node: KeyId
    peer_id: Short
    version: Short
    at: Time


# ---------------------------------------------------------------- one unit of work


class Rate(Record):
    """The unit's learning-rate multiplier: warm-up, then `start` to `end` along `shape`."""

    start: Real
    end: Real
    shape: Literal["cosine", "constant"]
    warmup: Count


class OpenState(Record):
    """A committed training state, laid open: its place among the commitment's states, its file."""

    index: Count
    file: TensorFile


class AuditTask(Record):
    """What an auditor replays: segments of somebody's committed training, from opened states."""

    contribution: Digest
    assignment: Digest
    commitment: Digest
    segments: tuple[Count, ...]
    states: tuple[OpenState, ...]


class Assignment(Statement):
    """A signed lease; training is a function of this record and the step.

    `plan` names how the expert is trained (`paris_models.plans`). `residual` is the root of what
    the node's last update of this expert left out, which this unit's update has to make up for.
    `kernels`: "reference" asks for deterministic algorithms, "fast" for whatever is quickest (such
    a unit is audited within a tolerance, never for equal bits). Of kind "audit" it repeats the
    audited assignment for another node and has `audit`.
    """

    TYPE: ClassVar[str] = "assignment"
    LATER = frozenset({"audit", "residual"})
    MAX_BYTES: ClassVar[int] = 1 << 20
    kind: Literal["train", "audit"]
    plan: Short
    node: KeyId
    expert: Count
    round: Count
    unit: Count
    parent: Head
    shards: tuple[Shard, ...]
    seed: Digest
    steps: Count
    batch: Count
    rate: Rate
    optimiser_state: Literal["fresh"] | Digest
    dtype: Literal["float32", "bfloat16"]
    threads: Count
    kernels: Literal["reference", "fast"]
    update_codec: UpdateCodec
    commit_every: Count
    policy: Count
    issued: Time
    soft_deadline: Time
    hard_deadline: Time
    audit: AuditTask | None = None
    residual: Digest | None = None


class Commitment(Statement):
    """Roots of the training states at every k-th step, and of the result, before it is handed in.

    `residual` is the root of what the update's codec left out, where the node will make up for it.
    """

    TYPE: ClassVar[str] = "commitment"
    LATER = frozenset({"residual"})
    MAX_BYTES: ClassVar[int] = 1 << 20
    assignment: Digest
    states: tuple[Digest, ...]
    states_root: Digest
    update_root: Digest
    steps: Count
    residual: Digest | None = None


class Contribution(Statement):
    """What a volunteer hands in for an assignment.

    `numerics` names the class of machine and build by the digest of a numeric self-test: two
    machines of one class compute the same bits.
    """

    TYPE: ClassVar[str] = "contribution"
    LATER = frozenset({"numerics"})
    assignment: Digest
    commitment: Digest
    update: TensorFile
    steps: Count
    samples: Count
    loss: Real
    seconds: Count
    numerics: Digest | None = None


class Draw(Record):
    """Whether and where a contribution is audited, so that anybody can repeat the draw.

    The seed is SHA-256 of `root`, the log's root when the commitment was its last of `size` leaves,
    and of `secret`, value `number` of the policy's hash chain (`paris_protocol.audit`).
    """

    number: Count
    size: Count
    root: Digest
    secret: Digest
    standing: Count
    rate: Real
    audited: bool
    segments: tuple[Count, ...]


class Challenge(Statement):
    """The coordinator asks a node to lay committed states open, until `deadline`."""

    TYPE: ClassVar[str] = "challenge"
    contribution: Digest
    node: KeyId
    states: tuple[Count, ...]
    attempt: Literal[1, 2]
    deadline: Time
    at: Time


class Opening(Statement):
    """A node's answer to a challenge: the states' files, which it then uploads."""

    TYPE: ClassVar[str] = "opening"
    challenge: Digest
    contribution: Digest
    states: tuple[OpenState, ...]


class Segment(Record):
    """One replayed segment: `rho` and `tensor` (the worst tensor's) against their limits.

    `exact` means that equal bits were demanded; the limits are then 0.
    """

    index: Count
    exact: bool
    rho: Real
    tensor: Real
    limit: Real
    tensor_limit: Real
    passed: bool


class AuditReport(Statement):
    """What an auditor found; `assignment` is the audit's own, None for the coordinator's replay."""

    TYPE: ClassVar[str] = "audit-report"
    contribution: Digest
    assignment: Digest | None
    auditor: KeyId
    numerics: Digest
    segments: tuple[Segment, ...]
    passed: bool
    at: Time


class Layer(Record):
    """One layer of the verdict: passed or the catalogue code, and its numbers."""

    layer: Literal["L0", "L1", "L2", "L3", "L4", "L5"]
    passed: bool
    code: Short
    numbers: tuple[Number, ...] = ()


class Verdict(Statement):
    """The coordinator's decision about a contribution, with its numbers and its audit draw."""

    TYPE: ClassVar[str] = "verdict"
    LATER = frozenset({"audit", "reports"})
    contribution: Digest
    assignment: Digest
    node: KeyId
    expert: Count
    round: Count
    accepted: bool
    code: Short
    layers: tuple[Layer, ...]
    policy: Count
    at: Time
    audit: Draw | None = None
    reports: tuple[Digest, ...] = ()


class MergeInput(Record):
    """One accepted contribution in a merge: its weight and clip scale, every bit of both."""

    contribution: Digest
    update: TensorFile
    weight: HexFloat
    scale: HexFloat


class Merge(Statement):
    """Turns accepted contributions into the next head; anyone can recompute it.

    Where the recipe has an `ema` and the merge is published, `average` is the running average
    after it, and `decay` = ema^(steps of the inputs together) the share of the one before in it.
    """

    TYPE: ClassVar[str] = "merge"
    MAX_BYTES: ClassVar[int] = 4 << 20
    LATER = frozenset({"average", "decay"})
    expert: Count
    round: Count
    parent: Head
    inputs: tuple[MergeInput, ...]
    result: TensorFile
    published: bool
    numbers: tuple[Number, ...]
    policy: Count
    at: Time
    average: TensorFile | None = None
    decay: HexFloat | None = None


class Revocation(Statement):
    """A key counts no more; `contributions` are those of its merged works that have not vested."""

    TYPE: ClassVar[str] = "revocation"
    MAX_BYTES: ClassVar[int] = 1 << 20
    key: KeyId
    reason: Short
    contributions: tuple[Digest, ...]
    at: Time


class Revert(Statement):
    """Takes merged inputs out of a head again: result = parent − Σ weight · scale · update.

    `removed` repeats the scalars with which they were merged. The head keeps its round.
    """

    TYPE: ClassVar[str] = "revert"
    MAX_BYTES: ClassVar[int] = 4 << 20
    expert: Count
    revocation: Digest
    parent: Head
    removed: tuple[MergeInput, ...]
    result: TensorFile
    numbers: tuple[Number, ...]
    policy: Count
    at: Time


class KeyRotation(Statement):
    """A node's key gives way to another; signed by the old key, `consent` by the new one.

    `consent`: hex Ed25519 signature of the new key over `paris_protocol.keys.rotation_text`.
    """

    TYPE: ClassVar[str] = "key-rotation"
    old: KeyId
    new: KeyId
    consent: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
    at: Time


class SecretSet(Statement):
    """Commits to the secret held-out clips of an expert before they judge anything.

    `root` is the Merkle root over SHA-256(salt || clip digest) in order.
    """

    TYPE: ClassVar[str] = "secret-set"
    expert: Count
    number: Count
    clips: Count
    root: Digest
    at: Time


class SecretSetOpened(Statement):
    """Opens a retired secret set: its salt and clips, and the losses' differences it gave.

    `scores`: for each contribution or merge judged by it, the mean difference and its error.
    """

    TYPE: ClassVar[str] = "secret-set-opened"
    MAX_BYTES: ClassVar[int] = 4 << 20
    set: Digest
    salt: Digest
    clips: tuple[Digest, ...]
    scores: tuple[tuple[Digest, Real, Real], ...]
    at: Time


class Withdrawal(Statement):
    """A clip is taken out of training: its shards are leased no more.

    `clip` is the SHA-256 of its row in the shards; `heads` are the merges that were trained on one
    of these shards. `reason` is the operator's.
    """

    TYPE: ClassVar[str] = "withdrawal"
    MAX_BYTES: ClassVar[int] = 1 << 20
    clip: Digest
    shards: tuple[Digest, ...]
    heads: tuple[Digest, ...]
    reason: Short
    at: Time


class ReleaseFile(Record):
    """One file of a release folder."""

    path: Path
    sha256: Digest
    size: Count


class ReleasedExpert(Record):
    """Which merge made the expert of a release, and the root of its tensors.

    They are the head's, or its average's where the recipe has an `ema`.
    """

    expert: Count
    merge: Digest | None
    root: Digest


class Release(Statement):
    """Lists every file of a release; one statement, so files cannot be mixed."""

    TYPE: ClassVar[str] = "release"
    MAX_BYTES: ClassVar[int] = 4 << 20
    number: Count
    previous: Digest | None
    files: tuple[ReleaseFile, ...]
    experts: tuple[ReleasedExpert, ...]
    router_root: Digest
    at: Time


class Index(Statement):
    """The coordinator's signed index: the truth about heads, policy, release and log."""

    TYPE: ClassVar[str] = "index"
    MAX_BYTES: ClassVar[int] = 1 << 20
    policy: Digest
    heads: tuple[Head, ...]
    release: Digest | None
    log_size: Count
    log_root: Digest
    finished: bool
    at: Time


# ---------------------------------------------------------------- requests (signed, not logged)


class LeaseRequest(Statement):
    """A node asks for work: what it can hold and what it has already.

    `plans` are those that it can train by, the preferred one first; none means float32.
    """

    TYPE: ClassVar[str] = "lease-request"
    LATER = frozenset({"plans"})
    at: Time
    version: Short
    name: Short
    device: Short
    memory_mb: Count
    disk_mb: Count
    cached: tuple[Digest, ...] = ()
    plans: tuple[Short, ...] = ()


class Beat(Statement):
    """A node says that it is alive and how far it is."""

    TYPE: ClassVar[str] = "beat"
    at: Time
    assignment: Digest | None
    step: Count
    state: Short


STATEMENTS: Final[tuple[type[Statement], ...]] = (
    Genesis,
    Policy,
    Registration,
    Assignment,
    Commitment,
    Contribution,
    Challenge,
    Opening,
    AuditReport,
    Verdict,
    Merge,
    Revocation,
    Revert,
    KeyRotation,
    SecretSet,
    SecretSetOpened,
    Withdrawal,
    Release,
    Index,
    LeaseRequest,
    Beat,
)
UNLOGGED: Final = frozenset({"index", "lease-request", "beat"})
LOGGED: Final = frozenset(kind.TYPE for kind in STATEMENTS) - UNLOGGED
