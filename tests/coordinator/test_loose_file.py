"""`inspect FILE --parent HEAD`: a file that nobody handed in is measured by the real functions."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from coordinator.planned import lease, work
from paris_coordinator import inspecting
from paris_coordinator.config import State
from paris_coordinator.jobs.loose import offered
from paris_models.checkpoint import load_tensors, save_tensors
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, save_key
from paris_protocol.net.store import BlobStore
from paris_protocol.records import PlanRules
from tinynet import TinyNet


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(net: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder as far as a loose file needs one."""
    state = State(tmp_path / "state")
    state.make()
    shutil.copy(net.folder / "genesis.json", state.genesis_file)
    shutil.copy(net.private(0), state.private_shard("validation", 0))
    save_key(state.key_file, PrivateKey.generate())
    BlobStore(state.store).add_file(net.head_file)
    desk = SimpleNamespace(
        policy=net.policy.record, genesis=net.genesis.record, works={}, merges={}, reverts={},
        experts=[SimpleNamespace(index=0, head=net.head)],
    )  # fmt: skip
    monkeypatch.setattr(inspecting, "open_desk", lambda _: desk)
    return state.folder


def layers(facts: dict[str, Any]) -> dict[str, tuple[bool, str, dict[str, str]]]:
    return {
        layer["layer"]: (
            layer["passed"],
            layer["code"],
            {number["name"]: number["value"] for number in layer["numbers"]},
        )
        for layer in facts["layers"]
    }


def test_an_honest_update_passes_all_that_can_be_measured(net: TinyNet, folder: Path) -> None:
    unit = net.unit(0, 0)
    root = net.head.weights.root
    for head in ("0", root[:12]):
        facts = inspecting.inspect_file(folder, unit.update, head)
        found = layers(facts)
        assert list(found) == ["L0", "L1", "L2", "L3"]
        assert found["L1"][:2] == (False, "commitment.missing")  # nobody committed to it
        assert found["L0"][0], found["L0"]
        assert found["L2"][0], found["L2"]
        assert found["L3"][0], found["L3"]
        assert float(found["L2"][2]["relative"]) > 0
    assert "loss on secret clips: passed" in inspecting.file_text(facts)


@pytest.mark.parametrize(
    ("plan", "codec"),
    [("float32", "topk-32"), ("float32", "int8"), ("lora-64-bf16", "lora-int8")],
)
def test_files_of_every_codec_are_measured_under_a_plan_that_sends_them(
    net: TinyNet, folder: Path, plan: str, codec: str
) -> None:
    unit = work(net, lease(net, 0, plan, codec)).unit
    found = layers(inspecting.inspect_file(folder, unit.update, "0"))
    assert list(found) == ["L0", "L1", "L2", "L3"]
    assert found["L0"][0], found["L0"]
    assert 0 < float(found["L2"][2]["reach"]) < 1
    rules = offered(net.policy.record, unit.update, net.config)
    assert (rules.plan.split("-")[:2], rules.update_codec) == (plan.split("-")[:2], codec)
    mine = PlanRules(plan="lora-64-nf4", dtype="bfloat16", update_codec="lora-int16", rate="2")
    policy = net.policy.record.model_copy(update={"plans": (mine,)})
    taken = offered(policy, unit.update, net.config)
    assert (taken.plan == "lora-64-nf4") == (codec == "lora-int8")
    assert taken.update_codec == codec


def test_noise_is_measured_beyond_its_first_refusal(
    net: TinyNet, folder: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    head = load_tensors(net.head_file)
    noise = {n: 3 * torch.randn(t.shape, generator=generator) for n, t in head.items()}
    save_tensors(noise, tmp_path / "noise.safetensors")
    found = layers(inspecting.inspect_file(folder, tmp_path / "noise.safetensors", "0"))
    assert not found["L2"][0]
    assert found["L3"][1] == "loss.damage"


def test_what_is_no_update_of_this_expert_is_said(
    net: TinyNet, folder: Path, tmp_path: Path
) -> None:
    save_tensors({"w": torch.zeros(3)}, tmp_path / "other.safetensors")
    found = layers(inspecting.inspect_file(folder, tmp_path / "other.safetensors", "0"))
    assert list(found) == ["L0"]
    assert found["L0"][1] == "structure.schema"
    (tmp_path / "text.safetensors").write_text("no tensors")
    for file, head, code in (
        (tmp_path / "text.safetensors", "0", "tensor.header"),
        (net.head_file, "7", "not-found"),
    ):
        with pytest.raises(ParisError) as refusal:
            inspecting.inspect_file(folder, cast(Path, file), cast(str, head))
        assert refusal.value.code == code
    with pytest.raises(ParisError, match="nothing"):
        inspecting.inspect_file(folder, tmp_path / "nothing.safetensors", "0")
