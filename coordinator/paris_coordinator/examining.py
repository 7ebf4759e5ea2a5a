"""`audit`: the operator replays a contribution again, offline, from the state folder alone.

Where the states that the node laid open are still kept, the worker's own `replay` job runs on the
segments; without them the whole unit is trained from its parent, which needs no opening: committed
state i + 1 follows from state i for as long as all states before are the ones that this machine
gets. After the first one that is not, the rest has no common start and says nothing::

    examine(Path("state"), "3f2a")["passed"]
    examine(Path("state"), "3f2a", [0, 3])["segments"]

Equal bits can be expected on a machine of the node's numeric class only; on another one a replay
from the assignment can tell how far the whole update is away, and does not conclude. Nothing is
written. Refused: `audit.unknown` for a segment that does not exist, `blob.missing` kin for files
that are no longer kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from paris_coordinator.board import Work
from paris_coordinator.config import State
from paris_coordinator.desk import Desk
from paris_coordinator.reading import one_of, open_desk
from paris_protocol.audit import segment_steps, segments_of, states_to_open
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import Segment

Json = dict[str, Any]

FAR: Final = "1e9"
"""The distance of another state than the committed one, where nothing but its root is known."""


def examine(folder: Path, beginning: str, segments: Sequence[int] | None = None) -> Json:
    """What a replay of these segments (None: all) shows."""
    state = State(folder)
    desk, store = open_desk(state), BlobStore(State(folder).store)
    work = desk.work_of(one_of(desk.contributions, beginning))
    places = range(segments_of(work.record)) if segments is None else segments
    steps = {place: segment_steps(work.record, place) for place in places}
    states = _kept_states(desk, store, work, list(steps))
    found = (
        _from_assignment(state, store, work, list(steps))
        if states is None
        else _from_states(state, desk, store, work, list(steps), states)
    )
    for segment in found["segments"]:
        segment["steps"] = list(steps[segment["index"]])
    return {"contribution": work.contribution, "node": work.record.node, **found}


def _kept_states(
    desk: Desk, store: BlobStore, work: Work, segments: Sequence[int]
) -> list[list[Any]] | None:
    """[place, path] of the opened states that these segments need, or None if one is not here."""
    audit = desk.audits.get(work.contribution or "")
    opening = audit.opening if audit else None
    kept = {
        state.index: str(store.path(state.file.blob))
        for state in (opening.states if opening else ())
        if store.has(state.file.blob)
    }
    needed = states_to_open(segments, exact=True)
    if not needed or not set(needed) <= kept.keys():
        return None
    return [[place, path] for place, path in sorted(kept.items())]


def _base(state: State, store: BlobStore, work: Work) -> Json:
    record = work.record
    return {
        "genesis": str(state.genesis_file),
        "assignment": record.model_dump(mode="json"),
        "parent": str(store.path(record.parent.weights.blob)),
        "shards": [str(store.path(shard.file.blob)) for shard in record.shards],
    }


def _perform(job: Json) -> Json:
    from paris_coordinator.worker import perform

    answer = perform(job)
    if "error" in answer:
        raise ParisError(answer["error"]["code"], answer["error"]["detail"])
    result: Json = answer["result"]
    return result


def _from_states(
    state: State,
    desk: Desk,
    store: BlobStore,
    work: Work,
    segments: Sequence[int],
    states: list[list[Any]],
) -> Json:
    rules = desk.policies[work.record.policy].audit
    if work.committed is None or rules is None:
        raise ParisError("audit.unknown", "nothing was committed under audit rules")
    answer = _perform(
        {
            **_base(state, store, work),
            "job": "replay",
            "commitment": work.committed.model_dump(mode="json"),
            "numerics": work.done.numerics,
            "states": states,
            "segments": list(segments),
            "audit": rules.model_dump(mode="json"),
        }
    )
    return {
        "way": "opened states",
        "same_class": answer["exact"],
        "segments": answer["segments"],
        "passed": answer["passed"] if answer["segments"] or answer["code"] else None,
        "code": answer["code"],
    }


def _from_assignment(state: State, store: BlobStore, work: Work, segments: Sequence[int]) -> Json:
    if work.committed is None:
        raise ParisError("commitment.missing", "nothing was committed for this unit")
    update = store.path(work.done.update.blob) if store.has(work.done.update.blob) else None
    job = {**_base(state, store, work), "job": "answer", "update": update and str(update)}
    answer = _perform(job)
    same_class = work.done.numerics == answer["numerics"] and work.record.kernels == "reference"
    equal = [a == b for a, b in zip(work.committed.states, answer["states"], strict=False)]
    found = []
    for index in segments:
        if not all(equal[: index + 1]):
            continue
        ends_equal = index + 1 < len(equal) and equal[index + 1]
        found.append(_segment(index, ends_equal))
    update_equal = work.committed.update_root == answer["update_root"]
    whole = update_equal and all(equal)
    passed = True if whole else False if same_class else None
    return {
        "way": "assignment alone",
        "same_class": same_class,
        "segments": found,
        "update_equal": update_equal,
        "rho": answer.get("rho"),
        "passed": passed,
        "code": "audit.mismatch" if passed is False else "",
    }


def _segment(index: int, equal: bool) -> Json:
    rho = "0" if equal else FAR
    return Segment(
        index=index, exact=True, rho=rho, tensor=rho, limit="0", tensor_limit="0", passed=equal
    ).model_dump(mode="json")


def examine_text(facts: Json) -> str:
    """The same for people."""
    lines = [f"contribution {facts['contribution']}", f"of {facts['node']}"]
    same = "the node's own numeric class" if facts["same_class"] else "another numeric class"
    lines.append(f"replayed from {facts['way']}, on {same}")
    for one in facts["segments"]:
        first, last = one["steps"]
        result = (
            ("equal bits" if one["exact"] else "within the tolerance")
            if one["passed"]
            else "NOT what was committed"
        )
        distance = "" if one["exact"] else f", rho {one['rho']} of {one['limit']}"
        lines.append(f"segment {one['index']:3d}  steps {first} to {last}  {result}{distance}")
    if "update_equal" in facts:
        far = "" if facts["rho"] is None else f", {facts['rho']} of its length away"
        lines.append("update     " + ("equal bits" if facts["update_equal"] else f"differs{far}"))
    if facts["passed"] is None:
        lines.append(
            "No conclusion: equal bits need a machine of the node's numeric class, a tolerance "
            "needs opened states."
        )
    return "\n".join(lines)
