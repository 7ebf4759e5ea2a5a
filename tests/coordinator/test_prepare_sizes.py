"""`prepare` with buckets, licences and filters: which clips are taken, and where they go."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from benchmarks.tiny_encoders import save_classifier

from coordinator.preparing import (
    BUCKETS,
    lines,
    put,
    put_sizes,
    put_worlds,
    shards,
    skipped,
    smoke,
    still,
)
from paris_coordinator.config import State
from paris_coordinator.genesis import Setup, init
from paris_coordinator.prepare import prepare
from paris_models.checkpoint import load_tensors, raw_bytes, read_metadata, save_tensors
from paris_models.codec import PatchPCA
from paris_models.shards import BucketSet, read_shards, read_training
from paris_models.video import encode_mp4
from paris_models.worlds import render
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError

N = 48


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of three buckets beside the network's own."""
    folder = tmp_path_factory.mktemp("sized")
    put_worlds(folder / "clips", N)
    put_sizes(folder / "clips")
    prepare(smoke(folder / "recipe", BUCKETS), folder / "clips", folder / "out")
    return folder / "out"


# ---------------------------------------------------------------- buckets


def test_every_clip_is_in_the_bucket_that_it_fills(sized: Path) -> None:
    described = json.loads((sized / "prepared.json").read_text())
    latents = [(32, 3, 4, 4), *(tuple(bucket["latent"]) for bucket in described["buckets"])]
    assert latents[1:] == [(32, 1, 4, 4), (32, 2, 4, 8), (32, 2, 8, 4)]
    assert [b["batch"] for b in described["buckets"]] == [7, 96, 96]
    assert [b["clips"] for b in described["report"]["buckets"]] == [N, 12, 12, 12]
    kinds = {"0": 0, "i": 1, "w": 2, "t": 3}
    assert all(line["bucket"] == kinds[line["name"][0]] for line in lines(sized))
    for shard in shards(sized):
        table = read_shards([sized / shard["path"]])
        assert (len(table), table.shape) == (shard["clips"], latents[shard["bucket"]])
    for cluster in described["clusters"]:
        for kind in ("validation", "audit"):
            table = read_shards([sized / cluster[kind]["path"]])
            assert table.shape == latents[0] and len(table) == cluster[kind]["clips"]


def test_a_clip_is_in_one_file_and_one_cluster(sized: Path) -> None:
    found = lines(sized)
    assert len({line["clip"] for line in found}) == len(found) == N + 36
    assert {line["name"] for line in found if line["file"].startswith("private")}.isdisjoint(
        line["name"] for line in found if line["file"].startswith("shards")
    )


def test_the_network_and_training_take_the_buckets(sized: Path, tmp_path: Path) -> None:
    init(sized, tmp_path / "state", Setup(), 0)
    genesis = open_genesis(State(tmp_path / "state").genesis_file.read_bytes()).record
    assert [bucket.latent for bucket in genesis.buckets][1] == (32, 2, 4, 8)
    assert [b.geometry.frames for b in genesis.buckets] == [1, 5, 5]
    made = {(shard.bucket, shard.clips) for c in genesis.clusters for shard in c.shards}
    assert made == {(shard["bucket"], shard["clips"]) for shard in shards(sized)}
    first = [s for s in shards(sized) if "cluster0" in s["path"]]
    batches = {n: bucket.batch for n, bucket in enumerate(genesis.buckets, 1)}
    clips = read_training([sized / s["path"] for s in first], [s["bucket"] for s in first], batches)
    assert isinstance(clips, BucketSet) and len(clips) == sum(s["clips"] for s in first)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("[[buckets]]\nframes = 8\nside = 24", "buckets: bucket 1: 8×24×24"),
        ("[[buckets]]\nframes = 9\nside = 24", "9×24×24 is there twice"),
        ('[[buckets]]\nframes = 9\nside = 48\naspects = ["7:5"]', "the aspect 7:5"),
        ("[[buckets]]\nframes = 9\nside = 48\naspects = []", "aspects"),
        ("[[buckets]]\nframes = 9\nside = 0", "side"),
        (
            "\n".join(f"[[buckets]]\nframes = 1\nside = {6 * n}" for n in range(1, 257)),
            "256, at most 255",
        ),
    ],
)
def test_a_bucket_that_the_model_cannot_take(tmp_path: Path, more: str, words: str) -> None:
    put_worlds(tmp_path / "clips", 1)
    with pytest.raises(ParisError, match=words) as refused:
        prepare(smoke(tmp_path, more), tmp_path / "clips", tmp_path / "out")
    assert refused.value.code == "recipe.invalid"
    assert not (tmp_path / "out" / "prepared.json").exists()


