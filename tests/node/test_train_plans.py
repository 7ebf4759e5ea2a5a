"""Units under every kind of plan: trained, stopped, laid open and replayed like float32 ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from node.test_trainer import UNIT, trained, value
from paris_models import lean
from paris_models.checkpoint import load_tensors, raw_items, save_tensors
from paris_models.codecs import decode
from paris_models.expert import parameter_shapes
from paris_node.hostile_trainer import KINDS
from paris_node.rework import open_states, replay_audit
from paris_node.trainer import Asked, reason_of, train_unit
from paris_node.unit import STATE, STATES, Order, Unit, file_size
from paris_protocol.errors import ParisError
from paris_protocol.records import AuditTask, OpenState
from paris_protocol.tensors import states_root, tensor_root
from tinynet import EVERY, STEPS, TinyNet, hexed, plain, tensor_file

LORA = {"plan": "lora-16-nf4", "dtype": "bfloat16", "update_codec": "lora-int8"}
FULL = {"plan": "adafactor", "dtype": "bfloat16", "update_codec": "int8", "commit_every": STEPS}
KAHAN = {"plan": "adamw", "dtype": "bfloat16", "update_codec": "topk-32", "commit_every": STEPS}
PLANS = pytest.mark.parametrize("asked", [LORA, FULL, KAHAN], ids=lambda one: str(one["plan"]))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("net"))


def order_of(net: TinyNet, work: Path, asked: dict[str, Any], **more: Any) -> Order:
    return Order.parse(value(net, work, assignment=dict(asked), **more))


def silent(report: dict[str, Any]) -> None:
    pass


def test_what_version_0_1_named_is_the_network_s_own_plan(net: TinyNet, tmp_path: Path) -> None:
    """Bit for bit: the update is the one that `train.py` alone gives."""
    result = trained(order_of(net, tmp_path / "a", {"plan": "policy 3, unit-cosine"}))
    assert result["update_root"] == net.unit(0, 0).commitment.update_root
    assert result["numerics"] == order_of(net, tmp_path / "b", {}).numerics()


@PLANS
def test_stopped_anywhere_and_resumed_equals_never_stopped(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any]
) -> None:
    whole = trained(order_of(net, tmp_path / "whole", asked))
    order = order_of(net, tmp_path / "parts", asked, save_every=0)
    for stop in (3, 8):
        assert trained(order, stop) == {}
        assert Unit(order).state.step == stop
    resumed = trained(order)
    for name in ("update_root", "states", "states_root", "loss", "steps"):
        assert resumed[name] == whole[name], name
    shapes = parameter_shapes(net.config)
    wire = load_tensors(Path(whole["update"]))
    assert tensor_root(raw_items(wire)) == whole["update_root"]
    dense = decode(wire, order.assignment.update_codec, shapes)
    assert dense.keys() == shapes.keys() and any(bool(t.any()) for t in dense.values())


@PLANS
def test_committed_states_are_the_plan_s_own_and_as_large_as_is_said(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any]
) -> None:
    order = order_of(net, tmp_path / "a", asked, states_mb=64)
    result = trained(order)
    state = Unit(order).state
    kept = sorted((order.work / STATES).glob("*.safetensors"))
    assert len(kept) == len(result["states"]) - 1
    size = file_size(state)
    assert all(path.stat().st_size <= size < 2 * path.stat().st_size for path in kept)
    last = load_tensors(order.kept(len(kept)))
    assert last.keys() == lean.state_tensors(state).keys()
    names = {n for n in last if n.startswith("weights.")}
    assert all(n.endswith((".a", ".b")) for n in names) == (asked is LORA)


@PLANS
def test_states_that_were_not_kept_are_made_again(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any]
) -> None:
    order = order_of(net, tmp_path / "a", asked)
    result = trained(order)
    places = range(1, len(result["states"]))
    found = open_states(order, result["states"], list(places), silent)
    assert [root for _, _, root in found] == result["states"][1:]


def audit(
    net: TinyNet, folder: Path, asked: dict[str, Any], result: dict[str, Any], segment: int = 0
) -> dict[str, Any]:
    """What an auditor of the same machine finds about a segment and the last state."""
    trainer = order_of(net, folder / "trainer", asked, states_mb=64)
    last = len(result["states"]) - 1
    places = sorted({segment, last} - {0})
    opened = tuple(OpenState(index=p, file=tensor_file(net.head_file)) for p in places)
    task = AuditTask(
        contribution=hexed("c"), assignment=hexed("a"), commitment=hexed("k"),
        segments=(segment,), states=opened,
    )  # fmt: skip
    lease = {**asked, "kind": "audit", "audit": task}
    order = order_of(net, folder / "auditor", lease, unit="cd" * 32)
    commitment = plain(net.unit(0, 0).commitment) | {
        "states": result["states"], "states_root": states_root(result["states"]),
        "update_root": result["update_root"], "residual": result["residual"],
    }  # fmt: skip
    job = {
        "commitment": commitment, "numerics": result["numerics"], "rules": None,
        "states": [[place, str(trainer.kept(place))] for place in places],
    }  # fmt: skip
    return replay_audit(order, job, silent)


@PLANS
def test_honest_training_passes_an_audit_with_equal_bits(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any]
) -> None:
    result = trained(order_of(net, tmp_path / "trainer", asked, states_mb=64))
    found = audit(net, tmp_path, asked, result)
    assert found["passed"] and found["segments"][0]["exact"]
    other = audit(net, tmp_path, asked, {**result, "update_root": hexed("else")})
    assert other["segments"][0]["passed"] and not other["passed"]


@pytest.mark.parametrize(
    ("asked", "attack"), [(LORA, "skip-steps"), (LORA, "reorder"), (FULL, "rate")]
)
def test_other_training_than_the_assigned_is_found(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any], attack: str
) -> None:
    said: list[dict[str, Any]] = []
    order = order_of(net, tmp_path / "trainer", asked, states_mb=64)
    train_unit(order, said.append, Asked(), kind=KINDS[attack])
    assert not audit(net, tmp_path, asked, said[-1])["passed"]


def test_extrapolated_factors_are_found(net: TinyNet, tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    order = order_of(net, tmp_path / "trainer", LORA, states_mb=64)
    train_unit(order, said.append, Asked(), kind=KINDS["extrapolate"])
    assert not audit(net, tmp_path, LORA, said[-1], segment=1)["passed"]


def test_opened_factors_that_no_update_can_carry_fail(net: TinyNet, tmp_path: Path) -> None:
    order = order_of(net, tmp_path / "trainer", LORA, states_mb=64)
    result = trained(order)
    last = len(result["states"]) - 1
    tensors = load_tensors(order.kept(last))
    name = next(n for n in tensors if n.endswith(".b") and n.startswith("weights."))
    tensors[name][0] = float("nan")
    save_tensors(tensors, order.kept(last))
    states = [*result["states"][:-1], tensor_root(raw_items(tensors))]
    assert not audit(net, tmp_path, LORA, {**result, "states": states})["passed"]


def test_a_torn_step_is_never_saved_and_the_unit_goes_on_from_the_last_whole_one(
    net: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(order_of(net, tmp_path / "whole", FULL))
    order = order_of(net, tmp_path / "a", FULL, save_every=0)
    trained(order, 4)
    before = (order.work / STATE).read_bytes()
    unit, seen = Unit(order), []
    assert isinstance(unit.state, lean.LeanState)
    update = type(unit.state.optimiser)._update

    def interrupted(optimiser: Any, parameter: str, gradient: torch.Tensor) -> None:
        seen.append(parameter)
        if len(seen) > 5:
            raise KeyboardInterrupt
        update(optimiser, parameter, gradient)

    with monkeypatch.context() as patch:
        patch.setattr(type(unit.state.optimiser), "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unit.step()
    with pytest.raises(ValueError, match="interrupted"):
        unit.save()
    assert (order.work / STATE).read_bytes() == before
    assert [path.name for path in order.work.iterdir()] == [STATE]
    assert trained(order)["update_root"] == whole["update_root"]


def test_a_save_of_another_plan_is_not_used(net: TinyNet, tmp_path: Path) -> None:
    trained(order_of(net, tmp_path / "a", LORA), 8)
    assert Unit(order_of(net, tmp_path / "a", LORA)).state.step == EVERY
    assert Unit(order_of(net, tmp_path / "a", FULL)).state.step == 0


def test_the_numeric_class_names_the_plan_and_not_the_swap(net: TinyNet, tmp_path: Path) -> None:
    bf16 = {"dtype": "bfloat16"}
    classes = {
        name: order_of(net, tmp_path / "a", {**bf16, "plan": name}).numerics()
        for name in ("float32", "adafactor", "adamw-host", "lora-16-nf4", "lora-32-nf4")
    }
    assert len(set(classes.values())) == len(classes)


def test_a_plan_that_there_is_not_is_refused_before_anything_is_read(
    net: TinyNet, tmp_path: Path
) -> None:
    for changes in ({"plan": "sgd"}, {"plan": "policy x, slice"}, {"plan": ""}):
        with pytest.raises(ParisError) as refused:
            Unit(order_of(net, tmp_path / "a", changes))
        assert refused.value.code == "structure.lineage"
    with pytest.raises(ParisError) as refused:
        Unit(order_of(net, tmp_path / "a", {"plan": "adamw"}, swap=1))
    assert refused.value.code == "structure.lineage"
    assert list((tmp_path / "a").iterdir()) == []
    assert UNIT


def test_what_runs_out_or_vanishes_has_its_own_name() -> None:
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 55)
    assert reason_of(short.value).code == "machine.too-small"
    assert reason_of(torch.OutOfMemoryError("CUDA out of memory. Tried…")).code == (
        "machine.too-small"
    )
    for text in ("CUDA error: unspecified launch failure\nmore", "No CUDA GPUs are available"):
        found = reason_of(RuntimeError(text))
        assert found.code == "gpu.unavailable" and "more" not in found.detail
    assert reason_of(RuntimeError("shapes differ")).code == "trainer.failed"
