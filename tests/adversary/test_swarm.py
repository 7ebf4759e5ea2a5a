"""Row "DHT poisoning / eclipse": peers are a hint, a signed reference says what bytes must be."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from nodeworld import NODE, Office, digest, make_kit
from paris_node.jobs import Jobs, check_lease
from paris_node.volunteer import Phase
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.net.fetch import fetch_blob
from paris_protocol.net.memory import MemoryControl
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import MemoryHub, MemorySwarm, Provider
from paris_protocol.records import Assignment, Head, TensorFile

DATA = bytes(range(256)) * 4096 * 9  # three pieces


def victim(folder: Path, hub: MemoryHub) -> tuple[BlobStore, MemorySwarm, MemoryControl, Office]:
    office = Office()
    store = BlobStore(folder / "victim")
    return store, MemorySwarm(hub, store), office.control, office


class Liar(MemorySwarm):
    """Announces whatever is asked for and serves bytes of its own."""

    def __init__(self, hub: MemoryHub, store: BlobStore, blob: Any, data: bytes) -> None:
        super().__init__(hub, store)
        self.announced = {blob.id}
        self.asked = 0
        self._data = data

    def spoil(self, data: bytes) -> bytes:
        self.asked += 1
        return self._data


@pytest.mark.parametrize("bytes_of_the_liar", [b"", b"x" * 10, b"x" * (4 << 20)])
def test_wrong_bytes_from_every_peer_end_at_the_coordinator(
    tmp_path: Path, bytes_of_the_liar: bytes
) -> None:
    async def life() -> None:
        hub = MemoryHub()
        store, swarm, control, _ = victim(tmp_path, hub)
        ref = control.add_blob(DATA)
        seeded = BlobStore(tmp_path / "liar")
        seeded.add_file(_file(tmp_path))
        liars = [Liar(hub, seeded, ref, bytes_of_the_liar) for _ in range(4)]
        path = await asyncio.wait_for(
            fetch_blob(ref, store, swarm, control, stall=0.2, patience=5.0), 30
        )
        assert path.read_bytes() == DATA
        assert any(liar.asked for liar in liars), "the liars were believed to have it"
        assert any(asked.startswith("piece") for asked in control.asked)
        assert swarm.received == 0

    asyncio.run(life())


def _file(folder: Path) -> Path:
    path = folder / "data"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("fault", ["corrupt", "absent", "silent"])
def test_an_eclipsed_node_works_on_from_the_coordinator(tmp_path: Path, fault: str) -> None:
    """Every peer that the node can see is the attacker's; an honest one changes nothing."""

    async def life(with_honest: bool) -> int:
        hub = MemoryHub()
        store, swarm, control, _ = victim(tmp_path / f"{with_honest}", hub)
        ref = control.add_blob(DATA)
        sources = ["", *[fault] * 3] if with_honest else [fault] * 3
        for number, kind in enumerate(sources):
            other = BlobStore(tmp_path / f"{with_honest}" / f"other{number}")
            other.add_file(_file(tmp_path))
            await MemorySwarm(hub, other, kind).announce([ref.id])
        path = await fetch_blob(ref, store, swarm, control, stall=0.2, patience=5.0)
        assert path.read_bytes() == DATA
        return swarm.received

    assert asyncio.run(life(with_honest=False)) == 0
    assert asyncio.run(life(with_honest=True)) > 0, "the honest twin's pieces are taken"


def test_peers_that_do_not_exist_cost_no_more_than_the_patience(tmp_path: Path) -> None:
    class Ghosts(MemorySwarm):
        async def providers(self, blob_id: str) -> list[Provider]:
            return [Provider(f"12D3KooW{'x' * 40}{i}", ("/ip4/10.0.0.1/tcp/1",)) for i in range(99)]

    async def life() -> None:
        hub = MemoryHub()
        store, _, control, _ = victim(tmp_path, hub)
        ref = control.add_blob(DATA)
        fetching = fetch_blob(ref, store, Ghosts(hub, store), control, stall=0.2, patience=5.0)
        assert (await asyncio.wait_for(fetching, 30)).read_bytes() == DATA

    asyncio.run(life())


def test_a_lease_that_was_not_signed_by_the_network_is_no_work(tmp_path: Path) -> None:
    """Whoever sits between node and coordinator cannot give work, nor mix clusters if he could."""
    office = Office()
    kit = make_kit(tmp_path / "node", office)
    jobs = Jobs(kit)
    honest = office.assignment(0, NODE.id)
    forged = seal(honest.record, NODE, office.network)
    real = office.control.handlers["lease"]

    async def life() -> None:
        office.control.handlers["lease"] = lambda raw: {"assignment": json.loads(forged.raw)}
        with pytest.raises(ParisError) as caught:
            await jobs.ask()
        assert caught.value.code == "record.signer"
        office.control.handlers["lease"] = real
        unit = await jobs.ask()
        await jobs.run(Phase.LEASED, unit, lambda step: None)

    asyncio.run(life())
    kit.journal.close()
    genesis = office.genesis.record
    foreign = genesis.clusters[1].shards[:1]
    weights = TensorFile(blob=genesis.initial.blob, root=digest("another root"))
    for changes, code in (
        ({"node": "ed25519:" + "a" * 64}, "unit.not-yours"),
        ({"shards": foreign}, "structure.lineage"),
        ({"parent": Head(round=0, weights=weights)}, "structure.lineage"),
        ({"expert": 7}, "structure.lineage"),
    ):
        lease: Assignment = honest.record.model_copy(update=changes)
        with pytest.raises(ParisError) as caught:
            check_lease(lease, NODE.id, genesis)
        assert caught.value.code == code
    check_lease(honest.record, NODE.id, genesis)
