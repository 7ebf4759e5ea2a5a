"""`prepare` on the real encoder classes at tiny size: what is stored, and by whichever workers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from benchmarks.tiny_encoders import recipe, save_all, save_hunyuan, save_wan

from coordinator.preparing import BUCKETS, files, lines, put_sizes, put_worlds, shards, smoke
from paris_coordinator import encoding, engine
from paris_coordinator.encoding import Order
from paris_coordinator.prepare import prepare
from paris_coordinator.tools import Tools
from paris_models.codec import pixels
from paris_models.encoders import HunyuanVAE, T5Clip, WanVAE
from paris_models.shards import ClipTable, read_shards
from paris_protocol.errors import ParisError

N = 24
FILTERS = "[filters]\ncut = 0"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with eight captions."""
    folder = tmp_path_factory.mktemp("real") / "clips"
    put_worlds(folder, N)
    listed = [json.loads(x) for x in (folder / "captions.jsonl").read_text().splitlines()]
    said = [line | {"caption": listed[i % 8]["caption"]} for i, line in enumerate(listed)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, said)))
    return folder


@pytest.fixture(scope="module")
def calls() -> list[int]:
    return []


@pytest.fixture(scope="module")
def real(sources: dict[str, Path], clips: Path, calls: list[int], tmp_path_factory: Any) -> Path:
    """A folder prepared with Wan VAE, T5, CLIP and DINOv2; `calls` are captions per call of T5."""
    folder: Path = tmp_path_factory.mktemp("prepared")
    (folder / "recipe.toml").write_text(recipe(sources, clips=FILTERS))
    plain = T5Clip.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            T5Clip, "encode", lambda self, some: calls.append(len(some)) or plain(self, some)
        )
        prepare(folder / "recipe.toml", clips, folder / "out")
    return folder / "out"


def clip_of(out: Path, name: str) -> tuple[ClipTable, int]:
    """The table that a clip is in, and its row."""
    found = next(line for line in lines(out) if line["name"] == name)
    same = [line for line in lines(out) if line["file"] == found["file"]]
    return read_shards([out / found["file"]]), same.index(found)


def test_the_scale_is_applied_once_and_the_first_frame_encoded_alone(
    real: Path, sources: dict[str, Path], clips: Path
) -> None:
    vae = WanVAE.from_pretrained(str(sources["codec"]))
    mean = torch.tensor([0.1, -0.2, 0.3, 0.0])[:, None, None, None]
    spread = torch.tensor([1.5, 2.0, 0.5, 1.0])[:, None, None, None]
    for name in ("00000.mp4", "00013.mp4"):
        table, row = clip_of(real, name)
        frames = tuple(found(clips / name))
        with torch.no_grad():
            video, first = (vae.model.encode(x).latent_dist.mode()[0] for x in frames)
        assert table.first is not None and table.features is not None
        assert torch.allclose(table.latents[row], (video - mean) / spread, atol=1e-4)
        assert torch.allclose(table.first[row], (first - mean) / spread, atol=1e-4)
        assert table.features.shape[1] == 32


def found(path: Path) -> Any:
    """The clip as floats, and its first frame."""
    from paris_models.video import Geometry, read_clip

    clip = pixels(read_clip(path, Geometry(9, 32, 32, 8)))[None]
    return clip, clip[:, :, :1]


def test_each_caption_is_encoded_once(real: Path, clips: Path, calls: list[int]) -> None:
    captions = {
        json.loads(x)["caption"] for x in (clips / "captions.jsonl").read_text().split("\n") if x
    }
    assert sum(calls) == len(captions) + 1 < N  # and the null text
    report = json.loads((real / "prepared.json").read_text())["report"]
    assert report["captions"] == len(captions) and report["text"] == {
        "store": "float32",
        "lost": "0",
    }


def test_hunyuan_in_buckets_of_another_codec(
    sources: dict[str, Path], clips: Path, tmp_path: Path
) -> None:
    vae = save_hunyuan(tmp_path / "hunyuan")
    text = recipe(
        sources | {"codec": vae}, clips=FILTERS, more="[[buckets]]\nframes = 1\nside = 16"
    )
    text = text.replace('"wan-vae"', '"hunyuan-vae"').replace(
        'name = "tiny', 'preset = "paper"\nname = "tiny'
    )
    (tmp_path / "recipe.toml").write_text(text)
    prepare(tmp_path / "recipe.toml", clips, tmp_path / "out")
    table, row = clip_of(tmp_path / "out", "00003.mp4")
    codec = HunyuanVAE.from_pretrained(str(vae))
    _, first = found(clips / "00003.mp4")
    with torch.no_grad():
        alone = codec.model.encode(first).latent_dist.mode()[0] * 0.476986
    assert table.first is not None
    assert torch.allclose(table.first[row], alone, atol=1e-4)
    assert not torch.allclose(table.first[row], table.latents[row][:, :1], atol=1e-3)  # it leaks
    odd = text.replace("height = 32", "height = 40")
    (tmp_path / "odd.toml").write_text(odd)
    with pytest.raises(ParisError, match=r"geometry: the expert cannot take it") as refused:
        prepare(tmp_path / "odd.toml", clips, tmp_path / "odd")
    assert refused.value.code == "recipe.invalid"


