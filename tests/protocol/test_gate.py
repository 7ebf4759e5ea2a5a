"""The gate accepts what safetensors writes and refuses every malformed header before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from paris_protocol.errors import ParisError
from paris_protocol.gate import Limits, check_header, header_length

SCHEMA = {"a.w": ("F32", (2, 3)), "b": ("I64", ()), "none": ("F16", (0, 4))}
GOOD: dict[str, Any] = {
    "a.w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
    "none": {"dtype": "F16", "shape": [0, 4], "data_offsets": [32, 32]},
}


def raw(header: str | dict[str, Any], data: int = 32) -> tuple[bytes, int]:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + data


def placed(begin: int, end: int) -> dict[str, Any]:
    """The good header with tensor `b` elsewhere; what follows it begins where it ends."""
    return changed("b", data_offsets=[begin, begin + 8]) | {
        "none": GOOD["none"] | {"data_offsets": [end, end]}
    }


def refuse(prefix: bytes, size: int, **rest: Any) -> None:
    with pytest.raises(ParisError) as caught:
        check_header(prefix, size, **rest)
    assert caught.value.code == "tensor.header"


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | fields}


def test_files_of_the_library_pass(tmp_path: Path) -> None:
    arrays = {
        "a.w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7),
        "none": np.zeros((0, 4), np.float16),
    }
    save_file(arrays, tmp_path / "x.safetensors", {"note": "hello"})
    data = (tmp_path / "x.safetensors").read_bytes()
    length = header_length(data[:8], len(data))
    header = check_header(data[: 8 + length], len(data), SCHEMA)
    assert header.metadata == {"note": "hello"}
    _, _, begin, end = header.tensors["a.w"]
    body = data[header.data_start + begin : header.data_start + end]
    assert body == arrays["a.w"].tobytes()


def test_good_header_is_accepted() -> None:
    prefix, size = raw(GOOD)
    assert list(check_header(prefix, size, SCHEMA).tensors) == list(SCHEMA)
    assert check_header(*raw(json.dumps(GOOD) + "       "), SCHEMA)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param(" " + json.dumps(GOOD), 32, id="leading white space"),
        pytest.param(json.dumps(GOOD) + "\n", 32, id="trailing newline"),
        pytest.param(json.dumps(GOOD) + " " * 8, 32, id="padding"),
        pytest.param(json.dumps(GOOD) + "{}", 32, id="two objects"),
        pytest.param("\ufeff" + json.dumps(GOOD), 32, id="byte order mark"),
        pytest.param("[]", 0, id="list"),
        pytest.param("{", 0, id="not JSON"),
        pytest.param('{"a":' * 5000 + "1" + "}" * 5000, 0, id="deep"),
        pytest.param('{"b":1,"b":1}', 0, id="duplicate name"),
        pytest.param(json.dumps(GOOD)[:-1] + "," + json.dumps(GOOD)[1:], 32, id="duplicate tensor"),
        pytest.param(json.dumps(GOOD).replace("[],", '[], "shape": [],'), 32, id="duplicate field"),
        pytest.param(changed("b", extra=1), 32, id="unknown field"),
        pytest.param({"b": {"dtype": "I64", "shape": []}}, 0, id="missing field"),
        pytest.param({"b": None}, 0, id="no object"),
        pytest.param(GOOD, 33, id="trailing bytes"),
        pytest.param(GOOD, 31, id="truncated"),
        pytest.param(placed(25, 33), 33, id="hole"),
        pytest.param(placed(16, 24), 24, id="overlap"),
        pytest.param(changed("none", data_offsets=[8, 8]), 32, id="empty tensor inside another"),
        pytest.param(changed("b", data_offsets=[32, 24]), 32, id="backwards"),
        pytest.param(changed("b", data_offsets=[24, 32, 40]), 32, id="three offsets"),
        pytest.param(changed("b", shape=[2]), 32, id="length"),
        pytest.param(changed("a.w", shape=[-2, -3]), 32, id="negative"),
        pytest.param(changed("a.w", shape=[2.0, 3]), 32, id="float"),
        pytest.param(changed("a.w", shape=[True, 6]), 32, id="bool"),
        pytest.param(changed("a.w", shape=[1 << 70, 0]), 32, id="overflow"),
        pytest.param(changed("a.w", shape="23"), 32, id="shape text"),
        pytest.param(changed("a.w", dtype="F64"), 32, id="dtype length"),
        pytest.param(changed("a.w", dtype="C64"), 32, id="dtype unknown"),
        pytest.param(changed("a.w", dtype=4), 32, id="dtype number"),
        pytest.param(GOOD | {"__metadata__": {"a": 1}}, 32, id="metadata number"),
        pytest.param(GOOD | {"__metadata__": [1]}, 32, id="metadata list"),
        pytest.param(GOOD | {"__metadata__": {"a": "x" * 70000}}, 32, id="metadata huge"),
        pytest.param('{"b":{"dtype":"I64","shape":[NaN],"data_offsets":[0,8]}}', 8, id="NaN"),
        pytest.param(json.dumps(GOOD).replace("[24, 32]", f"[24, {'9' * 5000}]"), 32, id="digits"),
    ],
)  # fmt: skip
def test_malformed_headers_are_refused(header: str | dict[str, Any], data: int) -> None:
    refuse(*raw(header, data))


@pytest.mark.parametrize("name", ["", "../w", "/w", "a/b", "a\0", "a\n", "ü", ".w", "a" * 257])
def test_hostile_names_are_refused(name: str) -> None:
    refuse(*raw({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1))


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 64) - 1])
def test_dishonest_lengths_are_refused_before_anything_is_read(length: int) -> None:
    with pytest.raises(ParisError):
        header_length(length.to_bytes(8, "little"), 1000)
    with pytest.raises(ParisError):
        header_length(b"1234", 1000)


def test_too_many_tensors_are_refused() -> None:
    many = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(11)}
    assert check_header(*raw(many, 0))
    refuse(*raw(many, 0), limits=Limits(tensors=10))


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA | {"more": ("F32", (1,))},
        {name: SCHEMA[name] for name in ("a.w", "b")},
        SCHEMA | {"a.w": ("F32", (3, 2))},
        SCHEMA | {"b": ("U64", ())},
    ],
)
def test_schema_must_be_equal(schema: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    refuse(*raw(GOOD), schema=schema)


@settings(max_examples=300)
@given(st.integers(0, 1 << 20), st.integers(0, 255))
def test_changed_byte_is_refused_or_means_the_same_schema(place: int, byte: int) -> None:
    prefix, size = raw(GOOD)
    data = bytearray(prefix)
    data[place % len(data)] = byte
    try:
        header = check_header(bytes(data), size, SCHEMA)
    except ParisError as error:
        assert error.code == "tensor.header"
    else:
        assert {n: t[:2] for n, t in header.tensors.items()} == SCHEMA


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 1 << 62))
def test_garbage_is_refused_with_a_code(prefix: bytes, size: int) -> None:
    try:
        check_header(prefix, size)
    except ParisError as error:
        assert error.code == "tensor.header"
