"""Our NumPy streams against the protocol's vectors and its plain Python reference."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models import noise
from paris_protocol import streams

VECTORS = json.loads((Path(__file__).parents[2] / "protocol/vectors/streams.json").read_text())
U64 = st.integers(0, 2**63)


@pytest.mark.parametrize("case", VECTORS["streams"])
def test_words_uniforms_and_normals_are_the_vectors(case: dict) -> None:
    key = bytes.fromhex(case["key"])
    at = (key, case["stream"], case["step"])
    words = noise.words_batch(*at, [case["slot"]], len(case["words"]))[0]
    assert [f"{w:016x}" for w in words.tolist()] == case["words"]
    uniforms = noise.uniforms(*at, case["slot"], len(case["uniforms"]))
    assert [struct.pack(">d", u).hex() for u in uniforms] == case["uniforms"]
    normals = noise.normals(*at, case["slot"], len(case["normals"]))
    assert normals.dtype == np.float32
    assert [struct.pack(">f", x).hex() for x in normals] == case["normals"]


@pytest.mark.parametrize("case", VECTORS["permutations"])
def test_permutations_are_the_vectors(case: dict) -> None:
    order = noise.permutation(bytes.fromhex(case["key"]), case["n"], case["epoch"])
    assert order.tolist() == case["order"]


@pytest.mark.parametrize("case", VECTORS["rows"])
def test_rows_are_the_vectors(case: dict) -> None:
    rows = noise.batch_rows(bytes.fromhex(case["key"]), case["n"], case["step"], case["batch"])
    assert rows.tolist() == case["rows"]


@pytest.mark.parametrize("case", VECTORS["picks"])
def test_picks_are_the_vectors(case: dict) -> None:
    word = np.array([int(case["word"], 16)], np.uint64)
    assert noise.picks(word, case["weights"]).tolist() == [case["pick"]]


@pytest.mark.parametrize("case", VECTORS["buckets"])
def test_buckets_are_the_vectors(case: dict) -> None:
    found = noise.bucket_of(bytes.fromhex(case["key"]), case["step"], case["weights"])
    assert list(found) == case["bucket"]


@pytest.mark.parametrize("case", VECTORS["bucket_rows"])
def test_rows_of_a_bucket_are_the_vectors(case: dict) -> None:
    key, n = bytes.fromhex(case["key"]), case["n"]
    rows = noise.batch_rows(key, n, case["visit"], case["batch"], case["bucket"])
    assert rows.tolist() == case["rows"]


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.integers(0, 2**64 - 1), max_size=5),
    weights=st.lists(st.integers(1, 2**50), min_size=1, max_size=6),
)
def test_picks_are_the_reference_everywhere(words: list[int], weights: list[int]) -> None:
    found = noise.picks(np.array(words, np.uint64), weights)
    assert found.tolist() == [streams.pick(word, weights) for word in words]


@settings(max_examples=40, deadline=None)
@given(key=st.binary(min_size=16, max_size=16), step=U64, slot=U64, n=st.integers(1, 21))
def test_they_are_the_reference_everywhere(key: bytes, step: int, slot: int, n: int) -> None:
    assert noise.words_batch(key, 1, step, [slot], n)[0].tolist() == streams.words(
        key, 1, step, slot, n
    )
    assert noise.normals(key, 2, step, slot, n).tolist() == streams.normals(key, 2, step, slot, n)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 12), n=st.integers(1, 30))
def test_every_pass_sees_every_clip_once(batch: int, n: int) -> None:
    steps = -(-3 * n // batch)
    rows = np.concatenate([noise.batch_rows(b"k" * 16, n, s, batch) for s in range(steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_slot_does_not_depend_on_its_batch() -> None:
    whole = noise.normals_batch(b"k" * 16, 1, 3, range(9), 33)
    assert np.array_equal(whole[[2, 7]], noise.normals_batch(b"k" * 16, 1, 3, [2, 7], 33))
    assert noise.normals_batch(b"k" * 16, 1, 3, [], 5).shape == (0, 5)


def test_normals_are_normal() -> None:
    x = noise.normals_batch(b"k" * 16, 1, 0, range(50), 2000).astype(np.float64)
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(x[:, 0::2].ravel(), x[:, 1::2].ravel())[0, 1]) < 0.02


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        noise.normals(b"short", 1, 0, 0, 4)
    with pytest.raises(ValueError, match="no clips"):
        noise.batch_rows(b"k" * 16, 0, 0, 4)
    for weights in ([], [3, 0], [-1], [1, 1 << 63]):
        with pytest.raises(ValueError, match="whole numbers"):
            noise.picks(np.zeros(1, np.uint64), weights)


def test_every_stream_has_its_number_in_both_places() -> None:
    names = ["NOISE", "TIME", "DROP", "ORDER", "SAMPLE", "HELD", "ROUNDING", "FACTORS", "BUCKET"]
    names.append("CONDITION")
    assert [getattr(noise, name) for name in names] == list(range(1, 11))
    assert [getattr(streams, name) for name in names] == list(range(1, 11))
