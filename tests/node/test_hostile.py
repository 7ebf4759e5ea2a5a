"""The hostile double: each lie is what its name says, and as consistent as a liar can be."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from node.test_audits import audit
from nodeworld import NODE, Office, digest, key, make_kit
from paris_models.checkpoint import load_tensors, raw_items, save_tensors
from paris_models.codecs import Codec, decode, encode
from paris_models.config import ExpertConfig
from paris_models.expert import parameter_shapes
from paris_node.hostile import ATTACKS, DISGUISE, FORGED, LIE, REFUSE, Hostile, _attacks, forge
from paris_node.hostile_trainer import noted
from paris_node.volunteer import Phase
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.records import Contribution, TensorFile
from paris_protocol.tensors import tensor_root

UNIT = "5e" * 32


def vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


SHAPES = {"a": (40, 30), "b": (50,)}


def handed_in(
    folder: Path, codec: Codec, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(3)
    tensors = encode(codec, {n: torch.randn(s, generator=random) for n, s in shapes.items()})
    save_tensors(tensors, folder / "update.safetensors")
    root = tensor_root(raw_items(tensors))
    return {"update": str(folder / "update.safetensors"), "update_root": root, "states": ["x"]}


@pytest.mark.parametrize("codec", ["dense-f32", "dense-bf16", "int8"])
@pytest.mark.parametrize("attack", FORGED)
def test_a_forgery_is_what_its_name_says(tmp_path: Path, attack: str, codec: Codec) -> None:
    honest = handed_in(tmp_path, codec)
    sent = load_tensors(Path(honest["update"]))
    before = decode(sent, codec, SHAPES)
    victim = tmp_path / "victim.safetensors"
    stolen = {name: torch.flip(tensor, [0]) for name, tensor in before.items()}
    save_tensors(stolen, victim)
    chosen = victim if attack == "copy" else None
    result = forge(attack, honest, tmp_path, chosen, codec, SHAPES)
    forged = load_tensors(Path(result["update"]))
    assert {n: (t.dtype, t.shape) for n, t in forged.items()} == {
        n: (t.dtype, t.shape) for n, t in sent.items()
    }
    signed = result["update_root"] == tensor_root(raw_items(forged))
    assert signed == (attack != "tamper"), "only the tamperer signs something else"
    assert result["states"] == honest["states"]
    assert forge(attack, honest, tmp_path, chosen, codec, SHAPES) == result
    if attack == "tamper":
        assert sum(int((forged[n] != sent[n]).sum()) for n in sent) == 1
        return
    after = decode(forged, codec, SHAPES)
    x, y = vector(before), vector(after)
    cosine = float(torch.dot(x, y) / x.norm() / y.norm())
    if attack == "sign-flip":
        assert torch.equal(y, -x)
    elif attack == "inflate":
        assert torch.allclose(y, 10 * x, rtol=0.02, atol=1e-6)
    elif attack == "noise":
        assert abs(cosine) < 0.2
        assert all(
            float(after[n].norm()) == pytest.approx(float(before[n].norm()), rel=0.02)
            for n in before
        )
    else:
        z = vector(stolen)
        assert 0 < float((y - z).norm() / z.norm()) < 0.02 > DISGUISE


def test_one_attack_a_unit_in_order_and_written_down(tmp_path: Path) -> None:
    office = Office(units=4)
    expert = ExpertConfig.from_record(office.genesis.record.expert)
    honest = handed_in(tmp_path, "dense-f32", parameter_shapes(expert))
    kit = make_kit(tmp_path / "h", office)
    jobs = Hostile(kit, ("sign-flip", "noise"))
    real = Path(honest["update"]).read_bytes()
    train = kit.trainer.train

    async def with_tensors(order: Any, hear: Any) -> dict[str, Any]:
        result = await train(order, hear)
        Path(result["update"]).write_bytes(real)
        return result

    kit.trainer.train = with_tensors  # type: ignore[method-assign]

    async def play() -> None:
        for _ in range(3):
            unit = await jobs.ask()
            for phase in list(Phase)[2:]:
                await jobs.run(phase, unit, lambda step: None)
                await jobs.run(phase, unit, lambda step: None) if phase is Phase.TRAINING else None

    asyncio.run(play())
    lines = jobs.past()
    assert [line["attack"] for line in lines] == ["sign-flip", "noise"]
    assert [line["contribution"] for line in lines] == list(office.contributions)[:2]
    kit.journal.close()


def test_it_copies_only_another_node_s_update_of_the_same_head(tmp_path: Path) -> None:
    office = Office()
    kit = make_kit(tmp_path / "h", office)
    jobs = Hostile(kit, ATTACKS)
    ours = office.assignment(0, NODE.id)

    def handed(number: int, author: str) -> Any:
        task = office.assignment(number, key(author).id)
        jobs.seen[task.id] = task
        blob = office.genesis.record.initial.blob.model_copy(update={"size": number})
        done = seal(
            Contribution(
                assignment=task.id,
                commitment=digest("c"),
                update=TensorFile(blob=blob, root=digest("r")),
                steps=1,
                samples=1,
                loss="1",
                seconds=1,
            ),
            key(author),
            office.network,
        )
        jobs.seen[done.id] = done
        return blob

    handed(0, "node")
    handed(1, "another")
    assert jobs._candidates(ours.record) == []
    wanted = handed(2, "another")
    assert jobs._candidates(ours.record) == [wanted]
    kit.journal.close()


def test_the_list_of_attacks_comes_from_the_command_line() -> None:
    words = ["hostile", "join", "x", "--attacks", "copy,noise", "--yes"]
    assert _attacks(words) == ("copy", "noise") and words == ["hostile", "join", "x", "--yes"]
    assert _attacks(["hostile"]) == ATTACKS
    with pytest.raises(SystemExit):
        _attacks(["hostile", "--attacks", "bribe"])


def test_a_lie_about_training_is_noted_before_and_told_to_nobody(tmp_path: Path) -> None:
    office = Office(units=3)
    kit = make_kit(tmp_path / "h", office)
    jobs = Hostile(kit, ("skip-steps", LIE))
    seen: list[str] = []
    train = kit.trainer.train

    async def looked(order: Any, hear: Any) -> dict[str, Any]:
        seen.append(noted(Path(order["work"])))
        return await train(order, hear)

    kit.trainer.train = looked  # type: ignore[method-assign]

    async def play() -> None:
        for _ in range(2):
            unit = await jobs.ask()
            for phase in list(Phase)[2:]:
                await jobs.run(phase, unit, lambda step: None)

    asyncio.run(play())
    assert seen == ["skip-steps", "honest"]
    assert [line["attack"] for line in jobs.past()] == ["skip-steps"]
    kit.journal.close()


def test_it_waits_for_each_verdict(tmp_path: Path) -> None:
    office = Office(units=2)
    office.judges = False
    kit = make_kit(tmp_path / "h", office)
    jobs = Hostile(kit, ("reorder", "rate"))

    async def play() -> None:
        unit = await jobs.ask()
        for phase in list(Phase)[2:]:
            await jobs.run(phase, unit, lambda step: None)
        with pytest.raises(ParisError) as refused:
            await jobs.ask()
        assert refused.value.code == "work.none"
        office.judge(jobs.past()[0]["contribution"], accepted=False)
        await jobs.ask()

    asyncio.run(play())
    kit.journal.close()


def test_it_keeps_its_states_to_itself_where_that_is_the_lie(tmp_path: Path) -> None:
    office = Office(units=2)
    office.judges, office.audits = False, True
    kit = make_kit(tmp_path / "h", office)
    jobs = Hostile(kit, (REFUSE,))

    async def play() -> None:
        openings = jobs.openings()
        for expected in (0, 1):
            unit = await jobs.ask()
            for phase in list(Phase)[1:]:
                await jobs.run(phase, unit, lambda step: None)
            await openings.hear([one for each in office.asked.values() for one in each])
            for one in kit.journal.challenges("open"):
                await openings._try(one)
            assert len({one.contribution for one in office.openings}) == expected
            office.judge(jobs._letter(unit, "contribution").id)

    asyncio.run(play())
    kit.journal.close()


def test_a_lying_auditor_says_the_opposite(tmp_path: Path) -> None:
    office = Office(units=2)
    office.granted.append(audit(office))
    kit = make_kit(tmp_path / "h", office)
    jobs = Hostile(kit, (LIE,))

    async def play() -> None:
        unit = await jobs.ask()
        for phase in list(Phase)[1:]:
            await jobs.run(phase, unit, lambda step: None)

    asyncio.run(play())
    [report] = office.reports
    assert not report.passed and [one.passed for one in report.segments] == [False]
    kit.journal.close()
