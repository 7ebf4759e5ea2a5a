"""The tensor root depends on names, dtypes, shapes and bytes, and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_protocol import tensors
from paris_protocol.errors import ParisError
from paris_protocol.log import merkle_root
from paris_protocol.tensors import chunk_root, states_root, tensor_root

ITEMS = [
    ("b", "F32", (2, 2), bytes(range(16))),
    ("a", "U8", (3,), b"xyz"),
    ("é", "I64", (), b"8" * 8),
]


def test_order_and_kind_of_buffer_do_not_matter() -> None:
    root = tensor_root(ITEMS)
    assert tensor_root(reversed(ITEMS)) == root
    assert tensor_root([(n, d, s, memoryview(bytearray(b))) for n, d, s, b in ITEMS]) == root
    array = np.frombuffer(bytes(range(16)), "<f4").reshape(2, 2)
    assert tensor_root([("b", "F32", (2, 2), memoryview(array)), *ITEMS[1:]]) == root


@pytest.mark.parametrize(
    "items",
    [
        ITEMS[1:],
        [("B", *ITEMS[0][1:]), *ITEMS[1:]],
        [("b", "I32", (2, 2), ITEMS[0][3]), *ITEMS[1:]],
        [("b", "F32", (4,), ITEMS[0][3]), *ITEMS[1:]],
        [("b", "F32", (2, 2), bytes(16)), *ITEMS[1:]],
        [*ITEMS, ("empty", "F32", (0,), b"")],
    ],
)
def test_everything_else_matters(items: list[tensors.Item]) -> None:
    assert tensor_root(items) != tensor_root(ITEMS)


@given(st.integers(0, 15), st.integers(1, 255))
def test_every_byte_matters(place: int, change: int) -> None:
    data = bytearray(ITEMS[0][3])
    data[place] ^= change
    assert tensor_root([("b", "F32", (2, 2), data), *ITEMS[1:]]) != tensor_root(ITEMS)


@pytest.mark.parametrize(
    "item",
    [
        ("w", "F32", (2,), b"1234"),
        ("w", "F31", (1,), b"1234"),
        ("w", "U8", (-1, -1), b"1"),
        ("", "U8", (1,), b"1"),
        ("x" * 1025, "U8", (1,), b"1"),
        ("a", "U8", (1,) * 17, b"1"),
    ],
)
def test_what_is_no_tensor_is_refused(item: tensors.Item) -> None:
    with pytest.raises(ParisError) as caught:
        tensor_root([item])
    assert caught.value.code == "tensor.header"


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ParisError):
        tensor_root([ITEMS[0], ITEMS[0]])


def test_chunks_are_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 4)
    leaves = [hashlib.sha256(b"\0" + part).digest() for part in (b"0123", b"4567", b"89")]
    assert chunk_root(b"0123456789") == merkle_root(leaves)
    assert chunk_root(b"") == hashlib.sha256(b"").digest()


def test_order_of_states_matters() -> None:
    states = ["00" * 32, "11" * 32]
    assert states_root(states) != states_root(states[::-1])
