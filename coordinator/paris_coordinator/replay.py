"""Between the desk's facts and the ledger's rows: one spelling each way, and the replay.

A row that does not spell a fact is refused (`state.corrupt`)::

    ledger.append([entry_of(Uploaded(contribution), now)])
    desk, policies = replay(ledger, state)
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, TypeAdapter

from paris_coordinator.config import State
from paris_coordinator.desk import Desk
from paris_coordinator.events import (
    Answered,
    Called,
    Fact,
    Filed,
    Measured,
    Opened,
    Ordered,
    Sampled,
    Scanned,
    Scored,
    Trained,
    Uploaded,
)
from paris_coordinator.ledger import STATEMENT, Entry, Envelope, Ledger
from paris_protocol.envelope import Sealed, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.records import Policy

BODIES: dict[str, type[Any]] = {
    "uploaded": Uploaded,
    "measured": Measured,
    "opened": Opened,
    "called": Called,
    "answered": Answered,
    "trained": Trained,
    "sampled": Sampled,
    "scored": Scored,
    "scanned": Scanned,
    "ordered": Ordered,
}
"""Facts that are no statements, by the kind under which the ledger keeps them."""


def entry_of(fact: Fact, at: int, raw: bytes = b"") -> Entry:
    """The ledger's form of a fact; `raw` is the envelope of a statement."""
    if isinstance(fact, Filed):
        return Entry(at, STATEMENT, Envelope(fact.id, fact.record.TYPE, fact.signer, raw))
    kind = next(name for name, body in BODIES.items() if isinstance(fact, body))
    return Entry(at, kind, None, json.dumps(fact._asdict(), sort_keys=True, default=_plain))


def _plain(record: BaseModel) -> Any:
    return record.model_dump(mode="json")


@lru_cache
def _reader(kind: str) -> TypeAdapter[Fact]:
    return TypeAdapter(BODIES[kind])


def fact_of(entry: Entry, network: str) -> Fact:
    """The fact that a ledger entry keeps; ParisError("state.corrupt") when it is damaged."""
    try:
        if entry.statement is not None:
            sealed = unseal_any(entry.statement.raw, network)
            return Filed(sealed.id, sealed.signer, sealed.record)
        return _reader(entry.kind).validate_json(entry.body)
    except (ParisError, KeyError, ValueError) as error:
        raise ParisError("state.corrupt", f"ledger event {entry.kind}: {error}") from error


def replay(ledger: Ledger, state: State) -> tuple[Desk, dict[int, Sealed[Policy]]]:
    """The desk and all policies, rebuilt from the ledger alone."""
    genesis = state.genesis()
    policies: dict[int, Sealed[Policy]] = {}
    desk: Desk | None = None
    for entry in ledger.entries():
        fact = fact_of(entry, genesis.id)
        if isinstance(fact, Filed) and isinstance(fact.record, Policy):
            assert entry.statement is not None
            sealed = Sealed(fact.record, entry.statement.raw, fact.id, fact.signer)
            policies[fact.record.number] = sealed
            if desk is None:
                desk = Desk(genesis.id, genesis.record, fact.record, fact.id)
        if desk is not None:
            desk.handle(fact, entry.at)
    if desk is None:
        raise ParisError("state.corrupt", f"{state.ledger_file} holds no policy")
    return desk, policies
