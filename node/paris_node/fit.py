"""What a unit of work needs, and under which training plan this machine could do it.

Pure arithmetic on a network's numbers, or on the built-in ladder of sizes when there is no network
yet, before anything is downloaded; estimates, and named so. Nothing here loads torch::

    need = need_of(LADDER["demo"], RecipeConfig(), tokens=54)
    need.memory_mb, need.fits(memory_mb=4000, disk_mb=20000)
    facts = facts_of("cpu", "CPU", free_mb=9000, ram_mb=9000, disk_mb=90_000, cores=8, links=HOME)
    config, work = ladder_work()["38M"]
    "\n".join(plan_lines({"38M": offers_of(config, work, facts)}, every=True))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from paris_models.config import LADDER, ExpertConfig, RecipeConfig
from paris_models.fitting import GIB, Facts, Offer, best, known, missed
from paris_models.plans import Work, update_bytes
from paris_protocol.records import Genesis, Policy

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
    codec: str = "dense-f32",
) -> Need:
    """The need of one unit in float32: `tokens` of video and text, `shard_bytes` of clips in it.

    Memory: parent, weights and gradients in float32, the optimiser (two moments; Muon one), the
    activations of a batch without recomputation, the clips, and the process itself.
    """
    p = expert.parameters
    moments = 1 if recipe.optimiser == "muon" else 2
    blocks = expert.double_blocks + expert.single_blocks
    live = recipe.batch * tokens * expert.width * blocks * ACTIVATIONS
    memory = 4 * (p * (3 + moments) + live) + 2 * shard_bytes
    head, update, state = 4 * p, update_bytes(codec, expert), 4 * p * (1 + moments)
    return Need(
        parameters=p,
        memory_mb=BASE_MB + _mb(memory),
        download_mb=_mb(head + shard_bytes),
        upload_mb=_mb(update),
        disk_mb=_mb(2 * head + 2 * state + 2 * update + shard_bytes),
    )


def need_of_network(genesis: Genesis, units: int = 1, codec: str = "dense-f32") -> Need:
    """The largest need of any unit, when a round deals a cluster's shards out to `units`."""
    shares = [
        sum(shard.file.blob.size for shard in cluster.shards) // max(1, units)
        for cluster in genesis.clusters
    ]
    expert = ExpertConfig.from_record(genesis.expert)
    latent = genesis.codec
    tokens = latent.frames * latent.height * latent.width // expert.patch**2 + genesis.text.length
    recipe = RecipeConfig.from_record(genesis.recipe)
    return need_of(expert, recipe, tokens=tokens, shard_bytes=max(shares, default=0), codec=codec)


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


# ---------------------------------------------------------------- plans


class Links(NamedTuple):
    """A line: megabits per second up and down."""

    up: float
    down: float


HOME: Final = Links(20.0, 100.0)
"""What is assumed of a line that nobody gave."""
CLIP_TOKENS: Final = (2304, 512)
"""Video and text tokens of the ladder's clip: 33 frames at 256 × 256 (science §7.1)."""
Report = Mapping[str, Sequence[Offer]]


def facts_of(
    kind: str, name: str, *, free_mb: int, ram_mb: int, disk_mb: int, cores: int, links: Links,
    gpus: int = 1, tflops: float | None = None,
) -> Facts:  # fmt: skip
    """A machine as `paris_models.fitting` wants it; without a measured rate, a table's.

    Raises `ValueError` for a line or a rate that is not positive.
    """
    cpu: Literal["cpu", "cuda"] = "cpu" if kind == "cpu" else "cuda"
    peak, watts = known("CPU" if cpu == "cpu" else name, cores)
    return Facts(
        name, cpu, free_mb << 20, ram_mb << 20, disk_mb << 20, links.up * 1e6, links.down * 1e6,
        peak if tflops is None else tflops, watts, measured=tflops is not None, gpus=gpus,
    )  # fmt: skip


def ladder_work() -> dict[str, tuple[ExpertConfig, Work]]:
    """The built-in sizes, each with a unit of single clips; the demo's clips are its own."""
    clip, demo = Work(*CLIP_TOKENS), Work(48, 6, batch=96)
    return {size: (expert, demo if size == "demo" else clip) for size, expert in LADDER.items()}


def codecs_of(policy: Policy) -> dict[str, str]:
    """How updates of each plan that a network takes cross the network, its own plan first."""
    own = {"float32": str(policy.update_codec)}
    return own | {rules.plan: str(rules.update_codec) for rules in policy.plans}


