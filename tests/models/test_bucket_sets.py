"""Clips of several sizes in one unit: which size a step takes, its batch, its shift (F11, F12)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paris_models import flow, noise
from paris_models.expert import build_expert
from paris_models.shards import BucketSet, ClipTable, read_shards, read_training, write_shard
from paris_models.train import (
    load_state_tensors,
    make_batch,
    new_state,
    state_tensors,
    train_step,
)
from paris_protocol import streams
from tiny_models import EXPERT, KEY, PAPER, UNIT, clips

BATCHES = {1: 6, 2: 2}
WEIGHTS = dict(build_expert(EXPERT, seed=5).state_dict())


def of_size(n: int, frames: int, side: int) -> ClipTable:
    plain = clips(n, seed=frames)
    g = torch.Generator().manual_seed(side)
    return replace(plain, latents=torch.randn(n, 8, frames, side, side, generator=g))


def mixed() -> BucketSet:
    """24 videos (4 a step), 18 images (6 a step), 10 longer and larger videos (2 a step)."""
    return BucketSet({0: of_size(24, 2, 2), 1: of_size(18, 1, 2), 2: of_size(10, 3, 4)}, BATCHES)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for bucket, table in mixed().tables.items():
        for part, rows in enumerate(torch.arange(len(table)).split(9)):
            write_shard(tmp_path / f"{bucket}.{part}", table.rows(rows))
    return tmp_path


def test_shards_of_the_networks_own_size_are_a_plain_table(folder: Path) -> None:
    paths = [folder / "0.0", folder / "0.1"]
    table = read_training(paths, [0, 0], BATCHES)
    assert isinstance(table, ClipTable)
    states = [new_state(EXPERT, PAPER, WEIGHTS) for _ in range(2)]
    losses = [
        train_step(s, t, UNIT) for s, t in zip(states, (table, read_shards(paths)), strict=True)
    ]
    one, two = (state_tensors(state) for state in states)
    assert losses[0] == losses[1] and all(torch.equal(one[name], two[name]) for name in one)


def test_shards_of_several_sizes_are_read_by_bucket(folder: Path) -> None:
    names = ["2.1", "0.0", "1.1", "1.0", "0.2", "2.0", "0.1"]
    found = read_training([folder / n for n in names], [int(n[0]) for n in names], BATCHES)
    assert isinstance(found, BucketSet) and len(found) == 52
    order = torch.cat([torch.arange(9, 18), torch.arange(9)])
    assert same(found.tables[1].latents, mixed().tables[1].latents[order])


def test_the_bucket_of_a_step_and_its_clips_are_the_streams() -> None:
    clips_of, weights = mixed(), [24 * 3, 18 * 2, 10 * 6]  # clips × lcm(4, 6, 2) ÷ batch
    for step in range(40):
        table, rows = clips_of.of_step(KEY, step, 4)
        bucket, visit = streams.bucket(KEY, step, weights)
        batch = {0: 4, **BATCHES}[bucket]
        assert table is clips_of.tables[bucket]
        wanted = [streams.row(KEY, visit, s, batch, len(table), bucket) for s in range(batch)]
        assert rows.tolist() == wanted


def test_every_clip_of_every_bucket_is_seen_about_equally_often() -> None:
    clips_of, steps = mixed(), 1500
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        table, rows = clips_of.of_step(KEY, step, 4)
        bucket = next(b for b, t in clips_of.tables.items() if t is table)
        seen.update((bucket, row) for row in rows.tolist())
    means = {}
    for bucket, table in clips_of.tables.items():
        counts = [seen[bucket, row] for row in range(len(table))]
        assert max(counts) - min(counts) <= 1  # passes over the bucket are whole
        means[bucket] = sum(counts) / len(counts)
    # 52 clips; a step of bucket b takes B_b of them with probability (n_b / B_b) / Σ (n / B).
    wanted = steps / sum(n / b for n, b in ((24, 4), (18, 6), (10, 2)))
    assert all(mean == pytest.approx(wanted, rel=0.08) for mean in means.values()), means


def test_each_size_has_its_own_shift_and_batch() -> None:
    recipe, drawn = replace(PAPER, t_shift=0.0), set()
    for step in range(12):
        batch = make_batch(mixed(), UNIT, recipe, step)
        n, _, frames, side, _ = batch.x0.shape
        normals = torch.from_numpy(noise.normals_batch(KEY, noise.TIME, step, range(n), 1)[:, 0])
        shift = flow.size_shift(frames, side, side)
        assert torch.equal(batch.t, flow.times_from_normals(normals, 0.0, 1.0, shift))
        assert len(batch.text_seq) == n == {(2, 2): 4, (1, 2): 6, (3, 4): 2}[frames, side]
        drawn.add((frames, side))
    assert len(drawn) == 3


def test_one_unit_trains_on_images_and_videos_and_resumes_without_a_changed_bit() -> None:
    unit, source = replace(UNIT, steps=8), mixed()
    whole, frames = new_state(EXPERT, PAPER, WEIGHTS), set()
    for step in range(8):
        frames.add(make_batch(source, unit, PAPER, step).x0.shape[2])
        if step == 5:
            saved = {name: t.clone() for name, t in state_tensors(whole).items()}
        train_step(whole, source, unit)
    assert {1, 2} <= frames
    again = new_state(EXPERT, PAPER, WEIGHTS)
    load_state_tensors(again, saved)
    while again.step < 8:
        train_step(again, mixed(), unit)
    one, two = state_tensors(whole), state_tensors(again)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_unit_of_images_alone_trains(folder: Path) -> None:
    source = read_training([folder / "1.0"], [1], BATCHES)
    state = new_state(EXPERT, PAPER, WEIGHTS)
    assert make_batch(source, UNIT, PAPER, 0).x0.shape == (6, 8, 1, 2, 2)
    assert train_step(state, source, UNIT) > 0


def test_what_is_no_set_of_buckets_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="of one bucket"):
        read_training([folder / "0.0"], [0, 1], BATCHES)
    with pytest.raises(ValueError, match="clips per step"):
        read_training([folder / "0.0", folder / "1.0"], [0, 1], {2: 2})
    with pytest.raises(ValueError, match="clips per step"):
        BucketSet({1: of_size(2, 1, 2)}, {1: 0})
    with pytest.raises(ValueError, match="no shards"):
        read_training([], [], {})
    for tables in ({}, {0: of_size(0, 2, 2)}):
        with pytest.raises(ValueError, match="has clips"):
            BucketSet(tables, {})
    with pytest.raises(ValueError, match="differ in channels"):
        BucketSet({0: clips(), 1: clips(channels=4)}, BATCHES)
    with pytest.raises(ValueError, match="do not fit together"):
        read_training([folder / "1.0", folder / "2.0"], [1, 1], BATCHES)