# ---------------------------------------------------------------- licences and provenance


def test_a_clip_without_a_licence_is_refused_unless_allowed(tmp_path: Path) -> None:
    clips, recipe = tmp_path / "clips", smoke(tmp_path / "recipe")
    put_worlds(clips, 45)
    more, _ = render(60, 31)
    for i in range(3):
        put(clips, f"none{i}.mp4", more[i], "a red ball moves up", licence="")
    (clips / "beside.mp4").write_bytes(encode_mp4(more[3], 8, lossless=True))
    (clips / "beside.txt").write_text("a red ball moves left")
    found = prepare(recipe, clips, tmp_path / "out")
    assert skipped(tmp_path / "out") == dict.fromkeys(
        ("none0.mp4", "none1.mp4", "none2.mp4", "beside.mp4"), "clip.licence"
    )
    assert found["report"]["licences"] == {"CC0-1.0": 45}
    found = prepare(recipe, clips, tmp_path / "out", allow_unlicensed=True)
    assert found["report"]["licences"] == {"CC0-1.0": 45, "none stated": 4}
    assert skipped(tmp_path / "out") == {}


def test_provenance_names_every_clip_by_its_latents(sized: Path) -> None:
    rows: dict[str, int] = {}
    for line in lines(sized):
        table = read_shards([sized / line["file"]])
        row = rows[line["file"]] = rows.get(line["file"], -1) + 1
        assert hashlib.sha256(raw_bytes(table.latents[row])).hexdigest() == line["clip"]
        assert (line["source"], line["licence"]) == ("drawn", "CC0-1.0")
    codec = PatchPCA.from_tensors(load_tensors(sized / "codec.safetensors"))
    clips, _ = render(N, 11)
    by_name = {line["name"]: line for line in lines(sized)}
    for i in (0, 17, N - 1):
        line = by_name[f"{i:05d}.mp4"]
        table = read_shards([sized / line["file"]])
        far = (table.latents - codec.encode(clips[i : i + 1])).abs().amax((1, 2, 3, 4))
        digest = hashlib.sha256(raw_bytes(table.latents[int(far.argmin())])).hexdigest()
        assert float(far.min()) < 1e-5 and digest == line["clip"]


# ---------------------------------------------------------------- filters


def test_joined_clips_and_stills_are_left_out(tmp_path: Path) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    worlds = put_worlds(clips, N)
    more, _ = render(60, 32)
    put(clips, "cut.mp4", torch.cat([more[0][:, :4], more[1][:, 4:]], 1), "a red ball moves up")
    put(clips, "still.mp4", still(more[2]), "a red ball moves up")
    prepare(smoke(tmp_path / "recipe"), clips, out)
    assert skipped(out) == {"cut.mp4": "clip.cut", "still.mp4": "clip.static"}
    assert len(lines(out)) == len(worlds)
    off = smoke(tmp_path / "off", "[filters]\ncut = 0\nstill = 0")
    assert prepare(off, clips, tmp_path / "all")["report"]["clips"] == N + 2


