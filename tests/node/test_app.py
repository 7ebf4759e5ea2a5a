"""The agent: the whole life of units against a scripted coordinator and trainer, with faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nodeworld import STEPS, Office, ScriptedTrainer, make_kit
from paris_node.app import Agent
from paris_node.control import ask
from paris_node.jobs import Jobs
from paris_node.kit import Kit
from paris_node.machine import FakeMachine
from paris_node.volunteer import Phase
from paris_protocol.errors import ParisError


@asynccontextmanager
async def living(kit: Kit, **more: Any) -> AsyncIterator[Agent]:
    """An agent that is stopped at the end, as the owner would."""
    agent = Agent(kit, Jobs(kit), **more)
    task = asyncio.create_task(agent.run())
    await until((kit.folder / "agent.sock").exists, "the control socket")
    try:
        yield agent
    finally:
        if not task.done():
            await asyncio.to_thread(ask, kit.folder, "stop")
        await asyncio.wait_for(task, 10)
        kit.journal.close()


async def until(met: Callable[[], bool], what: str) -> None:
    for _ in range(1000):
        if met():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"waited for {what}")


def test_units_are_trained_and_handed_in_one_after_the_other(tmp_path: Path) -> None:
    async def play() -> Office:
        office = Office(units=3)
        kit = make_kit(tmp_path / "a", office)
        agent = Agent(kit, Jobs(kit), until_finished=True)
        await asyncio.wait_for(agent.run(), 20)
        assert [one.state for one in kit.journal.letters()] == ["acknowledged"] * 6
        assert agent.volunteer.phase is Phase.IDLE
        assert list((tmp_path / "a" / "work").iterdir()) == [], "work folders are left over"
        assert [p.name for p in (tmp_path / "a" / "store" / "pins").iterdir()] == []
        kit.journal.close()
        return office

    office = asyncio.run(play())
    assert office.accepted == [one.id for one in office.granted] and len(office.accepted) == 3
    assert len(office.contributions) == 3
    assert office.leases[0].cached == () and len(office.leases[-1].cached) == 2


def test_pause_frees_the_trainer_and_resume_goes_on_at_the_very_step(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer = Office(units=1), ScriptedTrainer()
        trainer.gate.clear()
        kit = make_kit(tmp_path / "a", office, trainer)
        async with living(kit) as agent:
            await until(lambda: trainer.pid is not None, "training")
            while len(trainer.trained) < 7:
                trainer.gate.set()
                await asyncio.sleep(0)
            trainer.gate.clear()
            answer = await asyncio.to_thread(ask, kit.folder, "pause")
            assert answer["wish"] == "pause" and trainer.pid is None
            at = len(trainer.trained)
            status = await asyncio.to_thread(ask, kit.folder, "status")
            assert (status["why"], status["code"], status["state"]) == (
                "owner.paused",
                10,
                "training",
            )
            trainer.gate.set()
            for _ in range(10):
                await asyncio.sleep(0.01)
            assert len(trainer.trained) == at, "it trained while it was paused"
            await asyncio.to_thread(ask, kit.folder, "resume")
            await until(lambda: len(office.accepted) == 1, "the unit")
            assert agent.volunteer.why in ("node.working", "network.finished")
        steps = [step for _, step in trainer.trained]
        assert steps == list(range(1, STEPS + 1)), "a step was lost or done twice"

    asyncio.run(play())


def test_a_pause_outlives_the_process(tmp_path: Path) -> None:
    async def play() -> None:
        office = Office(units=1)
        async with living(make_kit(tmp_path / "a", office)):
            await asyncio.to_thread(ask, tmp_path / "a", "pause")
        done = len(office.accepted)
        async with living(make_kit(tmp_path / "a", office)) as agent:
            await asyncio.sleep(0.1)
            assert agent.volunteer.why == "owner.paused"
            assert len(office.accepted) == done
            await asyncio.to_thread(ask, tmp_path / "a", "resume")
            await until(lambda: len(office.accepted) == 1, "the unit")

    asyncio.run(play())


def test_a_coordinator_that_is_away_loses_nothing_and_is_found_again(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer = Office(units=2), ScriptedTrainer()
        kit = make_kit(tmp_path / "a", office, trainer)
        trainer.crash = lambda step: setattr(office.control, "down", step >= 8) or False
        async with living(kit) as agent:
            await until(lambda: agent.volunteer.phase is Phase.COMMIT, "the commitment")
            await until(lambda: agent.volunteer.why == "network.down", "the failure")
            assert len(kit.journal.letters(state="waiting")) == 2
        # The agent is restarted while the coordinator is still away.
        trainer = ScriptedTrainer()
        async with living(make_kit(tmp_path / "a", office, trainer)) as agent:
            await until(lambda: agent.volunteer.why == "network.down", "the failure")
            office.control.down = False
            await until(lambda: len(office.accepted) == 2, "both units")
            assert {unit for unit, _ in trainer.trained} == {office.granted[1].id}
        assert len(office.contributions) == 2

    asyncio.run(play())


@pytest.mark.parametrize("verb", ["lease", "commitments", "contributions"])
@pytest.mark.parametrize("before", [True, False])
def test_an_answer_lost_on_the_way_counts_nothing_twice(
    tmp_path: Path, verb: str, before: bool
) -> None:
    async def play() -> None:
        office, lost = Office(units=2), []
        real = office.control.handlers[verb]

        def flaky(raw: bytes) -> dict[str, Any]:
            if not before:
                answer = real(raw)
            if len(lost) < 3:
                lost.append(raw)
                raise ParisError("network.down", "the answer is lost")
            return real(raw) if before else answer

        office.control.handlers[verb] = flaky
        kit = make_kit(tmp_path / "a", office)
        await asyncio.wait_for(Agent(kit, Jobs(kit), until_finished=True).run(), 20)
        kit.journal.close()
        assert len(office.accepted) == len(office.contributions) == len(office.granted) == 2
        assert len(lost) == 3

    asyncio.run(play())


def test_a_refused_unit_is_let_go_and_the_next_one_comes(tmp_path: Path) -> None:
    async def play() -> None:
        office = Office(units=2)
        real = office.control.handlers["contributions"]

        def closed_once(raw: bytes) -> dict[str, Any]:
            if not office.accepted:
                office.accepted.append(office.granted[0].id)
                raise ParisError("unit.closed")
            return real(raw)

        office.control.handlers["contributions"] = closed_once
        kit = make_kit(tmp_path / "a", office)
        await asyncio.wait_for(Agent(kit, Jobs(kit), until_finished=True).run(), 20)
        states = [one.state for one in kit.journal.letters() if one.kind == "contribution"]
        assert states == ["unit.closed", "acknowledged"]
        kit.journal.close()

    asyncio.run(play())


def test_a_dying_trainer_is_started_again_from_its_last_save(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer, deaths = Office(units=1), ScriptedTrainer(), []

        def crash(step: int) -> bool:
            if step == 7 and len(deaths) < 2:
                deaths.append(step)
                return True
            return False

        trainer.crash = crash
        kit = make_kit(tmp_path / "a", office, trainer)
        await asyncio.wait_for(Agent(kit, Jobs(kit), until_finished=True).run(), 20)
        kit.journal.close()
        steps = [step for _, step in trainer.trained]
        assert steps == [1, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7, 8, 9, 10]
        assert len(office.accepted) == 1

    asyncio.run(play())


def test_finish_ends_the_unit_and_takes_no_more(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer = Office(units=3), ScriptedTrainer()
        trainer.gate.clear()
        kit = make_kit(tmp_path / "a", office, trainer)
        async with living(kit) as agent:
            await until(lambda: trainer.pid is not None, "training")
            await asyncio.to_thread(ask, kit.folder, "finish")
            trainer.gate.set()
            await until(lambda: agent.volunteer.why == "owner.finished", "the end of the unit")
            assert len(office.accepted) == 1 and len(office.granted) == 1
            await asyncio.to_thread(ask, kit.folder, "resume")
            await until(lambda: len(office.accepted) == 3, "the other units")

    asyncio.run(play())


def test_a_coordinator_that_forgot_the_node_is_told_again(tmp_path: Path) -> None:
    async def play() -> None:
        office = Office(units=2)
        kit = make_kit(tmp_path / "a", office)
        real = office.control.handlers["commitments"]

        def forget_once(raw: bytes) -> dict[str, Any]:
            if not office.accepted and not office.commitments:
                office.nodes.clear()
                office.commitments["restored from a backup"] = ""
            return real(raw)

        office.control.handlers["commitments"] = forget_once
        await asyncio.wait_for(Agent(kit, Jobs(kit), until_finished=True).run(), 20)
        assert len(office.accepted) == 2
        kit.journal.close()

    asyncio.run(play())


def test_a_full_disk_stops_the_node_until_there_is_room(tmp_path: Path) -> None:
    async def play() -> None:
        office = Office(units=1)
        kit = make_kit(tmp_path / "a", office, machine=FakeMachine(disk=[0, 0, 100_000]))
        async with living(kit) as agent:
            await until(lambda: agent.volunteer.why == "disk.full", "the refusal")
            await until(lambda: len(office.accepted) == 1, "the unit")

    asyncio.run(play())


@pytest.mark.parametrize("moment", ["training", "a transition"])
def test_a_full_disk_keeps_nobody_from_pausing_or_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr("paris_node.app.DISK_RETRY", 0.02)

    def full(*_: object) -> None:
        raise ParisError("disk.full", "journal")

    async def play() -> None:
        trainer = ScriptedTrainer()
        trainer.gate.clear()
        kit = make_kit(tmp_path / "a", Office(units=1), trainer)
        agent = Agent(kit, Jobs(kit))
        task = asyncio.create_task(agent.run())
        await until(lambda: trainer.pid is not None, "training")
        with monkeypatch.context() as patch:
            patch.setattr(kit.journal, "record", full)
            patch.setattr(kit.journal, "set_fact", full)
            if moment == "a transition":
                trainer.gate.set()
                await until(lambda: agent._disk_full, "the full disk")
            status = await asyncio.to_thread(ask, kit.folder, "status")
            assert moment == "training" or status["why"] == "disk.full"
            answer = await asyncio.to_thread(ask, kit.folder, "pause", timeout=5)
            assert answer["wish"] == "pause" and trainer.pid is None
            await asyncio.to_thread(ask, kit.folder, "stop", timeout=5)
            with suppress(ParisError):
                await asyncio.wait_for(task, 10)
        assert kit.journal.memory().phase is Phase.TRAINING
        kit.journal.close()

    asyncio.run(play())


def test_beats_tell_the_step_and_learn_of_the_end(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer = Office(units=1), ScriptedTrainer()
        trainer.gate.clear()
        kit = make_kit(tmp_path / "a", office, trainer)
        agent = Agent(kit, Jobs(kit), until_finished=True)
        task = asyncio.create_task(agent.run())
        await until(lambda: any(beat.state == "training" for beat in office.beats), "a beat")
        beat = next(beat for beat in office.beats if beat.state == "training")
        assert beat.assignment == office.granted[0].id
        office.accepted.append("by another node")  # the network needs this unit no more
        await asyncio.wait_for(task, 10)
        assert office.contributions == {}
        kit.journal.close()

    asyncio.run(play())


class Killed(BaseException):
    """What a kill -9 is to the code inside: the end, in the middle of whatever it did."""


POINTS = ("record", "post", "settle", "keep_unit", "keep_receipt", "keep_challenge")


def kill_at(kit: Kit, office: Office, point: int) -> Callable[[], bool]:
    """Die at the n-th write or call, before or after it happens; afterwards nothing can be done."""
    count, dead = 0, False

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def one(*words: Any, **named: Any) -> Any:
            nonlocal count, dead
            for moment in (0, 1):
                count += 1
                dead = dead or count == point
                if dead:
                    raise Killed
                if moment == 0:
                    result = real(*words, **named)
            return result

        return one

    for name in POINTS:
        setattr(kit.journal, name, wrap(getattr(kit.journal, name)))
    for verb, real in list(office.control.handlers.items()):
        if verb != "beat":
            office.control.handlers[verb] = wrap(real)
    pause = kit.trainer.pause

    async def pause_unless_dead(grace: float) -> int | None:
        return None if dead else await pause(grace)

    kit.trainer.pause = pause_unless_dead  # type: ignore[method-assign]
    return lambda: dead


async def live_until_killed(kit: Kit, dead: Callable[[], bool]) -> None:
    agent = Agent(kit, Jobs(kit), until_finished=True)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    task = asyncio.create_task(agent.run())
    while not task.done() and not dead():
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if agent._job is not None:
        agent._job.cancel()
        await asyncio.gather(agent._job, return_exceptions=True)


@pytest.mark.parametrize("first", range(1, 60, 4))
def test_killed_at_any_write_or_call_nothing_is_lost_or_counted_twice(
    tmp_path: Path, first: int
) -> None:
    async def play() -> None:
        office = Office(units=2)
        office.judges, office.audits = False, True
        handlers = dict(office.control.handlers)
        steps: list[tuple[str, int]] = []
        for point in (first, first // 2 + 3, 7):
            trainer = ScriptedTrainer()
            kit = make_kit(tmp_path / "a", office, trainer)
            office.control.handlers = dict(handlers)
            with suppress(Killed):
                await live_until_killed(kit, kill_at(kit, office, point))
            steps += trainer.trained
            kit.journal._db.close()
        office.control.handlers = handlers
        trainer = ScriptedTrainer()
        kit = make_kit(tmp_path / "a", office, trainer)
        await asyncio.wait_for(Agent(kit, Jobs(kit), until_finished=True).run(), 20)
        kit.journal.close()
        steps += trainer.trained
        assert len(office.granted) == len(office.accepted) == len(office.contributions) == 2
        assert office.judged == set(office.contributions), "an opening was lost"
        for unit in office.accepted:
            again = [step for one, step in steps if one == unit]
            assert sorted(set(again)) == list(range(1, STEPS + 1))
            assert len(again) <= STEPS + 3 * 5, "more was redone than what followed the last saves"

    asyncio.run(play())


@pytest.mark.parametrize("until_finished", [True, False])
def test_a_revoked_key_ends_the_node_that_waits_for_the_end_and_is_told(
    tmp_path: Path, until_finished: bool
) -> None:
    async def play() -> None:
        office = Office(units=2)
        real = office.control.handlers["lease"]

        def revoked(raw: bytes) -> dict[str, Any]:
            if office.accepted:
                raise ParisError("node.revoked")
            return real(raw)

        office.control.handlers["lease"] = revoked
        kit = make_kit(tmp_path / "a", office)
        if until_finished:
            with pytest.raises(ParisError) as ended:
                await asyncio.wait_for(Agent(kit, Jobs(kit), until_finished=True).run(), 20)
            assert ended.value.code == "node.revoked"
            kit.journal.close()
            return
        async with living(kit) as agent:
            await until(lambda: agent.volunteer.why == "node.revoked", "the refusal")
            status = await asyncio.to_thread(ask, kit.folder, "status")
            assert status["code"] == 22

    asyncio.run(play())
