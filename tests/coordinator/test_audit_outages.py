"""Audits when something fails here: the worker, time away, losses that are no numbers."""

import asyncio

import pytest

from coordinator.fakes import FakeJobs, new_shift, open_office, work_off
from coordinator.test_audits import Clock, network, nodes_of, one_unit
from paris_coordinator import shift as shift_module
from paris_protocol.errors import ParisError


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def office(tmp_path, clock):
    office = open_office(network(tmp_path), clock)
    yield office
    office.close()


@pytest.mark.parametrize("second", [False, True])
def test_a_window_that_ran_out_while_nobody_was_there_to_answer_is_given_again(
    office, clock, second
):
    async def life():
        [node] = nodes_of(office, 1)
        id = await one_unit(office, node)
        shift = new_shift(office)
        await work_off(shift)
        if second:
            clock.at += 61
            await work_off(shift)
        clock.at += 10_000  # the coordinator was away
        await work_off(new_shift(office))
        assert office.contribution(id)["outcome"] == "auditing"
        [asked] = node.challenges(await office.beat(node.beat()))
        assert (asked.record.attempt, asked.record.deadline) == (2, clock.at + 30)
        await node.beats(office)
        await work_off(new_shift(office))
        assert office.contribution(id)["accepted"] is True

    asyncio.run(life())


def test_while_the_coordinator_is_there_two_windows_are_all(office, clock):
    async def life():
        [node] = nodes_of(office, 1)
        id = await one_unit(office, node)
        shift = new_shift(office)
        for _ in range(3):
            await work_off(shift)
            clock.at += 61
        assert office.contribution(id)["code"] == "audit.unanswered"
        assert len(office.desk.audits[id].challenges) == 2

    asyncio.run(life())


def test_a_canary_that_cannot_be_trained_here_is_the_coordinators_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(shift_module, "FIRST_WAIT", 0.0)

    class Weak(FakeJobs):
        def answer(self, job):
            raise ParisError("internal", "a job took longer than 3600 s")

    office = open_office(network(tmp_path, audit={"canary": "1", "rate": "0", "floor": "0"}))

    async def life():
        [node] = nodes_of(office, 1)
        id = await one_unit(office, node)
        await work_off(new_shift(office, Weak()))
        return office.contribution(id)

    facts = asyncio.run(life())
    assert (facts["accepted"], facts["code"]) == (True, "accepted")
    layers = office.desk.work_of(facts["id"]).judged.layers
    assert [layer.layer for layer in layers] == ["L0", "L1", "L2", "L3"]
    office.close()


def test_a_loss_that_is_no_number_is_damage_and_has_no_score(office):
    class Blown(FakeJobs):
        def verify(self, job):
            return super().verify(job) | {"private": {"n": "256", "before": "1"}}

    async def life():
        [node] = nodes_of(office, 1)
        id = await one_unit(office, node)
        await work_off(new_shift(office, Blown(refuse=lambda job: True)))
        return office.contribution(id)

    assert asyncio.run(life())["code"] == "loss.damage"


def test_a_rival_whose_update_is_gone_holds_up_nobody(tmp_path):
    office = open_office(network(tmp_path, experts=1))

    async def life():
        first, second = nodes_of(office, 2)
        old = await one_unit(office, first)
        jobs = FakeJobs(refuse=lambda job: job["assignment"]["node"] == first.key.id)
        shift = new_shift(office, jobs)
        await work_off(shift)
        assert office.contribution(old)["code"] == "loss.damage"
        office.store.remove(office.desk.work_of(old).done.update.blob)
        id = await one_unit(office, second)
        await work_off(shift)
        return office.contribution(id)["outcome"]

    assert asyncio.run(life()) == "auditing"
    office.close()
