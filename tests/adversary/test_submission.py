"""Rows "replayed contribution / double submit" and "equivocation"; late, early and foreign words.

Over HTTP against the real office: whatever is sent twice counts once, whatever contradicts an
earlier word is refused and changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adversary.light import FakeNode, counter, refusal
from coordinator.fakes import new_shift
from paris_coordinator.office import Office
from paris_protocol.blobs import Manifest
from paris_protocol.net.control import HttpControl

DAY = 86_400


@dataclass
class Desk:
    """One coordinator, its clock, and two volunteers who have registered."""

    office: Office
    control: HttpControl
    clock: list[float]
    ada: FakeNode
    eve: FakeNode

    async def lease(self, node: FakeNode) -> Any:
        return node.assignment(await self.control.post("lease", node.request()))

    async def deliver(self, node: FakeNode, assignment: Any, value: float | None = None) -> str:
        """Everything from commitment to the last piece; the contribution's id."""
        commitment, contribution, data = node.statements(assignment, value)
        await self.control.post("commitments", commitment.raw)
        await self.control.post("contributions", contribution.raw)
        await self.upload(contribution, data)
        return contribution.id

    async def upload(self, contribution: Any, data: bytes) -> None:
        ref = contribution.record.update.blob
        await self.control.put_manifest(ref, Manifest.build([data]).raw)
        await self.control.put_piece(ref, 0, data)

    async def judge(self) -> None:
        shift = new_shift(self.office)
        for _ in range(20):
            if not await shift.step():
                break

    @property
    def ledger(self) -> list[Any]:
        return list(self.office.ledger.entries())


def play(folder: Path, scene: Callable[[Desk], Awaitable[None]], **more: Any) -> None:
    async def life() -> None:
        clock = [1_800_000_000.0]
        async with counter(folder, clock=lambda: clock[0], **more) as (office, control):
            ada, eve = (FakeNode(office.network, n, lambda: clock[0]) for n in (1, 2))
            for node in (ada, eve):
                await control.post("register", node.registration())
            await scene(Desk(office, control, clock, ada, eve))

    asyncio.run(life())


def test_everything_that_is_sent_twice_counts_once(tmp_path: Path) -> None:
    async def scene(desk: Desk) -> None:
        assignment = await desk.lease(desk.ada)
        commitment, contribution, data = desk.ada.statements(assignment)
        for _ in range(3):
            await desk.control.post("commitments", commitment.raw)
        for _ in range(3):
            await desk.control.post("contributions", contribution.raw)
        await desk.upload(contribution, data)
        for _ in range(2):
            assert await desk.control.put_piece(contribution.record.update.blob, 0, data) == 0
        await desk.judge()
        node = desk.office.desk.nodes[desk.ada.key.id]
        assert node.accepted == 1
        before = desk.ledger
        await desk.control.post("commitments", commitment.raw)
        answer = await desk.control.post("contributions", contribution.raw)
        assert answer["state"] == "judged"
        await desk.judge()
        assert desk.ledger == before
        assert node.accepted == 1

    play(tmp_path, scene)


def test_an_accepted_result_cannot_be_sold_again_for_another_unit(tmp_path: Path) -> None:
    async def scene(desk: Desk) -> None:
        first = await desk.lease(desk.ada)
        done = await desk.deliver(desk.ada, first)
        await desk.judge()
        second = await desk.lease(desk.ada)
        assert second.id != first.id
        old = desk.office.raw(done)
        before = desk.ledger
        assert (await desk.control.post("contributions", old))["state"] == "judged"
        assert desk.ledger == before, "it is the old contribution still, and earns nothing"
        # The thief signs the same update for the unit of his own: refused before its commitment.
        stolen = await desk.lease(desk.eve)
        _, contribution, _ = desk.eve.statements(stolen)
        assert await refusal(desk.control.post("contributions", contribution.raw)) == (
            "commitment.missing"
        )
        # And he cannot hand in for a unit that is not his.
        commitment, contribution, _ = desk.eve.statements(second)
        for verb, raw in (("commitments", commitment.raw), ("contributions", contribution.raw)):
            assert await refusal(desk.control.post(verb, raw)) == "unit.not-yours"

    play(tmp_path, scene)


