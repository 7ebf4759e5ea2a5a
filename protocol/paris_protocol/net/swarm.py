"""What a node asks of its peers: who holds a blob, and one piece of it. A hint, never the truth.

`Swarm` is the interface; `MemorySwarm` is its double inside one process, `process.NetworkProcess`
the real one. Pieces are verified against the manifest before they are returned; a peer that is
absent, silent or lies is `blob.missing` or `blob.corrupt` of that peer, and another one is asked::

    hub = MemoryHub()
    ours, theirs = MemorySwarm(hub, our_store), MemorySwarm(hub, their_store)
    await theirs.announce([ref.id])
    piece = await ours.fetch_piece((await ours.providers(ref.id))[0], ref, 0)
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from paris_protocol.blobs import Manifest
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import BlobRef

IDLE: Final = 10.0
"""Seconds of silence after which a peer is given up."""


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that says it holds a blob: libp2p PeerID and multiaddresses."""

    peer: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SwarmStatus:
    """How the swarm is doing: `alive` is false while the network process is being restarted."""

    alive: bool
    peer: str = ""
    addresses: tuple[str, ...] = ()
    known: int = 0
    bootstraps: int = 0
    announced: int = 0
    received: int = 0
    sent: int = 0
    restarts: int = 0
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain form for logs and `--json`."""
        return {name: getattr(self, name) for name in self.__slots__}


class Swarm(Protocol):
    """Exchange of blobs among peers."""

    async def announce(self, blob_ids: Collection[str]) -> None:
        """Keep telling the peers that these blobs are here, for as long as the store has them."""

    async def providers(self, blob_id: str) -> list[Provider]:
        """Peers that say they hold the blob, without ourselves; empty when nobody knows."""

    async def fetch_manifest(self, provider: Provider, ref: BlobRef, idle: float = IDLE) -> bytes:
        """The manifest that `ref` names, verified; `blob.missing` or `blob.corrupt`."""

    async def fetch_piece(
        self, provider: Provider, ref: BlobRef, i: int, idle: float = IDLE
    ) -> bytes:
        """Piece `i`, verified against the manifest in our own store, which must be there."""

    async def status(self) -> SwarmStatus:
        """How the swarm is doing; never raises."""

    async def close(self) -> None:
        """Leave the swarm; idempotent."""


@dataclass
class MemoryHub:
    """Where memory swarms meet."""

    members: dict[str, MemorySwarm] = field(default_factory=dict)
    joined: int = 0


class MemorySwarm:
    """The swarm inside one process, with faults on request.

    `fault` makes this member a bad provider: `silent` never answers, `corrupt` flips a byte,
    `absent` says that it has nothing.
    """

    def __init__(self, hub: MemoryHub, store: BlobStore, fault: str = "") -> None:
        self.hub = hub
        self.store = store
        self.fault = fault
        self.served = 0
        hub.joined += 1
        self.peer = f"memory-{hub.joined}"
        self.announced: set[str] = set()
        self.received = 0
        hub.members[self.peer] = self

    async def announce(self, blob_ids: Collection[str]) -> None:
        """See `Swarm`."""
        self.announced.update(blob_ids)

    async def providers(self, blob_id: str) -> list[Provider]:
        """See `Swarm`."""
        return [
            Provider(peer)
            for peer, member in self.hub.members.items()
            if member is not self and blob_id in member.announced
        ]

    async def fetch_manifest(self, provider: Provider, ref: BlobRef, idle: float = IDLE) -> bytes:
        """See `Swarm`."""
        member = await self._member(provider, ref, idle)
        raw = member.spoil(member.store.manifest(ref.id).raw)
        return Manifest.parse(raw, ref).raw

    async def fetch_piece(
        self, provider: Provider, ref: BlobRef, i: int, idle: float = IDLE
    ) -> bytes:
        """See `Swarm`."""
        manifest = self.store.manifest(ref.id)
        member = await self._member(provider, ref, idle)
        data = member.spoil(member.store.read_piece(ref.id, i))
        manifest.check_piece(i, data)
        member.served += 1
        self.received += len(data)
        return data

    async def status(self) -> SwarmStatus:
        """See `Swarm`."""
        return SwarmStatus(
            alive=self.peer in self.hub.members,
            peer=self.peer,
            known=len(self.hub.members) - 1,
            announced=len(self.announced),
            received=self.received,
        )

    async def close(self) -> None:
        """See `Swarm`."""
        self.hub.members.pop(self.peer, None)

    async def _member(self, provider: Provider, ref: BlobRef, idle: float) -> MemorySwarm:
        member = self.hub.members.get(provider.peer)
        if member is None or member.fault == "absent":
            raise ParisError("blob.missing", f"{provider.peer} does not answer")
        if ref.id not in member.announced:  # only what was announced is given away
            raise ParisError("blob.missing", f"{provider.peer} does not have it")
        if member.fault == "silent":
            await asyncio.sleep(idle)
            raise ParisError("blob.missing", f"{provider.peer} is silent")
        return member

    def spoil(self, data: bytes) -> bytes:
        """The data as this member sends them."""
        return data[:-1] + bytes([data[-1] ^ 1]) if self.fault == "corrupt" and data else data
