"""Reading a log tile by tile: the same answers as the whole tree, and every bent tile named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol.errors import ParisError
from paris_protocol.log import EMPTY_ROOT, Checkpoint, Tree, bundles, leaf_hash
from paris_protocol.tiles import TileReader

ENTRIES = [hashlib.sha256(b"%d" % i).digest() for i in range(70_000)]
LEAVES = [leaf_hash(entry) for entry in ENTRIES]
TREE = Tree(LEAVES)
ALL = {**dict(TREE.tiles()), **dict(bundles(ENTRIES))}


def reader(
    size: int, change: Callable[[str, bytes], bytes | None] = lambda _, data: data
) -> TileReader:
    """A reader of the log of 70,000 entries as it was with `size`, and what it fetched."""
    checkpoint = Checkpoint("log", size, TREE.root(size))

    def fetch(name: str) -> bytes:
        read.fetched.append(name)
        data = partial(size).get(name, ALL.get(name))
        found = None if data is None else change(name, data)
        if found is None:
            raise ParisError("not-found", name)
        return found

    read = Telling(checkpoint, fetch)
    return read


class Telling(TileReader):
    """A reader that knows what it fetched."""

    def __init__(self, checkpoint: Checkpoint, fetch: Callable[[str], bytes]) -> None:
        super().__init__(checkpoint, fetch)
        self.fetched: list[str] = []


def partial(size: int) -> dict[str, bytes]:
    """The partial tiles of a smaller tree."""
    if size not in PARTIAL:
        smaller = Tree(LEAVES[:size])
        begin = max(0, size - 1)
        PARTIAL[size] = {
            **dict(smaller.tiles(begin)),
            **{name: data for name, data in bundles(ENTRIES[:size], begin)},
        }
    return PARTIAL[size]


PARTIAL: dict[int, dict[str, bytes]] = {}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 70_000]), st.data())
def test_answers_are_those_of_the_whole_tree(size: int, data: st.DataObject) -> None:
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    read = reader(size)
    assert read.root(old) == TREE.root(old)
    assert read.inclusion(index) == TREE.inclusion(index, size)
    assert read.consistency(old) == TREE.consistency(old, size)
    assert read.leaf(index) == LEAVES[index]


def test_a_proof_needs_a_handful_of_tiles() -> None:
    read = reader(70_000)
    read.inclusion(12_345)
    assert len(read.fetched) == 5  # three on the right edge, one in each level below the root


def test_entries_are_checked_against_their_leaves() -> None:
    assert list(reader(600).entries(250, 520)) == [e.hex() for e in ENTRIES[250:520]]
    for name in ("tile/entries/001", "tile/entries/002.p/88"):
        bent = ENTRIES[0]

        def change(path: str, data: bytes, name: str = name, bent: bytes = bent) -> bytes:
            return data[:2] + bent + data[34:] if path == name else data

        with pytest.raises(ParisError, match="other entries") as caught:
            list(reader(600, change).entries(250, 520))
        assert caught.value.code == "log.proof"


@pytest.mark.parametrize("name", ["tile/0/048", "tile/0/273.p/112", "tile/1/000", "tile/2/000.p/1"])
@pytest.mark.parametrize("how", ["missing", "truncated", "foreign", "longer"])
def test_missing_truncated_and_foreign_tiles_are_refused(name: str, how: str) -> None:
    def change(path: str, data: bytes) -> bytes | None:
        if path != name:
            return data
        if how == "missing":
            return None
        bent = {"truncated": data[:-1], "foreign": bytes(32) + data[32:], "longer": data + b"x"}
        return bent[how]

    if how == "longer" and ".p/" not in name:
        return  # what stands behind a whole tile is never read
    with pytest.raises(ParisError) as caught:
        reader(70_000, change).inclusion(12_345)
    assert caught.value.code == "log.proof"


def test_a_partial_tile_may_have_given_way_to_the_whole_one() -> None:
    read = reader(300, lambda name, data: None if ".p/" in name and "/0/" in name else data)
    assert read.inclusion(299) == TREE.inclusion(299, 300)
    assert "tile/0/001" in read.fetched


def test_another_root_and_the_empty_log() -> None:
    with pytest.raises(ParisError) as caught:
        TileReader(Checkpoint("log", 300, bytes(32)), lambda name: ALL.get(name, b"")).root()
    assert caught.value.code == "log.proof"
    assert TileReader(Checkpoint("log", 0, EMPTY_ROOT), lambda _: b"").root() == EMPTY_ROOT
    with pytest.raises(ParisError):
        TileReader(Checkpoint("log", 0, bytes(32)), lambda _: b"")
