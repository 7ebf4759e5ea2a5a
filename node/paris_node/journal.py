"""The volunteer's memory: every transition, the open unit and the outbox, in one SQLite file.

Written (WAL, synchronous=FULL) before the effect it records, so that kill -9 at any point resumes.
An envelope stays in the outbox until the coordinator has acknowledged it. Refused: a journal of a
newer version (`state.newer`) or of another network (`state.other-network`); a damaged one is moved
aside and made again, and `renewed` tells so::

    journal = Journal.open(state / "journal.sqlite", network)
    journal.record(volunteer.memory, "assigned", at)
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Final

from paris_node.volunteer import Phase, Snapshot
from paris_protocol.errors import ParisError

SCHEMA: Final = 2
KEPT_TRANSITIONS: Final = 20_000
_FULL: Final = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"})
_DAMAGED: Final = frozenset({"SQLITE_CORRUPT", "SQLITE_NOTADB"})
"""What makes a journal worthless; any other failure to open it says nothing about its content."""
_ERRORS: Final = (sqlite3.Error, UnicodeDecodeError)
"""SQLite quotes the damaged text in its message, which then may be no text."""
_TABLES: Final = """
CREATE TABLE facts(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE transitions(
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, phase TEXT NOT NULL, unit TEXT, note TEXT NOT NULL
) STRICT;
CREATE TABLE units(id TEXT PRIMARY KEY, envelope BLOB NOT NULL, at REAL NOT NULL) STRICT;
CREATE TABLE outbox(
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, unit TEXT NOT NULL,
    envelope BLOB NOT NULL, blob TEXT, state TEXT NOT NULL
) STRICT;
CREATE TABLE receipts(
    contribution TEXT PRIMARY KEY, at REAL NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL
) STRICT;
"""
_SINCE_2: Final = """
CREATE TABLE challenges(
    id TEXT PRIMARY KEY, unit TEXT NOT NULL, envelope BLOB NOT NULL, opening BLOB,
    state TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Letter:
    """An envelope in the outbox; `state` is waiting, acknowledged, or the code that refused it."""

    id: str
    kind: str
    unit: str
    envelope: bytes
    blob: str | None
    state: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known about a contribution: its state and the coordinator's last answer."""

    contribution: str
    at: float
    state: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Challenged:
    """A challenge about a unit of ours and the answer to it, once that is made.

    `state` is open, answered, or the code that ended it.
    """

    id: str
    unit: str
    envelope: bytes
    opening: bytes | None
    state: str


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> ParisError:
    full = getattr(error, "sqlite_errorname", "") in _FULL
    return ParisError("disk.full" if full else "state.corrupt", f"journal: {error}")


class Journal:
    """One process has it open at a time (the agent holds the folder's lock); others only read."""

    def __init__(self, connection: sqlite3.Connection, renewed: Path | None = None) -> None:
        self._db = connection
        self.renewed = renewed
        """Where a damaged predecessor was moved to, if there was one."""

    @classmethod
    def open(cls, path: Path, network: str) -> Journal:
        """Open or make the journal of a network at `path`; see the module for what is refused."""
        renewed = None
        try:
            connection = _connect(path)
        except _ERRORS as error:
            if getattr(error, "sqlite_errorname", "SQLITE_CORRUPT") not in _DAMAGED:
                raise _refusal(error) from error
            renewed = _move_aside(path)
            with _errors():
                connection = _connect(path)
        journal = cls(connection, renewed)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            connection.close()
            raise ParisError("state.newer", f"journal of version {version}")
        with _errors():
            if version < SCHEMA:
                missing = _SINCE_2 if version else _TABLES + _SINCE_2
                connection.executescript(f"BEGIN;{missing}PRAGMA user_version={SCHEMA};COMMIT;")
            known = journal.fact("network")
            if known is None:
                journal.set_fact("network", network)
        if known not in (None, network):
            connection.close()
            raise ParisError("state.other-network", f"{str(known)[:12]}")
        return journal

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """Open read-only beside a running agent or after its end; None where there is none."""
        if not path.is_file():
            return None
        try:
            connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        except _ERRORS as error:
            raise ParisError("state.corrupt", f"journal: {error}") from error
        if version > SCHEMA:
            connection.close()
            raise ParisError("state.newer", f"journal of version {version}")
        return cls(connection) if version else None

    def close(self) -> None:
        """Close the file; nothing is pending, since every write is its own transaction."""
        self._db.close()

    # ------------------------------------------------------------ facts and transitions

    def fact(self, key: str) -> str | None:
        """A remembered value, or None."""
        with _errors():
            row = self._db.execute("SELECT value FROM facts WHERE key=?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_fact(self, key: str, value: str) -> None:
        """Remember a value."""
        with _errors():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES(?,?)", (key, value))

    def memory(self) -> Snapshot:
        """The volunteer's state at the last transition; a fresh one if there is none."""
        text = self.fact("volunteer")
        if text is None:
            return Snapshot()
        try:
            value = json.loads(text)
            return Snapshot(Phase(value.pop("phase")), **value)
        except (ValueError, TypeError, KeyError) as error:
            raise ParisError("state.corrupt", "the journal's last state cannot be read") from error

    def record(self, memory: Snapshot, note: str, at: float) -> None:
        """Write down a transition, atomically with the state it led to."""
        with _errors(), self._transaction():
            self.set_fact("volunteer", json.dumps(asdict(memory), sort_keys=True))
            last = self._db.execute(
                "INSERT INTO transitions(at, phase, unit, note) VALUES(?,?,?,?)",
                (at, memory.phase.value, memory.unit, note),
            ).lastrowid
            self._db.execute(
                "DELETE FROM transitions WHERE seq<=?", ((last or 0) - KEPT_TRANSITIONS,)
            )

    def transitions(self, last: int = 50) -> list[tuple[float, str, str | None, str]]:
        """(time, phase, unit, note) of the last transitions, oldest first."""
        with _errors():
            rows = self._db.execute(
                "SELECT at, phase, unit, note FROM transitions ORDER BY seq DESC LIMIT ?", (last,)
            ).fetchall()
        return [tuple(row) for row in reversed(rows)]

    # ------------------------------------------------------------ units

    def keep_unit(self, unit: str, envelope: bytes, at: float) -> None:
        """Keep the signed assignment of a unit."""
        with _errors():
            self._db.execute(
                "INSERT INTO units VALUES(?,?,?) ON CONFLICT(id) DO NOTHING", (unit, envelope, at)
            )

    def unit(self, unit: str) -> bytes | None:
        """The envelope of an assignment, or None."""
        with _errors():
            row = self._db.execute("SELECT envelope FROM units WHERE id=?", (unit,)).fetchone()
        return None if row is None else bytes(row[0])

    # ------------------------------------------------------------ outbox

    def post(self, letters: Sequence[Letter]) -> None:
        """Put envelopes into the outbox, all or none; those that are there already stay."""
        with _errors(), self._transaction():
            for letter in letters:
                self._db.execute(
                    "INSERT INTO outbox(id, kind, unit, envelope, blob, state)"
                    " VALUES(?,?,?,?,?,?) ON CONFLICT(id) DO NOTHING",
                    astuple(letter),
                )

    def settle(self, unit: str, state: str) -> None:
        """Mark a unit's waiting letters as acknowledged, or with the code that refused them."""
        with _errors():
            self._db.execute(
                "UPDATE outbox SET state=? WHERE unit=? AND state='waiting'", (state, unit)
            )

    def letters(self, unit: str | None = None, state: str | None = None) -> list[Letter]:
        """Letters in the order in which they were posted, of one unit or in one state."""
        with _errors():
            rows = self._db.execute(
                "SELECT id, kind, unit, envelope, blob, state FROM outbox"
                " WHERE (?1 IS NULL OR unit=?1) AND (?2 IS NULL OR state=?2) ORDER BY seq",
                (unit, state),
            ).fetchall()
        return [Letter(row[0], row[1], row[2], bytes(row[3]), row[4], row[5]) for row in rows]

    # ------------------------------------------------------------ challenges

    def keep_challenge(self, one: Challenged) -> None:
        """Keep a challenge, or what became of it."""
        with _errors():
            self._db.execute(
                "INSERT INTO challenges VALUES(?,?,?,?,?) ON CONFLICT(id)"
                " DO UPDATE SET opening=excluded.opening, state=excluded.state",
                astuple(one),
            )

    def challenges(self, state: str | None = None) -> list[Challenged]:
        """Challenges in the order in which they came, all or in one state."""
        with _errors():
            known = "SELECT 1 FROM sqlite_master WHERE name='challenges'"
            if self._db.execute(known).fetchone() is None:  # an older journal that is only read
                return []
            rows = self._db.execute(
                "SELECT id, unit, envelope, opening, state FROM challenges"
                " WHERE ?1 IS NULL OR state=?1 ORDER BY rowid",
                (state,),
            ).fetchall()
        return [Challenged(*row) for row in rows]

    # ------------------------------------------------------------ receipts

    def keep_receipt(self, receipt: Receipt) -> None:
        """Keep what the coordinator said about a contribution; a later answer replaces it."""
        with _errors():
            self._db.execute(
                "INSERT INTO receipts VALUES(?,?,?,?) ON CONFLICT(contribution)"
                " DO UPDATE SET at=excluded.at, state=excluded.state, body=excluded.body",
                (receipt.contribution, receipt.at, receipt.state, json.dumps(receipt.body)),
            )

    def receipts(self) -> list[Receipt]:
        """All receipts, oldest first."""
        with _errors():
            rows = self._db.execute(
                "SELECT contribution, at, state, body FROM receipts ORDER BY rowid"
            ).fetchall()
        return [Receipt(row[0], row[1], row[2], json.loads(row[3])) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back when the disk is full
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    """Open for writing; `sqlite3.DatabaseError` when the file is damaged or no database."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA busy_timeout=5000")
        verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))
    except BaseException:
        connection.close()
        raise
    return connection


def _move_aside(path: Path) -> Path:
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(target)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return target
