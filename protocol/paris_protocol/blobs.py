"""Blobs: bytes named by the digest of a manifest that lists the SHA-256 of every 4 MiB piece.

A piece is checked as it arrives, whoever sent it. Refused: a manifest that is not the one that the
reference names or does not fit its size (`blob.corrupt`), and pieces of wrong length or digest::

    manifest = Manifest.build([b"some ", b"bytes"])
    again = Manifest.parse(manifest.raw, manifest.ref)
    again.check_piece(0, b"some bytes")
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from paris_protocol.canonical import canonical, parse, sha256_hex
from paris_protocol.errors import ParisError
from paris_protocol.records import BlobRef

PIECE: Final = 4 << 20
MAX_SIZE: Final = 1 << 42
"""A blob has at most 4 TiB."""
_DIGITS: Final = frozenset("0123456789abcdef")


def piece_count(size: int) -> int:
    """Number of pieces of a blob of `size` bytes; none for an empty one."""
    return -(-size // PIECE)


def manifest_limit(size: int) -> int:
    """The most bytes that the manifest of a blob of `size` bytes may have."""
    return 128 + 67 * piece_count(size)


@dataclass(frozen=True)
class Manifest:
    """Size of a blob, size of its pieces, and their SHA-256 digests in hex."""

    size: int
    piece: int
    pieces: tuple[str, ...]

    @classmethod
    def build(cls, chunks: Iterable[bytes | bytearray | memoryview]) -> Manifest:
        """The manifest of the concatenated chunks, which may have any lengths."""
        size, room, running, pieces = 0, PIECE, hashlib.sha256(), []
        for chunk in chunks:
            view = memoryview(chunk)
            size += len(view)
            while len(view):
                part, view = view[:room], view[room:]
                running.update(part)
                room -= len(part)
                if room == 0:
                    pieces.append(running.hexdigest())
                    room, running = PIECE, hashlib.sha256()
        if room < PIECE:
            pieces.append(running.hexdigest())
        return cls(size, PIECE, tuple(pieces))

    @classmethod
    def parse(cls, raw: bytes, ref: BlobRef) -> Manifest:
        """Read a manifest that came from anywhere and must be the one that `ref` names."""
        if ref.size > MAX_SIZE or len(raw) > manifest_limit(ref.size):
            raise ParisError("blob.too-large", f"manifest of {ref.id[:12]}")
        if sha256_hex(raw) != ref.id:
            raise ParisError("blob.corrupt", f"manifest of {ref.id[:12]}")
        value = parse(raw)
        if not isinstance(value, dict) or set(value) != {"piece", "pieces", "size"}:
            raise ParisError("blob.corrupt", f"manifest of {ref.id[:12]} has other fields")
        pieces = value["pieces"]
        sound = isinstance(pieces, list) and all(
            isinstance(text, str) and len(text) == 64 and set(text) <= _DIGITS for text in pieces
        )
        counts = (value["piece"], value["size"])
        if not sound or counts != (PIECE, ref.size) or len(pieces) != piece_count(ref.size):
            raise ParisError("blob.corrupt", f"manifest of {ref.id[:12]} does not fit its size")
        return cls(ref.size, PIECE, tuple(pieces))

    @cached_property
    def raw(self) -> bytes:
        """Canonical JSON of the manifest."""
        return canonical({"piece": self.piece, "pieces": list(self.pieces), "size": self.size})

    @cached_property
    def id(self) -> str:
        """SHA-256 (hex) of `raw`: the blob's id."""
        return sha256_hex(self.raw)

    @property
    def ref(self) -> BlobRef:
        """The reference that signed records hold."""
        return BlobRef(id=self.id, size=self.size)

    def piece_range(self, i: int) -> tuple[int, int]:
        """Offset and length in bytes of piece `i`; `IndexError` beyond the last."""
        if not 0 <= i < len(self.pieces):
            raise IndexError(f"piece {i} of {len(self.pieces)}")
        return i * self.piece, min(self.piece, self.size - i * self.piece)

    def check_piece(self, i: int, data: bytes | bytearray | memoryview) -> None:
        """Raise `blob.corrupt` unless `data` is piece `i`."""
        _, length = self.piece_range(i)
        if len(data) != length or sha256_hex(data) != self.pieces[i]:
            raise ParisError("blob.corrupt", f"piece {i} of {self.id[:12]}")
