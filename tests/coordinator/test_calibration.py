"""Calibration measures what replays on other kernels really differ by, and files of elsewhere."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from paris_coordinator import calibration
from paris_coordinator.calibration import Kernel, Source, measure, of_prepared, sketch
from paris_coordinator.cli import app
from paris_coordinator.recipe_audit import Tolerance as RecipeTolerance
from paris_coordinator.tolerances import Pair, as_toml, compare, read_results, table, tolerances
from paris_models.checkpoint import load_tensors
from paris_protocol.errors import ParisError
from tinynet import TinyNet, plain

FEW = (
    Kernel("reference"),
    Kernel("attention math", attention="math"),
    Kernel("not deterministic", kernels="fast"),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = TinyNet(tmp_path_factory.mktemp("tiny"))
    described = {
        "format": 1,
        "expert": plain(net.spec),
        "recipe": plain(net.recipe_record),
        "policy": {"commit_every": 4},
        "initial": {"path": "initial.safetensors"},
        "clusters": [{"shards": [{"path": net.shard(0, 0).name}]}],
    }
    (net.folder / "prepared.json").write_text(json.dumps(described))
    return net.folder


@pytest.fixture(scope="module")
def source(prepared: Path) -> Source:
    return of_prepared(prepared)


@pytest.fixture(scope="module")
def results(source: Source) -> list[dict[str, Any]]:
    """Measured once in this process, kernel by kernel (their own processes: test below)."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(calibration, "KERNELS", FEW)
        patched.setattr(
            calibration, "_in_a_process", lambda order, kernel, folder: calibration.perform(order)
        )
        return measure(source, pairs=2, steps=(2, 4), dtypes=("float32",), device="cpu")


def test_kernels_are_compared_segment_by_segment(results: list[dict[str, Any]]) -> None:
    pairs = compare(results)
    assert len(pairs) == 2 * 2 * 3  # two segments, two lengths, every two of three kernels
    rows = {(row["kernel"].split(" (")[0], row["steps"]): row for row in table(pairs)}
    other = rows["attention math", 4]
    assert not other["equal_bits"]
    assert 0 < other["rho"] < 1e-3
    assert rows["not deterministic", 4]["equal_bits"] == (rows["not deterministic", 4]["rho"] == 0)


def test_a_tolerance_is_the_worst_pair_times_the_factor(
    results: list[dict[str, Any]], source: Source
) -> None:
    pairs = compare(results)
    found = tolerances(pairs, model=source.model, source="here", factor=5)
    apart = sum(not pair.equal for pair in pairs if pair.steps == 4)
    assert [(one.dtype, one.steps) for one in found] == [("float32", 2), ("float32", 4)]
    assert found[1].pairs == apart > 0
    worst = max(pair.rho for pair in pairs if pair.steps == 4)
    assert float(found[1].rho) == pytest.approx(5 * worst, rel=1e-2)
    again = tomllib.loads(as_toml(found))["audit"]["tolerances"]
    assert [RecipeTolerance(**one).steps for one in again] == [2, 4]
    assert again[1] == found[1].model_dump()


def test_a_sketch_is_linear_and_keeps_norms() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 200, generator=generator)
    b = a + 1e-4 * torch.randn(300, 200, generator=generator)
    off = (sketch(a) - sketch(b)).norm() / sketch(a).norm()
    assert float(off) == pytest.approx(1e-4, rel=0.35)  # 64 sums: about 9 % each way
    small = torch.arange(5.0)
    assert torch.equal(sketch(small), small)


def test_sketches_agree_with_whole_states(source: Source, results: list[dict[str, Any]]) -> None:
    """The same two kernels, compared by `replay.distance` on the states themselves."""
    from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
    from paris_models.replay import distance, replay
    from paris_models.shards import read_shards
    from paris_models.train import new_state, state_tensors

    config = ExpertConfig.from_record(source.expert)
    recipe = RecipeConfig.from_record(source.recipe)
    unit = UnitConfig(
        key=calibration.KEY[:-2] + bytes(2), steps=24, batch=recipe.batch, rate_shape="constant"
    )
    ends = []
    for backend in ("flash", "math"):
        state = new_state(config, recipe, load_tensors(source.initial))
        begin = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
        with calibration._attention(backend):
            replay(state, read_shards(source.shards), unit, 4)
        ends.append({name: tensor.clone() for name, tensor in state_tensors(state).items()})
    rho, tensor = distance(begin, ends[0], ends[1])
    pair = next(p for p in compare(results[:2]) if p.steps == 4)
    assert pair.rho == pytest.approx(rho, rel=0.25)
    assert pair.tensor == pytest.approx(tensor, rel=0.6)


