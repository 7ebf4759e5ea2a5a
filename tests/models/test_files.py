"""Checkpoint and shard files: deterministic bytes, atomic writes, refusals."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from paris_models.checkpoint import (
    load_tensors,
    raw_items,
    read_metadata,
    save_tensors,
    schema_of,
    write_stream,
)
from paris_models.shards import concatenate, read_shards, shard_schema, write_shard
from tiny_models import clips

TENSORS = {
    "ä.long": torch.arange(3),
    "b": torch.randn(2, 3).to(torch.bfloat16),
    "a": torch.randn(4, 1),
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 3),
    "turned": torch.randn(3, 2).T,
}


def test_files_are_plain_safetensors_with_the_same_bytes_each_time(tmp_path) -> None:
    notes = {"z": "1", "kind": "test", "a": "ü"}
    save_tensors(TENSORS, tmp_path / "x.safetensors", notes)
    save_tensors(dict(reversed(TENSORS.items())), tmp_path / "y.safetensors", notes)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    for loaded in (load_file(tmp_path / "x.safetensors"), load_tensors(tmp_path / "x.safetensors")):
        assert loaded.keys() == TENSORS.keys()
        assert all(
            torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in TENSORS.items()
        )
    assert read_metadata(tmp_path / "x.safetensors") == notes
    assert schema_of(loaded) == schema_of(TENSORS)


def test_without_metadata_the_layout_is_the_librarys(tmp_path) -> None:
    plain = {k: v.contiguous() for k, v in TENSORS.items()}
    save_tensors(plain, tmp_path / "ours")
    save_file(plain, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_raw_items_are_sorted_bytes() -> None:
    items = list(raw_items(TENSORS))
    assert [name for name, *_ in items] == ["a", "b", "empty", "scalar", "turned", "ä.long"]
    assert [dtype for _, dtype, *_ in items] == ["F32", "BF16", "F32", "F32", "F32", "I64"]
    assert bytes(items[-1][3]) == b"".join(i.to_bytes(8, "little") for i in range(3))
    assert bytes(items[4][3]) == TENSORS["turned"].contiguous().numpy().tobytes()
    with pytest.raises(ValueError, match="not stored"):
        list(raw_items({"c": torch.zeros(1, dtype=torch.complex64)}))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.zeros(2)}, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_tensors({"a": torch.ones(2)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_chunks_must_have_the_size_of_the_header(tmp_path) -> None:
    schema = {"a": ("F32", (2,))}
    for chunks in ([b"1234"], [], [b"12345678", b""]):
        with pytest.raises(ValueError, match=r"size|shorter|longer"):
            write_stream(tmp_path / "x", schema, chunks)
    assert list(tmp_path.iterdir()) == []


def test_shards_round_trip_with_their_own_captions(tmp_path) -> None:
    table = clips(7, features=4)
    table = replace(table, first=table.latents[:, :, :1].contiguous())
    part = table.rows(torch.tensor([1, 3, 4]))
    write_shard(tmp_path / "s.safetensors", part, {"cluster": "0"})
    again = read_shards([tmp_path / "s.safetensors"])
    assert torch.equal(again.latents, table.latents[[1, 3, 4]])
    for a, b in zip(again.text(torch.arange(3)), table.text(torch.tensor([1, 3, 4])), strict=True):
        assert torch.equal(a, b)
    used = len(set(part.caption.tolist()))
    expected = shard_schema(3, used, table.shape, 3, 12, 10, first=True, features=4)
    assert schema_of(load_tensors(tmp_path / "s.safetensors")) == expected


def test_reading_several_shards_keeps_the_order_and_shares_captions(tmp_path) -> None:
    table = clips(9)
    rows = [torch.tensor(r) for r in ([8, 0, 1], [2, 3], [4, 5, 6, 7])]
    for i, r in enumerate(rows):
        write_shard(tmp_path / str(i), table.rows(r))
    joined = read_shards([tmp_path / str(i) for i in range(3)])
    order = torch.cat(rows)
    assert torch.equal(joined.latents, table.latents[order])
    assert torch.equal(joined.text(torch.arange(9))[0], table.text(order)[0])
    assert len(joined.text_seq) == len(set(table.caption.tolist()))
    assert joined.shape == (8, 2, 2, 2)


def test_tables_that_do_not_fit_are_refused(tmp_path) -> None:
    table = clips(4)
    with pytest.raises(ValueError, match="one caption index"):
        replace(table, caption=table.caption[:2])
    with pytest.raises(ValueError, match="outside"):
        replace(table, caption=table.caption + 5)
    with pytest.raises(ValueError, match="float32"):
        replace(table, latents=table.latents.double())
    with pytest.raises(ValueError, match="null text"):
        replace(table, null_pooled=torch.zeros(3))
    with pytest.raises(ValueError, match="one per clip"):
        replace(table, features=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="different null text"):
        concatenate([table, replace(table, null_seq=table.null_seq + 1)])
    with pytest.raises(ValueError, match="do not fit together"):
        concatenate([table, clips(2, channels=4)])
    with pytest.raises(ValueError, match="no shards"):
        read_shards([])
    save_tensors({"latents": table.latents}, tmp_path / "bad")
    with pytest.raises(ValueError, match="no shard"):
        read_shards([tmp_path / "bad"])
