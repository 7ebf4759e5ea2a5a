"""How many bytes a node has moved, by way, over all its runs.

The counts of this run are added to what the journal knew when it began; a kill -9 loses what was
counted since the last beat, so these are figures for the owner, not for accounting::

    traffic = Traffic(journal)
    traffic.note(control, swarm_status)      # journals and returns the totals
    moved(journal)                           # the totals without an agent
"""

from __future__ import annotations

import json
from typing import Final

from paris_node.journal import Journal
from paris_protocol.net.control import Control
from paris_protocol.net.swarm import SwarmStatus

FACT: Final = "traffic"
WAYS: Final = ("from_coordinator", "to_coordinator", "from_peers", "to_peers")


class Traffic:
    """The totals of one node."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._before = moved(journal)

    def note(self, control: Control, swarm: SwarmStatus | None) -> dict[str, int]:
        """Add this run's counts to the earlier ones, journal them, and return the totals."""
        peers = (0, 0) if swarm is None else (swarm.received, swarm.sent)
        counts = dict(zip(WAYS, (control.received, control.sent, *peers), strict=True))
        totals = {way: self._before[way] + counts[way] for way in WAYS}
        self._journal.set_fact(FACT, json.dumps(totals))
        return totals


def moved(journal: Journal) -> dict[str, int]:
    """The totals that the journal knows, in bytes by way."""
    known = json.loads(journal.fact(FACT) or "{}")
    return {way: int(known.get(way, 0)) for way in WAYS}
