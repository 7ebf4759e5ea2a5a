"""Codecs: how an update crosses the network, from exact float32 down to ten bits per 64 weights.

Encoding is a function of the update's values alone: the same bytes on every machine, with any
number of threads. Dense updates are sent as they are; int8 and topk are described in their own
modules, factors in `codecs_lora`. What could not have been written is refused with `ValueError`;
only dense files may hold values that are not finite, which is for the reader to judge::

    wire = encode("topk-64", delta)                     # float32 by parameter name
    dense = decode(wire, "topk-64", shapes)             # zeros where nothing was sent
    later = left_out(delta, wire, "topk-64", shapes)    # what the next update makes up for
    update = open_update(path, None, shapes)            # lazy: a tensor at a time
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_models import codecs_int8, codecs_lora, codecs_topk
from paris_models.checkpoint import file_size, schema_of
from paris_models.codecs_layout import (
    CODECS,
    DENSE,
    LORA,
    Codec,
    Schema,
    Shapes,
    codec_of,
    lora_modules,
    per_weight,
    schema_for,
    wire_schema,
)

__all__ = [
    "CODECS", "DENSE", "LORA", "Codec", "Lazy", "Shapes", "codec_of", "decode", "encode",
    "left_out", "lora_modules", "mapped", "open_update", "per_weight", "wire_bytes", "wire_schema",
]  # fmt: skip

T = TypeVar("T")
Array = NDArray[Any]
TORCH: Final = {"dense-f32": torch.float32, "dense-bf16": torch.bfloat16}


class Lazy(Mapping[str, T]):
    """A mapping whose values are made whenever they are asked for, and not kept."""

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def encode(codec: Codec, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are sent for an update; `delta` is read tensor by tensor, several times.

    `delta` holds all tensors of an expert, or the factors `<module>.a` (r, in) and `<module>.b`
    (out, r) of all its modules under a LoRA codec. `ValueError` for an unknown codec, and for
    values that are not finite under all but the dense ones.
    """
    names = sorted(delta)
    if codec in DENSE:
        return {name: delta[name].detach().float().to(TORCH[codec]) for name in names}
    arrays = Lazy(names, lambda name: delta[name].detach().cpu().float().contiguous().numpy())
    if codec in LORA:
        wire = codecs_lora.encode(codec, arrays)
    elif codec == "int8":
        parts = [codecs_int8.encode_tensor(arrays[name].reshape(-1)) for name in names]
        empty = (np.zeros(0, np.float32), np.zeros(0, np.int8))
        largest, values = zip(empty, *parts, strict=True)
        wire = {"int8.largest": np.concatenate(largest), "int8.values": np.concatenate(values)}
    elif codec in CODECS:
        wire = codecs_topk.encode(codec, arrays)
    else:
        raise ValueError(f"there is no codec {codec}")
    return {name: torch.from_numpy(array) for name, array in wire.items()}


def decode(wire: Mapping[str, Tensor], codec: Codec, shapes: Shapes) -> dict[str, Tensor]:
    """The dense float32 update that was sent: every tensor of `shapes`, zeros where nothing was.

    `ValueError` for anything that `encode` could not have written. Dense values may be shared.
    """
    _check_schema(schema_of(wire), codec, shapes)
    if codec in DENSE:
        return {name: wire[name].float() for name in shapes}
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in wire.items()}
    tensor = _reader(codec, arrays, shapes)
    return {name: torch.from_numpy(tensor(name)) for name in shapes}


def left_out(
    delta: Mapping[str, Tensor], wire: Mapping[str, Tensor], codec: Codec, shapes: Shapes
) -> dict[str, Tensor]:
    """delta − decode(wire) in float32, by tensor: what was not sent. Refuses what `decode` does."""
    sent = decode(wire, codec, shapes)
    if delta.keys() != sent.keys():
        raise ValueError("the tensors differ in names or shapes")
    return {name: delta[name].float() - sent[name] for name in sorted(sent)}


def open_update(path: Path, codec: Codec | None, shapes: Shapes) -> Mapping[str, Array]:
    """The tensors of a file, decoded when they are asked for; `None` goes by the tensors' names.

    Float32 arrays of the tensors' shapes; dense files are mapped as they are, bfloat16 as uint16.
    The caller has checked the header before (`paris_protocol.gate`). `ValueError` for what cannot
    be an update of such an expert, some of it only when the tensor is asked for.
    """
    table, arrays = mapped(path)
    kind = codec or codec_of(arrays)
    if kind == "dense":
        if arrays.keys() != shapes.keys():
            raise ValueError("an update does not have the master's tensors")
        odd = sorted({dtype for dtype, _ in table.values()} - set(DENSE.values()))
        if odd:
            raise ValueError(f"tensors of {odd[0]} are not merged")
        return arrays
    _check_schema(table, kind, shapes)
    return arrays if kind in DENSE else Lazy(shapes, _reader(kind, arrays, shapes))


def wire_bytes(codec: Codec, shapes: Shapes, rank: int = 0) -> int:
    """Bytes of an update's file, exactly; `rank` is that of a LoRA codec's factors."""
    return file_size(schema_for(codec, shapes, rank))


def _check_schema(found: Schema, codec: Codec, shapes: Shapes) -> None:
    wanted = wire_schema(codec, shapes, found)
    if found != wanted:
        odd = min(
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        )
        raise ValueError(f"{odd} does not fit an update under {codec}")


def _reader(
    codec: Codec, arrays: Mapping[str, Array], shapes: Shapes
) -> Callable[[str], NDArray[np.float32]]:
    """The function that decodes one tensor of a checked file."""
    if codec in LORA:
        return codecs_lora.Reader(codec, arrays, shapes).tensor
    if codec == "int8":
        return codecs_int8.Reader(arrays, shapes).tensor
    return codecs_topk.Reader(codec, arrays, shapes).tensor


_KINDS: Final[dict[str, str]] = {
    "F32": "<f4", "BF16": "<u2", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1",
}  # fmt: skip


def mapped(path: Path) -> tuple[Schema, dict[str, Array]]:
    """Header and tensors of a file without reading them; bfloat16 as uint16."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    schema: Schema = {name: (spec["dtype"], tuple(spec["shape"])) for name, spec in table.items()}
    odd = sorted({dtype for dtype, _ in schema.values()} - _KINDS.keys())
    if odd:
        raise ValueError(f"tensors of {odd[0]} are not merged")
    data: Array = np.memmap(path, np.uint8, "r")[8 + length :]
    arrays = {}
    for name, (dtype, shape) in schema.items():
        begin, end = table[name]["data_offsets"]
        arrays[name] = data[begin:end].view(_KINDS[dtype]).reshape(shape)
    return schema, arrays
