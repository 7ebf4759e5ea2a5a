"""The vectors of updates, read by a decoder that knows SPEC.md alone: plain Python, no NumPy."""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from models.codec_cases import equal
from paris_models.checkpoint import raw_bytes
from paris_models.codecs import CODECS, LORA, decode, encode

FILE: Final = Path(__file__).parents[2] / "protocol" / "vectors" / "updates.json"
VECTORS: Final = json.loads(FILE.read_text(encoding="utf-8"))
SHAPES: Final = {name: tuple(shape) for name, shape in VECTORS["shapes"].items()}
SIZES: Final = {name: math.prod(shape) for name, shape in SHAPES.items()}
FORMATS: Final = {"F32": "f", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BF16": "H"}
KINDS: Final = {
    "F32": torch.float32, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BF16": torch.bfloat16,
}  # fmt: skip


def numbers(told: dict[str, Any]) -> list[Any]:
    data = bytes.fromhex(told["data"])
    mark = FORMATS[told["dtype"]]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(mark)}{mark}", data))


def float32(value: float) -> float:
    found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return found


def bits(told: dict[str, Any]) -> str:
    return "".join(f"{byte:08b}" for byte in bytes.fromhex(told["data"]))


def cut(flat: list[float]) -> dict[str, list[float]]:
    """Values of the whole update as tensors, in the sorted order of their names."""
    left, made = iter(flat), {}
    for name in sorted(SIZES, key=str.encode):
        made[name] = [next(left) for _ in range(SIZES[name])]
    return made


def read_dense(sent: dict[str, Any]) -> dict[str, list[float]]:
    made = {}
    for name, told in sent.items():
        values = numbers(told)
        if told["dtype"] == "BF16":
            values = [struct.unpack("<f", struct.pack("<I", value << 16))[0] for value in values]
        made[name] = values
    return made


def read_int8(sent: dict[str, Any]) -> dict[str, list[float]]:
    steps, largest = iter(numbers(sent["int8.values"])), iter(numbers(sent["int8.largest"]))
    flat = []
    for name in sorted(SIZES, key=str.encode):
        for place in range(SIZES[name]):
            if place % 256 == 0:
                most = next(largest)
            flat.append(float32(float(next(steps)) * most / 127))
    return cut(flat)


def read_topk(codec: str, sent: dict[str, Any]) -> dict[str, list[float]]:
    width = int(codec.removeprefix("topk-")).bit_length() - 1
    total = sum(SIZES.values())
    high, low, marks = (bits(sent[f"{codec}.{part}"]) for part in ("high", "low", "marks"))
    levels = numbers(sent[f"{codec}.levels"])
    ones = [place for place, bit in enumerate(high) if bit == "1"]
    values = [0.0] * total
    owner = [
        number for number, n in enumerate(sorted(SIZES, key=str.encode)) for _ in range(SIZES[n])
    ]
    kept = [0] * len(SIZES)
    for i, one in enumerate(ones):
        place = (one - i) << width | int(low[i * width : (i + 1) * width], 2)
        mark = int(marks[2 * i : 2 * i + 2], 2)
        level = levels[2 * owner[place] + (mark & 1)]
        values[place] = -level if mark & 2 else level
        kept[owner[place]] += 1
    assert kept == numbers(sent[f"{codec}.counts"])
    return cut(values)


def read_lora(codec: str, sent: dict[str, Any]) -> dict[str, list[float]]:
    names = [n for n in SHAPES if "transformer_blocks." in n and ".norm" not in n]
    modules = sorted(n.removesuffix(".weight") for n in names if len(SHAPES[n]) == 2)
    values, exponents = numbers(sent[f"{codec}.values"]), numbers(sent[f"{codec}.exponents"])
    rank = len(values) // len(exponents)
    made = {name: [0.0] * size for name, size in SIZES.items()}
    for module in modules:
        out, into = SHAPES[f"{module}.weight"]
        b, values = values[: out * rank], values[out * rank :]
        a, values = values[: into * rank], values[into * rank :]
        lines, exponents = exponents[: out + into], exponents[out + into :]
        made[f"{module}.weight"] = [
            float32(
                float(
                    sum(b[i * rank + k] * a[k * into + j] for k in range(rank))
                    * Fraction(2) ** (lines[i] + lines[out + j])
                )
            )
            for i in range(out)
            for j in range(into)
        ]
    assert not values
    assert not exponents
    return made


def read(codec: str, sent: dict[str, Any]) -> dict[str, list[float]]:
    if codec.startswith("dense"):
        return read_dense(sent)
    if codec == "int8":
        return read_int8(sent)
    return read_lora(codec, sent) if codec in LORA else read_topk(codec, sent)


def tensors(told: dict[str, Any]) -> dict[str, torch.Tensor]:
    made = {}
    for name, each in told.items():
        data = bytearray.fromhex(each["data"])
        flat = torch.frombuffer(data, dtype=KINDS[each["dtype"]]) if data else torch.zeros(0)
        made[name] = flat.to(KINDS[each["dtype"]]).view(each["shape"])
    return made


@pytest.mark.parametrize("each", VECTORS["updates"], ids=lambda each: each["codec"])
def test_vectors_mean_what_the_specification_says(each: dict[str, Any]) -> None:
    codec, sent = each["codec"], each["tensors"]
    told = {name: struct.pack(f"<{len(x)}f", *x).hex() for name, x in read(codec, sent).items()}
    assert told == each["decoded"]
    found = decode(tensors(sent), codec, SHAPES)
    assert {n: bytes(raw_bytes(t)).hex() for n, t in found.items()} == each["decoded"]
    if codec in LORA:
        change = tensors(VECTORS["factors"])
    else:
        told = {
            name: {"dtype": "F32", "shape": SHAPES[name], "data": data}
            for name, data in VECTORS["change"].items()
        }
        change = tensors(told)
    assert equal(encode(codec, change), tensors(sent))


def test_there_is_a_vector_of_every_codec() -> None:
    assert tuple(each["codec"] for each in VECTORS["updates"]) == CODECS


@pytest.mark.parametrize("each", VECTORS["refused"], ids=lambda e: f"{e['codec']} {e['why']}")
def test_what_is_never_written_is_refused(each: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"kept|levels|bits|block|line|places"):
        decode(tensors(each["tensors"]), each["codec"], SHAPES)
