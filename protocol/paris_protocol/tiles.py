"""Reading a log from its static files: only the tiles that a question needs, each one verified.

The tiles on the right edge give the checkpoint's root or are refused; every other tile has the root
that the tile above it holds. So an answer is as good as the checkpoint, whoever serves the files.
Missing, truncated and foreign tiles are `log.proof`, naming the tile::

    reader = TileReader(checkpoint, fetch)            # fetch("tile/0/000") -> bytes
    proof = reader.consistency(seen.size)
    assert verify_consistency(seen.size, reader.size, proof, seen.root, checkpoint.root)

`fetch` raises ParisError("not-found") for a file that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

from paris_protocol.errors import ParisError
from paris_protocol.log import (
    EMPTY_ROOT,
    TILE,
    Checkpoint,
    Subtrees,
    bundle_path,
    leaf_hash,
    merkle_root,
    parse_bundle,
    tile_path,
)

Fetch = Callable[[str], bytes]
_HASH = 32
_MISSING = ("not-found", "release.missing")


def _refuse(detail: str) -> NoReturn:
    raise ParisError("log.proof", detail)


class TileReader(Subtrees):
    """The tree of a checkpoint, read tile by tile."""

    def __init__(self, checkpoint: Checkpoint, fetch: Fetch) -> None:
        if checkpoint.size == 0 and checkpoint.root != EMPTY_ROOT:
            raise ParisError("log.checkpoint", "the root of an empty log is not that of nothing")
        self.checkpoint = checkpoint
        self._fetch = fetch
        self._tiles: dict[tuple[int, int], bytes] = {}
        self._edge: dict[int, bytes] | None = None

    @property
    def size(self) -> int:
        """Leaves that the checkpoint promises."""
        return self.checkpoint.size

    def subtree(self, level: int, index: int) -> bytes:
        """See `Subtrees`; from the tile that holds its leaves or, above it, their roots."""
        height, inside = divmod(level, 8)
        first = index << inside
        tile = self._tile(height, first // TILE)
        begin = first % TILE * _HASH
        hashes = range(begin, begin + (_HASH << inside), _HASH)
        return merkle_root([tile[i : i + _HASH] for i in hashes])

    def leaf(self, index: int) -> bytes:
        """The leaf hash at `index`, verified."""
        if not 0 <= index < self.size:
            raise IndexError(f"leaf {index} of {self.size}")
        return self.subtree(0, index)

    def entries(self, begin: int = 0, end: int | None = None) -> Iterator[str]:
        """Statement ids from place `begin` on, in log order, each checked against its leaf."""
        end = self._known(end)
        for n in range(begin // TILE, -(-end // TILE)):
            width = min(TILE, self.size - n * TILE)
            raw = self._file(bundle_path(n, width), bundle_path(n), 34 * width)
            tile = self._tile(0, n)
            for i, entry in enumerate(parse_bundle(raw, width)):
                if leaf_hash(entry) != tile[i * _HASH : (i + 1) * _HASH]:
                    _refuse(f"{bundle_path(n, width)} holds other entries than the log")
                if begin <= n * TILE + i < end:
                    yield entry.hex()

    # ------------------------------------------------------------ tiles

    def _tile(self, height: int, n: int) -> bytes:
        edge = self._right_edge()
        if n == self.size >> 8 * (height + 1):
            return edge[height]
        known = self._tiles.get((height, n))
        if known is None:
            path = tile_path(height, n)
            known = self._file(path, path, TILE * _HASH)
            above = self._tile(height + 1, n // TILE)
            begin = n % TILE * _HASH
            if _root(known) != above[begin : begin + _HASH]:
                _refuse(f"{path} is not a tile of this log")
            self._tiles[height, n] = known
        return known

    def _right_edge(self) -> dict[int, bytes]:
        """The partial tiles, one for each height; together they have the checkpoint's root."""
        if self._edge is None:
            found: dict[int, bytes] = {}
            for height in range((self.size.bit_length() + 7) // 8):
                count = self.size >> 8 * height
                if width := count % TILE:
                    n = count // TILE
                    path, whole = tile_path(height, n, width), tile_path(height, n)
                    found[height] = self._file(path, whole, width * _HASH)
            self._edge = found
            if self._range(0, self.size) != self.checkpoint.root:
                self._edge = None
                _refuse("the tiles at the end of the log do not have the checkpoint's root")
        return self._edge

    def _file(self, path: str, whole: str, length: int) -> bytes:
        """A file of exactly this length; the beginning of the whole one where that took its place.

        A log may remove a partial tile once the whole one is there.
        """
        for name in dict.fromkeys((path, whole)):
            try:
                data = self._fetch(name)
            except ParisError as error:
                if error.code not in _MISSING:
                    raise
                continue
            if name == path and len(data) != length:
                _refuse(f"{name} has {len(data)} of {length} bytes")
            if len(data) < length:
                _refuse(f"{name} has {len(data)} bytes")
            return data[:length]
        _refuse(f"{path} is missing")


def _root(tile: bytes) -> bytes:
    return merkle_root([tile[i : i + _HASH] for i in range(0, len(tile), _HASH)])