def work_of_network(
    genesis: Genesis,
    steps: int,
    units: int,
    codecs: Mapping[str, str],
    commit_every: int = 0,
) -> tuple[ExpertConfig, Work]:
    """A unit of a network: its clips' tokens, its batch, the largest share of a cluster's data."""
    shares = [
        sum(shard.file.blob.size for shard in cluster.shards) // max(1, units)
        for cluster in genesis.clusters
    ]
    expert, codec = ExpertConfig.from_record(genesis.expert), genesis.codec
    recipe = RecipeConfig.from_record(genesis.recipe)
    return expert, Work(
        tokens=codec.frames * codec.height * codec.width // expert.patch**2,
        text=genesis.text.length,
        batch=recipe.batch,
        steps=steps,
        commit_every=commit_every or steps,
        shard_bytes=max(shares, default=0),
        codecs=codecs,
        moments=1 if recipe.optimiser == "muon" else 2,
    )


def plan_lines(report: Report, *, every: bool) -> list[str]:
    """Per size the plan to train under and why not a better one; with `every`, all the plans."""
    head = f"{'size':10}{'plan':17}{'memory':>11}{'RAM':>8}{'s/step':>10}  {'per day':24}"
    lines = [f"{head} {'unit':>9}{'upload':>12}  {'audit':10} note"]
    for size, offers in report.items():
        chosen, better = best(offers), missed(offers)
        if every:
            lines += [_line(size, offer, offer.why or _mark(offer, chosen)) for offer in offers]
        elif chosen is None:
            lines.append(f"{size:10}{'none':17}{better.why if better else ''}")
        else:
            note = f"{better.plan.name} {better.why}" if better else "the best there is"
            lines.append(_line(size, chosen, note))
    return lines


def part_lines(offer: Offer) -> list[str]:
    """The memory of one plan by part, what an audit of it costs, and how it is saved."""
    need = offer.need
    rest = offer.device - need.device
    parts = (
        ("weights", need.weights), ("gradients", need.gradients), ("optimiser", need.optimiser),
        ("activations", need.activations), ("swap buffers", need.swap), ("process", rest),
    )  # fmt: skip
    saves = "whole steps only, a torn one is never written" if offer.plan.fused else "any step"
    return [
        *(f"  {name:14}{size / GIB:>9,.2f} GiB" for name, size in parts),
        f"  host memory   {offer.host / GIB:>9,.2f} GiB, disk {need.disk / GIB:,.2f} GiB",
        f"  audit         {offer.plan.audit}: opens {need.opening / 1e9:,.3f} GB, "
        f"{offer.opening_seconds:,.0f} s to upload; {offer.hash_seconds:,.1f} s of hashing a unit",
        f"  saves         {saves}",
    ]


def facts_json(offer: Offer) -> dict[str, Any]:
    """One plan of one size as plain values; bytes, seconds, GB and kWh."""
    need = offer.need
    parts = {
        "weights": need.weights, "gradients": need.gradients, "optimiser": need.optimiser,
        "activations": need.activations, "swap": need.swap, "process": offer.device - need.device,
    }  # fmt: skip
    return {
        "plan": offer.plan.name, "swap": offer.plan.swap, "audit": offer.plan.audit,
        "fits": offer.fits, "why": offer.why, "device_bytes": offer.device, "parts": parts,
        "host_bytes": offer.host, "disk_bytes": need.disk, "upload_bytes": need.upload,
        "download_bytes": need.download, "opening_bytes": need.opening,
        "hash_seconds": round(offer.hash_seconds, 3), "step_seconds": round(offer.seconds, 4),
        "unit_seconds": round(offer.unit_seconds, 1), "up_gb_day": round(offer.up_gb_day, 3),
        "down_gb_day": round(offer.down_gb_day, 3), "kwh_day": round(offer.kwh_day, 2),
    }  # fmt: skip


def _mark(offer: Offer, chosen: Offer | None) -> str:
    return "this one" if offer is chosen else "fits"


def _line(size: str, offer: Offer, note: str) -> str:
    plan = offer.plan.name + (f"+{offer.plan.swap}" if offer.plan.swap else "")
    day = f"{offer.up_gb_day:,.1f} GB up, {offer.kwh_day:.1f} kWh"
    memory, host = f"{offer.device / GIB:,.2f} GiB", f"{offer.host / GIB:,.1f}"
    step = f"{offer.seconds:,.2f}" if offer.seconds < 1000 else f"{offer.seconds:,.0f}"
    unit = f"{offer.unit_seconds / 3600:,.1f} h"
    upload = f"{offer.need.upload / 1e6:,.1f} MB"
    costs = f"{day:24} {unit:>9}{upload:>12}  {offer.plan.audit:10}"
    return f"{size:10}{plan:17}{memory:>11}{host:>8}{step:>10}  {costs} {note}"


def _mb(size: int) -> int:
    return -(-size // (1 << 20))
