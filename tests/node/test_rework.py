"""The trainer's other orders: states laid open whatever was kept, replays that tell the truth."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from node.test_trainer import UNIT, trained, value
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.replay import model_class
from paris_node.hostile_trainer import KINDS
from paris_node.rework import open_states, replay_audit
from paris_node.trainer import Asked, train_unit
from paris_node.training import TrainerProcess
from paris_node.unit import STATE, STATES, Order, Unit, file_size, root_of_tensors
from paris_protocol.errors import ParisError
from paris_protocol.lineage import committed_steps
from paris_protocol.records import AuditRules, AuditTask, OpenState, Tolerance
from paris_protocol.tensors import states_root
from tinynet import EVERY, STEPS, TinyNet, hexed, plain, tensor_file

PLACES = (1, 2, 3)
"""States after 5, 10 and 12 steps."""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("net"))


def silent(report: dict[str, Any]) -> None:
    pass


class Heard(list[dict[str, Any]]):
    """Keeps what is said."""

    def __call__(self, report: dict[str, Any]) -> None:
        self.append(report)


def files(order: Order) -> dict[int, Path]:
    return {int(path.stem): path for path in (order.work / STATES).glob("*.safetensors")}


def room_mb(net: TinyNet, work: Path, states: int) -> dict[str, int]:
    """A budget that holds so many states: whole megabytes less what `others` take."""
    size = file_size(Unit(Order.parse(value(net, work))).state)
    return {"states_mb": 64, "states_used": (64 << 20) - states * size - size // 2}


# ---------------------------------------------------------------- keeping and opening


@pytest.mark.parametrize(("room", "kept"), [(0, set()), (1, {3}), (2, {1, 3}), (3, {1, 2, 3})])
def test_any_state_can_be_laid_open_whatever_was_kept(
    net: TinyNet, tmp_path: Path, room: int, kept: set[int]
) -> None:
    order = Order.parse(value(net, tmp_path / "a", **room_mb(net, tmp_path / "x", room)))
    result = trained(order)
    assert set(files(order)) == kept
    size = file_size(Unit(order).state)
    assert sum(path.stat().st_size for path in files(order).values()) <= room * size
    found = open_states(order, result["states"], PLACES, silent)
    assert [place for place, _, _ in found] == list(PLACES)
    for place, path, root in found:
        tensors = load_tensors(Path(path))
        assert root == result["states"][place] == root_of_tensors(tensors)
        assert int(tensors["step"]) == committed_steps(STEPS, EVERY)[place]
    assert set(files(order)) == kept, "what was made again does not stay"


def test_what_takes_long_is_heard_of_at_every_step(
    net: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_node.rework.REPORT_EVERY", 0.0)
    order = Order.parse(value(net, tmp_path / "a"))
    result, said = trained(order), Heard()
    open_states(order, result["states"], (3,), said)
    assert [report["step"] for report in said] == [*range(1, STEPS + 1), STEPS]
    assert {report["event"] for report in said} == {"opening"}
    monkeypatch.setattr("paris_node.rework.REPORT_EVERY", 3600.0)
    open_states(order, result["states"], (3,), quiet := Heard())
    assert len(quiet) == 1


def test_a_kept_state_that_the_disk_damaged_is_made_again(net: TinyNet, tmp_path: Path) -> None:
    order = Order.parse(value(net, tmp_path / "a", states_mb=64))
    result = trained(order)
    for place, path in files(order).items():
        if place == 2:
            path.write_bytes(path.read_bytes()[:-10])
        if place == 1:
            tensors = load_tensors(path)
            save_tensors({**tensors, "step": tensors["step"] + 1}, path)
    found = open_states(order, result["states"], (2,), silent)
    assert root_of_tensors(load_tensors(Path(found[0][1]))) == result["states"][2]


def test_what_was_not_trained_here_or_does_not_exist_is_not_laid_open(
    net: TinyNet, tmp_path: Path
) -> None:
    order = Order.parse(value(net, tmp_path / "a"))
    roots = [hexed(str(place)) for place in range(4)]
    with pytest.raises(ParisError) as refused:
        open_states(order, roots, (1,), silent)
    assert refused.value.code == "audit.state"
    for wanted in ((4,), (-1,)):
        with pytest.raises(ParisError) as refused:
            open_states(order, roots, wanted, silent)
        assert refused.value.code == "audit.unknown"
    with pytest.raises(ParisError):
        open_states(order, roots[:3], (1,), silent)


def test_a_smaller_budget_after_a_restart_is_kept_too(net: TinyNet, tmp_path: Path) -> None:
    trained(Order.parse(value(net, tmp_path / "a", states_mb=64)), 11)
    order = Order.parse(value(net, tmp_path / "a", **room_mb(net, tmp_path / "x", 1)))
    assert trained(order)["update_root"] == net.unit(0, 0).commitment.update_root
    assert set(files(order)) == {3}


def test_training_makes_way_and_goes_on_where_it_was(net: TinyNet, tmp_path: Path) -> None:
    order = Order.parse(value(net, tmp_path / "a"))
    said: list[dict[str, Any]] = []
    ways = iter([False, False, True])
    assert not train_unit(order, said.append, Asked(way=lambda: next(ways)))
    assert said[-1] == {"event": "waiting", "step": 3} and (order.work / STATE).exists()
    assert train_unit(order, said.append, Asked(), "resumed")
    assert {"event": "resumed", "step": 3} in said
    assert said[-1]["update_root"] == net.unit(0, 0).commitment.update_root


def test_the_process_lays_open_in_the_middle_of_a_unit(net: TinyNet, tmp_path: Path) -> None:
    done = value(net, tmp_path / "a", states_mb=0)
    result = trained(Order.parse(done))
    slow = value(
        net, tmp_path / "b", unit="cd" * 32, assignment={"steps": 120, "commit_every": 120}
    )

    async def play() -> tuple[list[Any], list[str], dict[str, Any]]:
        process, heard = TrainerProcess(tmp_path / "trainer.log"), []
        rests: list[bool] = []
        begun = asyncio.Event()

        def hear(report: dict[str, Any]) -> None:
            heard.append(report["event"])
            rests.append(report["event"] == "progress" and "loss" not in report)
            begun.set()

        task = asyncio.create_task(process.train(slow, hear))
        await asyncio.wait_for(begun.wait(), 60)
        opened = await process.open({**done, "roots": result["states"], "states": [1, 3]})
        with pytest.raises(ParisError) as refused:
            await process.open({**done, "roots": result["states"], "states": [9]})
        assert refused.value.code == "audit.unknown"
        whole = await task
        await process.close()
        assert any(rests), "a unit that makes way seems silent, and is begun again"
        return opened, heard, whole

    opened, heard, whole = asyncio.run(play())
    assert [(place, root) for place, _, root in opened] == [
        (place, result["states"][place]) for place in (1, 3)
    ]
    assert all(path.exists() for _, path, _ in opened)
    assert heard.count("waiting") == heard.count("resumed") >= 1
    alone = value(
        net, tmp_path / "c", unit="cd" * 32, assignment={"steps": 120, "commit_every": 120}
    )
    assert whole["update_root"] == trained(Order.parse(alone))["update_root"]


# ---------------------------------------------------------------- replaying others


def audit(
    net: TinyNet, folder: Path, result: dict[str, Any], segments: tuple[int, ...], **job: Any
) -> dict[str, Any]:
    """What an auditor finds about a result; all states are laid open unless `states` says other."""
    trainer = Order.parse(value(net, folder / "trainer", states_mb=64))
    paths = job.pop("states", None) or {place: str(trainer.kept(place)) for place in PLACES}
    opened = tuple(OpenState(index=place, file=tensor_file(net.head_file)) for place in paths)
    task = AuditTask(
        contribution=hexed("c"),
        assignment=hexed("a"),
        commitment=hexed("k"),
        segments=segments,
        states=opened,
    )
    lease = {"kind": "audit", "audit": task}
    order = Order.parse(value(net, folder / "auditor", unit="cd" * 32, assignment=lease))
    commitment = {
        **plain(net.unit(0, 0).commitment),
        "states": result["states"],
        "states_root": states_root(result["states"]),
        "update_root": result["update_root"],
    }
    states = [[place, path] for place, path in paths.items()]
    facts = {"commitment": commitment, "states": states, "rules": None}
    say = job.pop("say", silent)
    return replay_audit(order, {**facts, "numerics": result["numerics"], **job}, say)


def test_an_audit_that_takes_long_is_heard_of(
    net: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_node.rework.REPORT_EVERY", 0.0)
    said = Heard()
    assert audit(net, tmp_path, trained(trainer_of(net, tmp_path)), (0, 1), say=said)["passed"]
    assert len(said) == 1 + 2 * (EVERY + 1), "the beginning, each step and each segment"


def trainer_of(net: TinyNet, folder: Path) -> Order:
    return Order.parse(value(net, folder / "trainer", states_mb=64))


def rules(order: Order, rho: str = "0.05", **changes: Any) -> dict[str, Any]:
    tolerance = Tolerance(
        dtype="float32",
        model=model_class(order.expert, order.recipe),
        steps=EVERY,
        rho=rho,
        tensor="0.5",
        factor="5",
        pairs=3,
        source="test",
    )
    record = AuditRules(
        chain=hexed("chain"),
        chain_length=8,
        segments=1,
        rate="10",
        floor="0.05",
        probation=3,
        probation_weight="0.25",
        vesting=3,
        answer_within=60,
        retry_within=60,
        auditors=3,
        canary="0",
        tolerances=(tolerance.model_copy(update=changes),),
    )
    return plain(record)


def test_honest_training_passes_with_equal_bits(net: TinyNet, tmp_path: Path) -> None:
    result = trained(trainer_of(net, tmp_path))
    found = audit(net, tmp_path, result, (0, 1, 2))
    assert found["passed"] and found["numerics"] == result["numerics"]
    assert [one["index"] for one in found["segments"]] == [0, 1, 2]
    assert all(one["exact"] and one["passed"] and one["rho"] == 0 for one in found["segments"])


@pytest.mark.parametrize("attack", sorted(KINDS))
@pytest.mark.parametrize("exact", [True, False])
def test_other_training_than_the_assigned_is_found(
    net: TinyNet, tmp_path: Path, attack: str, exact: bool
) -> None:
    order = trainer_of(net, tmp_path)
    said: list[dict[str, Any]] = []
    train_unit(order, said.append, Asked(), kind=KINDS[attack])
    result = said[-1]
    honest = net.unit(0, 0)
    assert result["update_root"] != honest.commitment.update_root
    assert (result["steps"], result["samples"]) == (STEPS, honest.contribution.samples)
    claimed = result["numerics"] if exact else hexed("another machine")
    segment = 1 if attack == "extrapolate" else 0  # what it trained, it trained well
    found = audit(net, tmp_path, result, (segment,), numerics=claimed, rules=rules(order))
    [one] = found["segments"]
    assert not found["passed"] and one["exact"] is exact and one["rho"] > 2 * one["limit"]


def test_another_machine_passes_within_a_tolerance_and_without_one_nothing_is_said(
    net: TinyNet, tmp_path: Path
) -> None:
    order = trainer_of(net, tmp_path)
    result = trained(order)
    other = {"numerics": hexed("another machine")}
    found = audit(net, tmp_path, result, (1,), **other, rules=rules(order))
    [one] = found["segments"]
    assert found["passed"] and (one["exact"], one["limit"]) == (False, 0.05)
    silent_ones = [
        audit(net, tmp_path, result, (1,), **other),
        audit(net, tmp_path, result, (1,), **other, rules=rules(order, model="another")),
        audit(net, tmp_path, result, (1,), **other, rules=rules(order, steps=EVERY - 1)),
        audit(net, tmp_path, result, (1,), **other, rules=rules(order), states={
            1: str(order.kept(1))}),
    ]  # fmt: skip
    assert all(one["segments"] == [] and one["passed"] for one in silent_ones)


def test_opened_bytes_that_were_not_committed_fail(net: TinyNet, tmp_path: Path) -> None:
    order = trainer_of(net, tmp_path)
    result = trained(order)
    tensors = load_tensors(order.kept(1))
    bad = tmp_path / "bad.safetensors"
    name = next(name for name in tensors if name.startswith("weights."))
    for forged in (
        {**tensors, name: tensors[name] + 1e-3},
        {**tensors, name: tensors[name].double()},
        {**tensors, "more": torch.zeros(3)},
    ):
        save_tensors(forged, bad)
        found = audit(net, tmp_path, result, (1,), states={1: str(bad)})
        assert found["segments"] == [] and not found["passed"]
    bad.write_bytes(b"\x80\x04 a pickle")
    assert not audit(net, tmp_path, result, (1,), states={1: str(bad)})["passed"]


def test_honest_states_beside_another_update_are_found(net: TinyNet, tmp_path: Path) -> None:
    result = trained(trainer_of(net, tmp_path))
    found = audit(net, tmp_path, {**result, "update_root": hexed("else")}, (0,))
    assert found["segments"][0]["passed"] and not found["passed"]
    assert UNIT != "cd" * 32