def test_results_of_another_machine_are_taken_in(
    results: list[dict[str, Any]], source: Source
) -> None:
    """Segments that begin at the parent are common; others begin at bits of one machine."""
    foreign = json.loads(json.dumps([{**results[1], "machine": "elsewhere"}]))
    for run in foreign[0]["runs"]:
        if run["pair"] == 1:
            run["begin"] = "00" * 32
    taken = read_results(json.dumps(foreign).encode(), source.model)
    pairs = [p for p in compare([*results, *taken]) if "elsewhere" in p.first + p.second]
    assert {(p.steps, p.second) for p in pairs} == {
        (2, "attention math (elsewhere)"), (4, "attention math (elsewhere)"),
    }  # fmt: skip
    assert len(pairs) == 2 * 3


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"[1]", b'[{"format": 2}]', b'[{"format": 1, "model": "other"}]']
)
def test_other_files_are_refused(source: Source, text: bytes) -> None:
    with pytest.raises(ParisError) as refused:
        read_results(text, source.model)
    assert refused.value.code == "recipe.invalid"


def test_results_without_their_tensors_are_refused(
    results: list[dict[str, Any]], source: Source
) -> None:
    broken = json.loads(json.dumps(results[:1]))
    broken[0]["runs"][0].pop("tensors")
    broken[0]["runs"][0]["end"] = "other"
    with pytest.raises(ParisError):
        read_results(json.dumps([*results[:1], *broken]).encode(), source.model)


def test_the_largest_pair_counts_whichever_kernels_it_is_of() -> None:
    pairs = [
        Pair("a", "b", "float32", 5, True, 0.0, 0.0),
        Pair("a", "c", "float32", 5, False, 0.001, 0.01),
        Pair("b", "c", "float32", 5, False, 0.002, 0.008),
    ]
    found = tolerances(pairs, model="m", source="s")
    assert (found[0].rho, found[0].tensor, found[0].factor) == ("0.1", "0.5", "50")
    found = tolerances(pairs, model="m", source="s", factor=5)
    assert (found[0].rho, found[0].tensor, found[0].factor) == ("0.01", "0.05", "5")


def test_the_verb_runs_a_kernel_in_a_process(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Kernel("ATen", environment={"ATEN_CPU_CAPABILITY": "default"})
    monkeypatch.setattr(calibration, "KERNELS", (one,))
    out, common = tmp_path / "here.json", ["calibrate", "--prepared", str(prepared), "--pairs", "1"]
    ended = CliRunner().invoke(app, [*common, "--measure-only", "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    found = json.loads(out.read_bytes())
    assert [one["kernel"] for one in found] == ["ATen"]
    assert "DEFAULT" in found[0]["machine"]  # the switch was set before torch started
    assert {run["steps"] for one in found for run in one["runs"]} == {4}  # the policy's


def test_a_network_must_be_named_and_be_there(tmp_path: Path, prepared: Path) -> None:
    for arguments in (
        [],
        ["--state", str(tmp_path)],
        ["--prepared", str(tmp_path)],
        ["--prepared", str(prepared), "--state", str(tmp_path)],
        ["--prepared", str(prepared), "--measure-only"],
        ["--prepared", str(prepared), "--dtype", "float8"],
        ["--prepared", str(prepared), "--results", str(tmp_path / "none.json")],
        ["--prepared", str(prepared), "--plan", "lora-5-bf16"],
        ["--prepared", str(prepared), "--plan", "lora-16-bf16", "--dtype", "float32"],
    ):
        ended = CliRunner().invoke(app, ["calibrate", *arguments])
        assert isinstance(ended.exception, ParisError), arguments


def test_every_plan_has_tolerances_of_its_own(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "KERNELS", FEW[:2])
    monkeypatch.setattr(
        calibration, "_in_a_process", lambda order, kernel, folder: calibration.perform(order)
    )
    facts, _, text = calibration.calibrated(
        source.under("lora-16-bf16"), pairs=2, steps=(2,), dtypes=None, device="cpu", others=(),
        measure_only=False, factor=None,
    )  # fmt: skip
    [found] = tomllib.loads(text)["audit"]["tolerances"]
    assert (found["dtype"], found["steps"]) == ("bfloat16", 2)
    assert found["model"] == facts["model"] == f"{source.model.rsplit('-', 2)[0]}-lora-16-bf16"
    assert 0 < float(found["rho"]) < 5


def test_no_weights_stand_in_results(results: list[dict[str, Any]]) -> None:
    tensors = results[0]["runs"][0]["tensors"]
    assert all(len(text) <= 4 * 64 * 4 / 3 + 4 for _count, text in tensors.values())
