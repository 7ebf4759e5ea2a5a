"""The kit: everything that a node works with, opened from its state folder.

Refused: a folder without state (`state.missing`), with a damaged genesis (`state.corrupt`) or of
another network (`network.mismatch`)::

    kit = make_kit(folder, load_settings(folder), time.time)
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Final

from paris_node.config import Settings
from paris_node.journal import Journal
from paris_node.machine import Machine, RealMachine
from paris_node.training import TrainerProcess
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, load_key
from paris_protocol.net.control import Control, HttpControl
from paris_protocol.net.logs import LogMemory, LogPlace, follow
from paris_protocol.net.process import NetworkProcess
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import Swarm
from paris_protocol.records import Genesis

BOOTSTRAPS: Final = "bootstraps"
"""Fact in the journal: where the swarm is entered, as the last verified policy said."""
ALARM: Final = "alarm"
"""Fact in the journal: how the log contradicts what was seen of it before; empty if mended."""


@dataclass
class Kit:
    """What the jobs work with; put together by `make_kit`."""

    folder: Path
    settings: Settings
    version: str
    key: PrivateKey
    network: str
    genesis: Genesis
    journal: Journal
    store: BlobStore
    control: Control
    swarm: Swarm | None
    trainer: TrainerProcess
    machine: Machine
    clock: Callable[[], float]
    log: Logger
    join_swarm: Callable[[], Awaitable[None]] | None = None
    watch: Callable[[], Awaitable[None]] | None = None
    """Looks whether the public log still contains what was seen of it before."""
    registered: bool = False
    loss: float | None = None


def version() -> str:
    """The version of the installed distribution."""
    try:
        return importlib.metadata.version("paris-ddm")
    except importlib.metadata.PackageNotFoundError:
        return "0.1.0"


def make_kit(
    folder: Path, settings: Settings, clock: Callable[[], float], machine: Machine | None = None
) -> Kit:
    """Open everything that stands in the state folder; starts no process yet."""
    invite = settings.invite
    try:
        genesis = open_genesis((folder / "genesis.json").read_bytes(), invite.network)
    except FileNotFoundError as error:
        raise ParisError("state.missing", str(folder)) from error
    except ParisError as error:
        if error.code == "network.mismatch":
            raise
        raise ParisError("state.corrupt", f"{folder}/genesis.json: {error.sentence}") from error
    journal = Journal.open(folder / "journal.sqlite", genesis.id)
    quota = settings.quota_mb << 20 if settings.quota_mb else None
    return Kit(
        folder=folder,
        settings=settings,
        version=version(),
        key=load_key(folder / "key"),
        network=genesis.id,
        genesis=genesis.record,
        journal=journal,
        store=BlobStore(folder / "store", quota),
        control=HttpControl(invite.url, genesis.id, clock=clock),
        swarm=None,
        trainer=TrainerProcess(folder / "logs" / "trainer.log"),
        machine=machine or RealMachine(),
        clock=clock,
        log=logging.getLogger("paris.node"),
    )


async def join_swarm(kit: Kit) -> None:
    """Start the network process; a node without peers still works, by HTTPS alone."""
    if kit.swarm is not None:
        return
    options: dict[str, Any] = {}
    if kit.settings.listen:
        options["host_maddrs"] = list(kit.settings.listen)
    process = NetworkProcess(
        kit.store,
        kit.key,
        kit.network,
        bootstraps=json.loads(kit.journal.fact(BOOTSTRAPS) or "[]"),
        log=kit.folder / "logs" / "network.log",
        **options,
    )
    await process.start()
    own = {letter.blob for letter in kit.journal.letters() if letter.state == "waiting"}
    await process.announce([blob for blob in kit.store.ids() if blob not in own])
    kit.swarm = process


async def watch(kit: Kit) -> None:
    """Follow the public log; a contradiction to what was seen before is told until it is mended."""
    place, memory = LogPlace(f"{kit.settings.invite.url}/log"), LogMemory(kit.folder / "log")
    try:
        await asyncio.to_thread(follow, place, kit.network, memory, int(kit.clock()))
    except ParisError as error:
        kit.log.warning("log.watch", extra={"code": error.code, "detail": error.detail})
        if error.code in ("log.rollback", "log.split"):
            kit.journal.set_fact(ALARM, error.sentence)
        return
    if kit.journal.fact(ALARM):
        kit.log.info("log.mended")
        kit.journal.set_fact(ALARM, "")
