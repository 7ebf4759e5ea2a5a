"""The journal: every transition, the outbox, and what happens to a damaged one."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_node.journal import SCHEMA, Challenged, Journal, Letter, Receipt
from paris_node.volunteer import Phase, Snapshot
from paris_protocol.errors import ParisError

NET = "ab" * 32


def letter(name: str, unit: str = "u", kind: str = "contribution") -> Letter:
    return Letter(name, kind, unit, name.encode(), None, "waiting")


def test_what_was_recorded_is_there_after_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal.open(path, NET)
    assert journal.memory() == Snapshot()
    memory = Snapshot(Phase.OUTBOX, "u", False, 2)
    journal.record(memory, "done", 5.0)
    journal.keep_unit("u", b"envelope", 1.0)
    journal.post([letter("a", kind="commitment"), letter("b")])
    journal.keep_receipt(Receipt("b", 2.0, "queued", {"x": [1]}))
    journal.close()
    again = Journal.open(path, NET)
    assert again.memory() == memory
    assert again.unit("u") == b"envelope" and again.unit("v") is None
    assert [one.id for one in again.letters("u")] == ["a", "b"]
    assert again.receipts() == [Receipt("b", 2.0, "queued", {"x": [1]})]
    assert again.transitions() == [(5.0, "outbox", "u", "done")]
    assert again.renewed is None
    again.close()


def test_what_changes_keeps_its_place(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal.sqlite", NET)
    for name in "ab":
        journal.keep_receipt(Receipt(name, 1.0, "queued", {}))
        journal.keep_challenge(Challenged(name, "u", b"asked", None, "open"))
    journal.keep_receipt(Receipt("a", 2.0, "judged", {"x": 1}))
    journal.keep_challenge(Challenged("a", "u", b"asked", b"answer", "answered"))
    assert journal.receipts()[0] == Receipt("a", 2.0, "judged", {"x": 1})
    assert journal.challenges()[0] == Challenged("a", "u", b"asked", b"answer", "answered")
    assert [one.contribution for one in journal.receipts()] == ["a", "b"]
    assert [one.id for one in journal.challenges()] == ["a", "b"]
    journal.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["post", "settle"])), max_size=12)
)
def test_a_letter_stands_once_and_waits_until_it_is_settled(steps: list[tuple[str, str]]) -> None:
    journal = Journal(sqlite3.connect(":memory:", isolation_level=None))
    from paris_node.journal import _TABLES

    journal._db.executescript(_TABLES)
    model: dict[str, str] = {}
    for name, verb in steps:
        if verb == "post":
            journal.post([letter(name, unit=name)])
            model.setdefault(name, "waiting")
        else:
            journal.settle(name, "acknowledged")
            model.update({name: "acknowledged"} if name in model else {})
    assert {one.id: one.state for one in journal.letters()} == model
    waiting = [name for name, state in model.items() if state == "waiting"]
    assert [one.id for one in journal.letters(state="waiting")] == waiting
    journal.close()


def test_letters_are_posted_all_or_none(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j", NET)
    broken = Letter("b", "contribution", None, b"", None, "waiting")  # type: ignore[arg-type]
    with pytest.raises(ParisError):
        journal.post([letter("a"), broken])
    assert journal.letters() == []
    journal.close()


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from paris_node.journal import Journal, Letter
from paris_node.volunteer import Phase, Snapshot
journal = Journal.open(Path(sys.argv[1]), "ab" * 32)
number = len(journal.letters()) // 2
while True:
    unit = str(number)
    journal.record(Snapshot(Phase.TRAINING, unit), "step", 1.0)
    journal.post([Letter(f"{unit}/{k}", k, unit, b"x" * 2000, None, "waiting") for k in ("c", "r")])
    journal.record(Snapshot(Phase.OUTBOX, unit), "done", 2.0)
    print(number, flush=True)
    number += 1
"""


def test_kill_9_in_mid_write_loses_nothing_that_was_told(tmp_path: Path) -> None:
    path, told = tmp_path / "journal.sqlite", -1
    for rounds in (3, 9, 30):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(rounds):
            told = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().split()
        told = int(rest[-1]) if rest else told
        child.wait()
        child.stdout.close()
        journal = Journal.open(path, NET)
        units = {one.unit for one in journal.letters()}
        assert units >= {str(number) for number in range(told + 1)}
        assert all(len(journal.letters(unit)) == 2 for unit in units), "half a unit was posted"
        assert journal.renewed is None
        journal.close()


def test_a_damaged_journal_is_moved_aside_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    Journal.open(path, NET).close()
    for number, data in enumerate(
        [b"this is no database at all" * 200, path.read_bytes()[:5000]], 1
    ):
        path.write_bytes(data)
        journal = Journal.open(path, NET)
        assert journal.renewed == tmp_path / f"journal.sqlite.damaged-{number}"
        assert journal.renewed.read_bytes() == data
        assert journal.memory() == Snapshot()
        journal.close()


def test_a_journal_of_another_network_or_a_newer_version_is_refused_untouched(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.sqlite"
    Journal.open(path, NET).close()
    with pytest.raises(ParisError) as refused:
        Journal.open(path, "cd" * 32)
    assert refused.value.code == "state.other-network"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={SCHEMA + 1}")
    connection.close()
    with pytest.raises(ParisError) as refused:
        Journal.open(path, NET)
    assert refused.value.code == "state.newer"
    assert [one.name for one in tmp_path.iterdir() if "damaged" in one.name] == []


def test_a_full_disk_is_said_so_and_changes_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j", NET)
    journal.record(Snapshot(Phase.TRAINING, "u"), "before", 1.0)
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(ParisError) as refused:
        journal.keep_unit("v", b"x" * 100_000, 1.0)
    assert refused.value.code == "disk.full"
    journal._db.execute("PRAGMA max_page_count=100000")
    assert journal.unit("v") is None
    assert journal.memory() == Snapshot(Phase.TRAINING, "u")
    journal.close()


def test_reading_beside_a_writer_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    assert Journal.read(path) is None
    writer = Journal.open(path, NET)
    writer.record(Snapshot(Phase.COMMIT, "u"), "x", 1.0)
    reader = Journal.read(path)
    assert reader is not None and reader.memory().phase is Phase.COMMIT
    with pytest.raises(ParisError):
        reader.set_fact("a", "b")
    reader.close()
    writer.close()


def test_a_journal_of_the_version_before_is_read_and_taken_further(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal.open(path, NET)
    journal.post([letter("a")])
    journal._db.executescript("DROP TABLE challenges; PRAGMA user_version=1;")
    journal.close()
    only_read = Journal.read(path)
    assert only_read is not None and only_read.challenges() == []
    only_read.close()
    again = Journal.open(path, NET)
    one = Challenged("c", "u", b"envelope", None, "open")
    again.keep_challenge(one)
    again.keep_challenge(replace(one, id="d", state="answered"))
    again.keep_challenge(replace(one, opening=b"opening"))
    assert again.challenges("open") == [replace(one, opening=b"opening")]
    assert {each.id for each in again.challenges()} == {"c", "d"}
    assert [each.id for each in again.letters()] == ["a"]
    again.close()
