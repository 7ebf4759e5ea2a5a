"""What `paris-node fit` prints: the plan for each size on this machine, and why not a better one.

The figures are `paris_node.fit`'s; this file asks the machine, reads the network's signed facts
where there is one, and downloads nothing else::

    show(folder, None, every=True, as_json=False, links=HOME, tflops=None)
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paris_models.config import ExpertConfig
from paris_models.fitting import best, offers_of
from paris_models.plans import Work
from paris_node import enrol
from paris_node.fit import (
    Links,
    Need,
    Report,
    codecs_of,
    facts_json,
    facts_of,
    ladder,
    ladder_work,
    need_of_network,
    part_lines,
    plan_lines,
    work_of_network,
)
from paris_node.machine import RealMachine
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError

STEPS = 500
"""Steps of a unit where no policy says it."""
Sizes = dict[str, tuple[ExpertConfig, Work]]


def show(
    folder: Path,
    network: str | None,
    *,
    every: bool,
    as_json: bool,
    links: Links,
    tflops: float | None,
) -> None:
    """Print the report of one network, of the enrolled one, or of the built-in sizes."""
    machine = RealMachine()
    sizes, needs = _sizes(folder, network, every)
    device, disk = machine.device("auto"), machine.disk_mb(folder)
    try:
        facts = facts_of(
            device.kind, device.name, free_mb=device.memory_mb, ram_mb=machine.memory_mb(),
            disk_mb=disk, cores=os.cpu_count() or 1, links=links, tflops=tflops,
        )  # fmt: skip
    except ValueError as error:
        raise ParisError("usage", str(error)) from error
    report = {size: offers_of(config, work, facts) for size, (config, work) in sizes.items()}
    states_mb = enrol.settings_for(folder, {}).states_mb
    if as_json:
        free = {"memory_mb": device.memory_mb, "disk_mb": disk, "states_mb": states_mb}
        rate = {"device": device.name, "tflops": facts.rate / 1e12, "measured": facts.measured}
        rows = [
            {"size": size, **asdict(need), "fits": need.fits(device.memory_mb, disk)}
            for size, need in needs.items()
        ]
        plans = {"plans": _plans(report), "links_mbit": links._asdict(), **rate}
        print(json.dumps({"version": 1, **free, **plans, "rows": rows}))
        return
    source = "measured" if facts.measured else "from a table"
    print(f"{device.name}: {device.memory_mb:,} MB memory and {disk:,} MB disk are free;")
    print(
        f"{facts.rate / 1e12:,.2f} TFLOP/s ({source}), {links.up:g} Mbit/s up, {links.down:g} down"
    )
    print(f"besides: up to {states_mb:,} MB of disk for states that an audit may ask for")
    print("\n".join(plan_lines(report, every=every)))
    chosen = best(next(iter(report.values()))) if len(report) == 1 else None
    if chosen is not None:
        print("\n".join(part_lines(chosen)))


def _sizes(folder: Path, network: str | None, every: bool) -> tuple[Sizes, dict[str, Need]]:
    """What is asked about: sizes with their work, and the needs of training as it is today."""
    if network is not None:
        import asyncio

        found = asyncio.run(enrol.find(network))
        record, plan = found.genesis.record, found.policy.plan
        policy, every_k = found.policy, found.policy.commit_every
        work = work_of_network(record, plan.steps, plan.units, codecs_of(policy), every_k)
        return {record.name: work}, {record.name: need_of_network(record)}
    if (folder / "genesis.json").exists() and not every:
        record = open_genesis((folder / "genesis.json").read_bytes()).record
        work = work_of_network(record, STEPS, 1, {"float32": "dense-f32"})
        return {record.name: work}, {record.name: need_of_network(record)}
    return ladder_work(), ladder()


def _plans(report: Report) -> list[dict[str, Any]]:
    return [
        {"size": size, **facts_json(offer), "chosen": offer is best(offers)}
        for size, offers in report.items()
        for offer in offers
    ]
