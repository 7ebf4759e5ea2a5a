"""The vectors of updates: one small change, how every codec sends it, and what is never sent.

The change has ties, a tensor without values, one of zeros, numbers from 2⁻¹⁴⁹ to 2⁹⁰, and a block
of int8 that is cut off. Floats are hex of their little-endian bytes, as is the data of tensors::

    updates()["updates"][0]["codec"]
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from paris_models.checkpoint import dtype_name, raw_bytes
from paris_models.codecs import CODECS, LORA, Codec, decode, encode

SHAPES: dict[str, tuple[int, ...]] = {
    "context_embedder.weight": (0, 4),
    "norm_out.linear.bias": (3,),
    "proj_out.weight": (5, 7),
    "single_transformer_blocks.0.proj_mlp.weight": (12, 30),
    "transformer_blocks.0.attn.to_q.bias": (4,),
    "transformer_blocks.0.attn.to_q.weight": (4, 6),
}
RANK = 3


def ramp(shape: tuple[int, ...], step: int, least: int) -> Tensor:
    """Whole numbers between −120 and 120 in a fixed disorder, times 2^least."""
    numbers = [(7 + step * i + i * i // 5) % 241 - 120 for i in range(math.prod(shape))]
    return torch.tensor(numbers, dtype=torch.float64).mul(2.0**least).float().view(shape)


def change() -> dict[str, Tensor]:
    """The change that is sent, by name."""
    made = {
        name: ramp(shape, 17 + 2 * i, -12 - i // 4)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    made["norm_out.linear.bias"] = torch.tensor([2.0**90, -(2.0**-149), 0.3])
    made["transformer_blocks.0.attn.to_q.bias"].zero_()
    return made


def factors() -> dict[str, Tensor]:
    """Factors of the two modules, one line of them zero."""
    made = {}
    for name, shape in SHAPES.items():
        if "transformer_blocks." in name and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            made[f"{module}.a"] = ramp((RANK, shape[1]), 29, -6) * 1.37
            made[f"{module}.b"] = ramp((shape[0], RANK), 31, -9) * 0.73
            made[f"{module}.b"][1] = 0
    return made


def told(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors as JSON: dtype, shape and data."""
    return {
        name: {
            "dtype": dtype_name(tensor),
            "shape": list(tensor.shape),
            "data": bytes(raw_bytes(tensor)).hex(),
        }
        for name, tensor in tensors.items()
    }


def floats(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Float32 tensors as the hex of their bytes."""
    return {name: bytes(raw_bytes(tensor.float())).hex() for name, tensor in tensors.items()}


def spoiled(codec: Codec, name: str, byte: int, value: int, why: str) -> dict[str, Any]:
    """An update with one byte changed, that no encoder writes."""
    tensors = told(encode(codec, factors() if codec in LORA else change()))
    data = bytearray.fromhex(tensors[name]["data"])
    if data[byte] == value:
        raise AssertionError(f"{why}: nothing changes")
    data[byte] = value
    tensors[name]["data"] = data.hex()
    wire = {n: _tensor(each) for n, each in tensors.items()}
    try:
        decode(wire, codec, SHAPES)
    except ValueError:
        return {"codec": codec, "why": why, "tensors": tensors}
    raise AssertionError(f"{why}: accepted")


def _tensor(told: dict[str, Any]) -> Tensor:
    kinds = {
        "F32": torch.float32, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8,
    }  # fmt: skip
    data = bytearray.fromhex(told["data"])
    return torch.frombuffer(data, dtype=kinds[told["dtype"]]).view(told["shape"])


def updates() -> dict[str, Any]:
    """The change, what each codec sends and what that means; updates that are refused."""
    sent = []
    for codec in CODECS:
        wire = encode(codec, factors() if codec in LORA else change())
        decoded = decode(wire, codec, SHAPES)
        sent.append({"codec": codec, "tensors": told(wire), "decoded": floats(decoded)})
    top = struct.pack("<f", 2.0**100)[-1]
    return {
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
        "change": floats(change()),
        "factors": told(factors()),
        "updates": sent,
        "refused": [
            spoiled("int8", "int8.values", 5, 0x80, "-128"),
            spoiled("int8", "int8.values", 0, 126, "a block without its largest value"),
            spoiled("int8", "int8.largest", 3, 0xFF, "a largest magnitude below zero"),
            spoiled("topk-32", "topk-32.counts", 4, 9, "counts that are not the places"),
            spoiled("topk-32", "topk-32.high", -1, 0x55, "ones behind the last place"),
            spoiled("topk-32", "topk-32.levels", 3, 1, "a level that nothing uses"),
            spoiled("topk-32", "topk-32.levels", 11, top, "a low level above the high one"),
            spoiled("topk-32", "topk-32.counts", 0, 1, "a count of a tensor without values"),
            spoiled("topk-256", "topk-256.marks", 0, 0x01, "bits behind the last mark"),
            spoiled("lora-int8", "lora-int8.values", 0, 0x80, "-128"),
            spoiled("lora-int8", "lora-int8.exponents", 0, 0x7F, "magnitudes beyond 2^60"),
            spoiled("lora-int8", "lora-int8.exponents", 1, 1, "an exponent of zeros"),
            spoiled("lora-int16", "lora-int16.exponents", 2, 0x80, "magnitudes below 2^-100"),
        ],
    }
