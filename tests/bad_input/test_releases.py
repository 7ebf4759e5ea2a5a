"""Releases that are not whole or not the network's, and prompts that say nothing or too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_input.saying import Said, refused, tree
from paris_models.commands.cli import main
from protocol.world import NODES, World

Say = Callable[..., Said]
WORLD = World().lived()
FILES = WORLD.release()


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return written(tmp_path / "release", FILES)


def both(say: Say, release: Path, code: str, *more: str) -> Said:
    """`verify` and `pull` refuse it; neither changes it, and nothing is pulled."""
    before, out = tree(release), release.parent / "pulled"
    said = say(main, "verify", release, *more)
    refused(said, code)
    pulled = say(main, "pull", release, "-o", out, *more)
    assert pulled.exit != 0 and "Traceback" not in pulled.err
    assert not out.exists() and tree(release) == before
    return said


def test_a_whole_one_passes(say: Say, release: Path) -> None:
    for words in (("verify", release), ("pull", release, "-o", release.parent / "pulled")):
        assert say(main, *words, "--network", WORLD.network).exit == 0
    assert tree(release.parent / "pulled") == tree(release)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"release.json"}))
def test_a_release_without_a_file(say: Say, release: Path, name: str) -> None:
    (release / name).unlink()
    said = both(say, release, "release.missing")
    assert name in said.err


@pytest.mark.parametrize("name", ["more.txt", "expert_0/pytorch_model.bin", ".hidden"])
def test_a_release_with_an_extra_file(say: Say, release: Path, name: str) -> None:
    (release / name).write_bytes(b"?")
    said = say(main, "verify", release)
    refused(said, "release.extra")
    assert name in said.err
    assert say(main, "pull", release, "-o", release.parent / "pulled").exit == 0
    assert not (release.parent / "pulled" / name).exists(), "what nobody signed is not pulled"


def test_a_release_with_a_link(say: Say, release: Path) -> None:
    (release / "expert_0" / "link").symlink_to("/etc/passwd")
    refused(say(main, "verify", release), "release.extra")


def test_a_release_by_an_unknown_key(say: Say, tmp_path: Path) -> None:
    forged = World().lived().release(signer=NODES[0])
    both(say, written(tmp_path / "release", forged), "release.key")


def test_a_release_of_another_network(say: Say, release: Path) -> None:
    both(say, release, "network.mismatch", "--network", "ab" * 32)


def test_no_release_at_all(say: Say, tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").write_bytes(b"?")
    before = tree(tmp_path)
    for folder in (tmp_path, tmp_path / "none"):
        refused(say(main, "verify", folder), "release.none")
        refused(say(main, "pull", folder, "-o", tmp_path / "out"), "release.none")
        refused(say(main, "generate", folder, "a ball", "-o", tmp_path / "o.mp4"), "release.none")
    assert tree(tmp_path) == before


def test_a_refusal_for_programs(say: Say, release: Path) -> None:
    (release / "README.md").unlink()
    said = say(main, "verify", release, "--json")
    assert json.loads(said.out)["code"] == "release.missing"


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "prompt.empty"), (" \t\n", "prompt.empty"), ("red " * 25_000, "prompt.too-long"),
        ("a red \udcff ball", "usage"),
    ],
)  # fmt: skip
def test_prompts(say: Say, release: Path, tmp_path: Path, prompt: str, code: str) -> None:
    before = tree(tmp_path)
    refused(say(main, "generate", release, prompt, "-o", tmp_path / "out.mp4"), code)
    assert tree(tmp_path) == before
