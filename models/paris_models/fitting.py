"""Which plan a machine can train under, what a day of it costs, and why a better plan is not it.

Pure: a machine is what somebody measured or a table says (`Facts`), and nothing here looks at the
one it runs on. A plan is offered when its memory, disk and time fit and an audit of it can be
answered over the given line::

    offers = offers_of(LADDER["paper"], Work(2304, 512), facts)
    best(offers).plan.name, best(offers).seconds               # adafactor, seconds per step
    offers[0].why                                              # "needs 238.2 GiB of memory, …"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from paris_models.config import ExpertConfig
from paris_models.plans import (
    PLANS,
    Need,
    Plan,
    Work,
    most_swap,
    moved_bytes,
    need_of,
    step_flops,
    with_swap,
)

GIB: Final = 1 << 30
DAY: Final = 86_400
PROCESS: Final = MappingProxyType(
    {
        ("cpu", "float32"): 430 << 20,
        ("cpu", "bfloat16"): 510 << 20,
        ("cuda", "float32"): 900 << 20,
        ("cuda", "bfloat16"): 900 << 20,
    }
)
"""What a training process takes of the device's memory before any weights: on the CPU interpreter,
libraries and their scratch (measured), on a GPU context and workspaces (estimated)."""
HOST_PROCESS: Final = 3 * GIB
"""What it takes of host memory beside a GPU (estimated)."""
SPARE: Final = 0.05
"""Part of the activations that the allocator's rounding may cost on top."""
SHARE: Final = 0.4
"""Part of a table's peak that a training step reaches; a measured rate is taken as it is."""
BUS: Final = 20e9
"""Bytes per second between host and device, 16 lanes of the fourth generation (estimated)."""
HASH_RATE: Final = 1.2e9
"""Bytes per second of SHA-256 and the Merkle root above it on one core (measured)."""
TOO_MUCH: Final = 4.0
LONGEST_UNIT: Final = 7 * DAY
LONGEST_TRANSFER: Final = DAY
HASH_SHARE: Final = 0.1
HASH_FREE: Final = 60
"""Limits of what is offered: a week for a unit, a day for a hand-in or for an opening, a tenth of
the unit's time for commitments that take more than a minute."""

