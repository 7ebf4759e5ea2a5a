"""Counter-based random streams: every random number of training is a function of four counters.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator
that NumPy ships in C; this is the slow reference in plain Python, for SPEC.md and the vectors. No
state is kept, so a stopped run and an auditor draw the same numbers as one that never stopped::

    key = unit_key("00" * 32)
    noise = normals(key, NOISE, step=7, slot=3, n=16)
    clip = row(key, step=7, slot=3, batch=32, n=1000)
    number, visit = bucket(key, step=7, weights=[1000, 40])
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NOISE: Final = 1
TIME: Final = 2
DROP: Final = 3
ORDER: Final = 4
SAMPLE: Final = 5
HELD: Final = 6
ROUNDING: Final = 7
FACTORS: Final = 8
BUCKET: Final = 9
CONDITION: Final = 10

_MASK: Final = (1 << 64) - 1
_M0, _M1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_W0, _W1 = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def unit_key(seed_hex: str) -> bytes:
    """The 16-byte stream key of an assignment's seed: HKDF-SHA256, no salt, `paris/unit/1`."""
    return HKDF(SHA256(), 16, salt=None, info=b"paris/unit/1").derive(bytes.fromhex(seed_hex))


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x64-10: four 64-bit words from four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _MASK, (p0 >> 64) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def words(key: bytes, stream: int, step: int, slot: int, n: int) -> list[int]:
    """The first `n` 64-bit words of a stream.

    Words 4b to 4b+3 are block b, whose counter words (least significant first) are
    (b + 1, slot, step, stream); the key's two words are little-endian. NumPy increments before its
    first block, so this is `numpy.random.Philox(key=…, counter=[0, slot, step, stream])
    .random_raw(n)` with both arguments as uint64 arrays.
    """
    pair = struct.unpack("<2Q", key)
    out: list[int] = []
    for block in range(-(-n // 4)):
        out.extend(philox((block + 1, slot, step, stream), (pair[0], pair[1])))
    return out[:n]


def uniforms(key: bytes, stream: int, step: int, slot: int, n: int) -> list[float]:
    """`n` float64 in [0, 1): word i gives number i as (word >> 11) · 2⁻⁵³."""
    return [(word >> 11) * 2.0**-53 for word in words(key, stream, step, slot, n)]


def normals(key: bytes, stream: int, step: int, slot: int, n: int) -> list[float]:
    """`n` standard normals, rounded to float32 (Box–Muller in float64, two per word).

    Word w gives u1 = ((w >> 32) + 1) · 2⁻³², u2 = (w mod 2³²) · 2⁻³², r = sqrt(−2 ln u1), and the
    numbers 2i = r cos 2πu2 and 2i+1 = r sin 2πu2.
    """
    out: list[float] = []
    for word in words(key, stream, step, slot, -(-n // 2)):
        radius = math.sqrt(-2.0 * math.log(((word >> 32) + 1) * 2.0**-32))
        angle = 2.0 * math.pi * ((word & 0xFFFFFFFF) * 2.0**-32)
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return list(struct.unpack(f"<{n}f", struct.pack(f"<{n}f", *out[:n])))


def permutation(key: bytes, n: int, epoch: int, bucket: int = 0) -> list[int]:
    """The order of `n` clips in an epoch: 0…n−1 stably sorted by word i of (ORDER, epoch, bucket).

    The bucket stands where other streams have their slot.
    """
    keys = words(key, ORDER, epoch, bucket, n)
    return sorted(range(n), key=keys.__getitem__)


def row(key: bytes, step: int, slot: int, batch: int, n: int, bucket: int = 0) -> int:
    """The clip that `slot` of `step` trains on, out of `n`; each epoch is a new permutation."""
    epoch, place = divmod(step * batch + slot, n)
    return permutation(key, n, epoch, bucket)[place]


def pick(word: int, weights: Sequence[int]) -> int:
    """Which of the weighted things a word names: ⌊word · Σ weights / 2⁶⁴⌋ lies in its span."""
    left = word * sum(weights) >> 64
    for place, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return place
    raise ValueError("a word has 64 bits and weights are positive")


def bucket(key: bytes, step: int, weights: Sequence[int]) -> tuple[int, int]:
    """The place of the bucket that `step` trains on, and how many steps before it had the same."""
    chosen = [pick(word, weights) for word in words(key, BUCKET, 0, 0, step + 1)]
    return chosen[step], chosen[:step].count(chosen[step])
