"""What every swarm keeps to, seen from one member (`ours`) with one other (`theirs`)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import Provider, Swarm
from paris_protocol.records import BlobRef

T = TypeVar("T")


@dataclass
class Pair:
    """Two members of one swarm, their stores, and how to run a coroutine with them."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    ours: Swarm
    theirs: Swarm
    our_store: BlobStore
    their_store: BlobStore


def fresh(name: str, size: int = PIECE + 321) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


async def until(ask: Callable[[], Awaitable[T]], limit: float = 20.0) -> T:
    """The first answer that is true."""
    async with asyncio.timeout(limit):
        while not (answer := await ask()):
            await asyncio.sleep(0.05)
        return answer


class SwarmContract:
    """A fixture `pair` gives the members; it may serve all tests."""

    async def _offered(self, pair: Pair, data: bytes) -> tuple[BlobRef, Provider]:
        ref = pair.their_store.add_bytes(data)
        await pair.theirs.announce([ref.id])
        await pair.theirs.announce([ref.id])
        return ref, (await until(lambda: pair.ours.providers(ref.id)))[0]

    def test_what_is_announced_is_found_and_comes_whole(self, pair: Pair) -> None:
        async def body() -> None:
            data = fresh("whole")
            ref, provider = await self._offered(pair, data)
            assert len(await pair.ours.providers(ref.id)) == 1
            raw = await pair.ours.fetch_manifest(provider, ref)
            manifest = pair.our_store.put_manifest(raw, ref)
            for i in range(len(manifest.pieces)):
                piece = await pair.ours.fetch_piece(provider, ref, i)
                pair.our_store.put_piece(ref, i, piece)
            assert pair.our_store.path(ref).read_bytes() == data
            assert (await pair.ours.status()).received >= len(data)

        pair.run(body())

    def test_nobody_has_what_nobody_announced(self, pair: Pair) -> None:
        async def body() -> None:
            secret = pair.their_store.add_bytes(fresh("secret"))
            assert await pair.ours.providers(secret.id) == []
            _, provider = await self._offered(pair, fresh("open"))
            with pytest.raises(ParisError) as caught:
                await pair.ours.fetch_manifest(provider, secret)
            assert caught.value.code == "blob.missing"
            pair.our_store.put_manifest(pair.their_store.manifest(secret.id).raw, secret)
            with pytest.raises(ParisError) as caught:
                await pair.ours.fetch_piece(provider, secret, 0)
            assert caught.value.code == "blob.missing"

        pair.run(body())

    def test_we_are_not_our_own_source(self, pair: Pair) -> None:
        async def body() -> None:
            ref = pair.our_store.add_bytes(fresh("own"))
            await pair.ours.announce([ref.id])
            assert await until(lambda: pair.theirs.providers(ref.id))
            assert await pair.ours.providers(ref.id) == []

        pair.run(body())

    def test_without_our_manifest_no_piece_is_taken(self, pair: Pair) -> None:
        async def body() -> None:
            ref, provider = await self._offered(pair, fresh("no manifest"))
            with pytest.raises(ParisError) as caught:
                await pair.ours.fetch_piece(provider, ref, 0)
            assert caught.value.code == "blob.missing"

        pair.run(body())

    def test_data_that_rotted_there_do_not_come(self, pair: Pair) -> None:
        async def body() -> None:
            data = fresh("rot")
            ref, provider = await self._offered(pair, data)
            pair.our_store.put_manifest(await pair.ours.fetch_manifest(provider, ref), ref)
            pair.their_store.path(ref).write_bytes(data[:-1] + b"?" * 1)
            assert await pair.ours.fetch_piece(provider, ref, 0) == data[:PIECE]
            with pytest.raises(ParisError) as caught:
                await pair.ours.fetch_piece(provider, ref, 1)
            assert caught.value.code in ("blob.missing", "blob.corrupt")

        pair.run(body())

    def test_another_size_is_another_blob(self, pair: Pair) -> None:
        async def body() -> None:
            ref, provider = await self._offered(pair, fresh("size"))
            with pytest.raises(ParisError) as caught:
                await pair.ours.fetch_manifest(provider, BlobRef(id=ref.id, size=ref.size + 1))
            assert caught.value.code in ("blob.missing", "blob.corrupt")

        pair.run(body())

    def test_a_peer_that_is_not_there_is_missing(self, pair: Pair) -> None:
        async def body() -> None:
            ref, _ = await self._offered(pair, fresh("absent"))
            stranger = Provider(
                "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", ("/ip4/127.0.0.1/tcp/9",)
            )
            with pytest.raises(ParisError) as caught:
                await pair.ours.fetch_manifest(stranger, ref, 2.0)
            assert caught.value.code == "blob.missing"

        pair.run(body())

    def test_parts_are_shared_before_the_whole_is_there(self, pair: Pair) -> None:
        async def body() -> None:
            data = fresh("parts")
            manifest = Manifest.build([data])
            ref = manifest.ref
            pair.their_store.put_manifest(manifest.raw, ref)
            pair.their_store.put_piece(ref, 1, data[PIECE:])
            await pair.theirs.announce([ref.id])
            provider = (await until(lambda: pair.ours.providers(ref.id)))[0]
            pair.our_store.put_manifest(await pair.ours.fetch_manifest(provider, ref), ref)
            assert await pair.ours.fetch_piece(provider, ref, 1) == data[PIECE:]
            with pytest.raises(ParisError) as caught:
                await pair.ours.fetch_piece(provider, ref, 0)
            assert caught.value.code == "blob.missing"

        pair.run(body())

    def test_status_tells_who_we_are(self, pair: Pair) -> None:
        status = pair.run(pair.ours.status())
        assert status.alive and status.peer and status.known >= 1 and status.as_json()["alive"]
