"""What the operator's commands read from a state folder, also while a coordinator serves it.

Nothing here writes. Everything comes from the ledger by replay, so it is the truth and not a cache.
Refused: a folder without a network (`state.missing`), ids that nothing has (`not-found`)::

    status(Path("state"))["experts"][0]["round"]
    recompute(Path("state"), "3f2a")["same"]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paris_coordinator.config import State
from paris_coordinator.desk import Desk
from paris_coordinator.ledger import Ledger
from paris_coordinator.replay import replay
from paris_protocol.authority import Authority
from paris_protocol.envelope import unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.log import MAX_NOTE
from paris_protocol.net.logs import CHECKPOINT, LogPlace, read_log
from paris_protocol.records import LOGGED, Merge, Revert

Json = dict[str, Any]


def open_desk(state: State) -> Desk:
    """The desk as the ledger of this folder makes it."""
    state.settings()
    ledger = Ledger(state.ledger_file, readonly=True)
    try:
        return replay(ledger, state)[0]
    finally:
        ledger.close()


def one_of(ids: Iterable[str], beginning: str) -> str:
    """The one id that begins so."""
    found = [id for id in ids if beginning and id.startswith(beginning)]
    if len(found) != 1:
        raise ParisError("not-found", f"{len(found)} ids begin with {beginning[:64]}")
    return found[0]


def status(folder: Path) -> Json:
    """Network, experts, volunteers, contributions by state, releases."""
    state = State(folder)
    desk = open_desk(state)
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
                "done": desk.ended(expert),
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
        "withdrawn": [
            {"id": id, **record.model_dump(mode="json")} for id, record in desk.withdrawals.items()
        ],
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
        units = "done" if e["done"] else f"units {e['accepted']}/{e['units']}"
        lines.append(
            f"expert {e['expert']}  round {e['round']}/{e['rounds']}  {units}  loss {losses or '–'}"
        )
    lines.append("")
    for n in facts["nodes"]:
        mark = "  quarantined" if n["quarantined"] else ""
        lines.append(f"{n['node'][:24]}…  accepted {n['accepted']}  refused {n['refusals']}{mark}")
    work = "  ".join(f"{name} {count}" for name, count in sorted(facts["work"].items()))
    lines += ["", f"work  {work or '–'}"]
    for one in facts["withdrawn"]:
        lines.append(
            f"withdrawn  clip {one['clip'][:16]}  {len(one['shards'])} shard(s)  "
            f"{len(one['heads'])} head(s) were trained on it  {one['reason']}"
        )
    lines += [f"release {r['number']}  {r['folder']}" for r in facts["releases"]]
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


def recompute(folder: Path, beginning: str, places: Sequence[str] = ()) -> Json:
    """A merge or revert of a state folder done again: stated and recomputed root.

    Inputs come from `places` (folders, addresses) and the state folder's own store.
    """
    desk = open_desk(State(folder))
    steps: dict[str, Merge | Revert] = {**desk.merges, **desk.reverts}
    return _again(steps, one_of(steps, beginning), [*places, str(folder)], desk.policy.inputs_kept)


def recompute_logged(log: str, beginning: str, places: Sequence[str]) -> Json:
    """The same from a mirrored log and blobs alone, for whoever has no state folder.

    The network is the one that the log names. Raises what `paris_protocol.net.logs` refuses.
    """
    place = LogPlace(log)
    name = place.read(CHECKPOINT, MAX_NOTE).decode("utf-8", "replace").partition("\n")[0]
    network = name.rpartition("/")[2]
    found = read_log(place, network)
    indices = {id: index for index, id in enumerate(found.reader.entries())}
    authority = Authority(found.genesis, found.policies, indices)
    steps: dict[str, Merge | Revert] = {}
    for id, index in indices.items():
        sealed = found.genesis if id == network else unseal_any(place.statement(id), network)
        if isinstance(sealed.record, Merge | Revert):
            authority.check(sealed, index)
            steps[id] = sealed.record
    kept = found.policies[-1].record.inputs_kept
    return _again(steps, one_of(steps, beginning), list(places), kept)


def _again(steps: Mapping[str, Merge | Revert], id: str, places: Sequence[str], kept: int) -> Json:
    from paris_models.commands.recompute import Blobs, Recomputer

    with tempfile.TemporaryDirectory(prefix="paris-recompute-") as scratch:
        blobs = Blobs(places, Path(scratch), kept)
        found = Recomputer(steps, blobs, Path(scratch)).step(id)
    if found.missing:
        raise ParisError("merge.input-gone", found.missing)
    facts = {"merge": id, "stated": found.stated, "root": found.root, "same": found.same}
    averages = {"average": found.average, "average_root": found.average_root}
    return facts | (averages if found.average else {})


def recompute_text(facts: Json) -> str:
    """The same for people."""
    lines = [facts["merge"], f"stated      {facts['stated']}", f"recomputed  {facts['root']}"]
    if "average" in facts:
        lines += [f"average     {facts['average']}", f"recomputed  {facts['average_root'] or '–'}"]
    return "\n".join(lines)
