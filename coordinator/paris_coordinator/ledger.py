"""The ledger: one SQLite file of append-only events, of which everything else is a replay.

`events` (seq, at, kind, statement, body) in the order in which they were accepted; `statements`
holds the signed envelopes that they name; `people` holds names and devices and can be erased. A
commit is on the disk (WAL, synchronous=FULL) before `append` returns. Refused: a damaged file
(`state.corrupt`), a newer schema (`state.newer`), a full disk (`disk.full`, nothing is kept)::

    ledger = Ledger(path)
    ledger.append([Entry(now, STATEMENT, Envelope(id, "registration", signer, raw))])
    for entry in ledger.entries(): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DatabaseError, OperationalError

from paris_protocol.errors import ParisError
from paris_protocol.records import LOGGED

MIGRATIONS: Final = Path(__file__).parent / "migrations"
STATEMENT: Final = "statement"
"""Kind of every event that is nothing but a signed statement; other kinds have a body."""

_META = sa.MetaData()
STATEMENTS: Final = sa.Table(
    "statements",
    _META,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("type", sa.String(40)),
    sa.Column("signer", sa.String(80)),
    sa.Column("raw", sa.LargeBinary),
)
EVENTS: Final = sa.Table(
    "events",
    _META,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at", sa.BigInteger),
    sa.Column("kind", sa.String(40)),
    sa.Column("statement", sa.String(64)),
    sa.Column("body", sa.Text),
)
PEOPLE: Final = sa.Table(
    "people",
    _META,
    sa.Column("node", sa.String(80), primary_key=True),
    sa.Column("name", sa.String(200)),
    sa.Column("device", sa.String(200)),
    sa.Column("seen", sa.BigInteger),
)


class Envelope(NamedTuple):
    """A signed statement as it is kept: id, type, signer, and the bytes of its envelope."""

    id: str
    type: str
    signer: str
    raw: bytes


class Entry(NamedTuple):
    """One event: when, what kind, the statement that it is or None, and its body as JSON text."""

    at: int
    kind: str
    statement: Envelope | None = None
    body: str = "{}"


class Logged(NamedTuple):
    """A statement for the log: the number of its event, its id and its envelope."""

    seq: int
    id: str
    raw: bytes


class Person(NamedTuple):
    """What a volunteer chose to show; erasable and never logged."""

    node: str
    name: str
    device: str
    seen: int


class Ledger:
    """The open ledger. Safe to use from several threads; one process writes."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        if readonly and not path.exists():
            raise ParisError("state.missing", str(path))
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        sa.event.listen(self._engine, "connect", _settings)
        try:
            self._check(readonly)
        except DatabaseError as error:
            self._engine.dispose()
            raise _refusal(error, path) from error
        except ParisError:
            self._engine.dispose()
            raise

    def _check(self, readonly: bool) -> None:
        """Sound file, known schema; brings an older schema up to date."""
        config = Config(attributes={})
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        script = ScriptDirectory.from_config(config)
        known = {step.revision for step in script.walk_revisions()}
        with self._engine.connect() as connection:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if verdict != "ok":
                raise ParisError("state.corrupt", f"{self.path}: {verdict}")
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in known:
                raise ParisError("state.newer", f"{self.path} has schema {current}")
            if current == script.get_current_head():
                return
            if readonly:
                raise ParisError("state.corrupt", f"{self.path} has schema {current}")
            connection.rollback()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def close(self) -> None:
        """Closes the file."""
        self._engine.dispose()

    # ------------------------------------------------------------ writing

    def append(self, entries: Sequence[Entry]) -> None:
        """Appends all entries in one durable transaction, or none of them.

        A statement whose event is here already is left out: `append` is idempotent by statement id.
        """
        try:
            with self._engine.begin() as connection:
                _insert(connection, entries)
        except DatabaseError as error:
            raise _refusal(error, self.path) from error

    def remember(self, person: Person) -> None:
        """Keeps what a volunteer chose to show, in place of what was known."""
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.delete(PEOPLE).where(PEOPLE.c.node == person.node))
                connection.execute(sa.insert(PEOPLE).values(person._asdict()))
        except DatabaseError as error:
            raise _refusal(error, self.path) from error

    def erase(self, node: str) -> None:
        """Forgets name and device of a node; its signed statements stay."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(PEOPLE).where(PEOPLE.c.node == node))

    # ------------------------------------------------------------ reading

    def entries(self) -> Iterator[Entry]:
        """All events in order, with their envelopes."""
        query = (
            sa.select(EVENTS, STATEMENTS.c.type, STATEMENTS.c.signer, STATEMENTS.c.raw)
            .outerjoin(STATEMENTS, STATEMENTS.c.id == EVENTS.c.statement)
            .order_by(EVENTS.c.seq)
        )
        with self._engine.connect() as connection:
            for row in connection.execution_options(yield_per=1000).execute(query):
                signed = row.statement is not None
                envelope = (
                    Envelope(row.statement, row.type, row.signer, row.raw) if signed else None
                )
                yield Entry(row.at, row.kind, envelope, row.body)

    def statement_ids(self, types: frozenset[str]) -> list[str]:
        """Ids of all statements of these types, in the order of their events."""
        query = (
            sa.select(EVENTS.c.statement)
            .join(STATEMENTS, STATEMENTS.c.id == EVENTS.c.statement)
            .where(STATEMENTS.c.type.in_(sorted(types)))
            .order_by(EVENTS.c.seq)
        )
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def logged(self, after: int, most: int) -> list[Logged]:
        """The first `most` statements of the log behind event number `after`, in log order."""
        query = (
            sa.select(EVENTS.c.seq, STATEMENTS.c.id, STATEMENTS.c.raw)
            .join(STATEMENTS, STATEMENTS.c.id == EVENTS.c.statement)
            .where(EVENTS.c.seq > after, STATEMENTS.c.type.in_(sorted(LOGGED)))
            .order_by(EVENTS.c.seq)
            .limit(most)
        )
        with self._engine.connect() as connection:
            return [Logged(*row) for row in connection.execute(query)]

    def envelope(self, id: str) -> Envelope | None:
        """The envelope of this statement id, or None."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(STATEMENTS).where(STATEMENTS.c.id == id)).first()
        return None if row is None else Envelope(row.id, row.type, row.signer, row.raw)

    def person(self, node: str) -> Person | None:
        """What a volunteer chose to show, or None."""
        return self.people().get(node)

    def people(self) -> dict[str, Person]:
        """All that volunteers chose to show, by node."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(PEOPLE).order_by(PEOPLE.c.node)).all()
        return {row.node: Person(row.node, row.name, row.device, row.seen) for row in rows}


def _insert(connection: sa.Connection, entries: Sequence[Entry]) -> None:
    """Statements and events of all entries, in order, each statement once."""
    ids = {entry.statement.id for entry in entries if entry.statement is not None}
    known = _known(connection, sorted(ids))
    statements, events = list[dict[str, Any]](), list[dict[str, Any]]()
    for at, kind, envelope, body in entries:
        if envelope is not None:
            if envelope.id in known:
                continue
            known.add(envelope.id)
            statements.append(envelope._asdict())
        id = None if envelope is None else envelope.id
        events.append({"at": at, "kind": kind, "statement": id, "body": body})
    if statements:
        connection.execute(sa.insert(STATEMENTS), statements)
    if events:
        connection.execute(sa.insert(EVENTS), events)


def _known(connection: sa.Connection, ids: Sequence[str]) -> set[str]:
    """Which of these statements are here already."""
    found = set[str]()
    for begin in range(0, len(ids), 500):  # SQLite limits the variables of a query
        some = sa.select(STATEMENTS.c.id).where(STATEMENTS.c.id.in_(ids[begin : begin + 500]))
        found.update(connection.execute(some).scalars())
    return found


def _settings(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _refusal(error: DatabaseError, path: Path) -> ParisError:
    text = str(error.orig)
    if isinstance(error, OperationalError) and ("full" in text or "disk I/O" in text):
        return ParisError("disk.full", f"{path}: {text}")
    return ParisError("state.corrupt", f"{path}: {text}")
