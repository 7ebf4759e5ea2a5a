"""What every control plane client keeps to; both sides are the statements of a small world."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.net.memory import MemoryControl
from paris_protocol.records import BlobRef, Index, Registration
from protocol.world import COORDINATOR, NODES, World

Body = Callable[[Any, MemoryControl], Coroutine[Any, Any, None]]


def index_of(world: World, signer: Any = COORDINATOR) -> bytes:
    record = Index(
        policy=world.policies[-1].id, heads=tuple(world.heads), release=None, log_size=3,
        log_root="0" * 64, finished=False, at=1_700_000_000,
    )  # fmt: skip
    return seal(record, signer, world.network).raw


def coordinator(world: World, expect: str | None = None) -> MemoryControl:
    raws = [policy.raw for policy in world.policies]
    return MemoryControl(world.genesis.raw, raws, index_of(world), expect)


async def code_of(call: Awaitable[Any]) -> str:
    try:
        await call
    except ParisError as error:
        return error.code
    return "none"


class ControlContract:
    """Subclasses say how to `run` a test's body with a client and the coordinator behind it."""

    def run(self, body: Body, there: MemoryControl, expect: str | None = None) -> None:
        raise NotImplementedError

    def test_signed_things_come_verified(self) -> None:
        world = World()

        async def body(control: Any, _: MemoryControl) -> None:
            assert await control.hello() == world.genesis
            assert await control.policy() == world.policies[-1]
            index = await control.index()
            assert index.signer == COORDINATOR.id and index.record.heads == tuple(world.heads)
            for sealed in world.policies:
                assert await control.statement(sealed.id) == sealed.raw

        self.run(body, coordinator(world))

    def test_another_network_is_a_mismatch(self) -> None:
        async def body(control: Any, _: MemoryControl) -> None:
            assert await code_of(control.hello()) == "network.mismatch"

        self.run(body, coordinator(World(), expect="0" * 64), expect="0" * 64)

    def test_an_index_of_another_signer_is_refused(self) -> None:
        world, there = World(), coordinator(World())
        there.index_raw = index_of(world, NODES[0])

        async def body(control: Any, _: MemoryControl) -> None:
            assert await code_of(control.index()) == "record.signer"

        self.run(body, there)

    def test_posts_reach_and_refusals_come_back_whole(self) -> None:
        world, there = World(), coordinator(World())
        record = Registration(node=NODES[0].id, peer_id="p", version="0.1.0", at=1_700_000_000)
        sealed = seal(record, NODES[0], world.network)
        heard: list[bytes] = []

        def register(raw: bytes) -> dict[str, Any]:
            heard.append(raw)
            return {"ok": True, "list": [1, "é"]}

        def lease(_: bytes) -> dict[str, Any]:
            raise ParisError("work.none", "all (really) leased", retry_after=7.5)

        there.handlers.update(register=register, lease=lease)
        there.objects["contributions/abc"] = {"state": "queued"}

        async def body(control: Any, _: MemoryControl) -> None:
            assert await control.post("register", sealed.raw) == {"ok": True, "list": [1, "é"]}
            assert heard == [sealed.raw]
            with pytest.raises(ParisError) as caught:
                await control.post("lease", sealed.raw)
            error = caught.value
            assert (error.code, error.retry_after) == ("work.none", 7.5)
            assert error.detail == "all (really) leased"
            assert await control.get("contributions/abc") == {"state": "queued"}
            assert await code_of(control.get("contributions/none")) == "not-found"
            assert await code_of(control.statement("0" * 64)) == "not-found"

        self.run(body, there)

    @pytest.mark.parametrize("size", [1, PIECE, 2 * PIECE + 5])
    def test_blobs_come_down_by_pieces(self, size: int) -> None:
        there, data = coordinator(World()), bytes(range(256)) * (size // 256 + 1)
        ref = there.add_blob(data[:size])

        async def body(control: Any, _: MemoryControl) -> None:
            manifest = Manifest.parse(await control.manifest(ref), ref)
            for i in range(len(manifest.pieces)):
                manifest.check_piece(i, await control.piece(ref, i))
            assert await code_of(control.piece(ref, len(manifest.pieces))) == "blob.missing"
            stranger = BlobRef(id="0" * 64, size=5)
            assert await code_of(control.manifest(stranger)) == "blob.missing"
            assert await code_of(control.piece(stranger, 0)) == "blob.missing"

        self.run(body, there)

    def test_blobs_go_up_by_pieces(self) -> None:
        there, data = coordinator(World()), b"u" * (PIECE + 9)
        manifest = Manifest.build([data])
        ref = manifest.ref

        async def body(control: Any, there: MemoryControl) -> None:
            assert await code_of(control.put_manifest(ref, manifest.raw)) == "blob.missing"
            there.want(ref)
            await control.put_manifest(ref, manifest.raw)
            assert await control.put_piece(ref, 1, data[PIECE:]) == 1
            assert await control.put_piece(ref, 1, data[PIECE:]) == 1
            assert await code_of(control.put_piece(ref, 0, b"wrong")) == "blob.corrupt"
            assert await control.put_piece(ref, 0, data[:PIECE]) == 0
            assert there.missing(ref) == []

        self.run(body, there)

    def test_a_coordinator_that_is_away_is_down(self) -> None:
        there = coordinator(World())
        there.down = True

        async def body(control: Any, _: MemoryControl) -> None:
            for call in (control.hello(), control.get("x"), control.post("register", b"{}")):
                assert await code_of(call) == "network.down"
            await control.close()
            await control.close()

        self.run(body, there)
