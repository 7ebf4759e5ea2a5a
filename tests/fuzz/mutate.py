"""Bytes that are nearly right: structure-aware damage to valid examples, drawn from a `Random`.

`damaged` spoils bytes (flips, cuts, repeats, splices, huge numbers); `spoiled` spoils a JSON value
in one to three places (odd numbers, lone surrogates, deep nesting, missing, doubled and unknown
fields), and `loose` writes such a value, which no strict writer would. With the `Random` of
hypothesis every failure shrinks::

    text = loose(spoiled(random, {"a": [1, 2]}))
    raw = damaged(random, b"valid bytes", [b"other valid bytes"])
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from paris_protocol.canonical import canonical
from paris_protocol.errors import ParisError

NUMBERS = (
    0, -1, 1, 2**31, 2**32 - 1, 2**53, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0,
    1e308, float("nan"), float("inf"),
)  # fmt: skip
TEXTS = (
    "", "0", "-0", "1e999", "-1e-999", "0x1.fffffffffffffp+9999", "0x1.0p-9999", "NaN", "\0",
    "\ud800", "\udfff\ud800", "\u202e", "é" * 300, "a" * 70_000, "../../etc/passwd", "/", "..",
    "ed25519:" + "0" * 64, "ed25519:" + "f" * 64, "f" * 64, "F" * 64, "f" * 63, "f" * 64 + "\n",
    "％d", "¹²³", "{}", "__metadata__", "'; --",
)  # fmt: skip
DEPTHS = (5, 31, 33, 200, 3000, 100_000)
_DEEP = re.compile(rb'"\\u0001deep(\d+)"')


ALIKE = (
    (re.compile(r"-?0x.*p.*"), (
        "0x1.fffffffffffffp+9999", "-0x1.0p+0", "0x0.0p+0", "0x1.0p-9999", "0x1.8p+1023",
        "0x1.0p+1024", "-0x1.fffffffffffffp+1023",
    )),
    (re.compile(r"-?[0-9.]+(e-?[0-9]+)?"), (
        "1e999", "-1e999", "1e-999", "0", "-1", "999999999999999999", "1e308", "-0", "0.5e1",
    )),
    (re.compile(r"[0-9a-f]{64}"), ("0" * 64, "f" * 64, "0" * 63, "0" * 65, "F" * 64)),
    (re.compile(r"ed25519:.*"), (
        "ed25519:" + "0" * 64, "ed25519:01" + "0" * 62, "ed25519:" + "f" * 64, "ed25519:",
        "ed25519:ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )),
)  # fmt: skip
"""Values of the same form that are wrong in what they mean."""


def deep(depth: int) -> str:
    """Stands for a list in a list in a list, which `loose` writes out."""
    return f"\1deep{depth}"


def odd(random: Random) -> Any:
    """A value that stands where another one belongs."""
    kind = random.randrange(6)
    if kind == 0:
        return random.choice(NUMBERS)
    if kind == 1:
        return random.choice(TEXTS)
    if kind == 2:
        return random.choice((None, True, False, [], {}))
    if kind == 3:
        return deep(random.choice(DEPTHS))
    if kind == 4:
        return [random.choice(NUMBERS) for _ in range(random.choice((1, 3, 40, 3000)))]
    return {random.choice(TEXTS): random.choice(NUMBERS)}


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every part of a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                waiting.append(one[key])
    return found


def _near(random: Random, value: Any) -> Any:
    """Something of the same type that is not quite the value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 256, value + 2**31))
    if isinstance(value, str):
        for form, others in ALIKE:
            if form.fullmatch(value) and random.random() < 0.8:
                return random.choice(others)
        place = random.randrange(len(value) + 1)
        return random.choice((
            value[:place], value + value, value.upper(), value[:place] + "\0" + value[place:],
            " " + value, value[::-1],
        ))  # fmt: skip
    if isinstance(value, list):
        return random.choice((value[:-1], value + value[:1], value[::-1], value * 3))
    return odd(random)


def spoiled(random: Random, value: Any) -> Any:
    """A copy of a JSON value with one to three parts changed, removed, added or doubled."""
    made = copy.deepcopy(value)
    if not isinstance(made, dict | list) or not made or random.random() < 0.02:
        return odd(random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        spots = places(made)
        if not spots:
            break
        container, key = random.choice(spots)
        act = random.randrange(6)
        if act == 0:
            del container[key]
        elif act == 1 and isinstance(container, dict):
            container[random.choice((*TEXTS, "extra", "protocol"))] = odd(random)
        elif act == 2 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif act in (3, 4):
            container[key] = _near(random, container[key])
        else:
            container[key] = odd(random)
    return made


def loose(value: Any) -> bytes:
    """JSON as a careless writer makes it: NaN, surrogates and any depth included.

    Canonical where that is possible, so that it gets past the outermost check.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
    if (found := _DEEP.search(text)) is not None:
        depth = int(found[1])
        return text[: found.start()] + b"[" * depth + b"]" * depth + text[found.end() :]
    try:
        return canonical(value)
    except ParisError:
        return text


def damaged(random: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """The bytes with one to four of them (or of their parts) spoiled."""
    made = data
    for _ in range(random.choice((1, 1, 2, 4))):
        made = random.choice(ACTS)(random, made, others)
    return made


def spoil_json(random: Random, seeds: list[bytes]) -> bytes:
    """Bytes or values of a JSON text."""
    raw = random.choice(seeds)
    if random.random() < 0.3:
        return damaged(random, raw, seeds)
    return loose(spoiled(random, json.loads(raw)))


def _flip(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if not data:
        return b"\0"
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def _cut(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _drop(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    begin = random.randrange(len(data) + 1)
    return data[:begin] + data[begin + random.choice((1, 2, 8, 100)) :]


def _repeat(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    begin = random.randrange(len(data) + 1)
    end = begin + random.choice((1, 2, 8, 100))
    return data[:end] + data[begin:end] * random.choice((1, 3, 50)) + data[end:]


def _insert(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    place = random.randrange(len(data) + 1)
    pieces = (b"\0", b"\n", b"\r\n", b" ", b"\xff", b"\xed\xa0\x80", b"9" * 30, b"9" * 5000, b"-",
              b"[" * 3000, b'"', b"\xe2\x80\x94", b"\xff" * 8, b"\0" * 64)  # fmt: skip
    return data[:place] + random.choice(pieces) + data[place:]


def _splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = random.choice(others) if others else data[::-1]
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _digit(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    spots = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not spots:
        return _flip(random, data, others)
    place = random.choice(spots)
    number = random.choice((b"0", b"-1", b"9" * 20, b"9" * 5000, b"1e99", b"00", b"+1", b"0x1"))
    return data[:place] + number + data[place + 1 :]


Act = Callable[[Random, bytes, Sequence[bytes]], bytes]
ACTS: tuple[Act, ...] = (_flip, _cut, _drop, _repeat, _insert, _splice, _digit)
