"""Update files for the fuzzing: read as a coordinator reads them, and encoded again.

What is taken must be exactly what is written for the change that it decodes to::

    read_update(update_files()[0])
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from fuzz.mutate import damaged
from fuzz.wire import spoil_header
from models.codec_cases import SHAPES, change, equal, factors
from paris_models.checkpoint import file_order, raw_bytes, schema_of
from paris_models.codecs import (
    CODECS,
    DENSE,
    LORA,
    Codec,
    codec_of,
    decode,
    encode,
    lora_modules,
    wire_schema,
)
from paris_models.codecs_lora import Reader
from paris_protocol.gate import check_header, header_length


def update_files() -> list[bytes]:
    """A file of every codec, a small and a special change."""
    made = []
    special = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    special["proj_out.bias"] += torch.tensor([2.0**-149, -3e38, 1.0])
    for codec in CODECS:
        for seed in (1, 2):
            delta = factors(seed, seed) if codec in LORA else (special, change(seed))[seed - 1]
            made.append(packed(encode(codec, delta)))
    return made


def packed(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file in memory, as `checkpoint.write_stream` lays it out."""
    schema, begin, parts = schema_of(tensors), 0, []
    for name in file_order(schema):
        dtype, shape = schema[name]
        data = bytes(raw_bytes(tensors[name]))
        offsets = f"[{begin},{begin + len(data)}]"
        parts.append((f'"{name}":{{"dtype":"{dtype}","shape":{list(shape)},'
                      f'"data_offsets":{offsets}}}', data))  # fmt: skip
        begin += len(data)
    text = ("{" + ",".join(part for part, _ in parts) + "}").encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, data in parts)


def spoil_update(random: Random, seeds: list[bytes]) -> bytes:
    """Mostly other data behind an honest header; sometimes another header."""
    raw = bytearray(random.choice(seeds))
    if random.random() < 0.2:
        return spoil_header(random, seeds)
    if random.random() < 0.1:
        return damaged(random, bytes(raw), seeds)
    begin = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(begin, len(raw))
        raw[place] = random.choice((raw[place] ^ 1 << random.randrange(8), 0, 0x7F, 0x80, 0xFF))
    return bytes(raw)


def read_update(raw: bytes) -> object:
    """Gate, schema, decoder; then the encoder must give the same tensors again."""
    prefix = raw[: 8 + header_length(raw[:8], len(raw))]
    header = check_header(prefix, len(raw))
    found = codec_of(header.tensors)
    half = any(entry[0] == "BF16" for entry in header.tensors.values())
    codec: Codec = ("dense-bf16" if half else "dense-f32") if found == "dense" else found
    check_header(prefix, len(raw), wire_schema(codec, SHAPES, header.tensors))
    wire = load(raw)
    dense = decode(wire, codec, SHAPES)
    assert {name: tuple(tensor.shape) for name, tensor in dense.items()} == SHAPES
    if codec in DENSE:
        return dense
    delta = sent_factors(wire, codec) if codec in LORA else dense
    assert all(bool(torch.isfinite(tensor).all()) for tensor in dense.values())
    assert equal(encode(codec, delta), wire)
    return dense


def sent_factors(wire: dict[str, Tensor], codec: Codec) -> dict[str, Tensor]:
    """The factors that a file stands for."""
    reader = Reader(codec, {name: tensor.numpy() for name, tensor in wire.items()}, SHAPES)
    made = {}
    for module in lora_modules(SHAPES):
        for part, grid in zip("ab", reader.grids(module), strict=True):
            made[f"{module}.{part}"] = torch.from_numpy(grid.dense().astype(np.float32))
    return made
