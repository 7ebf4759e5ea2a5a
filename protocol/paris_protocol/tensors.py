"""The Merkle root of a set of tensors: names, dtypes, shapes and bytes, whatever the file layout.

Two files with the same tensors have the same root. Each tensor is a leaf that holds the root of an
inner tree over 16 MiB chunks, so one tensor or one range can be proved alone. Refused: duplicate or
over-long names, unknown dtypes, data whose length is not dtype times shape (`tensor.header`)::

    root = tensor_root([("w", "F32", (2,), b"\\0" * 8)])
    assert root == tensor_root(iter([("w", "F32", (2,), bytearray(8))]))
    committed = states_root([root, root])
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from paris_protocol.errors import ParisError
from paris_protocol.log import leaf_hash, merkle_root

Data: TypeAlias = bytes | bytearray | memoryview
Item: TypeAlias = tuple[str, str, tuple[int, ...], Data]

CHUNK: Final = 16 << 20
DTYPES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of the safetensors dtypes that may cross the network."""
MAX_NAME: Final = 1024
MAX_DIMS: Final = 16


def byte_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; `tensor.header` for an unknown dtype or an impossible shape."""
    if dtype not in DTYPES:
        raise ParisError("tensor.header", f"dtype {dtype[:20]!r}")
    if len(shape) > MAX_DIMS or any(not 0 <= size < 1 << 63 for size in shape):
        raise ParisError("tensor.header", "impossible shape")
    return DTYPES[dtype] * math.prod(shape)


def chunk_root(data: Data) -> bytes:
    """RFC 6962 root over the 16 MiB chunks of `data` (the last one may be shorter), 32 bytes."""
    # A view of nothing cannot be cast, and the root of no chunks is that of the empty tree.
    view = memoryview(data)
    flat = view.cast("B") if view.nbytes else memoryview(b"")
    hashes = []
    for begin in range(0, len(flat), CHUNK):
        chunk = hashlib.sha256(b"\0")
        chunk.update(flat[begin : begin + CHUNK])
        hashes.append(chunk.digest())
    return merkle_root(hashes)


def tensor_leaf(name: str, dtype: str, shape: tuple[int, ...], inner: bytes) -> bytes:
    """The leaf hash of a tensor, from the root over its bytes (SPEC.md, section Tensor root)."""
    text = name.encode("utf-8")
    if not 0 < len(text) <= MAX_NAME:
        raise ParisError("tensor.header", "a tensor name has 1 to 1024 bytes")
    kind = dtype.encode("ascii")
    head = struct.pack(
        f"<I{len(text)}sB{len(kind)}sB", len(text), text, len(kind), kind, len(shape)
    )
    return leaf_hash(head + struct.pack(f"<{len(shape)}Q", *shape) + inner)


def tensor_root(items: Iterable[Item]) -> str:
    """Root (hex) over (name, dtype, shape, bytes) in any order; holds one tensor at a time.

    `bytes` is the C-contiguous little-endian content: bytes or a memoryview of an array.
    """
    leaves: dict[bytes, bytes] = {}
    for name, dtype, shape, data in items:
        if memoryview(data).nbytes != byte_size(dtype, shape):
            raise ParisError("tensor.header", f"length of {name[:80]!r} is not dtype times shape")
        key = name.encode("utf-8")
        if key in leaves:
            raise ParisError("tensor.header", f"two tensors named {name[:80]!r}")
        leaves[key] = tensor_leaf(name, dtype, shape, chunk_root(data))
    return merkle_root([leaves[key] for key in sorted(leaves)]).hex()


def states_root(states: Sequence[str]) -> str:
    """Root (hex) over committed state roots in order of steps: `Commitment.states_root`."""
    return merkle_root([leaf_hash(bytes.fromhex(state)) for state in states]).hex()
