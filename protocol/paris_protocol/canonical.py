"""One JSON text for one value: the form that is hashed, signed and sent.

Keys sorted by code point, no spaces, UTF-8 without needless escapes. Refused, both ways: floats,
integers beyond 2**53, non-text keys, duplicate keys, lone surrogates, deep nesting; and, when
reading, every text that is not itself canonical. All refusals are `record.malformed`::

    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    assert parse(canonical(["x", None])) == ["x", None]
    assert real(decimal(0.03)) == 0.03
"""

from __future__ import annotations

import hashlib
import json
import math
from decimal import Decimal
from typing import Any, Final, NoReturn

from paris_protocol.errors import ParisError

MAX_DEPTH: Final = 32
MAX_INTEGER: Final = 1 << 53


def _refuse(detail: str) -> NoReturn:
    raise ParisError("record.malformed", detail)


def _check(value: Any, depth: int = 0) -> None:
    if depth >= MAX_DEPTH and isinstance(value, dict | list | tuple):
        _refuse("nested too deep")
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            _refuse("integer beyond 2**53")
    elif isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                _refuse("a key that is not text")
            if type(part) is not str:
                _check(part, depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            if type(part) is not str:  # most parts of long lists are
                _check(part, depth + 1)
    else:
        _refuse(f"a value of type {type(value).__name__}")


def canonical(value: Any) -> bytes:
    """The canonical JSON of a value made of dict, list, tuple, str, int, bool and None."""
    _check(value)
    try:
        return _ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ParisError("record.malformed", "text with a lone surrogate") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        _refuse("a key that stands twice")
    return table


def _float(text: str) -> NoReturn:
    _refuse(f"the float {text[:20]}")


_ENCODER: Final = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
)
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_float=_float, parse_constant=_refuse
)


def parse(raw: bytes) -> Any:
    """The value of a canonical JSON text; whatever is not byte for byte canonical is refused.

    The caller caps the size first.
    """
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ParisError("record.malformed", "not JSON") from error
    if canonical(value) != raw:
        _refuse("not in canonical form")
    return value


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return sha256_hex(canonical(value))


def decimal(x: float, digits: int = 9) -> str:
    """A finite float as a `records.Real`, rounded to `digits` significant digits (at most 17).

    Raises `ValueError` for NaN and infinities: they have no place in a signed record.
    """
    if not math.isfinite(x):
        raise ValueError("only finite numbers are signed")
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    plain = f"{Decimal(mantissa).scaleb(int(exponent)):f}"
    if -5 <= int(exponent) < 15 and len(plain.partition(".")[2]) <= 18:
        return plain
    return f"{mantissa}e{int(exponent)}"


def real(text: str) -> float:
    """The float that a `records.Real` string means."""
    return float(text)
