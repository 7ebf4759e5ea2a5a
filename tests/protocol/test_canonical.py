"""One text for one value, and no other text is read."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_protocol.canonical import canonical, decimal, digest, parse, real
from paris_protocol.errors import ParisError
from paris_protocol.records import Real

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
PATTERN = next(m.pattern for m in Real.__metadata__ if hasattr(m, "pattern"))


@given(values)
def test_round_trip(value: object) -> None:
    assert parse(canonical(value)) == value
    assert json.loads(canonical(value)) == value


@given(values, st.integers(0, 1 << 20), st.integers(0, 255))
def test_two_texts_never_mean_the_same(value: object, place: int, byte: int) -> None:
    raw = bytearray(canonical(value))
    raw[place % len(raw)] = byte
    try:
        other = parse(bytes(raw))
    except ParisError:
        return
    assert canonical(other) == raw


@pytest.mark.parametrize("value", [1.0, math.nan, {1: 2}, b"x", 1 << 54, "\ud800", {"a": {3}}])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(ParisError):
        canonical(value)


def test_depth_is_limited_without_recursion_errors() -> None:
    with pytest.raises(ParisError):
        parse(b"[" * 100_000 + b"]" * 100_000)
    value: object = 1
    for _ in range(32):
        value = [value]
    assert parse(canonical(value)) == value
    with pytest.raises(ParisError):
        canonical([value])


def test_order_of_keys_does_not_matter() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 17))
def test_decimals_are_reals_of_the_asked_precision(x: float, digits: int) -> None:
    text = decimal(x, digits)
    assert re.fullmatch(PATTERN, text)
    if math.isfinite(real(text)):
        assert math.isclose(
            real(text), x, rel_tol=0.5 * 10.0 ** (1 - digits) + 1e-15, abs_tol=5e-324
        )
    if digits == 17:
        assert real(text) == x


@pytest.mark.parametrize("x", [math.nan, math.inf])
def test_only_finite_numbers_become_decimals(x: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        decimal(x)
