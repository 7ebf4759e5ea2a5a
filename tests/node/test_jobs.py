"""The jobs: whose word is believed, which leases are refused, and what is sent again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nodeworld import NODE, NOW, ROOT, Office, key, make_kit, make_policy
from paris_node.jobs import Jobs, NetworkOver, is_final
from paris_node.leases import check_lease, needed_blobs, version_tuple
from paris_node.machine import FakeMachine
from paris_node.volunteer import Phase
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.net.memory import MemoryControl
from paris_protocol.records import Head


@pytest.fixture
def office() -> Office:
    return Office()


def silent(done: int) -> None:
    pass


def ask(tmp_path: Path, office: Office, **more: Any) -> str:
    kit = make_kit(tmp_path / "a", office, **more)
    try:
        return asyncio.run(Jobs(kit).ask())
    finally:
        kit.journal.close()


def test_a_lease_is_journalled_and_says_what_the_machine_has(
    tmp_path: Path, office: Office
) -> None:
    unit = ask(tmp_path, office, machine=FakeMachine(memory=[1234], disk=[5678]))
    assert unit == office.granted[0].id
    request = office.leases[0]
    assert (request.memory_mb, request.disk_mb, request.at) == (1234, 5678, int(NOW))
    assert ask(tmp_path, office) == unit, "the open assignment is taken again"


@pytest.mark.parametrize("signer", ["mallory", "node"])
def test_an_assignment_signed_by_another_key_is_not_believed(
    tmp_path: Path, office: Office, signer: str
) -> None:
    record = office.assignment(0, NODE.id).record
    office.granted.append(seal(record, key(signer), office.network))
    with pytest.raises(ParisError) as refused:
        ask(tmp_path, office)
    assert refused.value.code == "record.signer"


def test_an_assignment_of_another_network_is_not_believed(tmp_path: Path, office: Office) -> None:
    office.granted.append(seal(office.assignment(0, NODE.id).record, ROOT, "cd" * 32))
    with pytest.raises(ParisError) as refused:
        ask(tmp_path, office)
    assert refused.value.code == "record.network"


def test_a_lease_that_would_break_isolation_is_refused(office: Office) -> None:
    genesis = office.genesis.record
    fine = office.assignment(0, NODE.id).record
    check_lease(fine, NODE.id, genesis)
    foreign = genesis.clusters[1].shards[:1]
    other_start = Head(round=0, weights=genesis.clusters[0].shards[0].file)
    for changes in (
        {"shards": foreign},
        {"shards": fine.shards + foreign},
        {"shards": ()},
        {"expert": 7},
        {"parent": other_start},
        {"steps": 0},
        {"kind": "audit"},
    ):
        with pytest.raises(ParisError) as refused:
            check_lease(fine.model_copy(update=changes), NODE.id, genesis)
        assert refused.value.code == "structure.lineage", changes
    with pytest.raises(ParisError) as refused:
        check_lease(fine, key("another").id, genesis)
    assert refused.value.code == "unit.not-yours"


def test_the_end_of_the_network_and_a_newer_version_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(NetworkOver):
        ask(tmp_path, Office(units=0))
    office = Office()
    office.control.policies[-1] = make_policy(office.network, min_version="9.1").raw
    with pytest.raises(ParisError) as refused:
        ask(tmp_path / "b", office) if (tmp_path / "b").mkdir() is None else None
    assert refused.value.code == "network.version"


def test_a_unit_whose_time_is_over_is_left(tmp_path: Path, office: Office) -> None:
    late = office.assignment(0, NODE.id, hard_deadline=int(NOW) - 1)
    office.granted.append(late)
    kit = make_kit(tmp_path / "a", office)
    jobs = Jobs(kit)
    unit = asyncio.run(jobs.ask())
    for phase in (Phase.LEASED, Phase.FETCHING, Phase.TRAINING):
        with pytest.raises(ParisError) as refused:
            asyncio.run(jobs.run(phase, unit, silent))
        assert refused.value.code == "unit.closed" and is_final(phase, "unit.closed")
    kit.journal.close()


def test_only_the_pieces_that_lack_are_sent(tmp_path: Path, office: Office) -> None:
    kit = make_kit(tmp_path / "a", office)
    jobs = Jobs(kit)

    async def play() -> None:
        unit = await jobs.ask()
        await jobs.run(Phase.LEASED, unit, silent)
        await jobs.run(Phase.FETCHING, unit, silent)
        assert all(kit.store.has(ref) for ref in needed_blobs(jobs.assignment(unit)))
        await jobs.run(Phase.TRAINING, unit, silent)
        with pytest.raises(ParisError):  # the order of the two is the coordinator's to insist on
            await jobs.hand_in(unit, silent)
        await jobs.run(Phase.COMMIT, unit, silent)
        for _ in range(3):
            await jobs.run(Phase.OUTBOX, unit, silent)
        puts = [call for call in office.control.asked if call.startswith("put piece")]
        assert len(puts) == 1, "a piece was sent twice"
        await jobs.run(Phase.ACK, unit, silent)
        await jobs.run(Phase.ACK, unit, silent)

    asyncio.run(play())
    assert len(office.contributions) == len(office.accepted) == 1
    kit.journal.close()


def test_training_again_after_a_kill_gives_the_same_statements(
    tmp_path: Path, office: Office
) -> None:
    kit = make_kit(tmp_path / "a", office)
    jobs = Jobs(kit)

    async def play() -> list[str]:
        unit = await jobs.ask()
        await jobs.run(Phase.FETCHING, unit, silent)
        await jobs.run(Phase.TRAINING, unit, silent)
        return [letter.id for letter in kit.journal.letters(unit)]

    first = asyncio.run(play())
    kit.journal._db.execute("DELETE FROM outbox")  # killed just before the letters were posted
    assert asyncio.run(play()) == first
    kit.journal.close()


def test_which_failures_end_a_unit() -> None:
    for code in ("unit.closed", "structure.lineage", "tensor.header", "machine.too-small"):
        assert is_final(Phase.TRAINING, code) and not is_final(Phase.IDLE, code)
    for code in ("network.down", "disk.full", "trainer.failed", "record.signer", "internal"):
        assert not is_final(Phase.OUTBOX, code)


def test_versions_are_compared_as_numbers() -> None:
    assert version_tuple("0.10.1") > version_tuple("0.9.9")
    assert version_tuple("0.4.1rc1") == (0, 4, 1)
    assert version_tuple("nonsense") == ()


def test_the_memory_control_is_the_double_that_the_office_uses(office: Office) -> None:
    assert isinstance(office.control, MemoryControl)
