"""Damaged shards, heads and journals: seen, set aside, made good where possible, never used."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bad_input.saying import Said, code_of, refused, tree
from coordinator.fakes import FakeJobs, FakeNode, found, new_shift, open_office, prepared_folder
from node.test_app import living, make_kit, until
from nodeworld import Office
from paris_coordinator import genesis as founding
from paris_coordinator.cli import main as coordinator
from paris_coordinator.genesis import Setup, init
from paris_node.app import Agent
from paris_node.cli import main as node
from paris_node.jobs import Jobs, needed_blobs
from paris_node.journal import Journal
from paris_node.volunteer import Phase, Snapshot
from paris_protocol.envelope import unseal
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment

Say = Callable[..., Said]
NET = "ab" * 32


def spoil(path: Path) -> None:
    """Change one byte of a file, whoever else has a link to it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


# ---------------------------------------------------------------- nodes


@pytest.mark.parametrize("which", [0, 1], ids=["head", "shard"])
def test_what_was_damaged_in_the_store_is_fetched_again(tmp_path: Path, which: int) -> None:
    office = Office(units=1)

    class Unlucky(Jobs):
        spoilt = False

        async def train(self, unit: str, hear: Callable[[int], None]) -> None:
            if not self.spoilt:
                self.spoilt = True
                raw = self.kit.journal.unit(unit) or b""
                record = unseal(raw, Assignment, office.network, None).record
                spoil(self.kit.store.path(needed_blobs(record)[which]))
            await super().train(unit, hear)

    async def play() -> None:
        kit = make_kit(tmp_path / "a", office)
        await asyncio.wait_for(Agent(kit, Unlucky(kit), until_finished=True).run(), 20)
        notes = [note for _, _, _, note in kit.journal.transitions()]
        assert notes.count("assigned") == 1, "the unit was given up"
        kit.journal.close()

    asyncio.run(play())
    assert len(office.accepted) == 1
    assert len(list((tmp_path / "a" / "store" / "corrupt").iterdir())) == 1


def test_a_shard_that_is_wrong_at_its_only_source(tmp_path: Path) -> None:
    office = Office(units=1)
    shard = office.genesis.record.clusters[0].shards[0].file.blob
    pieces: Any = office.control._pieces
    right = {key: data for key, data in pieces.items() if shard.id in key}
    assert right

    async def play() -> None:
        pieces.update((key, b"?" + data[1:]) for key, data in right.items())
        kit = make_kit(tmp_path / "a", office)
        async with living(kit) as agent:
            await until(lambda: agent.volunteer.why.startswith("blob."), "the refusal")
            assert agent.volunteer.phase is Phase.FETCHING and not kit.store.has(shard)
            pieces.update(right)
            await until(lambda: len(office.accepted) == 1, "the unit")

    asyncio.run(play())


def filled(path: Path) -> Journal:
    journal = Journal.open(path, NET)
    for number in range(20):
        journal.record(Snapshot(Phase.TRAINING, f"unit {number}"), "note " * 40, 1.0)
        journal.keep_unit(f"unit {number}", b"envelope" * 80, 1.0)
    return journal


def test_a_journal_damaged_anywhere_is_read_or_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    filled(path).close()
    whole, dice = path.read_bytes(), random.Random(1)
    for number in range(25):
        data = bytearray(whole)
        for place in dice.sample(range(len(data)), 20):
            data[place] ^= 1 << dice.randrange(8)
        if number == 0:  # a name that is no text, which SQLite quotes in its message
            data = bytearray(whole.replace(b"CREATE TABLE units", b"CREATE TABLE u\xf5its"))
            data = data.replace(b"tableunitsunits", b"tableu\xf5itsunits")
        path.write_bytes(data)
        try:
            journal = Journal.open(path, NET)
        except ParisError as error:
            assert error.code in ("state.corrupt", "state.newer", "state.other-network")
            assert path.read_bytes() == data
            continue
        try:
            journal.memory()
        except ParisError as error:
            assert error.code == "state.corrupt"
        if journal.renewed is not None:
            assert journal.renewed.read_bytes() == data
        journal.close()


@pytest.mark.parametrize("verb", ["status", "why", "receipts"])
def test_looking_at_a_damaged_journal_changes_nothing(say: Say, tmp_path: Path, verb: str) -> None:
    filled(tmp_path / "journal.sqlite").close()
    data = (tmp_path / "journal.sqlite").read_bytes()
    (tmp_path / "journal.sqlite").write_bytes(b"\0" * 4096 + data[4096:])
    (tmp_path / "genesis.json").write_bytes(b"{}")
    before = tree(tmp_path)
    refused(say(node, verb, "--state", tmp_path), "state.corrupt")
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- coordinators


def test_a_damaged_shard_founds_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(founding, "expert_schema", lambda _: None)
    prepared = prepared_folder(tmp_path / "prepared")
    shard = next(prepared.rglob("cluster*/*.safetensors"))
    whole = shard.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"\xff" * 64, whole + b"more"):
        shard.write_bytes(data)
        call = lambda: init(prepared, tmp_path / "state", Setup(), 1000)  # noqa: E731
        assert code_of(call) == "tensor.header"
        assert not (tmp_path / "state" / "settings.json").exists()
    shard.write_bytes(whole)
    assert init(prepared, tmp_path / "state", Setup(), 1000).network


def test_a_damaged_head_judges_nobody(tmp_path: Path) -> None:
    """The contribution waits, whoever sent it is not blamed, and the right file heals all."""
    state = found(tmp_path)

    async def play() -> None:
        office = open_office(state)
        shift, volunteer = new_shift(office, FakeJobs()), FakeNode(office.network, 1)
        await office.register(volunteer.registration())
        contribution = await volunteer.turn(office)
        head = office.desk.experts[office.desk.work_of(contribution).record.expert].head
        path = office.head_file(head)
        right = path.read_bytes()
        spoil(path)
        assert await shift.step()
        name, facts = shift.notes[-1]
        assert (name, facts["error"]) == ("verify", "blob.corrupt")
        assert office.contribution(contribution)["state"] == "queued"
        assert code_of(lambda: office.head_file(head)) == "blob.missing"
        assert office.store.add_bytes(right) == head.weights.blob
        shift._later.clear()
        while await shift.step():
            pass
        assert office.contribution(contribution)["accepted"] is True
        office.close()

    asyncio.run(play())


@pytest.mark.parametrize("damage", ["cut", "zeros", "prose", "row"])
def test_a_damaged_ledger(say: Say, tmp_path: Path, damage: str) -> None:
    state = found(tmp_path)
    path = state.ledger_file
    whole = path.read_bytes()
    genesis = state.genesis_file.read_bytes()[100:140]
    assert genesis in whole
    changed = genesis[:-1] + bytes([genesis[-1] ^ 1])
    path.write_bytes({
        "cut": whole[: len(whole) // 2], "zeros": b"\0" * 8192 + whole[8192:],
        "prose": b"no ledger " * 999, "row": whole.replace(genesis, changed),
    }[damage])  # fmt: skip
    before = path.read_bytes()
    for words in (("status",), ("serve", "--no-swarm")):
        refused(say(coordinator, *words, "--state", state.folder), "state.corrupt")
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["genesis.json", "settings.json", "log/checkpoint", "key.json"])
def test_a_damaged_file_of_a_coordinator(say: Say, tmp_path: Path, name: str) -> None:
    state = found(tmp_path)
    path = state.folder / name
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    code = "key.file" if name == "key.json" else "state.corrupt"
    refused(say(coordinator, "serve", "--no-swarm", "--state", state.folder), code)
    assert path.read_bytes() == before
