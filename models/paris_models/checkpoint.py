"""Tensors as safetensors files with deterministic bytes, written atomically.

The library's writer orders metadata by a hash map, so ours writes the same format itself: equal
tensors give equal files. Reading leaves checking to the caller: the protocol's strict header gate
comes before any library opens a stranger's file. Unknown dtypes are refused with `ValueError`; a
full disk raises the `OSError` and leaves nothing half-written::

    save_tensors({"a": torch.ones(2, 3)}, path, {"kind": "example"})
    tensors = load_tensors(path)
    root = tensor_root(raw_items(tensors))              # paris_protocol.tensors
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Schema = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype as safetensors names it, shape)."""

DTYPES: Final = {
    torch.float64: "F64", torch.int64: "I64",
    torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
SIZES: Final = {name: dtype.itemsize for dtype, name in DTYPES.items()}


def dtype_name(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype; `ValueError` for one that files cannot hold."""
    try:
        return DTYPES[tensor.dtype]
    except KeyError:
        raise ValueError(f"{tensor.dtype} is not stored in files") from None


def raw_bytes(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor, without a copy where it is contiguous on the CPU."""
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    if not plain.numel():  # may have a stride of 0, of which torch makes no view
        return memoryview(b"")
    return memoryview(plain.view(torch.uint8).numpy())  # type: ignore[arg-type]


def raw_items(
    tensors: Mapping[str, Tensor],
) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
    """(name, dtype, shape, bytes) of each tensor, sorted by name: what a tensor root is made of."""
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        yield name, dtype_name(tensor), tuple(tensor.shape), raw_bytes(tensor)


def schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    """The header that a file of these tensors must have."""
    return {name: (dtype_name(t), tuple(t.shape)) for name, t in tensors.items()}


def file_order(schema: Schema) -> list[str]:
    """Names in the order of their bytes in a file: wide dtypes first, so that all are aligned."""
    return sorted(schema, key=lambda name: (-SIZES[schema[name][0]], name.encode()))


def write_stream(
    path: Path, schema: Schema, chunks: Iterable[Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file from the bytes of its tensors, given in `file_order`, atomically.

    Each of `chunks` is one whole tensor as a bytes-like object; only one is held at a time, and one
    process writes a path at a time. Raises
    `ValueError` when a chunk has not the size that the schema says, `OSError` when writing fails.
    """
    text, sizes = _header(schema, metadata)
    path = Path(path)
    # A fixed name: what a killed process left behind is overwritten by the next write.
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for size, chunk in zip(sizes, chunks, strict=True):
                if file.write(chunk) != size:
                    raise ValueError("a tensor's bytes do not have the size of its header")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def file_size(schema: Schema) -> int:
    """Bytes of the file that `write_stream` makes of a schema, without metadata."""
    text, sizes = _header(schema, None)
    return 8 + len(text) + sum(sizes)


def _header(schema: Schema, metadata: Mapping[str, str] | None) -> tuple[bytes, list[int]]:
    """The JSON of a file, padded to whole 8 bytes, and the bytes of each tensor in file order."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position, sizes = 0, []
    for name in file_order(schema):
        dtype, shape = schema[name]
        size = SIZES[dtype]
        for length in shape:
            size *= length
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += size
        sizes.append(size)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), sizes


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; not every file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file: same tensors and metadata, same bytes."""
    schema = schema_of(tensors)
    write_stream(path, schema, (raw_bytes(tensors[name]) for name in file_order(schema)), metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. The caller has checked the header before."""
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
