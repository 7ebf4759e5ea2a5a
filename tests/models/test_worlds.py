"""The rendered worlds: a function of the seed, and the same pixels back from their files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from paris_models.video import read_clip
from paris_models.worlds import CAPTIONS, GEOMETRY, factors, render, write_clips


def test_render_is_a_function_of_the_seed() -> None:
    clips, captions = render(30, 5)
    again, _ = render(30, 5)
    other, _ = render(30, 6)
    assert torch.equal(clips, again) and not torch.equal(clips, other)
    assert clips.shape == (30, 3, 9, 24, 24) and clips.dtype == torch.uint8
    assert torch.equal(factors(captions)[0], torch.arange(30) % 3)


def test_captions_name_all_factors_once() -> None:
    assert len(CAPTIONS) == len(set(CAPTIONS)) == 216
    assert CAPTIONS[0] == "a red ball moves left"
    assert CAPTIONS[72 + 12 + 3 * 2 + 1] == "green checkers camera zooms in"
    index = torch.arange(216)
    world, colour, motion, shape = factors(index)
    assert torch.equal(world * 72 + colour * 12 + motion * 3 + shape, index)


def test_movement_goes_where_the_caption_says() -> None:
    clips, captions = render(300, 1)
    for clip, caption in zip(clips, captions, strict=True):
        if not CAPTIONS[caption].endswith(("moves left", "moves right")):
            continue
        light = clip.float().amax(0) - clip.float().amax(0).amin()
        place = (light.sum(1) * torch.arange(24)).sum(1) / light.sum((1, 2))
        assert (place[-1] > place[0]) == CAPTIONS[caption].endswith("right")


def test_files_are_real_and_lossless(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_clips(tmp_path, 6, seed=9, progress=lambda done, total: seen.append((done, total)))
    clips, captions = render(6, 9)
    for i in range(6):
        path = tmp_path / f"{i:05d}.mp4"
        assert torch.equal(read_clip(path, GEOMETRY), clips[i])
        assert path.with_suffix(".txt").read_text() == CAPTIONS[captions[i]] + "\n"
    assert seen[-1] == (6, 6) and len(list(tmp_path.iterdir())) == 13
    lines = [json.loads(x) for x in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [x["video"] for x in lines] == [f"{i:05d}.mp4" for i in range(6)]
    assert {x["licence"] for x in lines} == {"CC0-1.0"} and all(x["source"] for x in lines)
