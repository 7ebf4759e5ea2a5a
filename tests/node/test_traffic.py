"""Bytes by way add up over the runs of a node."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from paris_node.journal import Journal
from paris_node.traffic import Traffic, moved
from paris_protocol.net.swarm import SwarmStatus


def test_totals_add_up_over_runs_and_are_not_counted_twice(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal.sqlite", "0" * 64)
    control = SimpleNamespace(received=10, sent=1)
    first = Traffic(journal)
    first.note(control, None)
    control.received = 30
    assert first.note(control, SwarmStatus(alive=True, received=5, sent=2)) == moved(journal)
    second = Traffic(journal)
    totals = second.note(SimpleNamespace(received=1, sent=1), None)
    assert totals == {
        "from_coordinator": 31, "to_coordinator": 2, "from_peers": 5, "to_peers": 2
    }  # fmt: skip
    journal.close()
