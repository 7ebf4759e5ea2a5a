"""Text in fewer bytes: rows of float32 as int8 or float8 with one scale per row.

In a cached clip the encoded caption dominates. Each row (a token's vector) is divided by its scale
and rounded to the nearest code. Storing what was read gives the same bytes: a table loses something
once only. Values that are not finite are refused with `ValueError`::

    codes, scale = pack_rows(torch.randn(3, 512, 64), "int8")       # int8, and float32 (3, 512)
    again = unpack_rows(codes, scale)                               # float32 (3, 512, 64)
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Store = Literal["float32", "float8", "int8"]
CODES: Final[dict[str, tuple[torch.dtype, float]]] = {
    "int8": (torch.int8, 127.0),
    "float8": (torch.float8_e4m3fn, 448.0),
}
"""Type of the codes, and the largest code: 2⁷ − 2⁰ and 2⁹ − 2⁶.

For a difference of two powers of two, scale × code ÷ code is the scale again, also when rounded.
"""
DTYPES: Final[dict[Store, str]] = {"float32": "F32", "float8": "F8_E4M3", "int8": "I8"}
"""As safetensors names the type of the codes."""
SMALLEST: Final = 2.0**-100
"""No scale is smaller: a row of zeros, or of next to nothing, becomes zeros."""


def pack_rows(rows: Tensor, store: Store) -> tuple[Tensor, Tensor]:
    """Rows (…, D) float32 as codes (…, D) and scales (…): max |row| ÷ the largest code."""
    dtype, largest = CODES[store]
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("text holds values that are not finite")
    scale = (rows.abs().amax(-1) / largest).clamp(min=SMALLEST)
    values = rows / scale[..., None]
    if dtype == torch.int8:
        values = values.round().clamp(-largest, largest)
    return values.to(dtype), scale


def unpack_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (…, D) and scales (…) as float32 rows; one multiplication, equal bits everywhere."""
    return codes.float() * scale[..., None]