HOOK = """
import os
def dark(frames):
    assert frames.dtype.name == "uint8" and frames.shape == (9, 24, 24, 3)
    return "too dark" if frames.mean() < 5 else None
def broken(frames):
    raise RuntimeError("the filter's own fault")
def deadly(frames):
    os._exit(9)
"""


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_hook.py").write_text(HOOK)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("hook")
def test_the_operator_s_function_refuses_content(tmp_path: Path) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    worlds = put_worlds(clips, N)
    put(clips, "dark.mp4", worlds[0] // 40, "a red ball moves up")
    filters = "[filters]\ncut = 0\nstill = 0\ncontent = "
    prepare(smoke(tmp_path / "recipe", f'{filters}"own_hook:dark"'), clips, out)
    assert json.loads((out / "skipped.json").read_text()) == [
        {"name": "dark.mp4", "code": "clip.content", "detail": "too dark"}
    ]
    for content, words in (
        ("own_hook:broken", "the filter's own fault"),
        ("own_hook:nothing", "no attribute"),
        ("no_such_module:f", "no_such_module"),
        ("own_hook:HOME", "HOME"),
    ):
        with pytest.raises(ParisError, match=words) as refused:
            prepare(smoke(tmp_path / "bad", f'{filters}"{content}"'), clips, tmp_path / "none")
        assert refused.value.code == "recipe.invalid"
        assert not (tmp_path / "none" / "prepared.json").exists()


@pytest.mark.usefixtures("hook")
def test_a_worker_that_dies_costs_its_batch_only(tmp_path: Path) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    put_worlds(clips, N)
    deadly = smoke(tmp_path / "recipe", '[filters]\ncontent = "own_hook:deadly"')
    with pytest.raises(ParisError) as refused:
        prepare(deadly, clips, out, workers=2)
    assert refused.value.code == "prepare.worker" and not (out / "prepared.json").exists()
    assert list((out / "work").glob("text-*")) and not list(out.rglob("*.part"))
    (tmp_path / "own_hook.py").write_text("def deadly(frames):\n    return None\n")
    assert prepare(deadly, clips, out, workers=2)["report"]["clips"] == N


def test_a_classifier_refuses_labels(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    put_worlds(clips, N)
    model = save_classifier(tmp_path / "classifier", ("fine", "never", "always"))
    tensors = load_tensors(model / "model.safetensors")
    tensors["classifier.bias"] = torch.tensor([0.0, -20.0, 20.0])
    tensors["classifier.weight"].zero_()
    save_tensors(tensors, model / "model.safetensors", {"format": "pt"})

    def filters(*labels: str) -> Path:
        named = ", ".join(f'"{label}"' for label in labels)
        return smoke(tmp_path, f'[filters]\ncontent = "{model}"\nlabels = [{named}]')

    assert prepare(filters("never"), clips, tmp_path / "a")["report"]["clips"] == N
    with pytest.raises(ParisError, match=f"{N} × clip.content"):
        prepare(filters("never", "always"), clips, tmp_path / "b")
    with pytest.raises(ParisError, match="no label 'other'"):
        prepare(filters("other"), clips, tmp_path / "c")
    bad = smoke(tmp_path, '[filters]\nlabels = ["x"]')
    with pytest.raises(ParisError, match="name the classifier"):
        prepare(bad, clips, tmp_path / "d")


# ---------------------------------------------------------------- encoders named in shards


def test_a_shard_of_another_encoder_founds_no_network(sized: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "prepared"
    shutil.copytree(sized, folder)
    path = folder / shards(sized)[2]["path"]
    said = read_metadata(path)
    described = json.loads((sized / "prepared.json").read_text())
    assert said["codec"] == described["codec"]["fingerprint"]
    assert said["codec.scale"] == "applied" and said["geometry"] == "9×24×24 at 8"
    save_tensors(load_tensors(path), path, said | {"text": "f" * 64})
    with pytest.raises(ParisError, match=rf"{path.name}: text: made by ffff") as refused:
        init(folder, tmp_path / "state", Setup(), 0)
    assert refused.value.code == "encoder.mismatch"
    assert not State(tmp_path / "state").exists
