"""Rows about the replay audit: fewer steps, wrong data, wrong numbers, spoofs, refusing to open.

Real training, real openings over HTTP, real replay. Every cheat here passes L0 to L3 as an honest
unit does: the update looks well and helps. Only L4 tells them apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adversary.arena import Arena, files
from adversary.cheats import CHEATS, rate
from adversary.light import refusal
from adversary.players import Tensors, added, noise
from paris_models.config import ExpertConfig, RecipeConfig
from paris_models.replay import model_class
from paris_protocol.records import Layer, Verdict
from tinynet import root_of

AUDIT = {"segments": 3, "canary": "0", "answer_within": 100, "retry_within": 50}
ALIEN = "c1a55" + "0" * 59
"""The numeric class of a machine that nobody here has."""


def scene(folder: Path, play: Callable[[Arena], Awaitable[None]], **policy: Any) -> None:
    """One arena with every segment audited, and what happens in it."""

    async def life() -> None:
        async with Arena(folder, **{"audit": AUDIT, **policy}) as arena:
            await play(arena)

    asyncio.run(life())


def layer(verdict: Verdict, name: str) -> Layer:
    [found] = [each for each in verdict.layers if each.layer == name]
    return found


def numbers(verdict: Verdict) -> dict[str, float]:
    return {name: float(value) for name, value in layer(verdict, "L4").numbers}


# ---------------------------------------------------------------- dishonest training


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """One verdict per cheat and one for honest work, all in one network."""
    found: dict[str, Verdict] = {}

    async def play(arena: Arena) -> None:
        for number, (name, cheat) in enumerate({"honest": None, **CHEATS}.items()):
            player = await arena.player(f"player {number}")
            found[name] = await arena.judge(await player.unit(cheat=cheat))

    scene(tmp_path_factory.mktemp("cheats"), play)
    return found


def found_by_replay(verdict: Verdict) -> bool:
    """Whether L4 found it; the layers before may have been as good, then nobody was audited."""
    assert not verdict.accepted
    return verdict.code == "audit.mismatch"


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", CHEATS)
def test_dishonest_training_is_found_by_the_replay(verdicts: dict[str, Verdict], name: str) -> None:
    verdict = verdicts[name]
    assert verdict.audit is not None and verdict.audit.audited
    if found_by_replay(verdict) and name != "another result":  # whose states are honest
        assert numbers(verdict)["rho"] > 0.2
    else:
        assert verdict.layers[-1].layer in ("L2", "L3", "L4")


def test_nearly_all_of_it_is_found_by_nothing_else(verdicts: dict[str, Verdict]) -> None:
    by_replay = [name for name in CHEATS if found_by_replay(verdicts[name])]
    assert len(by_replay) >= len(CHEATS) - 3, by_replay


def test_the_honest_twin_is_replayed_to_the_bit(verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts["honest"]
    assert (verdict.accepted, verdict.code) == (True, "accepted")
    found = numbers(verdict)
    assert (found["exact"], found["segments"], found["rho"], found["tensor"]) == (1, 3, 0, 0)


# ---------------------------------------------------------------- another class of machine


def calibrated() -> dict[str, Any]:
    """A tolerance as calibration would publish it for this expert."""
    genesis = files().genesis.record
    config = ExpertConfig.from_record(genesis.expert)
    model = model_class(config, RecipeConfig.from_record(genesis.recipe))
    return {
        "dtype": "float32", "model": model, "steps": 5, "rho": "0.01", "tensor": "0.1",
        "factor": "5", "pairs": 1, "source": "the test",
    }  # fmt: skip


def rounded(states: list[Tensors]) -> list[Tensors]:
    """States as other kernels might have left them: other in the last bits."""
    return [
        {
            name: tensor * (1 + 1e-6) if n and tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        for n, state in enumerate(states)
    ]


FOREIGN = ("one step in five skipped", "wrong order", "half batch", "rate x 0.8", "another result")
"""Cheats that a tolerance must tell from an honest machine of another kind."""


def elsewhere(work: Any) -> Any:
    """The same work from a machine of another class."""
    player, states = work.player, rounded(work.states)
    return player.work_of(work.assignment, work.parent, states)


def test_between_classes_a_calibrated_tolerance_decides(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        honest = await arena.player("honest", numerics=ALIEN)
        verdict = await arena.judge(await honest.unit(tamper=elsewhere))
        assert verdict.accepted, verdict.code
        found = numbers(verdict)
        assert found["exact"] == 0 and 0 < found["rho"] < found["limit"]
        for number, name in enumerate(FOREIGN):
            player = await arena.player(f"cheat {number}", numerics=ALIEN)
            verdict = await arena.judge(await player.unit(cheat=CHEATS[name], tamper=None))
            assert found_by_replay(verdict), (name, verdict.code)
        # What stays below the tolerance is not seen: said openly, and measured by the benchmark.
        sly = await arena.player("sly", numerics=ALIEN)
        verdict = await arena.judge(await sly.unit(cheat=rate(1.001)))
        assert verdict.accepted and numbers(verdict)["rho"] > 0

    scene(tmp_path, play, audit=AUDIT | {"tolerances": [calibrated()]})


def test_an_unknown_class_without_a_tolerance_earns_no_standing(tmp_path: Path) -> None:
    """Naming a class that nobody has is no way around the audit: it proves nothing."""

    async def play(arena: Arena) -> None:
        for name, numerics, standing in (("sly", ALIEN, 0), ("old", None, 0), ("ada", "own", 1)):
            player = await arena.player(name, numerics=numerics)
            assert (await arena.judge(await player.unit())).accepted
            assert arena.office.desk.nodes[player.id].standing == standing

    scene(tmp_path, play)


# ---------------------------------------------------------------- openings


async def asked(arena: Arena, name: str) -> tuple[Any, Any, Any]:
    """A player whose honest unit is being audited: player, work and the challenge."""
    player = await arena.player(name)
    work = await player.unit()
    await arena.work()
    [challenge] = await player.challenges()
    assert challenge.record.states == (1, 2, 3)
    return player, work, challenge


def test_who_does_not_open_is_refused_after_two_windows(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        player, work, first = await asked(arena, "silent")
        honest, other, _ = await asked(arena, "honest")
        assert (await arena.judge(other)).accepted
        before = arena.office.desk.nodes[player.id].accepted
        arena.now = first.record.deadline + 1
        await arena.work()
        [second] = await player.challenges()
        assert (second.record.attempt, first.record.attempt) == (2, 1)
        await arena.close()
        await arena.open()  # a restart of the coordinator forgets nothing of it
        assert [each.id for each in await player.challenges()] == [second.id]
        arena.now = second.record.deadline + 1
        await arena.work()
        verdict = arena.verdict(work.id)
        assert verdict is not None and verdict.code == "audit.unanswered"
        node = arena.office.desk.nodes[player.id]
        assert (node.revoked, node.standing, node.accepted) == (None, 0, before)
        states = dict(enumerate(work.states))
        assert await refusal(player.lay_open(second, states)) == "audit.closed"
        assert (await arena.judge(await player.unit())).accepted, "it may work on"
        assert honest.id != player.id

    scene(tmp_path, play)


def test_a_late_answer_within_the_retry_counts(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        player, work, first = await asked(arena, "slow")
        arena.now = first.record.deadline + 1
        await arena.work()
        await arena.close()
        await arena.open()
        assert (await arena.judge(work)).accepted
        assert await player.challenges() == []

    scene(tmp_path, play)


def test_false_and_foreign_openings_change_nothing(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        player, work, challenge = await asked(arena, "liar")
        stranger = await arena.player("stranger")
        states = dict(enumerate(work.states))
        opening, _ = player.opening(challenge, states)
        record = opening.record

        def changed(**changes: Any) -> bytes:
            return player.seal(record.model_copy(update=changes)).raw

        other = replace(work, states=[added(s, s, 0.0) for s in work.states])
        other.states[2] = {n: t + 1 if t.is_floating_point() else t for n, t in states[2].items()}
        false, _ = player.opening(challenge, dict(enumerate(other.states)))
        first = record.states[0]
        huge = first.model_copy(
            update={"file": first.file.model_copy(
                update={"blob": first.file.blob.model_copy(update={"size": 1 << 40})})}
        )  # fmt: skip
        unasked = first.model_copy(update={"index": 7})
        before = list(arena.office.ledger.entries())
        for raw, code in (
            (false.raw, "audit.state"),
            (changed(states=record.states[:1]), "audit.unknown"),
            (changed(states=(unasked, *record.states[1:])), "audit.unknown"),
            (changed(states=record.states[::-1]), "audit.unknown"),
            (changed(states=(huge, *record.states[1:])), "blob.too-large"),
            (changed(challenge="0" * 64), "audit.unknown"),
            (changed(contribution="0" * 64), "unit.unknown"),
            (stranger.seal(record).raw, "unit.not-yours"),
        ):
            assert await refusal(player.post("openings", raw)) == code
        assert list(arena.office.ledger.entries()) == before
        # The honest answer, twice: once more changes nothing.
        await player.lay_open(challenge, states)
        assert (await player.lay_open(challenge, states))["state"] == "complete"
        assert (await arena.judge(work)).accepted

    scene(tmp_path, play)


@pytest.mark.parametrize("damage", ["other values", "other dtype", "other shape", "not tensors"])
def test_opened_bytes_that_do_not_have_their_root_end_the_key(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root in the opening is the committed one, and the bytes are something else."""

    def spoilt(state: Tensors) -> Tensors:
        name = "weights.proj_out.weight"
        if damage == "other dtype":
            return state | {name: state[name].double()}
        if damage == "other shape":
            return state | {name: torch.zeros(3)}
        return state | {name: state[name] + 1e-3}

    async def play(arena: Arena) -> None:
        player, work, challenge = await asked(arena, "liar")
        real, save = player.opening, "adversary.players.save_tensors"
        roots = {root_of(spoilt(state)): root_of(state) for state in work.states}
        wrong = {n: spoilt(state) for n, state in enumerate(work.states)}
        if damage == "not tensors":
            monkeypatch.setattr(
                save, lambda tensors, path: path.write_bytes(path.name.encode() * 99)
            )
        opening, blobs = real(challenge, wrong)
        states = tuple(
            each.model_copy(update={"file": each.file.model_copy(
                update={"root": roots[each.file.root]})})
            for each in opening.record.states
        )  # fmt: skip
        sealed = player.seal(opening.record.model_copy(update={"states": states}))
        monkeypatch.setattr(player, "opening", lambda *_: (sealed, blobs))
        await player.lay_open(challenge, wrong)
        monkeypatch.undo()
        verdict = await arena.judge(work)
        assert (verdict.accepted, layer(verdict, "L4").passed) == (False, False)
        await arena.work()
        assert arena.office.desk.nodes[player.id].revoked is not None
        honest = await arena.player("honest")
        assert (await arena.judge(await honest.unit())).accepted

    scene(tmp_path, play)


