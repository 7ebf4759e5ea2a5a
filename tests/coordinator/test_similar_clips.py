"""`prepare` keeps copies of held-out clips out of training, in all clusters, and names none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.test_similar import COPIES, source
from paris_coordinator.prepare import prepare
from paris_models.assets import asset
from paris_models.checkpoint import load_tensors
from paris_models.clusters import Clusters
from paris_models.worlds import CAPTIONS, render

VIDEOS = 72
COPY = "other quality (CRF 35)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every clip twice: as it is and encoded worse, with the smoke recipe."""
    folder = tmp_path_factory.mktemp("copies")
    (folder / "clips").mkdir()
    clips, captions = render(VIDEOS, 31)
    lines = []
    for number, (clip, caption) in enumerate(zip(clips, captions.tolist(), strict=True)):
        frames = source(clip)
        for kind, video in (("own", COPIES["larger (160)"]), ("copy", COPIES[COPY])):
            name = f"{number:03d}-{kind}.mp4"
            (folder / "clips" / name).write_bytes(video(frames))
            lines.append({"video": name, "caption": CAPTIONS[caption], "licence": "CC0-1.0"})
    (folder / "clips" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = asset("smoke.toml").read_text()
    text = text.replace("validation = 128", "validation = 6").replace("audit = 64", "audit = 4")
    for name in ("codec", "text", "initial"):
        shutil.copy(asset(f"{name}.safetensors"), folder)
    (folder / "recipe.toml").write_text(text)
    (folder / "off.toml").write_text(text.replace("audit = 4", "audit = 4\nalike = 0"))
    return folder


def table(out: Path) -> tuple[set[str], set[str]]:
    """Numbers of the clips that are trained on, and of those held out."""
    text = (out / "private" / "provenance.jsonl").read_text()
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    sides: tuple[set[str], set[str]] = (set(), set())
    for line in lines:
        sides[line["file"].startswith("private/")].add(line["name"][:3])
    return sides


def test_no_copy_of_a_held_out_clip_is_trained_on(folder: Path, tmp_path: Path) -> None:
    described = prepare(folder / "recipe.toml", folder / "clips", tmp_path / "out")
    training, held = table(tmp_path / "out")
    assert len(held) >= 10
    assert not training & held
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {one["code"] for one in skipped} == {"clip.near-duplicate"}
    assert held >= {one["name"][:3] for one in skipped}, "another clip than a copy was refused"
    # Both copies of a clip may be held out; what is said of the others names no clip but them.
    assert 0 < len(skipped) <= len(held)
    assert all(one["detail"] == "" for one in skipped)
    assert described["report"]["skipped"] == {"clip.near-duplicate": len(skipped)}
    assert described["report"]["clips"] == 2 * VIDEOS - len(skipped)


def test_without_the_limit_they_would_be(folder: Path, tmp_path: Path) -> None:
    prepare(folder / "off.toml", folder / "clips", tmp_path / "out")
    training, held = table(tmp_path / "out")
    assert training & held
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == []


def test_clusters_are_kept_for_later_clips_and_fine_ones_can_be_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    text = (folder / "recipe.toml").read_text().replace("count = 3", "count = 3\ncentres = 12")
    (folder / "fine.toml").write_text(text)
    for name, centres in (("recipe", 0), ("fine", 12)):
        described = prepare(folder / f"{name}.toml", folder / "clips", tmp_path / name)
        assert described["report"]["centres"] == centres
        kept = Clusters.from_tensors(load_tensors(tmp_path / name / "clusters.safetensors"))
        assert (kept.fine is not None) == (centres > 0)
        for cluster, row in zip(described["clusters"], kept.centroids.tolist(), strict=True):
            assert [float(value) for value in cluster["centroid"]] == pytest.approx(row, abs=1e-6)
