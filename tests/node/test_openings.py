"""Openings: who may ask, what is answered when, and what outlives a kill."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from node.test_app import living, until
from nodeworld import NOW, STEPS, Office, ScriptedTrainer, key, make_kit
from paris_node.control import ask
from paris_node.jobs import Jobs
from paris_node.journal import Receipt
from paris_node.leases import needed_blobs
from paris_node.openings import Openings, _lacking
from paris_node.upkeep import KEPT_FOR, laid_open, let_go
from paris_node.view import describe, lines
from paris_node.volunteer import Phase
from paris_protocol.blobs import PIECE
from paris_protocol.errors import ParisError
from paris_protocol.records import BlobRef

PHASES = list(Phase)[1:]


def auditing(units: int = 1) -> Office:
    """An office that accepts only what was laid open to it."""
    office = Office(units=units)
    office.judges, office.audits = False, True
    return office


async def handed_in(kit: Any) -> tuple[str, str]:
    """(unit, contribution) of a unit that went through all phases."""
    jobs = Jobs(kit)
    unit = await jobs.ask()
    for phase in PHASES:
        await jobs.run(phase, unit, lambda step: None)
    return unit, jobs._letter(unit, "contribution").id


class LargeStates(ScriptedTrainer):
    """States of three pieces each."""

    async def open(self, order: Mapping[str, Any]) -> list[tuple[int, Path, str]]:
        found = await super().open(order)
        for place, path, _ in found:
            path.write_bytes(bytes([place]) * (2 * PIECE + 1))
        return found


def heard(office: Office) -> list[dict[str, Any]]:
    return [one for each in office.asked.values() for one in each]


def test_an_opening_is_answered_beside_training_and_loses_no_step(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer = auditing(units=2), ScriptedTrainer()
        kit = make_kit(tmp_path / "a", office, trainer)
        trainer.open_gate.clear()
        challenge = office.challenge

        def hold(*args: Any, **changes: Any) -> Any:
            if not trainer.opened:  # the next unit is not to be over before anything was asked
                trainer.gate.clear()
            return challenge(*args, **changes)

        office.challenge = hold  # type: ignore[method-assign]
        async with living(kit) as agent:
            await until(lambda: bool(trainer.opened), "the opening")
            await until(lambda: agent.volunteer.phase is Phase.TRAINING, "the next unit")
            trainer.open_gate.set()
            await until(lambda: len(office.judged) == 1, "the answer")
            trainer.gate.set()
            await until(lambda: len(office.judged) == 2, "both verdicts")
        assert [states for _, states in trainer.opened] == [(1, 2), (1, 2)]
        steps = [step for _, step in trainer.trained]
        assert steps == [*range(1, STEPS + 1), *range(1, STEPS + 1)]
        opened = office.openings[-1]
        assert [one.index for one in opened.states] == [1, 2]
        assert all(office.control.missing(one.file.blob) == [] for one in opened.states)

    asyncio.run(play())


def test_a_unit_is_kept_until_its_verdict_and_its_states_go_then(tmp_path: Path) -> None:
    async def play() -> None:
        office = auditing(units=2)
        kit = make_kit(tmp_path / "a", office)
        unit, contribution = await handed_in(kit)
        work = kit.folder / "work" / unit
        pins = kit.store.folder / "pins"
        jobs = Jobs(kit)
        needed = {ref.id for ref in needed_blobs(jobs.assignment(unit))}
        assert work.exists() and [p for p in work.iterdir() if p.is_file()] == []
        assert {p.name for p in pins.iterdir()} == needed
        await let_go(kit, but=None)
        assert work.exists(), "an audit may still come"
        second = await jobs.ask()  # of the other expert: they share the parent
        await jobs.run(Phase.LEASED, second, lambda step: None)
        office.judge(contribution)
        kit.journal.keep_receipt(Receipt(contribution, NOW, "judged", {"accepted": True}))
        await let_go(kit, but=second)
        assert not work.exists()
        shared = {ref.id for ref in needed_blobs(jobs.assignment(second))}
        assert {p.name for p in pins.iterdir()} == needed & shared
        kit.journal.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("body", "state", "age"),
    [({}, "closed", 0.0), ({"accepted": False}, "judged", 0.0), ({}, "queued", KEPT_FOR + 1)],
)
def test_whom_nobody_will_ask_about_any_more_is_let_go(
    tmp_path: Path, body: dict[str, Any], state: str, age: float
) -> None:
    async def play() -> None:
        kit = make_kit(tmp_path / "a", auditing())
        unit, contribution = await handed_in(kit)
        kit.journal.keep_receipt(Receipt(contribution, NOW - age, state, body))
        await let_go(kit, but=None)
        assert not (kit.folder / "work" / unit).exists()
        assert list((kit.store.folder / "pins").iterdir()) == []
        kit.journal.close()

    asyncio.run(play())


def test_only_the_coordinator_may_ask_and_only_about_our_own_work(tmp_path: Path) -> None:
    async def play() -> None:
        office = auditing()
        kit = make_kit(tmp_path / "a", office)
        _, ours = await handed_in(kit)
        office.asked.clear()
        office.challenge(ours, 1, author=key("mallory"))
        office.challenge(ours, 1, author=key("node"))
        office.challenge(ours, 1, node=key("another").id)
        office.challenge(ours, 3)  # there are the states 0, 1 and 2
        office.challenge(ours)
        office.challenge("ab" * 32, 1)
        openings = Openings(kit)
        await openings.hear([*heard(office), {"no": "envelope"}, 5, None])
        await openings.hear("nonsense")
        await openings.hear(None)
        assert kit.journal.challenges() == []
        office.asked.clear()
        fine = office.challenge(ours, 2)
        await openings.hear(heard(office))
        await openings.hear(heard(office))
        assert [one.id for one in kit.journal.challenges("open")] == [fine.id]
        kit.journal.close()

    asyncio.run(play())


def test_a_restart_goes_on_with_what_is_open(tmp_path: Path) -> None:
    async def play() -> None:
        office = auditing()
        kit = make_kit(tmp_path / "a", office)
        await handed_in(kit)
        await Openings(kit).hear(heard(office))
        kit.journal.close()  # killed before it did anything about it
        office.asked.clear()  # and it is not told again
        async with living(make_kit(tmp_path / "a", office)) as agent:
            await until(lambda: bool(office.judged), "the answer")
            [one] = agent.kit.journal.challenges()
            assert one.state == "answered"
            await until(lambda: not list((tmp_path / "a" / "work").iterdir()), "the end of it")
            blobs = agent.kit.store.ids()
            assert not {one.file.blob.id for one in office.openings[0].states} & set(blobs)

    asyncio.run(play())


def test_an_opening_waits_for_the_owner(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer = auditing(), ScriptedTrainer()
        kit = make_kit(tmp_path / "a", office, trainer)
        trainer.open_gate.clear()
        async with living(kit):
            await until(lambda: bool(trainer.opened), "the opening")
            await asyncio.to_thread(ask, kit.folder, "pause")
            trainer.open_gate.set()
            assert trainer.pid is None
            for _ in range(20):
                await asyncio.sleep(0.01)
            assert office.openings == [] and len(trainer.opened) == 1
            view = describe(kit.journal, kit.folder, why="owner.paused", running=True)
            assert view["audits"]["challenges"] == {"open": 1, "answered": 0, "lost": 0}
            assert any("open 1" in line for line in lines(view))
            await asyncio.to_thread(ask, kit.folder, "resume")
            await until(lambda: bool(office.judged), "the answer")

    asyncio.run(play())


@pytest.mark.parametrize(
    ("code", "late", "becomes"),
    [
        ("audit.closed", False, "audit.closed"),
        ("audit.state", False, "audit.state"),
        ("node.revoked", False, "node.revoked"),
        ("network.down", False, "open"),
        ("network.down", True, "audit.unanswered"),
    ],
)
def test_what_a_refusal_means(tmp_path: Path, code: str, late: bool, becomes: str) -> None:
    async def play() -> None:
        office = auditing()
        kit = make_kit(tmp_path / "a", office)
        await handed_in(kit)

        def refuse(raw: bytes) -> dict[str, Any]:
            raise ParisError(code)

        office.control.handlers["openings"] = refuse
        openings = Openings(kit)
        await openings.hear(heard(office))
        kit.clock = lambda: NOW + (61 if late else 0)
        [one] = kit.journal.challenges("open")
        await openings._try(one)
        [one] = kit.journal.challenges()
        assert one.state == becomes
        assert one.opening is not None, "what was sent is forgotten"
        kept = [kit.store.has(ref) for ref in laid_open(kit, one.unit)]
        assert kept == [becomes in ("open", "audit.unanswered")] * 2
        await let_go(kit, but=None)
        assert kept == [kit.store.has(ref) for ref in laid_open(kit, one.unit)]
        kit.journal.keep_receipt(
            Receipt(next(iter(office.contributions)), NOW, "judged", {"accepted": False})
        )
        await let_go(kit, but=None)
        assert not any(kit.store.has(ref) for ref in laid_open(kit, one.unit))
        kit.journal.close()

    asyncio.run(play())


def test_the_same_opening_is_sent_again_until_all_of_it_is_there(tmp_path: Path) -> None:
    async def play() -> None:
        office = auditing()
        kit = make_kit(tmp_path / "a", office)
        await handed_in(kit)
        openings, real, lost = Openings(kit), office.control.handlers["openings"], []

        def flaky(raw: bytes) -> dict[str, Any]:
            lost.append(raw)
            if len(lost) in (1, 3):
                raise ParisError("network.down", "the answer is lost")
            return real(raw)

        office.control.handlers["openings"] = flaky
        await openings.hear(heard(office))
        for _ in range(3):
            for one in kit.journal.challenges("open"):
                await openings._try(one)
        assert [one.state for one in kit.journal.challenges()] == ["answered"]
        assert len(set(lost)) == 1, "another opening was made"
        puts = [call for call in office.control.asked if call.startswith("put piece")]
        assert len(puts) == 1 + 2, "the update, and each state once"
        kit.journal.close()

    asyncio.run(play())


def test_an_upload_that_broke_off_goes_on_where_it_was(tmp_path: Path) -> None:
    async def play() -> None:
        office = auditing()
        kit = make_kit(tmp_path / "a", office, LargeStates())
        await handed_in(kit)
        openings, put, sent = Openings(kit), office.control.put_piece, []

        async def breaks(ref: BlobRef, i: int, data: bytes) -> int:
            sent.append((ref.id, i))
            if len(sent) == 3:
                raise ParisError("network.down", "a slow line")
            return await put(ref, i, data)

        office.control.put_piece = breaks  # type: ignore[method-assign]
        await openings.hear(heard(office))
        for _ in range(2):
            for one in kit.journal.challenges("open"):
                await openings._try(one)
        assert [one.state for one in kit.journal.challenges()] == ["answered"]
        assert len(sent) == 2 * 3 + 1 and len(set(sent)) == 2 * 3, "what had arrived was sent again"
        kit.journal.close()

    asyncio.run(play())


@pytest.mark.parametrize("answer", [None, [], {"x": [0]}, {}, {"id": []}, {"id": [7]}])
def test_a_coordinator_that_does_not_say_which_pieces_lack_gets_all(answer: Any) -> None:
    assert _lacking({"missing": answer}, "id", 3) == [0, 1, 2]
    assert _lacking({"missing": {"id": [2]}}, "id", 3) == [2]


def test_asked_a_second_time_it_makes_nothing_twice_and_one_answer_is_enough(
    tmp_path: Path,
) -> None:
    async def play() -> None:
        office, trainer = auditing(), LargeStates()
        kit = make_kit(tmp_path / "a", office, trainer)
        unit, contribution = await handed_in(kit)
        openings, real = Openings(kit), office.control.handlers["openings"]

        def down(raw: bytes) -> dict[str, Any]:
            raise ParisError("network.down")

        office.control.handlers["openings"] = down
        await openings.hear(heard(office))
        kit.clock = lambda: NOW + 61
        [first] = kit.journal.challenges("open")
        await openings._try(first)
        assert [one.state for one in kit.journal.challenges()] == ["audit.unanswered"]
        office.challenge(contribution, 1, 2, attempt=2, deadline=int(NOW) + 120)
        office.challenge(contribution, 1, 2, attempt=2, deadline=int(NOW) + 121)
        await openings.hear(heard(office))
        assert len(kit.journal.challenges("open")) == 2
        office.control.handlers["openings"] = real
        running = asyncio.create_task(openings.run())
        await until(lambda: not kit.journal.challenges("open"), "the answers")
        running.cancel()
        assert len(trainer.opened) == 1, "the states were made again"
        assert len(office.openings) == 2, "the second was answered with the first"
        assert not any(kit.store.has(ref) for ref in laid_open(kit, unit))
        kit.journal.close()

    asyncio.run(play())


def test_states_that_the_store_lost_are_made_again(tmp_path: Path) -> None:
    async def play() -> None:
        office, trainer = auditing(), LargeStates()
        kit = make_kit(tmp_path / "a", office, trainer)
        unit, _ = await handed_in(kit)
        openings, real = Openings(kit), office.control.handlers["openings"]

        def down(raw: bytes) -> dict[str, Any]:
            raise ParisError("network.down")

        office.control.handlers["openings"] = down
        await openings.hear(heard(office))
        for one in kit.journal.challenges("open"):
            await openings._try(one)
        kit.store.remove(laid_open(kit, unit)[0])
        office.control.handlers["openings"] = real
        for one in kit.journal.challenges("open"):
            await openings._try(one)
        assert [one.state for one in kit.journal.challenges()] == ["answered"]
        kit.journal.close()

    asyncio.run(play())


def test_a_beat_that_failed_unforeseen_is_not_the_last_one(tmp_path: Path) -> None:
    async def play() -> None:
        office = auditing()
        real, beats = office.control.handlers["beat"], []

        def flawed(raw: bytes) -> dict[str, Any]:
            beats.append(raw)
            if len(beats) == 1:
                raise ValueError("nobody thought of this")
            return real(raw)

        office.control.handlers["beat"] = flawed
        async with living(make_kit(tmp_path / "a", office)):
            await until(lambda: len(office.judged) == 1, "the answer")

    asyncio.run(play())
