"""The ledger: durable, append-only, idempotent; damaged, newer and full are said as they are."""

import sqlite3

import pytest

from coordinator.synthetic import refused
from paris_coordinator.ledger import STATEMENT, Entry, Envelope, Ledger, Person


def signed(number):
    return Entry(
        number, STATEMENT, Envelope(f"{number:064x}", "beat", "ed25519:x", b"raw%d" % number)
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def test_entries_come_back_in_order_after_reopening(path):
    ledger = Ledger(path)
    entries = [signed(1), Entry(2, "uploaded", None, '{"contribution":"x"}'), signed(3)]
    ledger.append(entries[:2])
    ledger.append(entries[2:])
    ledger.close()
    again = Ledger(path)
    assert list(again.entries()) == entries
    assert again.statement_ids(frozenset({"beat"})) == [
        entries[0].statement.id,
        entries[2].statement.id,
    ]
    assert again.envelope(entries[0].statement.id) == entries[0].statement
    assert again.envelope("0" * 64) is None


def test_a_statement_is_kept_once(path):
    ledger = Ledger(path)
    ledger.append([signed(1), signed(1)])
    ledger.append([signed(1)])
    assert len(list(ledger.entries())) == 1


def test_nothing_can_be_changed_or_removed(path):
    ledger = Ledger(path)
    ledger.append([signed(1)])
    ledger.close()
    with sqlite3.connect(path) as connection:
        for table in ("events", "statements"):
            for change in (f"DELETE FROM {table}", f"UPDATE {table} SET rowid = 9"):
                with pytest.raises(sqlite3.DatabaseError, match="append-only"):
                    connection.execute(change)


def test_all_of_a_batch_or_nothing(path):
    ledger = Ledger(path)
    broken = Entry(2, "uploaded", None, None)
    with refused("state.corrupt"):
        ledger.append([signed(1), broken])
    assert list(ledger.entries()) == []


def test_a_full_disk_is_said_and_leaves_nothing(path):
    ledger = Ledger(path)
    ledger.append([signed(1)])
    with ledger._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    big = Entry(2, "uploaded", None, '"' + "x" * 100_000 + '"')
    with refused("disk.full"):
        ledger.append([signed(2), big])
    assert [entry.at for entry in ledger.entries()] == [1]


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 300])
def test_a_damaged_file_is_refused(path, damage):
    Ledger(path).close()
    whole = path.read_bytes()
    path.write_bytes(damage or whole[: len(whole) // 2] + b"\0" * 100)
    with refused("state.corrupt"):
        Ledger(path)


def test_a_newer_schema_is_refused_and_left_alone(path):
    Ledger(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with refused("state.newer"):
        Ledger(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [
            ("9999",)
        ]


def test_reading_needs_a_ledger_that_is_there(path):
    with refused("state.missing"):
        Ledger(path, readonly=True)
    assert not path.exists()


def test_people_are_replaced_and_erased(path):
    ledger = Ledger(path)
    ledger.remember(Person("n", "A", "cpu", 1))
    ledger.remember(Person("n", "B", "gpu", 2))
    assert ledger.person("n") == Person("n", "B", "gpu", 2)
    ledger.erase("n")
    assert ledger.people() == {}
