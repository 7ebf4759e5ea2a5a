"""What stands in a DHT pointer, under which key, and which addresses are dialled at all.

Pure words about records; `dht.py` stores them. Refused: addresses that are not plain TCP (QUIC of
the libp2p daemon ends transfers short), and pointers of any other form than ours::

    value = pack([blob_id], ["/ip4/127.0.0.1/tcp/4001"])
    pointer = unpack(f"[{key.id}]", value)
    assert pointer is not None and pointer.peer == peer_id(key.id)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from paris_protocol.keys import peer_id

MAX_RECORD: Final = 16 << 10
"""Bytes of a DHT record, signature included."""
MAX_TTL: Final = 900.0
"""Seconds that a pointer may live at most."""
BLOBS_PER_RECORD: Final = 400
ADDRESSES: Final = 8
_OWNER: Final = re.compile(rb"\[(ed25519:[0-9a-f]{64})\]")
_PEER: Final = re.compile("[1-9A-HJ-NP-Za-km-z]{40,70}")
_ADDRESS: Final = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[A-Za-z0-9.:\-]{1,253}/tcp/[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Pointer:
    """A peer says that it has these blobs (32-byte ids) and answers at these addresses."""

    peer: str
    addresses: tuple[str, ...]
    blobs: frozenset[bytes]


def shard_key(network: str, blob_id: str) -> str:
    """The DHT key under which holders of the blob announce: one of 256 per network."""
    return f"paris/{network}/{blob_id[:2]}"


def shard_keys(network: str) -> list[str]:
    """All 256 keys of a network."""
    return [shard_key(network, f"{prefix:02x}") for prefix in range(256)]


def owner(subkey: bytes) -> str | None:
    """The one key id that stands in a serialised subkey; None if there are none or several."""
    found = set(_OWNER.findall(subkey))
    return found.pop().decode("ascii") if len(found) == 1 else None


def pack(blob_ids: Iterable[str], addresses: Iterable[str]) -> dict[str, Any]:
    """The value of a pointer; ids beyond `BLOBS_PER_RECORD` are left out."""
    ids = sorted(blob_ids)[:BLOBS_PER_RECORD]
    blobs = b"".join(bytes.fromhex(blob) for blob in ids)
    return {"blobs": blobs, "addresses": list(addresses)[:ADDRESSES]}


def unpack(subkey: Any, value: Any) -> Pointer | None:
    """The pointer of a record whose signature was checked; None if it is none of ours."""
    # A lone surrogate becomes a question mark, which is in nobody's key.
    named = subkey.encode("utf-8", "replace") if isinstance(subkey, str) else b""
    match = _OWNER.fullmatch(named)
    if match is None or not isinstance(value, dict) or set(value) != {"blobs", "addresses"}:
        return None
    blobs, addresses = value["blobs"], value["addresses"]
    if not isinstance(blobs, bytes) or len(blobs) % 32 or not isinstance(addresses, list | tuple):
        return None
    ids = frozenset(blobs[i : i + 32] for i in range(0, len(blobs), 32))
    return Pointer(peer_id(match[1].decode("ascii")), tuple(dialable(addresses)), ids)


def dialable(addresses: Iterable[Any]) -> list[str]:
    """The plain TCP multiaddresses among these, at most eight."""
    good = (text for text in addresses if isinstance(text, str) and _ADDRESS.fullmatch(text))
    return [text for text, _ in zip(good, range(ADDRESSES), strict=False)]


def is_peer(text: str) -> bool:
    """Whether the text looks like a libp2p PeerID."""
    return _PEER.fullmatch(text) is not None


def bootstraps(texts: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Multiaddresses `/ip4/…/tcp/…/p2p/<peer>` as peer and plain address; others are left out."""
    parts = (text.partition("/p2p/") for text in texts)
    return [(peer, [at]) for at, _, peer in parts if is_peer(peer) and dialable([at])]
