"""The piece protocol `/paris/piece/1`: length and SHA-256 first, then the bytes, then a receipt.

A stream that ends looks the same whether the sender finished or was killed; only the frame tells.
What to expect comes from the signed manifest, never from the peer. Refused as `Broken`: other
length or digest, a source that is silent, or drips more slowly than `LEAST_RATE`::

    data = await ask(reader, writer, Wanted(blob_id, 3, length, sha256), idle=10)
    await serve(reader, writer, look_up, idle=15)       # the other end

Request: magic `PRQ1`, blob id (32 bytes), piece number (u32; `MANIFEST` asks for the manifest).
Answer: magic `PBS1`, status (u8), length (u64), SHA-256 (32), then `length` bytes if the status is
`DATA`. Receipt: SHA-256 of `ack` and the piece's digest. All integers are big-endian; one stream
carries any number of rounds; nobody half-closes (libp2p daemons would close both directions).
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from paris_protocol.blobs import Manifest, manifest_limit
from paris_protocol.records import BlobRef

PROTOCOL: Final = "/paris/piece/1"
MANIFEST: Final = 0xFFFFFFFF
DATA, ABSENT, BUSY = 0, 1, 2
LEAST_RATE: Final = 16 << 10
"""Bytes per second below which a source counts as stalled, whatever it drips."""
_REQUEST: Final = struct.Struct(">4s32sI")
_ANSWER: Final = struct.Struct(">4sBQ32s")
_ASK, _TELL = b"PRQ1", b"PBS1"
_CHUNK: Final = 1 << 18

LookUp = Callable[[str, int], Awaitable[bytes | None]]


class Broken(Exception):
    """The piece did not arrive whole: ask another source."""


class Corrupt(Broken):
    """The bytes are not those of the digest: this source is not to be trusted."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for: piece `index` of a blob, at most `length` bytes with this SHA-256."""

    blob_id: str
    index: int
    length: int
    sha256: str

    @classmethod
    def piece(cls, manifest: Manifest, i: int) -> Wanted:
        """Piece `i` as the manifest lists it."""
        return cls(manifest.id, i, manifest.piece_range(i)[1], manifest.pieces[i])

    @classmethod
    def manifest(cls, ref: BlobRef) -> Wanted:
        """The manifest itself, whose digest is the blob's id."""
        return cls(ref.id, MANIFEST, manifest_limit(ref.size), ref.id)


def _receipt(sha: bytes) -> bytes:
    return hashlib.sha256(b"ack" + sha).digest()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: Wanted, idle: float
) -> bytes:
    """Ask for one piece and return it verified; `idle` is the longest silence in seconds."""
    try:
        async with asyncio.timeout(idle + wanted.length / LEAST_RATE):
            return await _ask(reader, writer, wanted, idle)
    except (asyncio.IncompleteReadError, TimeoutError, OSError) as error:
        raise Broken(repr(error)) from error


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: Wanted, idle: float
) -> bytes:
    writer.write(_REQUEST.pack(_ASK, bytes.fromhex(wanted.blob_id), wanted.index))
    await asyncio.wait_for(writer.drain(), idle)
    head = await asyncio.wait_for(reader.readexactly(_ANSWER.size), idle)
    magic, status, length, sha = _ANSWER.unpack(head)
    if magic != _TELL or status != DATA:
        raise Broken("busy" if status == BUSY else "the peer does not have it")
    fits = length <= wanted.length if wanted.index == MANIFEST else length == wanted.length
    if not fits or sha.hex() != wanted.sha256:
        raise Broken(f"another piece is offered ({length} bytes)")
    data, running = bytearray(), hashlib.sha256()
    while len(data) < length:
        chunk = await asyncio.wait_for(reader.read(min(_CHUNK, length - len(data))), idle)
        if not chunk:
            raise Broken(f"the stream ended after {len(data)} of {length} bytes")
        data += chunk
        running.update(chunk)
    if running.digest() != sha:
        raise Corrupt("the digest differs")
    writer.write(_receipt(sha))
    await asyncio.wait_for(writer.drain(), idle)
    return bytes(data)


async def serve(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look_up: LookUp, idle: float
) -> int:
    """Answer requests until the other side leaves; returns the bytes that were acknowledged."""
    served = 0
    try:
        while True:
            request = await asyncio.wait_for(reader.readexactly(_REQUEST.size), idle)
            magic, blob_id, index = _REQUEST.unpack(request)
            if magic != _ASK:
                return served
            data = await look_up(blob_id.hex(), index)
            if data is None:
                writer.write(_ANSWER.pack(_TELL, ABSENT, 0, bytes(32)))
                await asyncio.wait_for(writer.drain(), idle)
                continue
            async with asyncio.timeout(idle + len(data) / LEAST_RATE):
                await _tell(reader, writer, data, idle)
            served += len(data)
    except (asyncio.IncompleteReadError, TimeoutError, OSError):
        return served  # a lost receipt is not a lost piece: nothing follows from it


async def _tell(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, idle: float
) -> None:
    sha = hashlib.sha256(data).digest()
    writer.write(_ANSWER.pack(_TELL, DATA, len(data), sha))
    for start in range(0, len(data), _CHUNK):
        writer.write(data[start : start + _CHUNK])
        await asyncio.wait_for(writer.drain(), idle)
    receipt = await asyncio.wait_for(reader.readexactly(32), idle)
    if receipt != _receipt(sha):
        raise ConnectionError("another receipt")


async def refuse(writer: asyncio.StreamWriter, idle: float) -> None:
    """Tell a peer that there are too many requests at the moment."""
    try:
        writer.write(_ANSWER.pack(_TELL, BUSY, 0, bytes(32)))
        await asyncio.wait_for(writer.drain(), idle)
    except (TimeoutError, OSError):
        return
