"""The piece protocol over real sockets: what the other side may do wrong."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.net import frames
from paris_protocol.net.frames import Broken, Wanted, ask, refuse, serve

Side = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]
DATA = hashlib.shake_256(b"data").digest(PIECE + 100)
MANIFEST = Manifest.build([DATA])
PIECES = (DATA[:PIECE], DATA[PIECE:])


async def look_up(blob_id: str, index: int) -> bytes | None:
    if blob_id != MANIFEST.id:
        return None
    return MANIFEST.raw if index == frames.MANIFEST else PIECES[index]


def between(server: Side, client: Side) -> Any:
    async def main() -> Any:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await server(reader, writer)
            finally:
                writer.close()

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        host, port = listener.sockets[0].getsockname()[:2]
        async with listener:
            reader, writer = await asyncio.open_connection(host, port)
            try:
                return await client(reader, writer)
            finally:
                writer.close()

    return asyncio.run(main())


async def honest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await serve(reader, writer, look_up, 2.0)


def wanted(i: int) -> Wanted:
    return Wanted.piece(MANIFEST, i)


def test_many_rounds_on_one_stream() -> None:
    served: list[int] = []

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(await serve(reader, writer, look_up, 2.0))

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for i in (0, 1, 0):
            assert await ask(reader, writer, wanted(i), 2.0) == PIECES[i]
        assert await ask(reader, writer, Wanted.manifest(MANIFEST.ref), 2.0) == MANIFEST.raw
        with pytest.raises(Broken, match="does not have it"):
            await ask(reader, writer, Wanted("0" * 64, 0, 5, "0" * 64), 2.0)
        assert await ask(reader, writer, wanted(1), 2.0) == PIECES[1]
        writer.close()
        for _ in range(100):
            if served:
                break
            await asyncio.sleep(0.02)

    between(server, client)
    assert served == [2 * PIECE + 200 + len(MANIFEST.raw)]


def header(data: bytes, length: int | None = None, sha: bytes | None = None) -> bytes:
    digest = hashlib.sha256(data).digest() if sha is None else sha
    return frames._ANSWER.pack(b"PBS1", 0, len(data) if length is None else length, digest)


def wrong(*parts: bytes, wait: float = 0.0, every: float = 0.0) -> Side:
    async def side(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(frames._REQUEST.size)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(every)
        await asyncio.sleep(wait)

    return side


ROT = bytes([PIECES[1][0] ^ 1]) + PIECES[1][1:]


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (wrong(header(PIECES[1]), PIECES[1][:50]), "ended after 50 of 100"),
        (wrong(header(PIECES[1]), ROT), "digest differs"),
        (wrong(header(ROT), ROT), "another piece"),
        (wrong(header(PIECES[1], length=1 << 60)), "another piece"),
        (wrong(header(PIECES[1], length=99)), "another piece"),
        (wrong(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9), "does not have"),
        (wrong(), "IncompleteRead"),
        (wrong(wait=9), "Timeout"),
        (wrong(header(PIECES[1]), wait=9), "Timeout"),
    ],
)
def test_what_is_not_the_piece_is_broken(server: Side, message: str) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with pytest.raises(Broken, match=message):
            await ask(reader, writer, wanted(1), 0.3)

    began = time.monotonic()
    between(server, client)
    assert time.monotonic() - began < 5


def test_a_drip_counts_as_stalled(monkeypatch: Any) -> None:
    monkeypatch.setattr(frames, "LEAST_RATE", 1000)
    drops = [bytes([byte]) for byte in PIECES[1]]

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with pytest.raises(Broken, match="Timeout"):
            await ask(reader, writer, wanted(1), 0.2)

    began = time.monotonic()
    between(wrong(header(PIECES[1]), *drops, every=0.1), client)
    assert time.monotonic() - began < 5


def test_busy_is_said() -> None:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await refuse(writer, 1.0)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with pytest.raises(Broken, match="busy"):
            await ask(reader, writer, wanted(0), 1.0)

    between(server, client)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n" * 5, b"PRQ1" + bytes(10)])
def test_strange_clients_are_let_go(sent: bytes) -> None:
    done: list[int] = []

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        done.append(await serve(reader, writer, look_up, 0.3))

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 5) == b""

    between(server, client)
    assert done == [0]


def test_a_client_that_reads_nothing_does_not_hold_the_server() -> None:
    done: list[int] = []

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        done.append(await serve(reader, writer, look_up, 0.3))

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames._REQUEST.pack(b"PRQ1", bytes.fromhex(MANIFEST.id), 0))
        deadline = time.monotonic() + 5
        while not done and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    between(server, client)
    assert done == [0]
