"""What the libp2p daemon leaves or wants on disk: identity, dead sockets, peers of the last run.

None of it is a secret of its own: the identity is the node's key in libp2p's form::

    write_identity(spool / "identity", key)
    known = KnownPeers(spool / "peers.json")
    known.add("12D3KooW…", ["/ip4/127.0.0.1/tcp/4001"])
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.net import pointers
from paris_protocol.net.store import disk_errors, write_atomic

KNOWN: Final = 32
"""Peers that are remembered."""
TRIED: Final = 8
"""Remembered peers that are called beside the bootstraps."""
_ED25519_PAIR: Final = bytes.fromhex("08011240")
"""Protobuf of libp2p's PrivateKey: field 1 = Ed25519, field 2 = 64 bytes (seed, public key)."""


def write_identity(path: Path, key: PrivateKey) -> None:
    """The node's key as a libp2p identity file, mode 0400."""
    path.unlink(missing_ok=True)
    with disk_errors(path):
        handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o400)
        with os.fdopen(handle, "wb") as file:
            file.write(_ED25519_PAIR + key.seed + key.public)


def remove_dead_sockets() -> None:
    """Daemons that were killed leave their sockets in /tmp; the kernel lists those in use."""
    with suppress(OSError):  # only Linux has this list
        found = list(Path("/tmp").glob("hivemind-*.sock"))  # noqa: S108 - hivemind's own place
        in_use = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace")
        for path in found:
            if str(path) not in in_use and path.stat().st_uid == os.getuid() and _refuses(path):
                path.unlink()


def _refuses(path: Path) -> bool:
    """Whether nobody listens; the kernel's list does not show other network namespaces."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


class KnownPeers:
    """Peers and their addresses, kept on disk: with the bootstraps away, the way back in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peers: dict[str, list[str]] = {}
        with suppress(OSError, ValueError, AttributeError, TypeError):
            for peer, addresses in json.loads(path.read_bytes()).items():
                self._peers[peer] = pointers.dialable(addresses)

    def add(self, peer: str, addresses: Iterable[str]) -> None:
        """Remember a peer as the last one seen."""
        self._peers.pop(peer, None)
        self._peers[peer] = list(addresses)
        while len(self._peers) > KNOWN:
            del self._peers[next(iter(self._peers))]

    def latest(self) -> list[tuple[str, list[str]]]:
        """The peers to call first."""
        return [
            (peer, addresses) for peer, addresses in self._peers.items() if pointers.is_peer(peer)
        ][-TRIED:]

    def save(self) -> None:
        """Write them down; a full disk is no reason to stop."""
        with suppress(OSError, ParisError):
            write_atomic(self._path, json.dumps(self._peers).encode())
