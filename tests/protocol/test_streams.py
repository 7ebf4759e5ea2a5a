"""The plain reference equals NumPy's Philox, and its numbers are what they are called."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol import streams

word = st.integers(0, (1 << 64) - 1)
KEY = streams.unit_key("ab" * 32)


def numpy_words(key: bytes, stream: int, step: int, slot: int, n: int) -> np.ndarray:
    counter = np.array([0, slot, step, stream], np.uint64)
    return np.random.Philox(key=np.frombuffer(key, "<u8"), counter=counter).random_raw(n)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=16, max_size=16), word, word, word, st.integers(1, 23))
def test_words_are_numpys(key: bytes, stream: int, step: int, slot: int, n: int) -> None:
    assert (
        streams.words(key, stream, step, slot, n)
        == numpy_words(key, stream, step, slot, n).tolist()
    )


def test_words_are_a_prefix_of_more_words() -> None:
    assert streams.words(KEY, 1, 2, 3, 9)[:5] == streams.words(KEY, 1, 2, 3, 5)
    assert streams.words(KEY, 1, 2, 3, 0) == []


def test_uniforms_and_normals_follow_from_the_words() -> None:
    words = numpy_words(KEY, 1, 2, 3, 1000)
    uniforms = (words >> np.uint64(11)) * 2.0**-53
    assert streams.uniforms(KEY, 1, 2, 3, 1000) == uniforms.tolist()
    u1 = ((words >> np.uint64(32)) + np.uint64(1)) * 2.0**-32
    u2 = (words & np.uint64(0xFFFFFFFF)) * 2.0**-32
    radius = np.sqrt(-2 * np.log(u1))
    pairs = np.stack([radius * np.cos(2 * np.pi * u2), radius * np.sin(2 * np.pi * u2)], 1)
    # Two libraries' logarithms may differ in the last bit of float64, so in few roundings.
    ours = np.array(streams.normals(KEY, 1, 2, 3, 2000), np.float32)
    assert np.mean(ours != pairs.reshape(-1).astype(np.float32)) < 1e-3
    assert np.allclose(ours, pairs.reshape(-1), rtol=1e-6)


def test_normals_are_normal() -> None:
    sample = np.array(streams.normals(KEY, streams.NOISE, 0, 0, 20000))
    assert abs(sample.mean()) < 0.03
    assert abs(sample.std() - 1) < 0.02
    assert abs(np.mean(sample**4) - 3) < 0.2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 5))
def test_permutation_is_a_stable_sort_of_words(n: int, epoch: int) -> None:
    order = streams.permutation(KEY, n, epoch)
    words = numpy_words(KEY, streams.ORDER, epoch, 0, n)
    assert order == np.argsort(words, kind="stable").tolist()
    assert sorted(order) == list(range(n))


def test_every_epoch_shows_every_clip_once() -> None:
    rows = [streams.row(KEY, step, slot, 4, 10) for step in range(5) for slot in range(4)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_streams_are_apart() -> None:
    seen = {
        tuple(streams.words(key, stream, step, slot, 2))
        for key in (KEY, streams.unit_key("00" * 32))
        for stream in range(1, 11)
        for step in range(3)
        for slot in range(3)
    }
    assert len(seen) == 2 * 10 * 3 * 3
