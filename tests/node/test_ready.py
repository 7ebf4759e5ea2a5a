"""Before a node asks: the best plan that fits, a tier down when memory goes, right numbers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from node.test_app import living, until
from nodeworld import NOW, Office, ScriptedTrainer, make_kit, make_policy
from paris_models.config import LADDER
from paris_models.plans import PLANS
from paris_node import ready as ready_module
from paris_node.fit import HOME, codecs_of, facts_of
from paris_node.jobs import Jobs
from paris_node.kit import Kit
from paris_node.machine import Device, FakeMachine, look
from paris_node.planning import LEFT_OUT, chosen, fell, left_out, offers_for, swap_for
from paris_node.ready import PROVED, Ready, cases_of, fingerprint, plan_told
from paris_node.upkeep import device_of, order_of
from paris_node.view import describe, lines
from paris_node.volunteer import Phase
from paris_protocol.errors import ParisError
from paris_protocol.records import ExpertSpec, Genesis, PlanRules, Policy


def rules(plan: str, codec: str) -> PlanRules:
    return PlanRules(plan=plan, dtype="bfloat16", update_codec=codec, rate="1")


OFFERED = (
    rules("adafactor", "topk-64"), rules("lora-16-bf16", "lora-int8"),
    rules("lora-16-nf4", "lora-int8"),
)  # fmt: skip
GIB = 1024


@pytest.fixture
def office() -> Office:
    return Office(units=2)


def offering(office: Office, **changes: Any) -> Policy:
    policy = make_policy(office.network, plans=OFFERED, **changes)
    office.control.policies.append(policy.raw)
    return policy.record


def large(genesis: Genesis, size: str = "950M") -> Genesis:
    """The same network with an expert that does not fit everywhere."""
    spec = {k: v for k, v in asdict(LADDER[size]).items() if k in ExpertSpec.model_fields}
    return genesis.model_copy(update={"expert": ExpertSpec(**spec)})


def machine(gib: float, **more: Any) -> FakeMachine:
    mb = int(gib * GIB)
    return FakeMachine(memory=[mb], **more)


def offers(office: Office, gib: float, forced: str = "auto", size: str = "950M") -> Any:
    facts = facts_of(
        "cpu", "CPU", free_mb=int(gib * GIB), ram_mb=int(gib * GIB), disk_mb=900_000, cores=8,
        links=HOME,
    )  # fmt: skip
    policy = make_policy(office.network, plans=OFFERED).record
    return offers_for(large(office.genesis.record, size), policy, facts, forced)


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("gib", "first"), [(60, "float32"), (4, "adafactor"), (2.0, "lora-16-nf4")]
)
def test_the_best_that_fits_and_only_what_the_network_takes(
    office: Office, gib: float, first: str
) -> None:
    names = [one.plan.name for one in chosen(offers(office, gib))]
    assert names[0] == first
    assert names == [name for name in PLANS if name in names], "best first"
    assert set(names) <= {"float32", *(one.plan for one in OFFERED)}


def test_what_fits_nothing_is_told_with_its_bytes(office: Office) -> None:
    with pytest.raises(ParisError) as refused:
        chosen(offers(office, 0.5))
    assert refused.value.code == "machine.too-small"
    least = min(offers(office, 0.5), key=lambda one: one.device)
    assert f"{least.device:,} bytes" in refused.value.detail


def test_a_plan_named_by_the_owner_is_taken_alone_or_refused(office: Office) -> None:
    [only] = chosen(offers(office, 60, "lora-16-nf4"), "lora-16-nf4")
    assert only.plan.name == "lora-16-nf4"
    with pytest.raises(ParisError) as refused:
        chosen(offers(office, 2, "adafactor"), "adafactor")
    assert refused.value.code == "machine.too-small"
    assert refused.value.detail.startswith("adafactor (") and "bytes" in refused.value.detail
    with pytest.raises(ParisError) as refused:
        offers(office, 60, "lora-64-fp8")
    assert refused.value.code == "machine.plan" and "lora-64-fp8" in refused.value.detail
    # Memory that ran out once takes nothing from an owner who insists.
    assert chosen(offers(office, 60, "adafactor"), "adafactor", {"adafactor"})


def test_a_plan_under_which_memory_ran_out_rests_for_a_day(office: Office) -> None:
    names = [one.plan.name for one in chosen(offers(office, 60), "auto", {"float32"})]
    assert names[0] == "adafactor" and "float32" not in names
    assert left_out({"float32": NOW}, NOW + LEFT_OUT - 1) == {"float32"}
    assert left_out({"float32": NOW}, NOW + LEFT_OUT) == set()
    with pytest.raises(ParisError, match="memory ran out"):
        chosen(offers(office, 60), "auto", {one.plan.name for one in offers(office, 60)})
    assert fell("float32", "adafactor") and not fell("adafactor", "float32")
    assert not fell(None, "adafactor")


def test_uploads_are_counted_by_each_plan_s_codec(office: Office) -> None:
    sizes = {one.plan.name: one.need.upload for one in offers(office, 60)}
    p = LADDER["950M"].parameters
    assert sizes["float32"] == 4 * p
    assert p * 10 / 8 / 64 <= sizes["adafactor"] < 1.01 * p * 10 / 8 / 64
    assert codecs_of(make_policy(office.network, plans=OFFERED).record)["float32"] == "dense-f32"


def test_on_a_gpu_as_few_blocks_wait_in_host_memory_as_will_do(office: Office) -> None:
    genesis = large(office.genesis.record)
    found = []
    for mb in (30_000, 2_800):
        facts = facts_of(
            "cuda", "NVIDIA H200", free_mb=mb, ram_mb=64_000, disk_mb=900_000, cores=8, links=HOME
        )
        found.append(swap_for(PLANS["adafactor"], genesis, 10, facts))
    assert found[0] == 0 < found[1]


# ---------------------------------------------------------------- the node asks


def kit_of(tmp_path: Path, office: Office, host: FakeMachine, **changes: Any) -> Kit:
    kit = make_kit(tmp_path / "a", office, machine=host)
    kit.settings = replace(kit.settings, **changes)
    return kit


def test_a_network_with_one_way_to_train_is_asked_as_ever(tmp_path: Path, office: Office) -> None:
    kit = kit_of(tmp_path, office, machine(8))
    asyncio.run(Jobs(kit).ask())
    assert office.leases[-1].plans == () and plan_told(kit.journal) == {}
    kit.journal.close()


def test_the_plans_that_fit_are_told_best_first(tmp_path: Path, office: Office) -> None:
    offering(office)
    kit = kit_of(tmp_path, office, machine(8))
    asyncio.run(Jobs(kit).ask())
    assert office.leases[-1].plans == ("float32", "adafactor", "lora-16-bf16", "lora-16-nf4")
    assert plan_told(kit.journal) == {"name": "float32", "instead_of": None, "why": ""}
    kit.journal.close()


@pytest.mark.parametrize(
    ("plan", "code"), [("lora-64-fp8", "machine.plan"), ("adafactor", "machine.too-small")]
)
def test_a_named_plan_that_cannot_be_leases_nothing(
    tmp_path: Path, office: Office, plan: str, code: str
) -> None:
    offering(office)
    kit = kit_of(tmp_path, office, machine(0.25), plan=plan)
    with pytest.raises(ParisError) as refused:
        asyncio.run(Jobs(kit).ask())
    assert refused.value.code == code and office.leases == [] and office.granted == []
    kit.journal.close()


def test_memory_that_goes_away_costs_one_tier_at_the_next_unit_and_is_said(
    tmp_path: Path, office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    policy = offering(office)
    host = machine(60)
    kit = kit_of(tmp_path, office, host)
    kit.genesis = large(kit.genesis)
    ready = Ready(kit)
    with caplog.at_level("INFO", "test"):
        assert asyncio.run(ready.plans(policy))[0] == "float32"
        host.memory[:] = [4 * GIB]
        assert asyncio.run(ready.plans(policy))[0] == "adafactor"
    assert [one.message for one in caplog.records] == ["plan.chosen", "plan.fallback"]
    told = describe(kit.journal, kit.folder, why="node.working", running=True)
    assert (told["plan"]["name"], told["plan"]["instead_of"]) == ("adafactor", "float32")
    assert "GiB of memory" in told["plan"]["why"]
    assert any("adafactor instead of float32" in line for line in lines(told))
    host.memory[:] = [60 * GIB]
    assert asyncio.run(ready.plans(policy))[0] == "float32"
    assert plan_told(kit.journal)["instead_of"] is None
    kit.journal.close()


def test_running_out_of_memory_in_mid_unit_leaves_it_and_asks_for_the_next_plan(
    tmp_path: Path, office: Office
) -> None:
    offering(office)

    class Short(ScriptedTrainer):
        async def train(self, order: Any, hear: Callable[[dict[str, Any]], None]) -> Any:
            if order["unit"] == office.granted[0].id:
                hear({"event": "started", "step": 0})
                office.accepted.append(order["unit"])  # the coordinator gives it to another node
                raise ParisError("machine.too-small", "tried to allocate 2.00 GiB")
            return await super().train(order, hear)

    async def play() -> None:
        kit = make_kit(tmp_path / "a", office, Short(), machine=machine(8))
        async with living(kit) as agent:
            await until(lambda: len(office.accepted) == 2, "the second unit")
            assert agent.volunteer.why in ("node.working", "network.finished", "work.none")
            assert plan_told(kit.journal) == {
                "name": "adafactor", "instead_of": "float32", "why": "memory ran out",
            }  # fmt: skip
            assert not (kit.folder / "work" / office.granted[0].id).exists()

    asyncio.run(play())
    assert [one.plans[0] for one in office.leases[:2]] == ["float32", "adafactor"]


# ---------------------------------------------------------------- a GPU that goes


def test_a_gpu_that_vanishes_keeps_the_unit_until_it_is_back(
    tmp_path: Path, office: Office
) -> None:
    gpu = Device("cuda", "NVIDIA H200", 30_000, "590.1")
    host = machine(60, gpu=gpu)

    class Card(ScriptedTrainer):
        closed = 0

        async def train(self, order: Any, hear: Callable[[dict[str, Any]], None]) -> Any:
            assert order["device"] == "cuda", "it went on elsewhere"
            return await super().train(order, hear)

        async def close(self) -> None:
            self.closed += 1
            await super().close()

    trainer = Card()

    def gone(step: int) -> bool:
        if step == 7 and host.gpu is not None and len(trainer.trained) < 8:
            host.gpu = None
            trainer.pid = None
            raise ParisError("gpu.unavailable", "CUDA error: the device is lost")
        return False

    async def play() -> None:
        trainer.crash = gone
        kit = make_kit(tmp_path / "a", Office(units=1), trainer, machine=host)
        async with living(kit) as agent:
            await until(lambda: agent.volunteer.why == "gpu.unavailable", "the refusal")
            unit = agent.volunteer.unit
            closed = trainer.closed
            assert closed, "the process that lost its GPU is kept"
            # Longer than a trainer that fails by itself would be borne with.
            await until(lambda: agent.volunteer.failures > 8, "more failures")
            assert (agent.volunteer.unit, agent.volunteer.phase) == (unit, Phase.TRAINING)
            status = describe(kit.journal, kit.folder, why="gpu.unavailable", running=True)
            assert status["code"] == 30
            host.gpu = gpu
            await until(lambda: len(trainer.trained) >= 12, "the rest of the unit")
            assert agent.volunteer.unit in (unit, None)

    asyncio.run(play())
    steps = [step for _, step in trainer.trained]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10], "not resumed at its last save"


def test_a_unit_of_the_cpu_or_of_an_earlier_lease_waits_for_no_gpu(
    tmp_path: Path, office: Office
) -> None:
    kit = kit_of(tmp_path, office, machine(8))
    unit = asyncio.run(Jobs(kit).ask())
    assert device_of(kit, unit) == "auto" == device_of(kit, "another")
    order = asyncio.run(order_of(kit, unit))
    assert (order["device"], order["swap"]) == ("auto", 0)
    kit.journal.close()


# ---------------------------------------------------------------- right numbers


def test_numbers_are_proved_once_and_again_when_something_changed(
    tmp_path: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    offering(office)
    host, trainer = (
        machine(60, gpu=Device("cuda", "NVIDIA H200", 99_000, "590.1")),
        ScriptedTrainer(),
    )
    kit = make_kit(tmp_path / "a", office, trainer, machine=host)
    policy = asyncio.run(kit.control.policy()).record

    def prove(*plans: str) -> None:
        asyncio.run(Ready(kit).prove(policy, plans))

    prove("float32")
    prove("float32")
    assert trainer.tested == [("cuda", ("float32",))]
    prove("float32", "lora-16-nf4", "lora-16-bf16")
    assert trainer.tested[1:] == [("cuda", ("lora-16-nf4", "lora-16-bf16"))], "only what is new"
    host.gpu = Device("cuda", "NVIDIA H200", 99_000, "595.0")
    prove("float32")
    host.gpu = Device("cuda", "NVIDIA L4", 20_000, "595.0")
    prove("float32")
    monkeypatch.setattr(ready_module.importlib.metadata, "version", lambda _: "99.0")
    prove("float32")
    prove("float32")
    assert len(trainer.tested) == 5, "a change of driver, device or torch went unnoticed"
    known = json.loads(kit.journal.fact(PROVED) or "")
    assert known == {"of": "torch 99.0, NVIDIA L4, driver 595.0", "cases": ["float32"]}
    kit.journal.close()


def test_a_machine_with_wrong_numbers_is_told_before_it_leases_anything(
    tmp_path: Path, office: Office
) -> None:
    offering(office)
    trainer = ScriptedTrainer()
    trainer.wrong = {"lora-16-nf4"}

    async def play() -> None:
        kit = make_kit(tmp_path / "a", office, trainer, machine=machine(8))
        async with living(kit) as agent:
            await until(lambda: agent.volunteer.why == "machine.numerics", "the refusal")
            await until(lambda: agent.volunteer.failures > 2, "further tries")
            assert office.leases == [] and office.granted == []
            assert kit.journal.fact(PROVED) is None
            assert len(trainer.tested) == 1, "it is not tested over and over"
            status = describe(kit.journal, kit.folder, why="machine.numerics", running=True)
            assert status["code"] == 20

    asyncio.run(play())


def test_which_cases_a_node_has_to_pass() -> None:
    assert cases_of("float32", ()) == ["float32"]
    assert cases_of("bfloat16", ()) == ["float32", "bfloat16"]
    assert cases_of("float32", ("adamw", "lora-64-fp8", "lora-16-fp8")) == [
        "float32", "adamw", "lora-16-fp8",
    ]  # fmt: skip
    assert "driver none" in fingerprint(Device("cpu", "CPU", 1))


def test_a_look_at_the_machine_takes_what_is_free(tmp_path: Path) -> None:
    device, facts = look(machine(3, gpu=None), "auto", tmp_path)
    assert device.kind == facts.kind == "cpu" and facts.device == 3 << 30
