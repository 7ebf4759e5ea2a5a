"""topk updates: the largest of all values, their places, signs and two levels per tensor.

The kept values are the ⌈total/N⌉ largest |x| of the whole update, the first of equal ones; zeros
are never kept. The places are Elias-Fano coded over the update's values in the sorted order of
their tensors. In each tensor a kept value above the exact mean of the kept magnitudes is "high";
the two levels are the exact means of the low and of the high ones, cut to float32. The search for
the threshold counts bit patterns, and the means are integer sums: no order, chunk or thread can
change a bit. Encoding what was decoded gives the same bytes. Refused with `ValueError`: values that
are not finite, files that could not have been written::

    wire = encode("topk-64", delta)                # name -> array; `delta` is read tensor by tensor
    reader = Reader("topk-64", wire, shapes)
    reader.tensor("proj_out.weight")               # float32, zeros where nothing was sent
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paris_models.codecs_layout import (
    MARK_BITS,
    Codec,
    Shapes,
    TopkLayout,
    offsets,
    topk_layout,
)

PIECE: Final = 1 << 20
"""Values that are worked on at once; a multiple of 8, so that packed bits end at bytes."""
HALF: Final = 16
MAGNITUDE: Final = np.uint32(0x7FFF_FFFF)
INFINITE: Final = 0x7F80_0000
UNIT: Final = -149
"""A float32 is a whole multiple of 2^UNIT."""
DIGITS: Final = 24

Bits = NDArray[np.uint32]
Wire = dict[str, NDArray[Any]]


class Threshold(NamedTuple):
    """Kept are all magnitudes whose bits are above `bits`, and the first `ties` that equal them."""

    bits: int
    ties: int


class _Kept(NamedTuple):
    """Kept values of one tensor: places in it, ascending, and their float32 bits."""

    places: NDArray[np.int64]
    bits: Bits


def encode(codec: Codec, delta: Mapping[str, NDArray[np.float32]]) -> Wire:
    """The arrays of a topk file. `delta` is read several times, in sorted order of names."""
    names = sorted(delta)
    shapes = {name: tuple(delta[name].shape) for name in names}
    layout = topk_layout(codec, shapes)
    threshold = find_threshold(delta, layout.keep)
    counts = np.zeros(len(names), np.int32)
    levels = np.zeros((len(names), 2), np.float32)
    low, marks = np.zeros(layout.keep, np.uint8), np.zeros(layout.keep, np.uint8)
    high = np.zeros(layout.high_bits, np.bool_)
    done, begin, ties = 0, 0, threshold.ties
    for number, name in enumerate(names):
        flat = np.ascontiguousarray(delta[name]).reshape(-1)
        kept, ties = _kept(flat, threshold, ties)
        part = slice(done, done + len(kept.places))
        magnitudes = (kept.bits & MAGNITUDE).view(np.float32)
        levels[number], above = _levels(magnitudes)
        marks[part] = (kept.bits >> 31) << 1 | above
        places = kept.places + begin
        low[part] = places & ((1 << layout.low) - 1)
        high[(places >> layout.low) + np.arange(part.start, part.stop)] = True
        counts[number] = len(places)
        done, begin = part.stop, begin + flat.size
    return {
        f"{codec}.counts": counts,
        f"{codec}.high": np.packbits(high),
        f"{codec}.levels": levels,
        f"{codec}.low": _packed(low, layout.low),
        f"{codec}.marks": _packed(marks, MARK_BITS),
    }


def find_threshold(delta: Mapping[str, NDArray[np.float32]], keep: int) -> Threshold:
    """Where the `keep` largest magnitudes begin, exactly, by counting the halves of their bits.

    Magnitudes of float32 are ordered as their bit patterns are. Memory: two tables of 65,536
    numbers and one piece. `ValueError` for values that are not finite.
    """
    upper = np.zeros(1 << HALF, np.int64)
    for bits in _magnitudes(delta):
        if bits.max(initial=0) >= INFINITE:
            raise ValueError("the update holds values that are not finite")
        upper += np.bincount(bits >> HALF, minlength=len(upper))
    first, above = _bin_of(upper, keep)
    lower = np.zeros(1 << HALF, np.int64)
    for bits in _magnitudes(delta):
        same = bits[bits >> HALF == first] & ((1 << HALF) - 1)
        lower += np.bincount(same, minlength=len(lower))
    if first == 0:
        lower[0] = 0  # zeros are never kept
    second, above_too = _bin_of(lower, keep - above)
    ties = min(keep - above - above_too, int(lower[second]))
    return Threshold(first << HALF | second, ties)


def _bin_of(counts: NDArray[np.int64], keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest (the last one if there are fewer), those above it."""
    down = np.cumsum(counts[::-1])
    place = min(int(np.searchsorted(down, max(keep, 1))), len(counts) - 1)
    found = len(counts) - 1 - place
    return found, int(down[place] - counts[found])


