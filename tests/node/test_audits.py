"""Audit work: which audits are taken, what is fetched and compared, what is reported and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodeworld import NODE, ROOT, STEPS, Office, digest, key, make_kit
from paris_node.jobs import Jobs
from paris_node.kit import Kit
from paris_node.leases import check_audited, check_lease, needed_blobs
from paris_node.volunteer import Phase
from paris_protocol.envelope import Sealed, seal
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    Assignment,
    AuditTask,
    Commitment,
    Contribution,
    OpenState,
    TensorFile,
)
from paris_protocol.tensors import states_root

OTHER = key("another")
PHASES = list(Phase)[1:]


def silent(done: int) -> None:
    pass


def audit(office: Office, **changes: Any) -> Sealed[Assignment]:
    """Another node's finished work, in the log, and the order to audit it."""
    lease = office.assignment(0, OTHER.id)
    states = tuple(digest(f"state {place}") for place in range(3))
    commitment = seal(
        Commitment(
            assignment=lease.id,
            states=states,
            states_root=states_root(states),
            update_root=digest("update"),
            steps=STEPS,
        ),
        OTHER,
        office.network,
    )
    update = TensorFile(blob=office.control.add_blob(b"update"), root=digest("update"))
    result = seal(
        Contribution(
            assignment=lease.id,
            commitment=commitment.id,
            update=update,
            steps=STEPS,
            samples=4 * STEPS,
            loss="0.5",
            seconds=1,
            numerics=digest("there"),
        ),
        OTHER,
        office.network,
    )
    office.control.statements |= {one.id: one.raw for one in (lease, commitment, result)}
    opened = tuple(
        OpenState(
            index=place,
            file=TensorFile(blob=office.control.add_blob(b"state %d" % place), root=states[place]),
        )
        for place in (1, 2)
    )
    task = AuditTask(
        contribution=result.id,
        assignment=lease.id,
        commitment=commitment.id,
        segments=(1,),
        states=opened,
    )
    task = task.model_copy(update=changes.pop("task", {}))
    record = lease.record.model_copy(
        update={"kind": "audit", "node": NODE.id, "audit": task, **changes}
    )
    return seal(record, ROOT, office.network)


async def whole(kit: Kit) -> str:
    jobs = Jobs(kit)
    unit = await jobs.ask()
    for phase in PHASES:
        await jobs.run(phase, unit, silent)
        await jobs.run(phase, unit, silent)
    return unit


def test_an_audit_goes_through_the_same_phases_and_ends_in_a_report(tmp_path: Path) -> None:
    office = Office(units=2)
    sealed = audit(office)
    office.granted.append(sealed)
    kit = make_kit(tmp_path / "a", office)
    assert asyncio.run(whole(kit)) == sealed.id
    [order] = kit.trainer.replayed
    assert (order["numerics"], order["rules"]) == (digest("there"), None)
    assert [place for place, _ in order["states"]] == [1, 2]
    assert order["bytes"] == [b"state 1", b"state 2"]
    reports = {(one.assignment, one.auditor, one.passed) for one in office.reports}
    assert reports == {(sealed.id, NODE.id, True)}
    assert office.commitments == {} and office.contributions == {}
    assert not (kit.folder / "work" / sealed.id).exists()
    assert list((kit.store.folder / "pins").iterdir()) == []
    task = sealed.record.audit
    assert task is not None and not any(kit.store.has(one.file.blob) for one in task.states)
    kit.journal.close()


def test_a_report_is_the_same_after_a_kill(tmp_path: Path) -> None:
    office = Office(units=2)
    office.granted.append(audit(office))
    kit = make_kit(tmp_path / "a", office)

    async def play() -> None:
        jobs, now = Jobs(kit), kit.clock()
        unit = await jobs.ask()
        for phase in PHASES[:4]:
            await jobs.run(phase, unit, silent)
        kit.clock = lambda: now + 9
        await jobs.run(Phase.TRAINING, unit, silent)
        for _ in range(2):
            await jobs.run(Phase.OUTBOX, unit, silent)
        assert len(kit.trainer.replayed) == 1
        assert len({one.at for one in office.reports}) == 1

    asyncio.run(play())
    kit.journal.close()


@pytest.mark.parametrize(
    "harm",
    [
        {"audit": None},
        {"kind": "train"},
        {"task": {"segments": ()}},
        {"task": {"segments": (2,)}},
        {"task": {"states": ()}},
        {"shards": ()},
        {"steps": 0},
    ],
)
def test_an_audit_that_does_not_hang_together_is_not_taken(harm: dict[str, Any]) -> None:
    office = Office()
    check_lease(audit(office).record, NODE.id, office.genesis.record)
    with pytest.raises(ParisError) as refused:
        check_lease(audit(office, **harm).record, NODE.id, office.genesis.record)
    assert refused.value.code == "structure.lineage"


def twice(task: AuditTask) -> tuple[OpenState, ...]:
    return (*task.states, task.states[0])


def beyond(task: AuditTask) -> tuple[OpenState, ...]:
    return (*task.states, task.states[0].model_copy(update={"index": 3}))


@pytest.mark.parametrize("states", [twice, beyond])
def test_states_that_cannot_be_are_not_fetched(
    states: Callable[[AuditTask], tuple[OpenState, ...]],
) -> None:
    office = Office()
    task = audit(office).record.audit
    assert task is not None
    with pytest.raises(ParisError) as refused:
        made = audit(office, task={"states": states(task)}).record
        check_lease(made, NODE.id, office.genesis.record)
    assert refused.value.code == "structure.lineage"


@pytest.mark.parametrize(
    "harm", [{"seed": digest("another")}, {"steps": STEPS + 5}, {"commit_every": 2}, {"batch": 8}]
)
def test_nothing_but_the_audited_training_is_replayed(tmp_path: Path, harm: dict[str, Any]) -> None:
    office = Office(units=2)
    states = {"task": {"segments": (0,)}} if "commit_every" in harm else {}
    office.granted.append(audit(office, **states, **harm))
    kit = make_kit(tmp_path / "a", office)
    with pytest.raises(ParisError) as refused:
        asyncio.run(whole(kit))
    assert refused.value.code == "structure.lineage"
    assert kit.trainer.replayed == [] and office.reports == []
    kit.journal.close()


def test_nobody_audits_his_own_work_or_an_audit(tmp_path: Path) -> None:
    office = Office()
    made = audit(office).record
    own = office.assignment(0, NODE.id).record
    for audited in (own, made.model_copy(update={"node": OTHER.id})):
        with pytest.raises(ParisError) as refused:
            check_audited(made, audited)
        assert refused.value.code == "structure.lineage"
    check_audited(made, office.assignment(0, OTHER.id).record)


def test_a_state_that_was_not_committed_is_not_replayed_from(tmp_path: Path) -> None:
    office = Office(units=2)
    task = audit(office).record.audit
    assert task is not None
    first = task.states[0].file.model_copy(update={"root": digest("forged")})
    states = (task.states[0].model_copy(update={"file": first}), task.states[1])
    office.granted.append(audit(office, task={"states": states}))
    kit = make_kit(tmp_path / "a", office)
    with pytest.raises(ParisError) as refused:
        asyncio.run(whole(kit))
    assert refused.value.code == "structure.lineage" and office.reports == []
    kit.journal.close()


def test_training_needs_no_opened_states() -> None:
    office = Office()
    assert len(needed_blobs(office.assignment(0, NODE.id).record)) == 2
    assert len(needed_blobs(audit(office).record)) == 4
