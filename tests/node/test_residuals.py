"""What a sparse update left out: kept, begun with, laid open, and found where it is another."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from node.test_trainer import trained, value
from nodeworld import NODE, Office, ScriptedTrainer, digest, make_kit
from paris_models import lean
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codecs import decode
from paris_models.expert import parameter_shapes
from paris_models.plans import PLANS
from paris_node import residuals
from paris_node.jobs import Jobs
from paris_node.journal import Receipt
from paris_node.leases import check_lease
from paris_node.rework import open_states, replay_audit
from paris_node.unit import RESIDUAL, Order, Unit, root_of, root_of_tensors
from paris_node.upkeep import let_go, order_of
from paris_node.volunteer import Phase
from paris_protocol.envelope import unseal
from paris_protocol.errors import ParisError
from paris_protocol.records import AuditTask, Commitment, OpenState
from paris_protocol.tensors import states_root
from tinynet import STEPS, TinyNet, hexed, plain, tensor_file

SPARSE = {"plan": "float32", "update_codec": "topk-64"}
HALF = {
    "plan": "adamw", "dtype": "bfloat16", "update_codec": "topk-64", "commit_every": STEPS,
}  # fmt: skip
BOTH = pytest.mark.parametrize("asked", [SPARSE, HALF], ids=["float32", "adamw"])


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("net"))


def silent(report: dict[str, Any]) -> None:
    pass


def second(net: TinyNet, folder: Path, asked: dict[str, Any]) -> tuple[Order, dict[str, Any]]:
    """A unit that begins with what another one left out."""
    order = Order.parse(value(net, folder / "first", assignment=dict(asked)))
    root = trained(order)["residual"]
    rest = order.work / RESIDUAL
    lease = {**asked, "residual": root, "seed": hexed("second")}
    return Order.parse(
        value(net, folder / "second", assignment=lease, residual=str(rest), states_mb=64)
    ), lease


@BOTH
def test_what_an_update_leaves_out_is_all_that_it_does_not_say(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any]
) -> None:
    order = Order.parse(value(net, tmp_path / "a", assignment=dict(asked), states_mb=64))
    result = trained(order)
    rest = load_tensors(order.work / RESIDUAL)
    assert root_of_tensors(rest) == result["residual"]
    wire = load_tensors(Path(result["update"]))
    sent = decode(wire, "topk-64", parameter_shapes(net.config))
    last = load_tensors(order.kept(len(result["states"]) - 1))
    whole = lean.update_of(order.plan, load_tensors(net.head_file), last, "dense-f32")
    assert all(torch.allclose(sent[n] + rest[n], whole[n], atol=1e-7, rtol=0) for n in whole)
    for codec in ("dense-f32", "int8"):
        other = Order.parse(
            value(net, tmp_path / codec, assignment={**asked, "update_codec": codec})
        )
        assert trained(other)["residual"] is None and not (other.work / RESIDUAL).exists()


@BOTH
def test_the_next_unit_begins_with_it_and_its_update_holds_it(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any]
) -> None:
    order, _ = second(net, tmp_path, asked)
    parent, rest = load_tensors(net.head_file), order.rest
    assert rest is not None
    start = {name: parent[name] + rest[name] for name in parent}
    fresh = lean.new_state(
        PLANS[asked["plan"]], net.config, net.recipe, start, key=order.config.key
    )
    assert Unit(order).roots == [root_of(fresh)]
    still = lean.update_of(order.plan, parent, lean.state_tensors(fresh), "dense-f32", rest)
    assert all(torch.allclose(still[n], rest[n], atol=2e-8, rtol=1e-2) for n in rest), (
        "a unit that changes nothing hands in the residual"
    )
    again = Order.parse({**value(net, tmp_path / "again"), "assignment": plain(order.assignment),
                         "residual": str(order.residual), "save_every": 0})  # fmt: skip
    whole = trained(order)
    trained(again, 7)
    assert trained(again)["update_root"] == whole["update_root"]
    assert whole["residual"] not in (None, order.assignment.residual)


def audit(
    net: TinyNet, folder: Path, lease: dict[str, Any], order: Order, result: dict[str, Any],
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """What an auditor finds about the last segment, with the residual laid open."""
    last = len(result["states"]) - 1
    places = sorted({max(last - 1, 1), last, last + 1})
    found = open_states(order, result["states"], places, silent)
    paths = {place: path for place, path, _ in found} | changes.pop("paths", {})
    opened = tuple(OpenState(index=p, file=tensor_file(net.head_file)) for p in paths)
    task = AuditTask(
        contribution=hexed("c"), assignment=hexed("a"), commitment=hexed("k"),
        segments=(last - 1,), states=opened,
    )  # fmt: skip
    asked = {**lease, "kind": "audit", "audit": task}
    auditor = Order.parse(value(net, folder / "auditor", unit="cd" * 32, assignment=asked))
    commitment = plain(net.unit(0, 0).commitment) | {
        "states": result["states"], "states_root": states_root(result["states"]),
        "update_root": result["update_root"], "residual": result["residual"],
    }  # fmt: skip
    states = [[place, path] for place, path in paths.items() if path]
    job = {"commitment": commitment, "numerics": result["numerics"], "rules": None}
    return replay_audit(auditor, {**job, "states": states}, silent)


@BOTH
def test_an_audit_begins_with_it_too_and_finds_another(
    net: TinyNet, tmp_path: Path, asked: dict[str, Any]
) -> None:
    order, lease = second(net, tmp_path, asked)
    result = trained(order)
    last = len(result["states"])
    fair = audit(net, tmp_path, lease, order, result)
    assert fair["passed"] and fair["segments"][0]["exact"]
    lost = {**result, "residual": hexed("another")}
    assert not audit(net, tmp_path, lease, order, lost)["passed"]
    none = {**result, "residual": None}
    assert not audit(net, tmp_path, lease, order, none)["passed"]
    bad = tmp_path / "bad.safetensors"
    save_tensors({n: 2 * t for n, t in (order.rest or {}).items()}, bad)
    found = audit(net, tmp_path, lease, order, result, paths={last: str(bad)})
    assert not found["passed"] and found["segments"] == []
    silent_one = audit(net, tmp_path, lease, order, result, paths={last: ""})
    assert silent_one["passed"] and silent_one["segments"] == [], "a guess, not a report"
    jumped = [hexed("a head of its own"), *result["states"][1:]]
    found = audit(net, tmp_path, lease, order, {**result, "states": jumped})
    assert not found["passed"], "it began elsewhere than at parent + residual"


def test_a_unit_without_the_assigned_residual_is_not_trained(net: TinyNet, tmp_path: Path) -> None:
    order, lease = second(net, tmp_path, SPARSE)
    bad = tmp_path / "bad.safetensors"
    save_tensors({n: t + 1 for n, t in (order.rest or {}).items()}, bad)
    for path in (None, str(bad)):
        with pytest.raises(ParisError) as refused:
            Unit(Order.parse(value(net, tmp_path / "x", assignment=lease, residual=path)))
        assert refused.value.code == "audit.state"
    with pytest.raises(ParisError) as refused:  # a unit that began with the parent has none
        first = Order.parse(value(net, tmp_path / "first", assignment=SPARSE))
        open_states(first, trained(first)["states"], (4,), silent)
    assert refused.value.code == "audit.unknown"
    with pytest.raises(ValueError, match="not one of this expert"):
        lean.start_of({"a": torch.ones(2)}, {"a": torch.ones(3)})


# ---------------------------------------------------------------- the node keeps it


class Leaving(ScriptedTrainer):
    """Leaves a residual beside each update."""

    async def train(self, order: Any, hear: Any) -> dict[str, Any]:
        facts = await super().train(order, hear)
        rest = Path(order["work"]) / "residual.safetensors"
        rest.write_bytes(f"left by {order['unit']}".encode())
        self.began = order["residual"]
        return {**facts, "residual": digest(f"rest {order['unit']}")}


def test_it_is_committed_to_told_with_the_next_lease_and_found_again(tmp_path: Path) -> None:
    office, trainer = Office(units=2), Leaving()
    kit = make_kit(tmp_path / "a", office, trainer)
    jobs = Jobs(kit)

    async def one() -> str:
        unit = await jobs.ask()
        for phase in (Phase.FETCHING, Phase.TRAINING, Phase.COMMIT, Phase.OUTBOX, Phase.ACK):
            await jobs.run(phase, unit, lambda _: None)
        return unit

    first = asyncio.run(one())
    root = digest(f"rest {first}")
    [letter] = [one for one in kit.journal.letters(first) if one.kind == "commitment"]
    record = unseal(letter.envelope, Commitment, kit.network, None).record
    assert record.residual == root and residuals.held(kit.folder) == [root]
    office.granted.append(office.assignment(2, NODE.id, residual=root))
    office.accepted.remove(first)
    office.accepted.append(first)
    second = asyncio.run(one())
    assert root in office.leases[-1].cached
    assert trainer.began is not None and Path(trainer.began).read_bytes().endswith(first.encode())
    assert residuals.held(kit.folder) == [root, digest(f"rest {second}")]
    check_lease(office.granted[-1].record, NODE.id, kit.genesis)

    def judge(unit: str, accepted: bool) -> None:
        [own] = [one for one in kit.journal.letters(unit) if one.kind == "contribution"]
        kit.journal.keep_receipt(Receipt(own.id, 1.0, "judged", {"accepted": accepted}))

    judge(first, True)
    asyncio.run(let_go(kit, but=None))
    assert len(residuals.held(kit.folder)) == 2, "the second one is not judged yet"
    judge(second, False)
    asyncio.run(let_go(kit, but=None))
    assert residuals.held(kit.folder) == [root], "the refused one's is of no use"
    assert asyncio.run(order_of(kit, second))["residual"] == trainer.began
    kit.journal.close()


def test_of_the_accepted_ones_the_newest_of_each_expert_stays(tmp_path: Path) -> None:
    verdicts: dict[str, bool | None] = {"a": True, "b": True, "c": None, "d": False, "e": True}
    for number, (unit, expert) in enumerate(zip("abcde", (0, 0, 0, 0, 1), strict=True)):
        path = tmp_path / unit
        path.write_text(unit)
        residuals.keep(tmp_path, expert=expert, unit=unit, root=hexed(unit), path=path)
        residuals.keep(tmp_path, expert=expert, unit=unit, root=hexed(unit), path=path)
        kept = residuals.path_of(tmp_path, hexed(unit))
        assert kept is not None
        os.utime(kept, (number, number))
    residuals.prune(tmp_path, lambda unit: verdicts[unit])
    assert [one.unit for one in residuals.kept(tmp_path)] == ["b", "c", "e"]
    assert residuals.path_of(tmp_path, hexed("a")) is None is residuals.path_of(tmp_path, None)