def _magnitudes(delta: Mapping[str, NDArray[np.float32]]) -> Iterator[Bits]:
    for name in sorted(delta):
        flat = np.ascontiguousarray(delta[name]).reshape(-1).view(np.uint32)
        for begin in range(0, flat.size, PIECE):
            yield flat[begin : begin + PIECE] & MAGNITUDE


def _kept(flat: NDArray[np.float32], threshold: Threshold, ties: int) -> tuple[_Kept, int]:
    """The kept values of a tensor, and how many ties are left for the tensors behind it."""
    found = []
    for begin in range(0, flat.size, PIECE):
        bits = flat[begin : begin + PIECE].view(np.uint32) & MAGNITUDE
        mask = bits > threshold.bits
        if ties:
            equal = np.flatnonzero(bits == threshold.bits)[:ties]
            mask[equal] = True
            ties -= len(equal)
        found.append(np.flatnonzero(mask) + begin)
    places = np.concatenate(found) if found else np.zeros(0, np.int64)
    return _Kept(places, flat.view(np.uint32)[places]), ties


def _levels(magnitudes: NDArray[np.float32]) -> tuple[tuple[float, float], NDArray[np.bool_]]:
    """(low, high) of a tensor's kept magnitudes, all above zero, and which of them are high."""
    if not magnitudes.size:
        return (0.0, 0.0), np.zeros(0, np.bool_)
    above = magnitudes > _mean(magnitudes)
    high = _mean(magnitudes[above]) if above.any() else 0.0
    return (_mean(magnitudes[~above]), high), above


def _mean(magnitudes: NDArray[np.float32]) -> float:
    """The largest float32 that is not above the exact mean of at most 2²⁹ magnitudes."""
    bits = magnitudes.view(np.uint32)
    exponents = bits >> 23
    digits = (bits & 0x7F_FFFF) | np.where(exponents > 0, 1 << 23, 0)
    # Each sum is a whole number below 2⁵³, so float64 adds it exactly in any order.
    sums = np.bincount(np.maximum(exponents, 1) - 1, weights=digits)
    total = sum(int(part) << place for place, part in enumerate(sums.tolist()))
    whole = total // magnitudes.size
    cut = max(0, whole.bit_length() - DIGITS)
    return math.ldexp(whole >> cut, cut + UNIT)


