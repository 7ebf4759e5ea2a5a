"""The strict gate in front of safetensors: a file's header is judged before any library opens it.

The library itself accepts duplicate keys, unknown fields, leading white space, hostile names and
huge metadata. Refused here (`tensor.header`): all of these, dtypes that may not cross the network,
dishonest lengths, holes, overlaps, trailing bytes, and whatever differs from an expected schema::

    length = header_length(first_8_bytes, file_size)
    header = check_header(first_8_plus_length_bytes, file_size, {"w": ("F32", (2, 3))})
    dtype, shape, begin, end = header.tensors["w"]     # bytes from header.data_start on
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

from paris_protocol.errors import ParisError
from paris_protocol.tensors import byte_size

Schema: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", re.ASCII)
_TENSOR: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a header may hold: its bytes, tensors, bytes of a name and of the metadata."""

    header: int = 16 << 20
    tensors: int = 1 << 16
    name: int = 256
    metadata: int = 64 << 10


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds.

    `tensors[name]` is (dtype, shape, begin, end) with byte offsets counted from `data_start`.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    data_start: int
    metadata: dict[str, str]


LIMITS: Final = Limits()


def _refuse(detail: str) -> NoReturn:
    raise ParisError("tensor.header", detail)


def header_length(first: bytes, file_size: int, limits: Limits = LIMITS) -> int:
    """Bytes of JSON after the first 8 bytes of a file, from those 8; refuses dishonest lengths."""
    if len(first) < 8 or file_size < 10:
        _refuse("too short for a tensor file")
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= min(limits.header, file_size - 8):
        _refuse(f"a header of {length} bytes")
    return length


def check_header(
    prefix: bytes, file_size: int, schema: Schema | None = None, limits: Limits = LIMITS
) -> Header:
    """Judge a file by its first 8 + header_length bytes (more do no harm) and its size in bytes.

    With a schema, names, dtypes and shapes must be exactly those. Raises `tensor.header`.
    """
    length = header_length(prefix, file_size, limits)
    if len(prefix) < 8 + length:
        _refuse("the header is cut off")
    table = _parse(prefix[8 : 8 + length], limits)
    metadata = _metadata(table.pop("__metadata__", {}), limits)
    if len(table) > limits.tensors:
        _refuse(f"{len(table)} tensors")
    tensors = {name: _tensor(name, entry, limits) for name, entry in table.items()}
    _check_layout(tensors, file_size - 8 - length)
    if schema is not None:
        _check_schema(tensors, schema)
    return Header(tensors, 8 + length, metadata)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        _refuse("a key that stands twice")
    return table


def _no_float(text: str) -> NoReturn:
    _refuse(f"the number {text[:20]}")


def _parse(raw: bytes, limits: Limits) -> dict[str, Any]:
    # A tensor has four fields' colons, two lists and one object; metadata may hold any text. More
    # than that is refused before a parser makes hundreds of megabytes of small objects of it.
    for mark, each in ((b":", 4), (b"[", 2), (b"{", 1)):
        if raw.count(mark) > each * (limits.tensors + 1) + limits.metadata:
            _refuse("too many tensors")
    # Writers pad with spaces behind the JSON to a multiple of 8; anything else around it is odd.
    text = raw.rstrip(b" ")
    if not text.startswith(b"{") or not text.endswith(b"}") or len(raw) - len(text) > 7:
        _refuse("stray bytes around the header")
    try:
        table = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_pairs,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except (ValueError, RecursionError) as error:
        raise ParisError("tensor.header", "not JSON") from error
    if not isinstance(table, dict):
        _refuse("not an object")
    return table


def _metadata(value: object, limits: Limits) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _refuse("metadata that is not text")
    if sum(len(key) + len(text) for key, text in value.items()) > limits.metadata:
        _refuse("too much metadata")
    return value


def _tensor(name: str, entry: object, limits: Limits) -> tuple[str, tuple[int, ...], int, int]:
    if len(name) > limits.name or _NAME.fullmatch(name) is None:
        _refuse(f"the name {name[:40]!r}")
    if not isinstance(entry, dict) or set(entry) != _TENSOR:
        _refuse(f"fields of {name}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets):
        _refuse(f"fields of {name}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != byte_size(dtype, tuple(shape)):
        _refuse(f"length of {name}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(part) is int and part >= 0 for part in value)


def _check_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], data_size: int
) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    reached = 0
    for begin, end, name in sorted((t[2], t[3], name) for name, t in tensors.items()):
        if begin != reached:
            _refuse(f"a hole or an overlap before {name}")
        reached = end
    if reached != data_size:
        _refuse(f"{data_size} bytes of data, {reached} described")


def _check_schema(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], schema: Schema
) -> None:
    for name in sorted(tensors.keys() ^ schema.keys()):
        _refuse(f"{name} is {'unknown' if name in tensors else 'missing'}")
    for name, (dtype, shape, _, _) in tensors.items():
        if (dtype, shape) != (schema[name][0], tuple(schema[name][1])):
            _refuse(f"{name} is {dtype} {list(shape)}, expected {schema[name]}")
