"""The list of what wants a GPU runs, every part of it, with a toy; and says what did not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, gpu_parts
from benchmarks.gpu_lab import Lab
from benchmarks.table import as_json

from paris_models.plans import PLANS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_runs_with_a_toy(part: str, tmp_path: Path) -> None:
    facts, rows = gpu.run(True, part, tmp_path)
    said = json.loads(as_json(part, facts, rows))
    assert said["conditions"]["device"] == "CPU"
    assert rows or said["conditions"]["not_run"]
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.id.startswith("gpu.") for row in rows)
    assert list(tmp_path.iterdir()) == [], "a toy's figures are nobody's result"


def test_the_list_and_its_functions_are_the_same() -> None:
    assert set(gpu.PARTS) == set(gpu_parts.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_each_part_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    facts, rows = gpu.run(False, "memory")
    assert rows == [] and facts["not_run"] == [["memory", "there is no GPU that torch can use"]]
    assert "not run: memory" in capsys.readouterr().err


def test_what_has_no_room_is_skipped_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(torch.device("cuda"), "RTX 3060", toy=False, quick=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (12 << 30, 12 << 30))
    assert not lab.fits("adamw-8bit", PLANS["adamw-8bit"], "paper")
    what, why = lab.not_run[0]
    assert what == "adamw-8bit" and "GiB of the GPU, 12.0 free" in why


def test_a_result_names_its_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toy = Lab.here(quick=True)
    assert toy is not None
    card = Lab(toy.device, "NVIDIA Card 1 (80GB)", toy=False, quick=True)
    monkeypatch.setattr(Lab, "here", classmethod(lambda _cls, _quick: card))
    monkeypatch.setitem(gpu_parts.__dict__, "PARTS", {"kernels": lambda lab: lab.skip("a", "b")})
    gpu.run(False, "kernels", tmp_path)
    (found,) = tmp_path.iterdir()
    assert found.name == "gpu-kernels-nvidia-card-1-80gb.json"
    assert json.loads(found.read_text())["conditions"]["not_run"] == [["a", "b"]]
