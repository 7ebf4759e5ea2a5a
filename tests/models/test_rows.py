"""Text in fewer bytes: what it loses, once only, and shards that keep it so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models.checkpoint import raw_bytes, read_metadata
from paris_models.rows import pack_rows, unpack_rows
from paris_models.shards import check_encoders, read_shards, shard_schema, store_of, write_shard
from paris_protocol.gate import check_header
from tiny_models import clips

STORES = ("int8", "float8")


def table(seed: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 5, 64, generator=generator) * spread


@pytest.mark.parametrize(("store", "limit"), [("int8", 0.008), ("float8", 0.03)])
def test_what_is_lost(store: str, limit: float) -> None:
    rows = table(0, 1.0)
    again = unpack_rows(*pack_rows(rows, store))
    lost = float((again - rows).norm() / rows.norm())
    assert limit / 2 < lost < limit
    biggest = rows.abs().amax(-1)
    assert torch.allclose(again.abs().amax(-1), biggest, rtol=2**-15)


@settings(max_examples=150)
@given(
    st.sampled_from(STORES),
    st.integers(0, 1000),
    st.sampled_from([1e-38, 1e-29, 1e-20, 1.0, 3e4, 1e30]),
)
def test_storing_what_was_read_gives_the_same_bytes(store: str, seed: int, spread: float) -> None:
    codes, scale = pack_rows(table(seed, spread), store)
    second, scale2 = pack_rows(unpack_rows(codes, scale), store)
    assert bytes(raw_bytes(codes)) == bytes(raw_bytes(second)) and torch.equal(scale, scale2)


def test_rows_of_zeros_and_values_that_are_not_finite() -> None:
    for store in STORES:
        assert not unpack_rows(*pack_rows(torch.zeros(2, 3), store)).any()
        for bad in (float("inf"), float("nan")):
            with pytest.raises(ValueError, match="not finite"):
                pack_rows(torch.tensor([[1.0, bad]]), store)


@pytest.mark.parametrize("store", STORES)
def test_a_shard_keeps_text_so_and_gives_float32(store: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    made = clips(n=10)
    write_shard(plain, made)
    write_shard(packed, made, {"codec": "a"}, store)
    first, second = read_shards([plain]), read_shards([packed])
    assert second.text_seq.dtype == torch.float32
    assert torch.equal(first.null_seq, second.null_seq)
    assert torch.equal(second.text_seq, unpack_rows(*pack_rows(first.text_seq, store)))
    raw = packed.read_bytes()
    captions = len(second.text_seq)
    schema = shard_schema(10, captions, made.shape, 3, 12, 10, store=store)
    found = check_header(raw, len(raw), schema)
    assert store_of(found.tensors["text_seq"][0]) == store
    write_shard(packed.with_suffix(".2"), second, {"codec": "a"}, store)
    assert packed.with_suffix(".2").read_bytes() == raw


def test_a_shard_of_another_encoder_is_refused_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", clips(), {"codec": "1" * 64, "text": "2" * 64})
    said = read_metadata(tmp_path / "a")
    check_encoders(said, {"codec": "1" * 64, "text": "2" * 64, "features": "3" * 64})
    check_encoders({}, {"codec": "1" * 64})
    with pytest.raises(ValueError, match=r"text: made by 2222.*, not by 4444"):
        check_encoders(said, {"codec": "1" * 64, "text": "4" * 64})
