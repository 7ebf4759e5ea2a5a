"""Volunteers as auditors: two of three, liars, colluders, neighbours, absentees."""

import asyncio

import pytest

from coordinator import synthetic as made
from coordinator.fakes import FakeJobs, new_shift, open_office, work_off
from coordinator.synthetic import refused
from coordinator.test_audits import Clock, joined, network, nodes_of, one_unit, verdicts_of


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def crowd(tmp_path, clock):
    """Everybody is of standing at once, so that volunteers audit each other."""
    office = open_office(
        network(tmp_path, audit={"auditors": 3, "probation": 0, "floor": "0"}), clock
    )
    yield office
    office.close()


async def audited(office, nodes, jobs=None, blocks=None):
    """One contribution of the first node, audited by the others: its facts and the shift."""
    trainer, *others = nodes
    await joined(office, *others)
    blocks = blocks or {}
    for node in nodes:
        await office.register(node.registration())
        await office.beat(node.beat(), blocks.get(node, "127.0.0.1"))
    id = await one_unit(office, trainer)
    jobs = jobs or FakeJobs()
    shift = new_shift(office, jobs)
    await work_off(shift)
    await trainer.beats(office, blocks.get(trainer, "127.0.0.1"))
    await work_off(shift)
    for node in others:
        await node.turn(office)
    await work_off(shift)
    return id, shift, jobs


def replays(jobs):
    return [job for job in jobs.done if job["job"] == "replay"]


def test_two_volunteers_of_one_mind_decide(crowd):
    id, _, jobs = asyncio.run(audited(crowd, nodes_of(crowd, 4)))
    audit = crowd.desk.audits[id]
    assert len(audit.called) == 3
    assert crowd.contribution(id)["accepted"] is True
    assert replays(jobs) == []
    [verdict] = verdicts_of(crowd)[1]
    assert len(verdict.reports) == 3
    assert dict(verdict.layers[4].numbers)["reports"] == "3"


def test_a_lying_auditor_is_found_and_loses_standing(crowd):
    nodes = nodes_of(crowd, 4)
    nodes[2].says = False
    id, _, jobs = asyncio.run(audited(crowd, nodes))
    assert crowd.contribution(id)["accepted"] is True
    assert len(replays(jobs)) == 1, "the coordinator arbitrates"
    assert crowd.desk.nodes[nodes[2].key.id].standing == 0
    assert crowd.desk.nodes[nodes[2].key.id].refusals == 1
    assert [crowd.desk.nodes[nodes[i].key.id].refusals for i in (0, 1, 3)] == [0, 0, 0]
    assert crowd.desk.revocations == {}


def test_colluding_auditors_revoke_nobody(crowd):
    nodes = nodes_of(crowd, 4)
    for node in nodes[1:]:
        node.says = False
    id, _, jobs = asyncio.run(audited(crowd, nodes))
    assert crowd.contribution(id)["accepted"] is True
    assert len(replays(jobs)) == 1
    assert crowd.desk.revocations == {}
    assert all(crowd.desk.nodes[node.key.id].refusals == 1 for node in nodes[1:])


def test_unanimous_passes_are_checked_at_the_floor_rate(tmp_path, clock):
    office = open_office(
        network(tmp_path, audit={"auditors": 3, "probation": 0, "floor": "1"}), clock
    )
    nodes = nodes_of(office, 4)
    jobs = FakeJobs(cheated=lambda assignment: True)
    id, _, _ = asyncio.run(audited(office, nodes, jobs))
    assert len(replays(jobs)) == 1
    assert office.contribution(id)["code"] == "audit.mismatch"
    assert all(office.desk.nodes[node.key.id].refusals == 1 for node in nodes[1:])
    office.close()


def test_auditors_never_come_from_the_trainers_block(crowd):
    nodes = nodes_of(crowd, 5)
    blocks = {nodes[0]: "192.0.2.7", nodes[1]: "192.0.2.200"}
    blocks |= {node: "198.51.100.1" for node in nodes[2:]}
    id, _, _ = asyncio.run(audited(crowd, nodes, blocks=blocks))
    called = crowd.desk.audits[id].called
    assert set(called) == {node.key.id for node in nodes[2:]}
    for file in crowd.state.log.rglob("*"):
        assert not file.is_file() or b"192.0.2" not in file.read_bytes()


def test_auditors_who_stay_away_are_replaced_by_the_coordinator(crowd, clock):
    async def life():
        nodes = nodes_of(crowd, 4)
        id, shift, jobs = await audited_by_nobody(crowd, nodes)
        assert crowd.contribution(id)["outcome"] == "auditing"
        clock.at += 101
        await work_off(shift)
        assert len(replays(jobs)) == 1
        return id

    assert crowd.contribution(asyncio.run(life()))["accepted"] is True


async def audited_by_nobody(office, nodes):
    for node in nodes:
        await office.register(node.registration())
        await office.beat(node.beat(), "127.0.0.1")
    id = await one_unit(office, nodes[0])
    jobs = FakeJobs()
    shift = new_shift(office, jobs)
    await work_off(shift)
    await nodes[0].beats(office)
    await work_off(shift)
    return id, shift, jobs


def test_false_reports_change_nothing(crowd):
    async def life():
        nodes = nodes_of(crowd, 4)
        id, _, _ = await audited_by_nobody(crowd, nodes)
        auditor, other = nodes[1], nodes[2]
        answer = await crowd.lease(auditor.request())
        assignment = auditor.assignment(answer)
        assert assignment.record.kind == "audit"
        assert await crowd.lease(auditor.request()) == answer
        task = assignment.record.audit
        before = made.snapshot(crowd.desk)

        async def fails(code, by=auditor, **changed):
            record = made.report_for(id, task.segments, True, assignment.id, by.key.id)
            with refused(code):
                await crowd.audit(by.seal(record.model_copy(update=changed)).raw)
            assert made.snapshot(crowd.desk) == before

        await fails("unit.not-yours", by=other)
        await fails("audit.unknown", assignment=None)
        await fails("audit.unknown", assignment="0" * 64)
        await fails("audit.unknown", contribution="0" * 64)
        await fails("audit.unknown", segments=(made.segment(99),))
        await fails("record.malformed", segments=(made.segment(task.segments[0], False),))
        for _ in range(2):
            assert await auditor.audit(crowd, assignment)
        with refused("audit.closed"):
            record = made.report_for(id, task.segments, False, assignment.id, auditor.key.id)
            await crowd.audit(auditor.seal(record).raw)

    asyncio.run(life())