def test_two_results_for_one_assignment_are_refused(tmp_path: Path) -> None:
    """Equivocation: the first commitment in the log binds, whatever is said later."""

    async def scene(desk: Desk) -> None:
        assignment = await desk.lease(desk.eve)
        commitment, contribution, data = desk.eve.statements(assignment, 0.25)
        other_commitment, other, _ = desk.eve.statements(assignment, 0.75)
        await desk.control.post("commitments", commitment.raw)
        before = desk.ledger
        assert await refusal(desk.control.post("commitments", other_commitment.raw)) == (
            "unit.second-result"
        )
        assert await refusal(desk.control.post("contributions", other.raw)) == "commitment.missing"
        assert desk.ledger == before
        await desk.control.post("contributions", contribution.raw)
        assert await refusal(desk.control.post("contributions", other.raw)) == "unit.second-result"
        assert await refusal(desk.control.post("commitments", other_commitment.raw)) == (
            "unit.second-result"
        )
        await desk.upload(contribution, data)
        await desk.judge()
        assert desk.office.contribution(contribution.id)["accepted"] is True
        assert await refusal(desk.control.post("commitments", other_commitment.raw)) in (
            "unit.second-result", "unit.closed",
        )  # fmt: skip

    play(tmp_path, scene)


def test_bytes_of_another_result_cannot_be_uploaded(tmp_path: Path) -> None:
    async def scene(desk: Desk) -> None:
        assignment = await desk.lease(desk.eve)
        commitment, contribution, data = desk.eve.statements(assignment)
        _, other = desk.eve.update(assignment, 0.75)
        await desk.control.post("commitments", commitment.raw)
        await desk.control.post("contributions", contribution.raw)
        ref = contribution.record.update.blob
        wrong, _ = desk.eve.update(assignment, 0.75)
        assert await refusal(
            desk.control.put_manifest(other.blob, Manifest.build([wrong]).raw)
        ) == ("not-found")
        await desk.control.put_manifest(ref, Manifest.build([data]).raw)
        assert await refusal(desk.control.put_piece(ref, 0, wrong)) == "blob.corrupt"
        assert await desk.control.put_piece(ref, 0, data) == 0

    play(tmp_path, scene)


def test_after_the_hard_deadline_nothing_counts(tmp_path: Path) -> None:
    async def scene(desk: Desk) -> None:
        late, in_time = await desk.lease(desk.eve), await desk.lease(desk.ada)
        await desk.deliver(desk.ada, in_time)
        commitment, contribution, _ = desk.eve.statements(late)
        desk.clock[0] = late.record.hard_deadline + 1
        before = desk.ledger
        for verb, raw in (("commitments", commitment.raw), ("contributions", contribution.raw)):
            assert await refusal(desk.control.post(verb, raw)) == "unit.closed"
        assert desk.ledger == before
        await desk.judge()
        assert desk.office.desk.nodes[desk.ada.key.id].accepted == 1

    play(tmp_path, scene)


def told(desk: Desk, offset: float) -> float:
    """What a clock says that is `offset` seconds ahead."""
    return desk.clock[0] + offset


def test_clocks_a_day_apart_change_no_verdict(tmp_path: Path) -> None:
    """Deadlines are the coordinator's; what a node writes into `at` decides nothing."""

    async def scene(desk: Desk) -> None:
        for offset in (-DAY, DAY, -desk.clock[0] + 1):
            seed = 77 + int(offset) % 50
            liar = FakeNode(desk.office.network, seed, partial(told, desk, offset))
            await desk.control.post("register", liar.registration())
            assignment = await desk.lease(liar)
            assert assignment.record.issued == desk.clock[0]
            done = await desk.deliver(liar, assignment)
            await desk.judge()
            assert desk.office.contribution(done)["accepted"] is True

    play(tmp_path, scene)


def test_a_node_that_is_refused_again_and_again_gets_no_more_work(tmp_path: Path) -> None:
    async def scene(desk: Desk) -> None:
        limit = desk.office.desk.policy.refusals_to_quarantine
        for _ in range(limit):
            assignment = await desk.lease(desk.eve)
            await desk.deliver(desk.eve, assignment)
            shift = new_shift(desk.office)
            shift._jobs.refuse = lambda job: True
            while await shift.step():
                pass
        assert await refusal(desk.control.post("lease", desk.eve.request())) == "node.quarantined"
        assert await desk.lease(desk.ada) is not None

    play(tmp_path, scene)
