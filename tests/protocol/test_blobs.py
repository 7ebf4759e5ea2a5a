"""Manifests: the same for the same bytes however they are cut, and nothing else passes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol.blobs import PIECE, Manifest, manifest_limit
from paris_protocol.canonical import canonical, sha256_hex
from paris_protocol.errors import ParisError
from paris_protocol.records import BlobRef

DATA = bytes(range(256)) * (2 * PIECE // 256) + b"rest"
MANIFEST = Manifest.build([DATA])


def test_pieces_cover_the_blob() -> None:
    assert [MANIFEST.piece_range(i) for i in range(3)] == [
        (0, PIECE), (PIECE, PIECE), (2 * PIECE, 4),
    ]  # fmt: skip
    for i in range(3):
        begin, length = MANIFEST.piece_range(i)
        MANIFEST.check_piece(i, DATA[begin : begin + length])
    for i in (-1, 3):
        with pytest.raises(IndexError):
            MANIFEST.piece_range(i)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, len(DATA)), max_size=5))
def test_cuts_do_not_matter(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(DATA)]
    parts = [DATA[a:b] for a, b in pairwise(edges)]
    assert Manifest.build(parts) == MANIFEST


def test_empty_blob_has_no_pieces() -> None:
    empty = Manifest.build([])
    assert (empty.size, empty.pieces) == (0, ())
    assert Manifest.parse(empty.raw, empty.ref) == empty


def test_wrong_pieces_are_refused() -> None:
    for piece, data in ((2, b"Rest"), (2, b"rest."), (2, b""), (0, DATA[PIECE : 2 * PIECE - 1])):
        with pytest.raises(ParisError) as caught:
            MANIFEST.check_piece(piece, data)
        assert caught.value.code == "blob.corrupt"


@settings(max_examples=50)
@given(st.integers(0, 1 << 20), st.integers(1, 255))
def test_changed_manifest_is_refused(place: int, change: int) -> None:
    raw = bytearray(MANIFEST.raw)
    raw[place % len(raw)] ^= change
    with pytest.raises(ParisError) as caught:
        Manifest.parse(bytes(raw), MANIFEST.ref)
    assert caught.value.code == "blob.corrupt"


@pytest.mark.parametrize(
    "changes",
    [
        {"size": len(DATA) + 1},
        {"piece": PIECE // 2},
        {"pieces": list(MANIFEST.pieces[:2])},
        {"pieces": [*MANIFEST.pieces, "00" * 32]},
        {"pieces": [text.upper() for text in MANIFEST.pieces]},
        {"pieces": [1, 2, 3]},
        {"pieces": "x"},
        {"extra": 1},
    ],
)
def test_manifest_that_does_not_fit_its_reference_is_refused(changes: dict[str, object]) -> None:
    fields = {"piece": PIECE, "pieces": list(MANIFEST.pieces), "size": len(DATA)}
    raw = canonical(fields | changes)
    with pytest.raises(ParisError):
        Manifest.parse(raw, BlobRef(id=sha256_hex(raw), size=len(DATA)))


def test_size_is_checked_first() -> None:
    assert len(MANIFEST.raw) <= manifest_limit(len(DATA))
    with pytest.raises(ParisError) as caught:
        Manifest.parse(b"x" * 200, BlobRef(id="0" * 64, size=0))
    assert caught.value.code == "blob.too-large"
