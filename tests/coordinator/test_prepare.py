"""`prepare` on real files: every bad input by its code, resumption, held-out clips, shards."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import av
import numpy as np
import pytest
import torch

from paris_coordinator import encoding
from paris_coordinator import prepare as module
from paris_coordinator.captions import CAPTION_LIMIT, find_clips
from paris_coordinator.prepare import prepare
from paris_models.assets import asset
from paris_models.checkpoint import load_tensors
from paris_models.codec import PatchPCA
from paris_models.shards import ClipTable, read_shards
from paris_models.video import encode_mp4, read_clip
from paris_models.worlds import CAPTIONS, GEOMETRY, render, write_clips
from paris_protocol.errors import ParisError

CLIPS = 96


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_clips(folder, CLIPS, seed=11)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe in batches of 16, with few held-out clips."""
    folder = tmp_path_factory.mktemp("recipe")
    text = asset("smoke.toml").read_text()
    text = text.replace("validation = 128", "validation = 5").replace("audit = 64", "audit = 3")
    clips = "[clips]\nbatch = 16\nallow_unlicensed = true\n\n"
    text = text.replace("[codec]", clips + "[codec]")
    for name in ("codec", "text", "initial"):
        shutil.copy(asset(f"{name}.safetensors"), folder)
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def prepared(recipe: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare(recipe, videos, out)
    return out


def tables(folder: Path) -> dict[str, ClipTable]:
    """All tables of a prepared folder by relative path."""
    described = json.loads((folder / "prepared.json").read_text())
    paths = [
        part["path"]
        for cluster in described["clusters"]
        for part in (*cluster["shards"], cluster["validation"], cluster["audit"])
    ]
    return {path: read_shards([folder / path]) for path in paths}


def test_what_is_written_is_what_is_described(prepared: Path) -> None:
    described = json.loads((prepared / "prepared.json").read_text())
    assert described["format"] == 1 and described["codec"]["frames"] == 3
    assert described["codec"]["path"] == "codec.safetensors"
    total = 0
    for cluster in described["clusters"]:
        assert len(cluster["shards"]) == 4 and len(cluster["centroid"]) == 6
        assert cluster["clips"] == sum(shard["clips"] for shard in cluster["shards"])
        assert (cluster["validation"]["clips"], cluster["audit"]["clips"]) == (5, 3)
        total += cluster["clips"] + 8
    assert total == described["report"]["clips"] == CLIPS
    assert abs(sum(float(c["prior"]) for c in described["clusters"]) - 1) < 1e-6
    for name, table in tables(prepared).items():
        parts = (*(c for k in described["clusters"] for c in k["shards"]),)
        if name.startswith("shards"):
            assert len(table) == next(part["clips"] for part in parts if part["path"] == name)
        assert table.shape == (32, 3, 4, 4) and table.features is None and table.first is None
    names = {path.relative_to(prepared).as_posix() for path in prepared.rglob("*.safetensors")}
    small = {f"{name}.safetensors" for name in ("codec", "text", "initial", "clusters")}
    assert names == small | tables(prepared).keys()
    assert not (prepared / "work").exists()
    assert (prepared / "private").stat().st_mode & 0o077 == 0


def test_latents_and_captions_are_those_of_the_files(prepared: Path) -> None:
    codec = PatchPCA.from_tensors(load_tensors(prepared / "codec.safetensors"))
    clips, captions = render(CLIPS, 11)
    latents = codec.encode(clips)
    words = load_tensors(prepared / "text.safetensors")
    found = set()
    for table in tables(prepared).values():
        for clip, caption in zip(table.latents, table.caption, strict=True):
            error = (latents - clip).square().mean((1, 2, 3, 4))
            index = int(error.argmin())
            assert float(error[index]) < 1e-8
            found.add(index)
            count = len(CAPTIONS[int(captions[index])].split())
            assert torch.equal(table.text_seq[caption][count], words["table"][2])
    assert found == set(range(CLIPS))


def test_a_clip_is_in_one_file_only(prepared: Path) -> None:
    rows = [clip.numpy().tobytes() for t in tables(prepared).values() for clip in t.latents]
    assert len(rows) == len(set(rows)) == CLIPS


def test_it_is_a_function_of_its_inputs_and_done_only_once(
    recipe: Path, videos: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(recipe, videos, tmp_path / "again")
    for path in prepared.rglob("*"):
        if path.is_file():
            other = tmp_path / "again" / path.relative_to(prepared)
            assert other.read_bytes() == path.read_bytes()
    monkeypatch.setattr(encoding, "decode", lambda *_: pytest.fail("decoded again"))
    assert prepare(recipe, videos, tmp_path / "again")["report"]["clips"] == CLIPS


def test_other_inputs_make_it_anew(recipe: Path, videos: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(videos, clips)
    first = prepare(recipe, clips, tmp_path / "out")
    (clips / "00000.txt").write_text("a blue star grows")
    second = prepare(recipe, clips, tmp_path / "out")
    assert first["inputs"] != second["inputs"]
    assert prepare(recipe, clips, tmp_path / "out") == second


def bad_files(folder: Path) -> dict[str, str]:
    """One file of every kind that is refused, and its code."""
    good = encode_mp4(render(3, 77)[0][0], 8, lossless=True)
    other = encode_mp4(render(3, 77)[0][1], 8, lossless=True)
    short = encode_mp4(render(3, 77)[0][2][:, :5], 8, lossless=True)
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    empty = io.BytesIO()
    with av.open(empty, "w", format="avi") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 24, 24, "yuv420p"
        container.start_encoding()
    cases: dict[str, tuple[bytes, bytes | None, str]] = {
        "zz-text.mp4": (b"this is no video\n" * 20, b"a text", "clip.not-video"),
        "zz-cut.mp4": (good[: len(good) // 2], b"a cut one", "clip.truncated"),
        "zz-empty.avi": (empty.getvalue(), b"nothing", "clip.no-frames"),
        "zz-sound.mp4": (sound.getvalue(), b"a sound", "clip.audio-only"),
        "zz-short.mp4": (short, b"a short one", "clip.too-short"),
        "zz-missing.mp4": (other, None, "caption.missing"),
        "zz-blank.mp4": (other, b" \n\t", "caption.empty"),
        "zz-latin.mp4": (other, "un café".encode("latin-1"), "caption.encoding"),
        "zz-huge.mp4": (other, b"red " * 25_000, "caption.too-long"),
        "zz-words.mp4": (other, b"far more words than six can be", "caption.too-long"),
        "zz-notes.pdf": (b"%PDF", None, "clip.not-video"),
    }
    for name, (video, caption, _) in cases.items():
        (folder / name).write_bytes(video)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
    shutil.copy(folder / "00007.mp4", folder / "zz-copy.mp4")
    (folder / "zz-copy.txt").write_text("a red ball moves up")
    return {name: code for name, (_, _, code) in cases.items()} | {"zz-copy.mp4": "clip.duplicate"}


def test_every_bad_file_is_skipped_with_its_code(
    recipe: Path, videos: Path, tmp_path: Path
) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(videos, clips)
    expected = bad_files(clips)
    described = prepare(recipe, clips, tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {skip["name"]: skip["code"] for skip in skipped} == expected
    assert described["report"]["clips"] == CLIPS
    assert sum(described["report"]["skipped"].values()) == len(expected)


def test_a_file_name_that_is_not_utf_8(recipe: Path, videos: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(videos, clips)
    odd = os.fsdecode(b"caf\xe9")
    (clips / f"{odd}.mp4").write_bytes(b"no video")
    (clips / f"{odd}.txt").write_text("a red ball")
    prepare(recipe, clips, tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert skipped == [{"name": f"{odd}.mp4", "code": "clip.not-video", "detail": ANY}]


def test_nothing_usable_is_refused_with_the_counts(recipe: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for setup, words in (("", "it is empty"), ("a.mp4", "1 × caption.missing")):
        if setup:
            (clips / setup).write_bytes(b"x")
        with pytest.raises(ParisError, match=words) as caught:
            prepare(recipe, clips, tmp_path / "out")
        assert caught.value.code == "clips.none"
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["skipped.json"]
    with pytest.raises(ParisError) as caught:
        prepare(recipe, tmp_path / "nowhere", tmp_path / "none")
    assert caught.value.code == "clips.none" and not (tmp_path / "none").exists()


def test_too_few_clips_for_the_clusters(recipe: Path, videos: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in (0, 1, 2, 3):
        for suffix in ("mp4", "txt"):
            shutil.copy(videos / f"{i:05d}.{suffix}", clips)
    with pytest.raises(ParisError, match=r"clusters.count") as caught:
        prepare(recipe, clips, tmp_path / "out")
    assert caught.value.code == "recipe.invalid"
    assert not (tmp_path / "out" / "prepared.json").exists()


# ---------------------------------------------------------------- captions


def names(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    items, skips = find_clips(folder, unlicensed=True)
    return {i.name: i.caption for i in items}, {s.name: s.code for s in skips}


def test_captions_from_jsonl(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        (tmp_path / name).write_bytes(b"v")
    (tmp_path / "b.txt").write_text("beside")
    lines = [
        json.dumps({"video": "a.mp4", "caption": "one  line"}).encode(),
        json.dumps({"video": "./sub/c.mp4", "caption": ""}).encode(),
        json.dumps({"video": "../outside.mp4", "caption": "x"}).encode(),
        json.dumps({"video": "gone.mp4", "caption": "x"}).encode(),
        b"{broken",
        b'{"video": "a.mp4"}',
        b'["list"]',
        b'{"video": "a.mp4", "caption": "caf\xe9"}',
        b"",
    ]
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    found, skips = names(tmp_path)
    assert found == {"a.mp4": "one line", "b.mp4": "beside"}
    assert skips == {
        "sub/c.mp4": "caption.empty",
        "captions.jsonl:3": "clip.missing",
        "gone.mp4": "clip.missing",
        "captions.jsonl:5": "caption.list",
        "captions.jsonl:6": "caption.list",
        "captions.jsonl:7": "caption.list",
        "captions.jsonl:8": "caption.encoding",
    }


def test_captions_from_csv(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"v")
    (tmp_path / "captions.csv").write_text(
        f'video,caption\na.mp4,"one, two"\nb.mp4\nc.mp4,{"x" * (CAPTION_LIMIT + 1)}\n'
    )
    found, skips = names(tmp_path)
    assert found == {"a.mp4": "one, two"}
    assert skips == {
        "captions.csv:3": "caption.list",
        "b.mp4": "caption.missing",
        "c.mp4": "caption.too-long",
    }
    (tmp_path / "captions.csv").write_bytes(b"video,caption\na.mp4,caf\xe9\n")
    assert names(tmp_path)[1]["captions.csv:2"] == "caption.encoding"


def test_sources_and_licences_from_every_list(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "f.png"):
        (tmp_path / name).write_bytes(b"v")
        (tmp_path / name).with_suffix(".txt").write_text(f"beside {name}")
    said = [
        {"video": "a.mp4", "licence": "CC-BY-4.0", "source": " a  page "},
        {"video": "b.mp4", "licence": "CC0-1.0", "caption": "listed"},
        {"video": "c.mp4", "licence": "x" * 201},
        {"video": "d.mp4", "licence": 4},
        {"video": "e.mp4", "source": "known, but under which terms?"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, said)))
    (tmp_path / "captions.csv").write_text("video,licence\nf.png,MIT\n")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for key, words in (
            ("x", {"caption": "said", "licence": "CC0-1.0"}),
            ("y", {"caption": "z"}),
        ):
            add(tar, f"{key}.mp4", b"v")
            add(tar, f"{key}.json", json.dumps(words).encode())
        add(tar, "z.png", b"v")
        add(tar, "z.txt", b"the txt")
        add(tar, "z.json", json.dumps({"licence": "MIT"}).encode())
    items, skips = find_clips(tmp_path)
    assert [(i.name, i.caption, i.source, i.licence) for i in items] == [
        ("a.mp4", "beside a.mp4", "a page", "CC-BY-4.0"),
        ("b.mp4", "listed", "", "CC0-1.0"),
        ("f.png", "beside f.png", "", "MIT"),
        ("t.tar/x.mp4", "said", "", "CC0-1.0"),
        ("t.tar/z.png", "the txt", "", "MIT"),
    ]
    assert {skip.name: skip.code for skip in skips} == {
        "captions.jsonl:3": "caption.list",
        "captions.jsonl:4": "caption.list",
        "c.mp4": "clip.licence",
        "d.mp4": "clip.licence",
        "e.mp4": "clip.licence",
        "t.tar/y.mp4": "clip.licence",
    }
    assert len(find_clips(tmp_path, unlicensed=True)[0]) == 9
    marks = [item.mark() for item in items]
    said[0]["licence"] = "CC0-1.0"
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, said)))
    assert [item.mark() for item in find_clips(tmp_path)[0]] != marks


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_a_webdataset_is_read_in_place(recipe: Path, tmp_path: Path) -> None:
    clips, captions = render(48, 12)
    folder = tmp_path / "clips"
    folder.mkdir()
    with tarfile.open(folder / "part-0.tar", "w") as tar:
        for i, clip in enumerate(clips):
            add(tar, f"d/{i:03d}.mp4", encode_mp4(clip, 8, lossless=True))
            text = CAPTIONS[int(captions[i])]
            if i % 2:
                add(tar, f"d/{i:03d}.txt", text.encode())
            else:
                add(tar, f"d/{i:03d}.json", json.dumps({"caption": text}).encode())
        add(tar, "d/none.mp4", b"v")
        add(tar, "../../escape.mp4", b"v")
    (folder / "broken.tar").write_bytes(b"no tar")
    items, skips = find_clips(folder, unlicensed=True)
    assert [item.caption for item in items] == [CAPTIONS[int(c)] for c in captions]
    assert torch.equal(read_clip(items[5].read(), GEOMETRY), clips[5])
    assert {skip.name: skip.code for skip in skips} == {
        "part-0.tar/d/none.mp4": "caption.missing",
        "part-0.tar/../../escape.mp4": "caption.missing",
        "broken.tar": "clip.truncated",
    }
    assert prepare(recipe, folder, tmp_path / "out")["report"]["clips"] == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "out"]


def test_all_clips_of_a_video_stay_together(recipe: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "clips", tmp_path / "out"
    folder.mkdir()
    clips, captions = render(90, 13)
    for i, clip in enumerate(clips):
        both = torch.cat([clip, clip.flip(1)], 1)
        (folder / f"{i:03d}.mp4").write_bytes(encode_mp4(both, 8, lossless=True))
        (folder / f"{i:03d}.txt").write_text(CAPTIONS[int(captions[i])])
    text = recipe.read_text().replace("batch = 16", "batch = 16\nmost = 2\nstride = 9")
    (recipe.parent / "two.toml").write_text(text)
    described = prepare(recipe.parent / "two.toml", folder, out)
    assert described["report"]["clips"] == 180
    codec = PatchPCA.from_tensors(load_tensors(out / "codec.safetensors"))
    first, second = codec.encode(clips), codec.encode(clips.flip(2))

    def members(table: ClipTable, known: torch.Tensor) -> set[int]:
        """Which of the known latents the table holds."""
        far = torch.cdist(known.flatten(1), table.latents.flatten(1)).amin(1)
        return set((far < 0.1).nonzero()[:, 0].tolist())

    for table in tables(out).values():
        here = members(table, first)
        assert here == members(table, second) and len(table) == 2 * len(here)


# ---------------------------------------------------------------- interruptions

RUN = """
import sys
from pathlib import Path
from paris_coordinator.prepare import prepare
prepare(*(Path(a) for a in sys.argv[1:]), lambda stage, done, total: print(stage, done, flush=True))
"""


def test_kill_9_costs_at_most_the_batch_in_hand(
    recipe: Path, videos: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    paths = os.pathsep.join(p for p in sys.path if p)
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, recipe, videos, out],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("encode 48"):
            break
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=20)
    child.stdout.close()
    done = len(list((out / "work").glob("batch-*.safetensors")))
    assert done >= 3 and not (out / "prepared.json").exists()
    decoded: list[Any] = []
    real = encoding.decode
    monkeypatch.setattr(encoding, "decode", lambda *a: decoded.append(a[0]) or real(*a))
    prepare(recipe, videos, out)
    assert len(decoded) == CLIPS - 16 * done
    for path in prepared.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(prepared)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("stage", ["save_tensors", "write_shard", "_write"])
def test_a_full_disk_is_said_and_nothing_is_finished(
    recipe: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    holder: Any = encoding if stage == "save_tensors" else module
    with monkeypatch.context() as patch:
        patch.setattr(holder, stage, full)
        with pytest.raises(ParisError) as caught:
            prepare(recipe, videos, tmp_path / "out")
    assert caught.value.code == "disk.full"
    assert not (tmp_path / "out" / "prepared.json").exists()
    assert not list((tmp_path / "out").rglob("*.part"))
    assert prepare(recipe, videos, tmp_path / "out")["report"]["clips"] == CLIPS


def test_without_pinned_files_codec_and_words_are_fitted(
    recipe: Path, videos: Path, tmp_path: Path
) -> None:
    text = "\n".join(x for x in recipe.read_text().splitlines() if not x.startswith("file"))
    text = re.sub(r"\[\[plans\]\].*?(?=\n\[)", "", text, flags=re.DOTALL)  # none on a fresh expert
    (tmp_path / "own.toml").write_text(text.replace("batch = 16", "batch = 64"))
    described = prepare(tmp_path / "own.toml", videos, tmp_path / "out")
    assert float(described["report"]["psnr_db"]) > 20
    codec = PatchPCA.from_tensors(load_tensors(tmp_path / "out" / "codec.safetensors"))
    assert codec.fingerprint == described["codec"]["fingerprint"]
    initial = load_tensors(tmp_path / "out" / "initial.safetensors")
    assert not initial["proj_out.weight"].any() and initial["x_embedder.weight"].any()


def test_another_codec_than_the_recipe_names_is_refused(
    recipe: Path, videos: Path, tmp_path: Path
) -> None:
    text = recipe.read_text().replace("channels = 32", f'channels = 32\nfingerprint = "{"0" * 64}"')
    (recipe.parent / "other.toml").write_text(text)
    with pytest.raises(ParisError) as caught:
        prepare(recipe.parent / "other.toml", videos, tmp_path / "out")
    assert caught.value.code == "encoder.mismatch"


def test_an_initial_checkpoint_of_another_expert_is_refused(
    recipe: Path, videos: Path, tmp_path: Path
) -> None:
    for name, source in (("codec", "codec"), ("text", "text"), ("initial", "codec")):
        shutil.copy(asset(f"{source}.safetensors"), tmp_path / f"{name}.safetensors")
    shutil.copy(recipe, tmp_path / "recipe.toml")
    with pytest.raises(ParisError, match=r"initial\.file") as caught:
        prepare(tmp_path / "recipe.toml", videos, tmp_path / "out")
    assert caught.value.code == "recipe.invalid"


@pytest.mark.slow
def test_a_thousand_clips_take_seconds(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", 1000, seed=1)
    begin = time.process_time()
    prepare(asset("smoke.toml"), tmp_path / "clips", tmp_path / "out")
    assert time.process_time() - begin < 12