# ---------------------------------------------------------------- commitments out of their time


def test_commitments_count_once_and_only_before_the_reveal(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        player = await arena.player("eve")
        assignment = await player.lease()
        parent = player.parent(assignment.record)
        honest = player.train(assignment, parent)
        lazy = player.train(assignment, parent, skip=lambda step: step % 2 == 0)
        done = await player.hand_in(lazy)
        await arena.work()
        assert len(await player.challenges()) == 1, "now she knows that she is audited"
        before = list(arena.office.ledger.entries())
        commitment, contribution, _ = player.statements(honest)
        for verb, raw in (("commitments", commitment.raw), ("contributions", contribution.raw)):
            assert await refusal(player.post(verb, raw)) in ("unit.second-result", "audit.late")
        again, _, _ = player.statements(lazy)
        assert (await player.post("commitments", again.raw))["ok"] is True
        assert list(arena.office.ledger.entries()) == before
        verdict = await arena.judge(done)
        assert verdict.code == "audit.mismatch" and verdict.audit is not None
        await arena.office.project()
        log = arena.office.log
        assert log.index_of(done.commitment) == verdict.audit.size - 1
        assert log.index_of(arena.office.desk.work_of(done.id).verdict or "") is not None

    scene(tmp_path, play)


def test_noise_within_the_limits_of_l2_and_l3_is_found(tmp_path: Path) -> None:
    """A tenth of noise on an honest result: no statistic sees it, the last state shows it."""

    async def play(arena: Arena) -> None:
        eve, ada = await arena.player("eve"), await arena.player("ada")
        lie = await eve.unit(
            tamper=lambda work: work.with_update(added(work.update, noise(work.update), 0.1))
        )
        verdict = await arena.judge(lie)
        assert (verdict.accepted, verdict.code) == (False, "audit.mismatch")
        assert (await arena.judge(await ada.unit())).accepted

    scene(tmp_path, play)
