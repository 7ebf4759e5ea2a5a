"""Both swarms keep the contract: the double, and real libp2p processes on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.swarm_contract import Pair, SwarmContract
from paris_protocol.keys import PrivateKey, peer_id
from paris_protocol.net.process import LOOPBACK, NetworkProcess
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import MemoryHub, MemorySwarm, Swarm

NETWORK = "5a" * 32


async def memory(ours: BlobStore, theirs: BlobStore) -> tuple[Swarm, Swarm]:
    hub = MemoryHub()
    return MemorySwarm(hub, ours), MemorySwarm(hub, theirs)


async def libp2p(ours: BlobStore, theirs: BlobStore) -> tuple[Swarm, Swarm]:
    first, second = PrivateKey.generate(), PrivateKey.generate()
    there = NetworkProcess(theirs, first, NETWORK, host_maddrs=LOOPBACK)
    await there.start()
    status = await there.ready()
    assert status.peer == peer_id(first.id)
    roots = [f"{address}/p2p/{status.peer}" for address in status.addresses]
    here = NetworkProcess(ours, second, NETWORK, bootstraps=roots, host_maddrs=LOOPBACK)
    await here.start()
    await here.ready()
    return here, there


@pytest.fixture(scope="module", params=[memory, libp2p])
def pair(request: Any, tmp_path_factory: Any) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("swarm")
    stores = BlobStore(folder / "ours"), BlobStore(folder / "theirs")
    with asyncio.Runner() as runner:
        ours, theirs = runner.run(request.param(*stores))
        try:
            yield Pair(runner.run, ours, theirs, *stores)
        finally:
            for member in (ours, theirs, ours):
                runner.run(member.close())


class TestSwarm(SwarmContract):
    pass
