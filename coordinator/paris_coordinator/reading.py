"""What the operator's commands read from a state folder, also while a coordinator serves it.

Nothing here writes. Everything comes from the ledger by replay, so it is the truth and not a cache.
Refused: a folder without a network (`state.missing`), ids that nothing has (`not-found`)::

    status(Path("state"))["experts"][0]["round"]
    recompute(Path("state"), "3f2a")["same"]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paris_coordinator.board import Work
from paris_coordinator.config import State
from paris_coordinator.desk import Desk
from paris_coordinator.ledger import Ledger
from paris_coordinator.replay import replay
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import LOGGED

Json = dict[str, Any]


def _desk(state: State) -> Desk:
    state.settings()
    ledger = Ledger(state.ledger_file, readonly=True)
    try:
        return replay(ledger, state)[0]
    finally:
        ledger.close()


def _one(ids: Iterable[str], beginning: str) -> str:
    """The one id that begins so."""
    found = [id for id in ids if beginning and id.startswith(beginning)]
    if len(found) != 1:
        raise ParisError("not-found", f"{len(found)} ids begin with {beginning[:64]}")
    return found[0]


def status(folder: Path) -> Json:
    """Network, experts, volunteers, contributions by state, releases."""
    state = State(folder)
    desk = _desk(state)
    counts: dict[str, int] = {}
    for work in desk.works.values():
        counts[work.state] = counts.get(work.state, 0) + 1
    return {
        "network": desk.network,
        "name": desk.genesis.name,
        "policy": desk.policy.number,
        "finished": desk.complete,
        "experts": [
            {
                "expert": expert.index,
                "round": expert.round,
                "rounds": desk.policy.plan.rounds,
                "attempt": expert.attempt,
                "accepted": sum(unit.accepted is not None for unit in expert.units),
                "units": len(expert.units),
                "head": expert.head.weights.root,
                "losses": [dict(desk.merges[id].numbers).get("after") for id in expert.merges],
            }
            for expert in desk.experts
        ],
        "nodes": [
            {
                "node": id,
                "accepted": node.accepted,
                "refusals": node.refusals,
                "quarantined": node.quarantined,
            }
            for id, node in desk.nodes.items()
        ],
        "work": counts,
        "router": desk.router is not None,
        "releases": [
            {"number": record.number, "id": id, "folder": str(state.releases / str(record.number))}
            for id, record in desk.releases.items()
        ],
    }


def status_text(facts: Json) -> str:
    """The same for people."""
    lines = [f"{facts['name']}  {facts['network']}", ""]
    for e in facts["experts"]:
        losses = " → ".join(loss for loss in e["losses"] if loss)
        units = f"units {e['accepted']}/{e['units']}" if e["round"] < e["rounds"] else "done"
        lines.append(
            f"expert {e['expert']}  round {e['round']}/{e['rounds']}  {units}  loss {losses or '–'}"
        )
    lines.append("")
    for n in facts["nodes"]:
        mark = "  quarantined" if n["quarantined"] else ""
        lines.append(f"{n['node'][:24]}…  accepted {n['accepted']}  refused {n['refusals']}{mark}")
    work = "  ".join(f"{name} {count}" for name, count in sorted(facts["work"].items()))
    lines += ["", f"work  {work or '–'}"]
    lines += [f"release {r['number']}  {r['folder']}" for r in facts["releases"]]
    return "\n".join(lines)


def contribution(folder: Path, beginning: str) -> Json:
    """Everything about a contribution."""
    desk = _desk(State(folder))
    work = desk.work_of(_one(desk.contributions, beginning))
    return _facts(work)


def _facts(work: Work) -> Json:
    judged = work.judged
    return {
        "contribution": work.contribution,
        "assignment": work.id,
        "commitment": work.commitment,
        "node": work.record.node,
        "expert": work.record.expert,
        "round": work.record.round,
        "unit": work.record.unit,
        "state": work.state,
        "update": work.done.update.model_dump(mode="json"),
        "steps": work.done.steps,
        "loss": work.done.loss,
        "seconds": work.done.seconds,
        "verdict": work.verdict,
        "code": judged and judged.code,
        "layers": [] if judged is None else [x.model_dump(mode="json") for x in judged.layers],
        "merge": work.merge,
    }


def contribution_text(facts: Json) -> str:
    """The same for people."""
    unit = f"expert {facts['expert']}, round {facts['round']}, unit {facts['unit']}"
    lines = [f"contribution {facts['contribution']}", f"of {facts['node']}", unit]
    lines.append(f"state {facts['state']}" + (f" ({facts['code']})" if facts["code"] else ""))
    for layer in facts["layers"]:
        mark = "passed" if layer["passed"] else layer["code"]
        numbers = "  ".join(f"{name} {value}" for name, value in layer["numbers"])
        lines.append(f"  {layer['layer']}  {mark:18s} {numbers}")
    if facts["merge"]:
        lines.append(f"merge {facts['merge']}")
    return "\n".join(lines)


def log(folder: Path) -> list[Json]:
    """Index, type and id of every logged statement."""
    state = State(folder)
    state.settings()
    ledger = Ledger(state.ledger_file, readonly=True)
    try:
        types = {e.statement.id: e.statement.type for e in ledger.entries() if e.statement}
        ids = ledger.statement_ids(LOGGED)
        return [{"index": n, "type": types[id], "id": id} for n, id in enumerate(ids)]
    finally:
        ledger.close()


def recompute(folder: Path, beginning: str) -> Json:
    """A merge done again from the store's blobs: stated and recomputed root."""
    from paris_coordinator.genesis import file_root
    from paris_models.merge import merge_files

    state = State(folder)
    desk, store = _desk(state), BlobStore(state.store)
    id = _one(desk.merges, beginning)
    record = desk.merges[id]
    inputs = [
        (store.path(part.update.blob), float.fromhex(part.weight), float.fromhex(part.scale))
        for part in record.inputs
    ]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "merged.safetensors"
        merge_files(store.path(record.parent.weights.blob), inputs, out)
        root = file_root(out)
    stated = record.result.root
    return {"merge": id, "stated": stated, "root": root, "same": root == stated}
