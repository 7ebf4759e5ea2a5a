"""The jobs merge, router and samples on real files: same inputs, same bytes, never half."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paris_coordinator.jobs import merge as jobs_merge
from paris_coordinator.jobs.common import new_folder
from paris_coordinator.worker import perform
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.merge import merge_files
from paris_models.video import Geometry, read_clip
from tinynet import SECRET, TinyNet, Unit, hexed, plain, root_of


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def units(net: TinyNet) -> list[Unit]:
    return [net.unit(0, 0), net.unit(0, 1)]


def merge_job(net: TinyNet, updates: list[Path], out: Path, **changes: Any) -> dict[str, Any]:
    weight = (1 / len(updates)).hex()
    return {
        "job": "merge",
        "genesis": str(net.folder / "genesis.json"),
        "parent": str(net.head_file),
        "inputs": [{"path": str(p), "weight": weight, "scale": (1.0).hex()} for p in updates],
        "out": str(out),
        "private": str(net.private(0)),
        "policy": plain(net.policy.record),
        "secret": SECRET,
        **changes,
    }


def test_merge_is_the_mean_of_deltas_in_the_same_bytes(
    net: TinyNet, units: list[Unit], tmp_path: Path
) -> None:
    updates = [unit.update for unit in units]
    first = perform(merge_job(net, updates, tmp_path / "a.safetensors"))["result"]
    again = perform(merge_job(net, updates, tmp_path / "b.safetensors"))["result"]
    assert first == again
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    head, parent = load_tensors(tmp_path / "a.safetensors"), load_tensors(net.head_file)
    one, two = (load_tensors(path) for path in updates)
    for name, tensor in head.items():
        assert torch.equal(tensor, parent[name] + (0.5 * one[name] + 0.5 * two[name])), name
    assert first["root"] == root_of(head)
    assert first["worse"] is False
    found = dict(first["numbers"])
    assert float(found["after"]) < float(found["before"])


def damaged(unit: Unit, factor: float, path: Path) -> Path:
    tensors = load_tensors(unit.update)
    save_tensors({name: factor * tensor for name, tensor in tensors.items()}, path)
    return path


def test_a_merge_that_damages_says_so(net: TinyNet, units: list[Unit], tmp_path: Path) -> None:
    """Each unit may pass alone; what is merged is judged again. Nothing can be saved here."""
    updates = [damaged(unit, -9, tmp_path / f"{i}.safetensors") for i, unit in enumerate(units)]
    out = tmp_path / "head.safetensors"
    answer = perform(merge_job(net, updates, out))["result"]
    assert answer["worse"] is True
    assert answer["inputs"] == [[place, (0.5).hex(), (1.0).hex()] for place in range(2)]
    assert answer["left_out"] == []
    found = dict(answer["numbers"])
    assert (found["step"], found["left_out"]) == ("1", "0")
    assert answer["root"] == root_of(load_tensors(out)), "what is told is what was asked for"


def test_the_culprit_is_left_out(net: TinyNet, units: list[Unit], tmp_path: Path) -> None:
    bad = damaged(units[0], -9, tmp_path / "bad.safetensors")
    updates, out = [units[1].update, bad], tmp_path / "head.safetensors"
    answer = perform(merge_job(net, updates, out))["result"]
    assert answer["worse"] is False
    assert (answer["inputs"], answer["left_out"]) == ([[0, (0.5).hex(), (1.0).hex()]], [1])
    assert dict(answer["numbers"])["left_out"] == "1"
    again = tmp_path / "again.safetensors"
    merge_files(net.head_file, [(units[1].update, 0.5, 1.0)], again)
    assert out.read_bytes() == again.read_bytes(), "the scalars told are those of the file"


def test_half_the_step_comes_before_leaving_out(
    net: TinyNet, units: list[Unit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[jobs_merge.Variant] = []
    real = jobs_merge._Bench.merged

    def merged(bench: Any, variant: jobs_merge.Variant) -> jobs_merge.Found:
        tried.append(variant)
        return replace(real(bench, variant), worse=variant.step == 1)

    monkeypatch.setattr(jobs_merge._Bench, "merged", merged)
    updates, out = [unit.update for unit in units], tmp_path / "head.safetensors"
    answer = perform(merge_job(net, updates, out))["result"]
    assert [variant.step for variant in tried] == [1, 0.5]
    assert answer["inputs"] == [[place, (0.25).hex(), (1.0).hex()] for place in range(2)]
    assert dict(answer["numbers"])["step"] == "0.5"
    again = tmp_path / "again.safetensors"
    merge_files(net.head_file, [(path, 0.25, 1.0) for path in updates], again)
    assert out.read_bytes() == again.read_bytes()


def test_a_revert_takes_out_what_was_merged(
    net: TinyNet, units: list[Unit], tmp_path: Path
) -> None:
    updates, out = [unit.update for unit in units], tmp_path / "head.safetensors"
    merged = merge_job(net, updates, out)
    perform(merged)
    job = merged | {
        "job": "revert", "parent": str(out), "removed": [merged["inputs"][1]],
        "out": str(tmp_path / "reverted.safetensors"),
    }  # fmt: skip
    first = perform(job)["result"]
    assert first == perform(job)["result"]
    head, back = load_tensors(out), load_tensors(tmp_path / "reverted.safetensors")
    taken = load_tensors(updates[1])
    assert all(torch.equal(back[name], head[name] - 0.5 * taken[name]) for name in head)
    assert first["root"] == root_of(back)
    found = dict(first["numbers"])
    assert float(found["after"]) > float(found["before"]), "honest work is missed"


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_merge_that_overflows_leaves_nothing(net: TinyNet, tmp_path: Path) -> None:
    parent = load_tensors(net.head_file)
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in parent.items()}
    save_tensors(huge, tmp_path / "huge.safetensors")
    out = tmp_path / "head.safetensors"
    updates = [
        {"path": str(tmp_path / "huge.safetensors"), "weight": (4.0).hex(), "scale": (1.0).hex()}
    ]
    answer = perform(merge_job(net, [tmp_path / "huge.safetensors"], out, inputs=updates))
    assert answer["error"]["code"] == "tensor.values"
    assert not out.exists()


def test_router_and_samples(net: TinyNet, tmp_path: Path) -> None:
    genesis, router = str(net.folder / "genesis.json"), tmp_path / "router"
    job = {
        "job": "router", "genesis": genesis, "seed": hexed("router"), "out": str(router),
        "shards": [[k, str(net.shard(k, i))] for k in range(2) for i in range(2)],
        "private": [[k, str(net.private(k))] for k in range(2)],
    }  # fmt: skip
    report = perform(job)["result"]["report"]
    assert report["accuracy"] > 0.9
    before = {path.name: path.read_bytes() for path in router.iterdir()}
    perform(job)
    assert {path.name: path.read_bytes() for path in router.iterdir()} == before

    prompts = ["a red wave drifts", "a blue wave pulses", "a red wave pulses"]
    made = {
        "job": "samples", "genesis": genesis, "heads": [str(net.head_file)] * 2,
        "codec": str(net.folder / "codec.safetensors"),
        "text": str(net.folder / "text.safetensors"),
        "prompts": prompts, "seed": hexed("samples"),
    }  # fmt: skip
    for name, given in (("with", str(router)), ("without", None)):
        out = tmp_path / name
        files = perform(made | {"router": given, "out": str(out)})["result"]["files"]
        assert files == ["sample-0.mp4", "sample-1.mp4", "sample-2.mp4"]
        assert sorted(path.name for path in out.iterdir()) == files
        clip = read_clip(out / files[0], Geometry(frames=5, height=192, width=192, fps=8))
        assert clip.shape == (3, 5, 192, 192)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "made"
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with new_folder(out) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in out.iterdir()] == ["second"]