@pytest.mark.parametrize(("store", "most"), [("int8", 0.01), ("float8", 0.04)])
def test_text_in_fewer_bytes(
    real: Path, sources: dict[str, Path], clips: Path, tmp_path: Path, store: str, most: float
) -> None:
    text = recipe(sources, clips=FILTERS, store=f'store = "{store}"')
    (tmp_path / "recipe.toml").write_text(text)
    described = prepare(tmp_path / "recipe.toml", clips, tmp_path / "out")
    assert 0 < float(described["report"]["text"]["lost"]) < most
    for shard in shards(real):
        plain, packed = (read_shards([out / shard["path"]]) for out in (real, tmp_path / "out"))
        assert torch.equal(plain.latents, packed.latents)
        assert torch.equal(plain.null_seq, packed.null_seq)
        lost = (plain.text_seq - packed.text_seq).norm() / plain.text_seq.norm()
        assert 0 < float(lost) < most
        sizes = [(out / shard["path"]).stat().st_size for out in (real, tmp_path / "out")]
        saved = 3 * plain.text_seq.numel() - 4 * plain.text_seq[..., 0].numel()
        assert abs(sizes[0] - sizes[1] - saved) < 300  # the header says a little more


def test_other_weights_in_the_same_folder_encode_anew(
    sources: dict[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: tmp_path / name for name in sources}
    for name, source in sources.items():
        shutil.copytree(source, own[name])
    (tmp_path / "recipe.toml").write_text(recipe(own, clips=FILTERS))

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("encode", 16):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "recipe.toml", clips, tmp_path / "out", stop)
    batch = tmp_path / "out" / "work" / "batch-000000.safetensors"
    before = batch.read_bytes()
    shutil.rmtree(own["codec"])
    save_wan(own["codec"], seed=9)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "recipe.toml", clips, tmp_path / "out", stop)
    assert batch.read_bytes() != before
    order = Order.of(*load(tmp_path, clips))
    tools = Tools.load(order.recipe, order.items, order.work, lambda *_: None)
    worker = engine.Worker(order, dict(tools.prints) | {"text": "e" * 64})
    refusal = worker.do(("clips", 1))[1]
    assert refusal is not None and refusal[0] == "encoder.mismatch" and "text" in refusal[1]


def load(folder: Path, clips: Path) -> Any:
    from paris_coordinator.captions import find_clips
    from paris_coordinator.recipe import load_recipe

    return load_recipe(folder / "recipe.toml"), find_clips(clips)[0], folder / "out" / "work"


# ---------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with buckets and stored int8, and its clips."""
    folder = tmp_path_factory.mktemp("small")
    put_worlds(folder / "clips", 48)
    put_sizes(folder / "clips", 6)
    return smoke(folder / "recipe", BUCKETS, text='store = "int8"'), folder / "clips"


@pytest.fixture(scope="module")
def alone(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone")
    prepare(*small, out)
    return files(out)


def test_two_workers_leave_the_same_bytes(
    small: tuple[Path, Path], alone: dict[str, bytes], tmp_path: Path
) -> None:
    prepare(*small, tmp_path / "out", workers=2)
    assert files(tmp_path / "out") == alone


RUN = """
import sys
from pathlib import Path
from paris_coordinator.prepare import prepare
if __name__ == "__main__":
    def say(stage, done, total):
        print(stage, done, flush=True)
    prepare(*(Path(a) for a in sys.argv[1:]), say, workers=2)
"""


@pytest.mark.slow
def test_killed_with_its_workers_it_goes_on(
    small: tuple[Path, Path], alone: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(RUN)
    child = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", *small, tmp_path / "out"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert child.stdout is not None
    assert any(line.startswith("encode") for line in child.stdout)
    family = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=20)
    child.stdout.close()
    assert len(family) >= 2 and not psutil.wait_procs(family, timeout=30)[1]
    assert list((tmp_path / "out" / "work").glob("batch-*.safetensors"))
    prepare(*small, tmp_path / "out")
    assert files(tmp_path / "out") == alone


def test_a_full_disk_in_a_worker_is_said(
    small: tuple[Path, Path], alone: dict[str, bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copy(small[0], tmp_path)
    for name in ("codec", "text", "initial"):
        shutil.copy(small[0].parent / f"{name}.safetensors", tmp_path)
    (tmp_path / "out" / "work").mkdir(parents=True)
    order = Order.of(*load(tmp_path, small[1]))
    tools = Tools.load(order.recipe, order.items, order.work, lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "save_tensors", full)
        job, refusal = engine.Worker(order, dict(tools.prints)).do(("captions", 0))
    assert refusal == ("disk.full", str(tmp_path / "out"))
    with pytest.raises(ParisError) as refused:
        engine._checked((job, refusal))
    assert refused.value.code == "disk.full"
    assert not list(order.work.glob("text-*"))


def test_without_ray_it_is_said(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ParisError) as refused:
        prepare(*small, tmp_path / "out", workers=2, engine="ray")
    assert refused.value.code == "engine.missing"
    assert not (tmp_path / "out" / "prepared.json").exists()


RAY = RUN.replace("workers=2)", 'workers=2, engine="ray")')


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra `ray`)")
def test_a_ray_cluster_of_two_workers_leaves_the_same_bytes(
    small: tuple[Path, Path], alone: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(RAY)
    subprocess.run(
        [sys.executable, tmp_path / "run.py", *small, tmp_path / "out"],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert files(tmp_path / "out") == alone
