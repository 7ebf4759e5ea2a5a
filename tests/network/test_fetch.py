"""Fetching and uploading blobs: who is asked, what happens when they fail, and resuming."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contracts.control_contract import coordinator
from contracts.store_contract import blob, pieces
from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.errors import ParisError
from paris_protocol.net.control import Control
from paris_protocol.net.fetch import fetch_blob, upload_blob
from paris_protocol.net.memory import MemoryControl
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import MemoryHub, MemorySwarm, Provider, Swarm
from paris_protocol.records import BlobRef
from protocol.world import World

DATA = blob(3 * PIECE + 17)
MANIFEST = Manifest.build([DATA])
REF = MANIFEST.ref
STALL = 0.3


class Place:
    """One fetcher, some peers that hold the blob (with faults), and a coordinator."""

    def __init__(self, folder: Path, *faults: str, coordinator_has: bool = True) -> None:
        self.hub = MemoryHub()
        self.store = BlobStore(folder / "ours")
        self.swarm = MemorySwarm(self.hub, self.store)
        self.peers = []
        for i, fault in enumerate(faults):
            store = BlobStore(folder / f"peer{i}")
            peer = MemorySwarm(self.hub, store, fault)
            peer.announced.add(store.add_bytes(DATA).id)
            self.peers.append(peer)
        self.control = coordinator(World())
        if coordinator_has:
            self.control.add_blob(DATA)

    def fetch(self, **options: Any) -> Path:
        async def main() -> Path:
            return await fetch_blob(
                REF, self.store, self.swarm, self.control, **{"stall": STALL, **options}
            )

        return asyncio.run(main())

    def asked(self, what: str = "") -> int:
        return sum(what in line for line in self.control.asked)


def test_peers_come_first_and_share(tmp_path: Path) -> None:
    place = Place(tmp_path, "", "")
    seen: list[tuple[int, int]] = []
    path = place.fetch(progress=lambda here, size: seen.append((here, size)))
    assert path.read_bytes() == DATA
    assert place.asked() == 0
    assert sum(peer.served for peer in place.peers) == 4
    assert all(peer.served for peer in place.peers)
    assert seen[-1] == (len(DATA), len(DATA)) and seen == sorted(seen)
    place.fetch()  # it is here
    assert sum(peer.served for peer in place.peers) == 4


@pytest.mark.parametrize("fault", ["silent", "absent", "corrupt"])
def test_the_coordinator_helps_when_the_only_peer_fails(tmp_path: Path, fault: str) -> None:
    place = Place(tmp_path, fault)
    began = time.monotonic()
    assert place.fetch().read_bytes() == DATA
    assert time.monotonic() - began < 10
    assert place.asked("piece") >= 4 and place.peers[0].served == 0


@pytest.mark.parametrize("fault", ["silent", "absent", "corrupt"])
def test_good_peers_make_up_for_bad_ones(tmp_path: Path, fault: str) -> None:
    place = Place(tmp_path, fault, "", fault)
    assert place.fetch().read_bytes() == DATA
    assert place.asked("piece") == 0 and place.peers[1].served == 4


def test_without_a_swarm_the_coordinator_gives_all(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> Path:
        return await fetch_blob(REF, place.store, None, place.control)

    assert asyncio.run(main()).read_bytes() == DATA


def test_with_the_coordinator_away_peers_suffice(tmp_path: Path) -> None:
    place = Place(tmp_path, "")
    place.control.down = True
    assert place.fetch().read_bytes() == DATA


def test_a_coordinator_that_returns_is_used(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.control.down = True

    async def main() -> Path:
        asyncio.get_running_loop().call_later(0.5, lambda: setattr(place.control, "down", False))
        return await fetch_blob(REF, place.store, place.swarm, place.control, stall=STALL)

    assert asyncio.run(main()).read_bytes() == DATA


def test_a_peer_that_comes_later_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("paris_protocol.net.fetch.LOOK_AGAIN", 0.2)
    place = Place(tmp_path, "", coordinator_has=False)
    place.store.put_manifest(MANIFEST.raw, REF)
    peer = place.peers[0]
    peer.announced.clear()

    async def main() -> Path:
        asyncio.get_running_loop().call_later(0.5, lambda: peer.announced.add(REF.id))
        return await fetch_blob(REF, place.store, place.swarm, place.control, stall=STALL)

    assert asyncio.run(main()).read_bytes() == DATA


def test_when_nobody_has_it_patience_ends(tmp_path: Path) -> None:
    for faults in ((), ("silent",), ("corrupt",)):
        place = Place(tmp_path / "-".join(["x", *faults]), *faults, coordinator_has=False)
        began = time.monotonic()
        with pytest.raises(ParisError) as caught:
            place.fetch(patience=0.5)
        assert caught.value.code == "blob.missing"
        assert time.monotonic() - began < 5
        assert place.store.used() == 0


class Lying(MemoryControl):
    """A coordinator whose pieces are wrong."""

    async def piece(self, ref: BlobRef, i: int, timeout: float = 1.0) -> bytes:
        return b"x" + (await super().piece(ref, i, timeout))[1:]


def test_when_all_sources_lie_the_data_are_corrupt(tmp_path: Path) -> None:
    world = World()
    control = Lying(world.genesis.raw)
    control.add_blob(DATA)
    store = BlobStore(tmp_path)

    async def main() -> None:
        await fetch_blob(REF, store, None, control, stall=STALL)

    with pytest.raises(ParisError) as caught:
        asyncio.run(main())
    assert caught.value.code == "blob.corrupt"
    assert store.missing(REF) == [0, 1, 2, 3]


class Slow:
    """A swarm whose one peer sends a piece in `seconds`."""

    def __init__(self, swarm: MemorySwarm, seconds: float) -> None:
        self.swarm, self.seconds = swarm, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.swarm, name)

    async def fetch_piece(
        self, provider: Provider, ref: BlobRef, i: int, idle: float = 1.0
    ) -> bytes:
        await asyncio.sleep(self.seconds)
        return await self.swarm.fetch_piece(provider, ref, i, idle)


def fetch_with(place: Place, swarm: Swarm | None, control: Control) -> Path:
    async def main() -> Path:
        return await fetch_blob(REF, place.store, swarm, control, stall=STALL)

    return asyncio.run(main())


def test_slow_is_better_than_never(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("paris_protocol.net.fetch.FLOOR", 1 << 40)
    place = Place(tmp_path, "", coordinator_has=False)
    slow: Any = Slow(place.swarm, 1.5 * STALL)
    assert fetch_with(place, slow, place.control).read_bytes() == DATA


def test_a_slow_source_that_speaks_is_not_cut_off(tmp_path: Path) -> None:
    place = Place(tmp_path, "")
    slow: Any = Slow(place.swarm, 1.5 * STALL)
    assert fetch_with(place, slow, place.control).read_bytes() == DATA
    assert place.asked() == 0 and place.peers[0].served == 4


def test_a_source_that_drips_is_overtaken(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("paris_protocol.net.fetch.FLOOR", 1 << 40)
    place = Place(tmp_path, "")
    drips: Any = Slow(place.swarm, 600)
    began = time.monotonic()
    assert fetch_with(place, drips, place.control).read_bytes() == DATA
    assert place.asked("piece") >= 4 and time.monotonic() - began < 10


def test_what_is_here_already_is_not_fetched_again(tmp_path: Path) -> None:
    place = Place(tmp_path, "")
    place.store.put_manifest(MANIFEST.raw, REF)
    for i in (0, 2, 3):
        place.store.put_piece(REF, i, pieces(MANIFEST, DATA)[i])
    seen: list[int] = []
    assert place.fetch(progress=lambda here, _: seen.append(here)).read_bytes() == DATA
    assert place.peers[0].served == 1 and seen == [len(DATA)]


def test_an_interrupted_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    place = Place(tmp_path, coordinator_has=True)

    async def main() -> None:
        half = asyncio.Event()
        task = asyncio.create_task(
            fetch_blob(REF, place.store, None, place.control, progress=lambda *_: half.set())
        )
        await half.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    left = len(place.store.missing(REF))
    place.control.asked.clear()
    assert place.fetch().read_bytes() == DATA
    assert place.asked("piece") == left


def test_a_damaged_blob_is_fetched_again(tmp_path: Path) -> None:
    place = Place(tmp_path, "")
    path = place.fetch()
    path.write_bytes(DATA[:-1] + b"?")
    assert place.fetch().read_bytes() == DATA


def test_a_full_disk_ends_it_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    place = Place(tmp_path, "")
    place.store.put_manifest(MANIFEST.raw, REF)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ParisError) as caught:
            place.fetch()
    assert caught.value.code == "disk.full" and place.store.missing(REF) == [0, 1, 2, 3]
    assert place.fetch().read_bytes() == DATA


def test_the_quota_ends_it_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path, "")
    place.store.quota = PIECE
    with pytest.raises(ParisError) as caught:
        place.fetch()
    assert caught.value.code == "disk.quota"


@pytest.mark.parametrize("size", [0, 1, PIECE])
def test_odd_sizes(tmp_path: Path, size: int) -> None:
    place = Place(tmp_path)
    ref = place.control.add_blob(blob(size))

    async def main() -> Path:
        return await fetch_blob(ref, place.store, place.swarm, place.control, stall=STALL)

    assert asyncio.run(main()).read_bytes() == blob(size)


# ---------------------------------------------------------------- uploads


def upload(place: Place, missing: Callable[[], list[int]]) -> None:
    asyncio.run(upload_blob(REF, place.store, place.control, missing()))


def test_an_upload_sends_only_what_is_missing(tmp_path: Path) -> None:
    place = Place(tmp_path, coordinator_has=False)
    place.store.add_bytes(DATA)
    place.control.want(REF)
    upload(place, lambda: place.control.missing(REF))
    assert place.control.missing(REF) == [] and place.asked("put piece") == 4
    place.control.asked.clear()
    upload(place, lambda: place.control.missing(REF))
    assert place.asked() == 0


def test_an_upload_goes_on_where_it_was(tmp_path: Path) -> None:
    place = Place(tmp_path, coordinator_has=False)
    place.store.add_bytes(DATA)
    place.control.want(REF)
    real, calls = place.control.put_piece, 0

    async def failing(ref: BlobRef, i: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ParisError("network.down")
        return await real(ref, i, data)

    place.control.put_piece = failing  # type: ignore[method-assign]
    with pytest.raises(ParisError) as caught:
        upload(place, lambda: place.control.missing(REF))
    assert caught.value.code == "network.down" and place.control.missing(REF) == [2, 3]
    upload(place, lambda: place.control.missing(REF))
    assert place.control.missing(REF) == [] and calls == 5


def test_the_coordinator_may_refuse_an_upload(tmp_path: Path) -> None:
    place = Place(tmp_path, coordinator_has=False)
    place.store.add_bytes(DATA)
    with pytest.raises(ParisError) as caught:
        upload(place, lambda: [0, 1, 2, 3])
    assert caught.value.code == "blob.missing" and place.asked("put piece") == 0