def _packed(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The lowest `width` bits of each value, highest first, one behind the other in bytes."""
    out = np.empty(-(-values.size * width // 8), np.uint8)
    for begin in range(0, values.size, PIECE):
        piece = values[begin : begin + PIECE, None]
        bits = np.packbits(np.unpackbits(piece, axis=1)[:, 8 - width :])
        out[begin * width // 8 :][: bits.size] = bits
    return out


def _bits(packed: NDArray[np.uint8], begin: int, end: int) -> NDArray[np.uint8]:
    """Bits `begin` to `end` of packed bytes, one in a byte."""
    first = begin // 8
    unpacked = np.unpackbits(packed[first : -(-end // 8)])
    return unpacked[begin - 8 * first : end - 8 * first]


def _unpacked(packed: NDArray[np.uint8], begin: int, end: int, width: int) -> NDArray[np.uint8]:
    """Values number `begin` to `end` that `_packed` wrote."""
    out = np.zeros(end - begin, np.uint8)
    for at in range(begin, end, PIECE):
        to = min(at + PIECE, end)
        bits = _bits(packed, at * width, to * width).reshape(-1, width)
        wide = np.zeros((to - at, 8), np.uint8)
        wide[:, 8 - width :] = bits
        out[at - begin : to - begin] = np.packbits(wide, axis=1)[:, 0]
    return out


class Reader:
    """The tensors of a topk file, each decoded when it is asked for.

    Opening checks lengths, counts, levels and padding; a tensor's places are checked with it.
    """

    def __init__(self, codec: Codec, wire: Mapping[str, NDArray[Any]], shapes: Shapes) -> None:
        self._layout = topk_layout(codec, shapes)
        self._shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        self._number = {name: number for number, name in enumerate(self._shapes)}
        self._counts, self._levels = wire[f"{codec}.counts"], wire[f"{codec}.levels"]
        self._high, self._low = wire[f"{codec}.high"], wire[f"{codec}.low"]
        self._marks = wire[f"{codec}.marks"]
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        if ((self._counts < 0) | (self._counts > np.array(sizes, np.int64))).any():
            raise ValueError("a tensor has more kept values than values")
        self._begins, self._firsts = offsets(sizes), offsets(self._counts.tolist())
        _check(self._layout, self._firsts[-1], self._high, self._low, self._marks)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor, of its shape; `ValueError` for what `encode` never writes."""
        number = self._number[name]
        shape = self._shapes[name]
        out = np.zeros(math.prod(shape), np.float32)
        first, end = self._firsts[number], self._firsts[number + 1]
        low, high = self._levels[number]
        marks = _unpacked(self._marks, first, end, MARK_BITS)
        _check_levels(low, high, marks & 1)
        if first < end:
            values = np.where(marks & 1, high, low)
            out[self._places(number, first, end, out.size)] = np.where(marks & 2, -values, values)
        return out.reshape(shape)

    def _places(self, number: int, first: int, end: int, size: int) -> NDArray[np.int64]:
        """Places of a tensor's kept values; the ones of its own stretch of the high part."""
        begin, width = self._begins[number], self._layout.low
        at = (begin >> width) + first
        to = ((begin + size - 1) >> width) + end
        ones = np.flatnonzero(_bits(self._high, at, to))
        if ones.size != end - first:
            raise ValueError("the kept values of a tensor are not as many as its count says")
        upper = ones + at - np.arange(first, end)
        places: NDArray[np.int64] = upper << width | _unpacked(self._low, first, end, width)
        places -= begin
        if places[0] < 0 or places[-1] >= size or (np.diff(places) <= 0).any():
            raise ValueError("the places of kept values are not ascending inside their tensor")
        return places


def _check(layout: TopkLayout, kept: int, *packed: NDArray[np.uint8]) -> None:
    """No more values than the codec keeps, and only zeros behind the last of them."""
    high, low, marks = packed
    if kept > layout.keep:
        raise ValueError(f"{kept} kept values, at most {layout.keep} are sent")
    ones = sum(
        int(np.bitwise_count(high[begin : begin + PIECE]).sum(dtype=np.int64))
        for begin in range(0, high.size, PIECE)
    )
    if ones != kept or _bits(high, layout.high_bits, 8 * high.size).any():
        raise ValueError("the kept values are not as many as their counts say")
    for values, width in ((low, layout.low), (marks, MARK_BITS)):
        used = kept * width
        if _bits(values, used, -(-used // 8) * 8).any() or values[-(-used // 8) :].any():
            raise ValueError("bits behind the last kept value")


def _check_levels(low: np.float32, high: np.float32, above: NDArray[Any]) -> None:
    """0 < low < high for those in use, +0 for others; something is low where anything is kept."""
    highs = int(np.count_nonzero(above))
    unused = np.array([low, high], np.float32).view(np.uint32) == 0
    sound_low = 0 < low < np.inf if highs < above.size else unused[0] and not highs
    sound_high = low < high < np.inf if highs else unused[1]
    if not (sound_low and sound_high):
        raise ValueError("the levels of a tensor are not ones that are ever written")
