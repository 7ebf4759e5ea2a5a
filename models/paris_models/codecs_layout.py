"""What an update's file holds under each codec: tensors, lengths and bytes (SPEC.md, Updates).

Arithmetic on names and shapes alone; no torch and no NumPy is loaded. A codec's tensors are named
`<codec>.<part>` and run over all tensors of the expert in the sorted order of their names; dense
updates have the expert's own names. What a file of the codec cannot be raises `ValueError`::

    schema = wire_schema("topk-64", shapes, header.tensors)    # what the strict gate must see
    codec_of(schema)                                           # "topk-64"
    per_weight("topk-64")                                      # 0.15625 bytes
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Literal, cast, get_args

Codec = Literal[
    "dense-f32", "dense-bf16", "int8", "topk-32", "topk-64", "topk-128", "topk-256",
    "lora-int16", "lora-int8",
]  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]
"""Names and shapes of an expert's tensors."""
Schema = dict[str, tuple[str, tuple[int, ...]]]

CODECS: Final[tuple[Codec, ...]] = get_args(Codec)
DENSE: Final[Mapping[str, str]] = {"dense-f32": "F32", "dense-bf16": "BF16"}
LORA: Final[Mapping[str, tuple[str, int]]] = {
    "lora-int16": ("I16", (1 << 15) - 1),
    "lora-int8": ("I8", (1 << 7) - 1),
}
"""dtype and largest number of the grid that factors are put on."""
BLOCK: Final = 256
"""Values of a tensor that share a scale under int8."""
MOST_RANK: Final = 256
"""So many columns a factor may have on the wire."""
MARK_BITS: Final = 2
"""Bits of a kept value under topk: its sign and which of two levels."""


@dataclass(frozen=True, slots=True)
class TopkLayout:
    """Lengths under topk: of `total` values at most `keep` are sent, with `low` fixed bits each.

    Positions are Elias-Fano over the whole update: position p is the i-th kept one when bit
    (p >> low) + i of `high` is one; its other bits stand in `low`.
    """

    total: int
    keep: int
    low: int

    @property
    def high_bits(self) -> int:
        """Bits of the unary part: one for each kept value, and the largest high part."""
        return self.keep + ((self.total - 1) >> self.low) if self.total else 0


def topk_layout(codec: Codec, shapes: Shapes) -> TopkLayout:
    """The lengths of a topk codec: ⌈total / N⌉ values, log₂ N low bits."""
    total, one_of = parameters(shapes), int(codec.removeprefix("topk-"))
    return TopkLayout(total, -(-total // one_of), one_of.bit_length() - 1)


def is_topk(codec: str) -> bool:
    """Whether a codec sends the largest values alone."""
    return codec.startswith("topk-")


def parameters(shapes: Shapes) -> int:
    """Values of all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values())


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where each of some parts begins when they stand one behind the other, and the end."""
    return [0, *accumulate(sizes)]


def lora_modules(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The modules with factors, sorted, and their (out, in): Linears of blocks, no modulation.

    The same as `adapters.adapt` gives factors to.
    """
    linears = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if "transformer_blocks." in name
        and ".norm" not in name
        and name.endswith(".weight")
        and len(shape) == 2
    }
    return dict(sorted(linears.items()))


def wire_schema(codec: Codec, shapes: Shapes, header: Mapping[str, Any]) -> Schema:
    """The header that a file of the codec must have: name -> (dtype, shape).

    `header` maps names to (dtype, shape, …) as the gate read them; only the rank of factors is
    taken from it. Raises `ValueError` for an unknown codec, or a length that no rank up to
    `MOST_RANK` gives.
    """
    if codec in DENSE:
        return {name: (DENSE[codec], tuple(shape)) for name, shape in shapes.items()}
    if codec in LORA:
        values = header.get(f"{codec}.values")
        shape = tuple(values[1]) if values is not None else ()
        return _lora_schema(codec, shapes, _rank(shape, shapes))
    if codec == "int8":
        blocks = sum(-(-math.prod(shape) // BLOCK) for shape in shapes.values())
        return {"int8.largest": ("F32", (blocks,)), "int8.values": ("I8", (parameters(shapes),))}
    if is_topk(codec) and codec in CODECS:
        return _topk_schema(codec, shapes)
    raise ValueError(f"there is no codec {codec}")


def schema_for(codec: Codec, shapes: Shapes, rank: int = 0) -> Schema:
    """The header of a file that is still to be written; `rank` is that of factors."""
    if codec not in LORA:
        return wire_schema(codec, shapes, {})
    if not 1 <= rank <= MOST_RANK:
        raise ValueError(f"a rank of {rank}")
    return _lora_schema(codec, shapes, rank)


def _lora_schema(codec: Codec, shapes: Shapes, rank: int) -> Schema:
    lines = sum(sum(pair) for pair in lora_modules(shapes).values())
    return {
        f"{codec}.exponents": ("I8", (lines,)),
        f"{codec}.values": (LORA[codec][0], (rank * lines,)),
    }


def _rank(shape: tuple[int, ...], shapes: Shapes) -> int:
    lines = sum(sum(pair) for pair in lora_modules(shapes).values())
    rank = shape[0] // lines if len(shape) == 1 and lines else 0
    if not 1 <= rank <= MOST_RANK or shape != (rank * lines,):
        raise ValueError(f"factors of {list(shape)} values for {lines} rows and columns")
    return rank


def _topk_schema(codec: Codec, shapes: Shapes) -> Schema:
    layout = topk_layout(codec, shapes)
    return {
        f"{codec}.counts": ("I32", (len(shapes),)),
        f"{codec}.high": ("U8", (-(-layout.high_bits // 8),)),
        f"{codec}.levels": ("F32", (len(shapes), 2)),
        f"{codec}.low": ("U8", (-(-layout.keep * layout.low // 8),)),
        f"{codec}.marks": ("U8", (-(-layout.keep * MARK_BITS // 8),)),
    }


def codec_of(names: Iterable[str]) -> Codec | Literal["dense"]:
    """Which codec wrote a file, by the names of its tensors; dense ones differ by dtype alone."""
    known = {name.partition(".")[0] for name in names} & set(CODECS)
    return cast(Codec, known.pop()) if len(known) == 1 else "dense"


def per_weight(codec: Codec) -> float:
    """Bytes per weight of an update, but for headers and the rest of the last block or byte.

    Factors cost by their rank, not by weights: `ValueError`.
    """
    if codec in DENSE:
        return 4.0 if codec == "dense-f32" else 2.0
    if codec == "int8":
        return 1 + 4 / BLOCK
    if not is_topk(codec):
        raise ValueError(f"{codec} costs by its rank")
    one_of = int(codec.removeprefix("topk-"))
    low = one_of.bit_length() - 1
    return (low + 2 + MARK_BITS) / (8 * one_of)  # the high part has a one and a zero per value