DEVICES: Final[tuple[tuple[str, float, float], ...]] = (
    ("H200", 989, 700), ("H100", 989, 700), ("A100", 312, 400), ("L40S", 362, 350),
    ("A6000", 155, 300), ("L4", 121, 72), ("T4", 65, 70), ("5090", 209, 575), ("4090", 165, 450),
    ("4080", 97, 320), ("4070", 58, 200), ("3090", 71, 350), ("3080", 60, 320), ("3060", 25, 170),
)  # fmt: skip
"""Part of a device's name, its makers' dense 16-bit TFLOP/s, and its watts."""
UNKNOWN_GPU: Final = (20.0, 200.0)
CPU_CORE: Final = (0.06, 12.0)
"""TFLOP/s and watts of one CPU core."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A machine: free bytes on the device, in RAM and on disk, bits per second, TFLOP/s, watts.

    `measured` says that `tflops` is what a step reached; otherwise it is a table's peak, of which
    `SHARE` counts. With several GPUs each trains a unit of its own: RAM, disk and lines are shared.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    device: int
    ram: int
    disk: int
    up: float
    down: float
    tflops: float
    watts: float
    measured: bool = False
    gpus: int = 1

    def __post_init__(self) -> None:
        if min(self.up, self.down, self.tflops, self.watts) <= 0 or self.gpus < 1:
            raise ValueError("links, TFLOP/s, watts and GPUs of a machine must be positive")

    @property
    def rate(self) -> float:
        """FLOPs per second of a step."""
        return self.tflops * 1e12 * (1.0 if self.measured else SHARE)


@dataclass(frozen=True, slots=True)
class Offer:
    """One plan on one machine; `why` is empty when it fits, else the first thing that forbids it.

    `device` and `host` are bytes with everything; seconds per step, of a unit with its transfers,
    of an opening's upload and of hashing; GB and kWh of a day; GPUs of a machine are counted in.
    """

    plan: Plan
    need: Need
    device: int
    host: int
    seconds: float
    unit_seconds: float
    opening_seconds: float
    hash_seconds: float
    up_gb_day: float
    down_gb_day: float
    kwh_day: float
    why: str

    @property
    def fits(self) -> bool:
        """Whether it can be offered."""
        return not self.why


def known(name: str, cores: int) -> tuple[float, float]:
    """Peak TFLOP/s and watts of a device by its name; `cores` counts for "CPU"."""
    if name.startswith("CPU"):
        return CPU_CORE[0] * cores, CPU_CORE[1] * cores
    found = (row[1:] for row in DEVICES if row[0] in name)
    return next(found, UNKNOWN_GPU)


def offers_of(
    config: ExpertConfig, work: Work, facts: Facts, plans: Iterable[Plan] = PLANS.values()
) -> list[Offer]:
    """These plans on this machine, best first, with as few blocks swapped as will do.

    A plan that waits for the bus so long that another full plan does `TOO_MUCH` times its steps in
    the same time is not worth its better optimiser.
    """
    offers = [_least_swap(plan, config, work, facts) for plan in plans]
    full = [offer for offer in offers if offer.fits and not offer.plan.rank]
    quick = min(full, key=lambda offer: offer.seconds, default=None)
    for at, offer in enumerate(offers):
        if quick and offer in full and offer.seconds > TOO_MUCH * quick.seconds:
            times = f"{offer.seconds / quick.seconds:,.0f} times that of {quick.plan.name}"
            offers[at] = replace(offer, why=f"a step takes {_time(offer.seconds)}, {times}")
    return offers


def best(offers: Sequence[Offer]) -> Offer | None:
    """The best plan that fits, or none."""
    return next((offer for offer in offers if offer.fits), None)


def missed(offers: Sequence[Offer]) -> Offer | None:
    """The next better plan than the best that fits, which its `why` forbids; the last of all when
    none fits."""
    chosen = best(offers)
    at = len(offers) if chosen is None else offers.index(chosen)
    return offers[at - 1] if at else None


def offer_of(plan: Plan, config: ExpertConfig, work: Work, facts: Facts) -> Offer:
    """One plan, with exactly its number of swapped blocks, on one machine."""
    need = need_of(plan, config, work)
    on_device = need.device + int(SPARE * need.activations) + PROCESS[facts.kind, plan.compute]
    host = need.host + HOST_PROCESS
    if facts.kind == "cpu":  # one memory is both
        on_device, host = on_device + need.host, 0
    line_up, line_down = facts.up / facts.gpus, facts.down / facts.gpus
    seconds = max(
        step_flops(plan, config, work) / facts.rate,
        0.0 if facts.kind == "cpu" else moved_bytes(plan, config) / BUS,
    )
    hashing = need.hashed / HASH_RATE
    transfers = 8 * need.upload / line_up + 8 * need.download / line_down
    unit = work.steps * seconds + transfers + hashing
    units_a_day = facts.gpus * DAY / unit
    offer = Offer(
        plan, need, on_device, host, seconds, unit,
        opening_seconds=8 * need.opening / line_up, hash_seconds=hashing,
        up_gb_day=units_a_day * need.upload / 1e9, down_gb_day=units_a_day * need.download / 1e9,
        kwh_day=facts.watts * facts.gpus * 24 / 1000, why="",
    )  # fmt: skip
    why = _short_of_space(offer, facts) or _too_slow(offer, work, facts)
    return replace(offer, why=why)


def _least_swap(plan: Plan, config: ExpertConfig, work: Work, facts: Facts) -> Offer:
    """The plan as it is, or with the fewest blocks swapped that make it fit the device."""
    offer = offer_of(plan, config, work, facts)
    if facts.kind == "cpu" or offer.device <= facts.device:
        return offer
    for blocks in range(1, most_swap(plan, config) + 1):
        offer = offer_of(with_swap(plan, blocks), config, work, facts)
        if offer.device <= facts.device:
            break
    return offer


def _short_of_space(offer: Offer, facts: Facts) -> str:
    where = "memory" if facts.kind == "cpu" else "GPU memory"
    swapped = f" with {offer.plan.swap} blocks swapped" if offer.plan.swap else ""
    for what, wanted, free in (
        (where + swapped, offer.device, facts.device),
        ("host memory", offer.host, facts.ram // facts.gpus),
        ("disk", offer.need.disk, facts.disk // facts.gpus),
    ):
        if wanted > free:
            return f"needs {wanted / GIB:,.1f} GiB of {what}, {max(0, free) / GIB:,.1f} are free"
    return ""


def _too_slow(offer: Offer, work: Work, facts: Facts) -> str:
    hand_in = 8 * offer.need.upload * facts.gpus / facts.up
    if offer.unit_seconds > LONGEST_UNIT:
        return f"a unit of {work.steps} steps takes {_time(offer.unit_seconds)}, a week is the most"
    if hand_in > LONGEST_TRANSFER:
        return f"handing in takes {_time(hand_in)} on this line, a day is the most"
    if offer.opening_seconds > LONGEST_TRANSFER:
        return (
            f"an audit's opening takes {_time(offer.opening_seconds)} to upload, a day is the most"
        )
    if offer.hash_seconds > max(HASH_FREE, HASH_SHARE * offer.unit_seconds):
        return f"commitments take {_time(offer.hash_seconds)} of hashing, over a tenth of the unit"
    return ""


def _time(seconds: float) -> str:
    for size, name in ((DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} seconds"
