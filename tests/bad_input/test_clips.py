"""`paris-coordinator prepare`: folders that it cannot use; for single files see `README.md`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_input.saying import Said, refused, tree
from paris_coordinator.captions import find_clips
from paris_coordinator.cli import main
from paris_models.assets import asset

Say = Callable[..., Said]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    for name in ("codec.safetensors", "text.safetensors", "initial.safetensors", "smoke.toml"):
        shutil.copy(asset(name), folder)
    return folder / "smoke.toml"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


def test_folders_without_video(say: Say, recipe: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(say(main, "prepare", recipe, clips, "--out", out), "clips.none")
    assert list(tree(out)) == ["skipped.json"]
    (clips / "notes.pdf").write_bytes(b"%PDF")
    (clips / "film.mp4").write_bytes(b"this is no video")
    (clips / "film.txt").write_text("a film")
    before = tree(clips)
    said = say(main, "prepare", recipe, clips, "--out", out)
    refused(said, "clips.none")
    assert "1 × clip.licence" in said.err
    said = say(main, "prepare", recipe, clips, "--out", out, "--allow-unlicensed")
    refused(said, "clips.none")
    assert "2 × clip.not-video" in said.err
    listed = json.loads((out / "skipped.json").read_text())
    assert sorted(one["name"] for one in listed) == ["film.mp4", "notes.pdf"]
    assert (list(tree(out)), tree(clips)) == (["skipped.json"], before)


def test_a_folder_that_is_not_there(say: Say, recipe: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    words = ("prepare", recipe, tmp_path / "nowhere", "--out", tmp_path / "out")
    refused(say(main, *words), "clips.none")
    refused(say(main, "prepare", recipe, recipe, "--out", tmp_path / "out"), "clips.none")
    assert tree(tmp_path) == before


def test_an_earlier_result_survives_an_empty_folder(
    say: Say, recipe: Path, clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("prepared.json", "skipped.json"):
        (out / name).write_text("{}")
    before = tree(out)
    refused(say(main, "prepare", recipe, clips, "--out", out), "clips.none")
    assert tree(out) == before


def test_an_engine_that_there_is_not(say: Say, recipe: Path, clips: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for wrong in (("--engine", "spark"), ("--workers", "0")):
        said = say(main, "prepare", recipe, clips, "--out", tmp_path / "out", *wrong)
        assert said.exit == 2 and wrong[0] in said.err and "Traceback" not in said.err, said
    assert tree(tmp_path) == before


def test_an_out_that_is_a_file(say: Say, recipe: Path, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    before = tree(tmp_path)
    said = say(main, "prepare", recipe, clips, "--out", tmp_path / "out")
    assert said.exit != 0 and "Traceback" not in said.err, said
    assert tree(tmp_path) == before


def test_what_is_no_file_is_left_alone(clips: Path) -> None:
    (clips / "folder.mp4").mkdir()
    (clips / "gone.mp4").symlink_to("nowhere")
    os.mkfifo(clips / "pipe.mp4")
    assert find_clips(clips) == ([], [])
