"""What `status` and `why` show, from the journal and the one reason of the moment.

The same view comes from a running agent and, without one, from its journal alone; its exit codes
belong to `status` and to nothing else::

    view = describe(journal, folder, why="owner.paused", running=True)
    state_code("owner.paused")                         # 10
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

from paris_node import receipts
from paris_node.following import followed
from paris_node.journal import Journal
from paris_node.kept import MB
from paris_node.kit import ALARM
from paris_node.openings import counts
from paris_node.ready import plan_told
from paris_node.traffic import moved
from paris_node.upkeep import states_used
from paris_protocol.envelope import unseal
from paris_protocol.errors import DISK, GPU, NETWORK, REASONS, ParisError
from paris_protocol.records import Assignment

VERSION: Final = 1
_CODES: Final = {
    "node.working": 0,
    "node.starting": 0,
    "owner.paused": 10,
    "owner.stopped": 10,
    "owner.finished": 10,
    "work.none": 12,
    "network.finished": 12,
    "network.version": 21,
    "node.quarantined": 22,
    "node.revoked": 22,
    "trainer.failed": 50,
    "job.silent": 50,
    "internal": 50,
}
_BY_EXIT: Final = {GPU: 30, DISK: 31, NETWORK: 40}
NEEDS_OWNER: Final = 20


def state_code(why: str) -> int:
    """Exit code of `status` for a reason: 0 working, 10 paused, 12 waiting, 20 needs you, …"""
    return _CODES.get(why, _BY_EXIT.get(REASONS[why].exit, NEEDS_OWNER))


def describe(journal: Journal, folder: Path, *, why: str, running: bool) -> dict[str, Any]:
    """Everything that is known of a node without asking anybody else."""
    memory = journal.memory()
    reason = REASONS[why]
    states = Counter(letter.state for letter in journal.letters() if letter.kind == "contribution")
    waiting = states.pop("waiting", 0)
    known = journal.receipts()
    judged = [receipt for receipt in known if receipt.body.get("code") is not None]
    accepted = sum(receipt.body.get("accepted") is True for receipt in judged)
    last = journal.transitions(1)
    unit = _unit(journal, memory.unit)
    return {
        "version": VERSION,
        "network": journal.fact("network"),
        "node": journal.fact("node"),
        "bytes": moved(journal),
        "followed": followed(journal),
        "plan": plan_told(journal) or None,
        "folder": folder.name,
        "running": running,
        "state": memory.phase.value,
        "why": why,
        "text": reason.text,
        "fix": reason.fix,
        "code": state_code(why),
        "unit": unit,
        "step": 0,
        "steps": 0 if unit is None else unit["steps"],
        "outbox": waiting,
        "contributions": {
            "handed_in": states.pop("acknowledged", 0),
            "lost": dict(states),
            "accepted": accepted,
            "refused": len(judged) - accepted,
            "merged": sum(receipt.body.get("merge") is not None for receipt in known),
        },
        "audits": {
            "passed": sum(
                bool(receipts.replayed(each.body.get("verdict")))
                for each in judged
                if each.body.get("accepted") is True
            ),
            "reported": sum(
                one.kind == "audit-report" for one in journal.letters(state="acknowledged")
            ),
            "challenges": counts(journal.challenges()),
        },
        "states_mb": -(-states_used(folder) // MB),
        "alarm": journal.fact(ALARM) or None,
        "last_transition": last[0][0] if last else None,
    }


def offline(folder: Path) -> dict[str, Any]:
    """The view without an agent: the journal's last word; `state.missing` without a journal."""
    journal = Journal.read(folder / "journal.sqlite")
    if journal is None:
        if not (folder / "genesis.json").exists():
            raise ParisError("state.missing", str(folder))
        raise ParisError("agent.not-running", "it has never run in this folder")
    try:
        return describe(journal, folder, why="agent.not-running", running=False)
    finally:
        journal.close()


def lines(view: dict[str, Any]) -> list[str]:
    """The view as a few lines of text."""
    unit, done = view["unit"], view["contributions"]
    mark = "●" if view["why"] == "node.working" else "○"
    out = [f"{mark} {view['state']:9} {view['text']}"]
    if view["why"] != "node.working":
        out.append(f"  what to do: {view['fix']}")
    if unit is not None:
        where = f"expert {unit['expert']}, round {unit['round']}"
        step = f", step {view['step']}/{view['steps']}" if view["state"] == "training" else ""
        out.append(f"  unit {unit['id'][:12]}: {where}{step}")
    plan = view["plan"]
    if plan is not None:
        fell = f" instead of {plan['instead_of']}: {plan['why']}" if plan["instead_of"] else ""
        out.append(f"  plan {plan['name']}{fell}")
    if view.get("loss") is not None:
        out.append(f"  loss {view['loss']:.4f}")
    out.append(
        f"  handed in {done['handed_in']} · accepted {done['accepted']} · refused {done['refused']}"
        f" · merged {done['merged']} · in the outbox {view['outbox']}"
    )
    audits = view["audits"]
    asked = audits["challenges"]
    if asked["open"] or asked["answered"] or audits["reported"]:
        out.append(
            f"  audits passed {audits['passed']} · openings answered {asked['answered']}"
            f" · open {asked['open']} · lost {asked['lost']} · replayed for others"
            f" {audits['reported']} · kept states {view['states_mb']} MB"
        )
    if view["alarm"] is not None:
        out.append(f"  ALARM: the log is not what it was: {view['alarm']}")
    return out


def _unit(journal: Journal, unit: str | None) -> dict[str, Any] | None:
    raw = None if unit is None else journal.unit(unit)
    if raw is None:
        return None
    record = unseal(raw, Assignment, str(journal.fact("network")), None).record
    return {
        "id": unit,
        "expert": record.expert,
        "round": record.round,
        "unit": record.unit,
        "steps": record.steps,
        "soft_deadline": record.soft_deadline,
        "hard_deadline": record.hard_deadline,
    }


def as_json(view: dict[str, Any]) -> str:
    """The view for programs."""
    return json.dumps(view, indent=2, sort_keys=True)
