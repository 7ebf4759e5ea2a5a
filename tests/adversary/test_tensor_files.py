"""Rows "malicious safetensors" and "NaN/Inf/denormal bombs": files that lie about themselves.

Every class of malformed file goes through the coordinator's own L0, which must refuse it before
anything large is allocated; the honest file passes. Files of a tebibyte are sparse.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paris_coordinator.jobs.common import expert_schema, gated, header_of
from paris_coordinator.worker import perform
from paris_models.checkpoint import load_tensors
from paris_protocol.errors import ParisError
from paris_protocol.gate import check_header
from tinynet import TinyNet, Unit

MEGABYTE = 1 << 20
Entry = dict[str, Any]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def honest(net: TinyNet) -> Unit:
    return net.unit(0, 0)


def split(path: Path) -> tuple[Entry, bytes]:
    """Header and data of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def dumped(header: Entry | str) -> bytes:
    """A header as it stands in a file."""
    compact = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    return compact.encode("utf-8", "surrogatepass")


def joined(header: Entry | str | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with this header; `length` is what it says about the header's."""
    text = header if isinstance(header, bytes) else dumped(header)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


Forge = Callable[[Entry, bytes], bytes]


def first(header: Entry) -> str:
    return min(header, key=lambda name: header[name]["data_offsets"][0])


def moved(header: Entry, by: int) -> Entry:
    """Every tensor but the first one begins `by` bytes later."""
    kept = first(header)
    return {
        name: entry
        if name == kept
        else entry | {"data_offsets": [place + by for place in entry["data_offsets"]]}
        for name, entry in header.items()
    }


def changed(header: Entry, **fields: Any) -> Entry:
    name = first(header)
    return header | {name: header[name] | fields}


def renamed(name: str) -> Forge:
    def forge(header: Entry, data: bytes) -> bytes:
        old = first(header)
        return joined({name if n == old else n: entry for n, entry in header.items()}, data)

    return forge


def doubled(header: Entry, data: bytes) -> bytes:
    text = json.dumps(header)
    return joined(text[:-1] + "," + text[1:], data)


def empties(count: int) -> Forge:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'

    def forge(header: Entry, data: bytes) -> bytes:
        return joined("{" + ",".join(f'"t{i}":{entry}' for i in range(count)) + "}", b"")

    return forge


def text(value: str) -> Forge:
    return lambda header, data: joined(value, data)


CLASSES: dict[str, Forge] = {
    # dishonest header length
    "length of nothing": lambda h, d: joined(h, d, 0),
    "length beyond the file": lambda h, d: joined(h, d, 1 << 40),
    "largest length": lambda h, d: joined(h, d, (1 << 64) - 1),
    "length too short": lambda h, d: joined(h, d, 40),
    "length into the data": lambda h, d: joined(h, d, len(dumped(h)) + 8),
    # dishonest offsets
    "hole": lambda h, d: joined(moved(h, 4), d[:4] + bytes(4) + d[4:]),
    "overlap": lambda h, d: joined(moved(h, -4), d[:-4]),
    "trailing data": lambda h, d: joined(h, d + b"x"),
    "truncated": lambda h, d: joined(h, d[:-1]),
    "no data": lambda h, d: joined(h, b""),
    "backwards": lambda h, d: joined(changed(h, data_offsets=[8, 0]), d),
    "negative": lambda h, d: joined(changed(h, data_offsets=[-8, 0]), d),
    "overflow": lambda h, d: joined(changed(h, shape=[1 << 62, 1 << 62]), d),
    "offsets beyond 64 bits": lambda h, d: joined(changed(h, data_offsets=[0, 1 << 70]), d),
    # ambiguous or unknown content
    "duplicate keys": doubled,
    "unknown field": lambda h, d: joined(changed(h, extra=1), d),
    "leading white space": lambda h, d: joined(" " + json.dumps(h), d),
    "byte order mark": lambda h, d: joined("\ufeff" + json.dumps(h), d),
    "polyglot": lambda h, d: joined("<html>" + json.dumps(h), d),
    "two objects": lambda h, d: joined(json.dumps(h) + "{}", d),
    "floats": lambda h, d: joined(changed(h, shape=[2.0, 3.0]), d),
    "booleans": lambda h, d: joined(changed(h, shape=[True]), d),
    "NaN": text('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
    "not UTF-8": lambda h, d: joined(b'{"\xff":1}', d),
    "lone surrogate": text('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "unknown dtype": lambda h, d: joined(changed(h, dtype="C128"), d),
    "list": text("[]"),
    # exhaustion
    "very many empty tensors": empties(250_000),
    "many empty tensors": empties(20_000),
    "huge metadata": lambda h, d: joined(h | {"__metadata__": {"a": "x" * (8 << 20)}}, d),
    "deep nesting": text("[" * (4 << 20)),
    "deep objects": text('{"a":' * 200_000 + "1" + "}" * 200_000),
    "millions of lists": text('{"a":[' + "[]," * 4_000_000 + "[]]}"),
    "millions of keys": text("{" + ",".join(f'"{i}":0' for i in range(1_000_000)) + "}"),
    "a number of a million digits": text('{"a":' + "9" * 1_000_000 + "}"),
    # hostile names
    **{
        f"name {name[:12]!r}": renamed(name)
        for name in ("../../etc/passwd", "/etc/passwd", "..", "C:\\x", "a\0b", "a\nb", "a b", "",
                     "ü", "\u202ereversed", "a" * 100_000, "$(id)", "proj_out.bias\u200b")
    },
}  # fmt: skip


def judged(net: TinyNet, unit: Unit, path: Path) -> tuple[str, str]:
    """Layer and code of the coordinator's refusal of a unit with this file as its update."""
    answer = perform(net.verify_job(unit, update=str(path)))
    assert "result" in answer, answer
    last = answer["result"]["layers"][-1]
    return ("", "") if last["passed"] else (last["layer"], last["code"])


@pytest.mark.parametrize("name", CLASSES)
def test_malformed_files_are_refused_before_they_cost_anything(
    name: str, net: TinyNet, honest: Unit, tmp_path: Path
) -> None:
    path = tmp_path / "update.safetensors"
    path.write_bytes(CLASSES[name](*split(honest.update)))
    schema = expert_schema(net.config, "F32")
    tracemalloc.start()
    try:
        with pytest.raises(ParisError) as caught:
            gated(path, schema)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == "tensor.header"
    assert peak < 100 * MEGABYTE, f"{peak >> 20} MB for a file of {path.stat().st_size >> 20} MB"
    assert judged(net, honest, path) == ("L0", "structure.schema")


def test_the_honest_file_passes(net: TinyNet, honest: Unit) -> None:
    assert judged(net, honest, honest.update) == ("", "")


def test_a_tebibyte_is_refused_by_its_header(net: TinyNet, honest: Unit, tmp_path: Path) -> None:
    """The file says the truth about its size: one tensor too many, or one far too large."""
    header, data = split(honest.update)
    size = 1 << 40
    path = tmp_path / "large.safetensors"
    more = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
    for entry in (header | {"more": more}, {"proj_out.weight": more | {"data_offsets": [0, size]}}):
        raw = joined(entry, data if "more" in entry else b"")
        path.write_bytes(raw)
        with path.open("r+b") as file:
            file.truncate(len(raw) + size)
        check_header(raw, len(raw) + size)  # as a file it is sound: it is the schema that refuses
        tracemalloc.start()
        with pytest.raises(ParisError, match=r"unknown|missing|expected"):
            gated(path, expert_schema(net.config, "F32"))
        assert tracemalloc.get_traced_memory()[1] < MEGABYTE
        tracemalloc.stop()
        header_of(path, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_a_single_value_that_is_no_number(
    net: TinyNet, honest: Unit, bad: float, place: int
) -> None:
    update = {n: t.clone() for n, t in load_tensors(honest.update).items()}
    update[sorted(update)[place]].view(-1)[place] = bad
    lie = net.hand_in(honest.assignment, update, list(honest.commitment.states))
    assert judged(net, lie, lie.update) == ("L0", "structure.values")


def test_denormals_neither_pass_as_work_nor_slow_the_judge(net: TinyNet, honest: Unit) -> None:
    """All values below the smallest normal number: an empty update that looks full."""
    update = load_tensors(honest.update)
    tiny = {name: torch.full_like(tensor, 1e-42) for name, tensor in update.items()}
    lie = net.hand_in(honest.assignment, tiny, list(honest.commitment.states))
    assert judged(net, lie, lie.update) == ("L2", "statistics.zero")


def test_one_gigantic_value_in_a_good_update(net: TinyNet, honest: Unit) -> None:
    update = {n: t.clone() for n, t in load_tensors(honest.update).items()}
    update[sorted(update)[0]].view(-1)[0] = 1e30
    lie = net.hand_in(honest.assignment, update, list(honest.commitment.states))
    assert judged(net, lie, lie.update) == ("L2", "statistics.norm")
