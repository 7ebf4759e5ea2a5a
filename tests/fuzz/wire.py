"""Files, blobs, frames, peers and words for the fuzzing: what comes over the wire unsigned.

Each reader answers or refuses by name::

    read_header(b"\\x08" + bytes(7) + b"{\\"a\\":1}")
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from random import Random

from fuzz.mutate import damaged, loose, spoiled
from fuzz.statements import vectors
from paris_protocol import gate
from paris_protocol.blobs import Manifest
from paris_protocol.canonical import canonical, sha256_hex
from paris_protocol.errors import ParisError
from paris_protocol.invite import check_url, parse_network
from paris_protocol.keys import key_bytes, peer_id
from paris_protocol.net import frames, pointers
from paris_protocol.records import (
    BlobRef,
)
from paris_protocol.transfer import Transfer
from protocol.world import NODES


def headers() -> list[bytes]:
    """Safetensors files of a few tensors, whole."""
    schema = {
        "__metadata__": {"format": "pt"},
        "a.w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
        "none": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [32, 32]},
    }
    text = json.dumps(schema).encode()
    return [len(text).to_bytes(8, "little") + text + bytes(32)]


def spoil_header(random: Random, seeds: list[bytes]) -> bytes:
    """A header with other fields and an honest length, or any bytes."""
    raw = random.choice(seeds)
    if random.random() < 0.3:
        return damaged(random, raw, seeds)
    length = int.from_bytes(raw[:8], "little")
    text = loose(spoiled(random, json.loads(raw[8 : 8 + length])))
    told = len(text) + random.choice((0, 0, 0, 0, 1, -1, 8))
    return max(0, told).to_bytes(8, "little") + text + raw[8 + length :]


def read_header(raw: bytes) -> object:
    """The gate as it is used: eight bytes, then the header, then its judgement."""
    length = gate.header_length(raw[:8], len(raw))
    return gate.check_header(raw[: 8 + length], len(raw))


def read_manifest(raw: bytes) -> object:
    """A manifest whose digest a stranger named, for several sizes that he may have named too."""
    sizes = [0, 1, (4 << 20) + 1, 1 << 42, 1 << 53]
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        told = json.loads(raw)["size"]
        sizes += [told] if type(told) is int and 0 <= told <= 1 << 53 else []
    refused = None
    for size in sizes:
        try:
            manifest = Manifest.parse(raw, BlobRef(id=sha256_hex(raw), size=size))
            Transfer(manifest, set(), fallback="c", stall=1.0, first=0)
        except ParisError as error:
            refused = error
        else:
            return manifest
    assert refused is not None
    raise refused


class Pipe:
    """A writer that leads nowhere."""

    def write(self, data: bytes) -> None:
        """Takes the bytes."""

    async def drain(self) -> None:
        """Has room at once."""


async def _reader(raw: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    return reader


PIECE = b"some bytes of a piece" * 20


def answers() -> list[bytes]:
    """What a peer sends for a piece, and for one that it lacks."""
    sha = bytes.fromhex(sha256_hex(PIECE))
    whole = b"PBS1\0" + len(PIECE).to_bytes(8, "big") + sha + PIECE
    return [whole, b"PBS1\1" + bytes(40), b"PBS1\2" + bytes(40)]


def read_answer(raw: bytes) -> object:
    """A peer's answer to our request for a piece and for a manifest."""

    async def both() -> None:
        for index in (0, frames.MANIFEST):
            wanted = frames.Wanted("0" * 64, index, len(PIECE), sha256_hex(PIECE))
            got = await frames.ask(await _reader(raw), Pipe(), wanted, 0.5)  # type: ignore[arg-type]
            assert got == PIECE

    return asyncio.run(both())


def requests() -> list[bytes]:
    """What a peer asks of us, with and without its receipt."""
    import hashlib

    receipt = hashlib.sha256(b"ack" + hashlib.sha256(PIECE).digest()).digest()
    one = b"PRQ1" + bytes(32) + (0).to_bytes(4, "big")
    manifest = b"PRQ1" + bytes(32) + b"\xff" * 4
    return [one, one + receipt + one, manifest + receipt]


def read_request(raw: bytes) -> object:
    """A peer's requests, of which it may have made any number."""

    async def look_up(blob: str, index: int) -> bytes | None:
        assert len(blob) == 64
        return PIECE if index < 3 else None

    async def serve() -> int:
        return await frames.serve(await _reader(raw), Pipe(), look_up, 0.5)  # type: ignore[arg-type]

    return asyncio.run(serve())


def records() -> list[bytes]:
    """DHT pointers: subkey and value, the blobs as hex."""
    value = pointers.pack(["ab" * 32, "cd" * 32], ["/ip4/127.0.0.1/tcp/4001"])
    made = {"blobs": value["blobs"].hex(), "addresses": value["addresses"]}
    return [loose({"subkey": f"[{NODES[0].id}]", "value": made})]


def read_pointer(raw: bytes) -> object:
    """A DHT record after decoding; what is none of ours is None, never an exception."""
    try:
        record = json.loads(raw)
        subkey, value = record["subkey"], record["value"]
        if isinstance(value, dict) and isinstance(value.get("blobs"), str):
            value = value | {"blobs": bytes.fromhex(value["blobs"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ParisError("record.malformed", "not a record at all") from error
    found = pointers.unpack(subkey, value)
    pointers.owner(json.dumps(subkey).encode())
    addresses = value.get("addresses") if isinstance(value, dict) else None
    if isinstance(addresses, list):
        pointers.bootstraps(text for text in addresses if isinstance(text, str))
    return found


# ---------------------------------------------------------------- words


def read_words(raw: bytes) -> object:
    """An invite, an address, a key id: what people paste and what a policy says."""
    text = raw.decode("utf-8", "surrogateescape")
    taken, refused = 0, None
    for read in (parse_network, check_url, key_bytes, peer_id):
        try:
            read(text)
            taken += 1
        except ParisError as error:
            refused = error
    if refused is not None and not taken:
        raise refused
    return taken


def words() -> list[bytes]:
    """Invites, addresses and key ids."""
    texts = [each["text"] for each in vectors("invites")["invites"]]
    return [text.encode() for text in (*texts, "https://a.example:8443", NODES[0].id)]


def refusals() -> list[bytes]:
    """Error answers of a coordinator."""
    return [canonical(ParisError("work.none", "x", retry_after=3).as_json())]
