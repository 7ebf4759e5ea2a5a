"""What the pages show, read off the desk: dicts of plain values and records, all to be escaped.

No HTML here and no request: a view is a function from the coordinator's state and `now` to what its
template prints. What does not exist is refused with `not-found`::

    home(source)["experts"][0]["loss"]    # [{"round": 0, "loss": 0.21, "se": 0.002, "n": 256}, …]
    contribution(source, id)["layers"]    # every layer with its numbers, as the verdict has them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from paris_coordinator.board import Board, Expert, Node, Work
from paris_coordinator.config import State
from paris_coordinator.ledger import Person
from paris_coordinator.web import trust_views
from paris_coordinator.withdrawing import listed
from paris_protocol.canonical import real
from paris_protocol.envelope import Sealed
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.invite import make_invite
from paris_protocol.records import Beat, Genesis, Merge

Json = dict[str, Any]
SILENT: int = 360
"""Seconds without any sign of life after which a volunteer counts as away."""
LAST: int = 30
"""How many verdicts, merges and contributions a page lists."""


class Log(Protocol):
    """The transparency log, as far as pages read it."""

    @property
    def size(self) -> int:
        """Statements in it."""

    def index_of(self, statement: str) -> int | None:
        """Where a statement stands."""


class PageSource(Protocol):
    """What the pages read; the office is one."""

    @property
    def network(self) -> str:
        """Id of the network."""

    @property
    def genesis(self) -> Sealed[Genesis]:
        """Its genesis."""

    @property
    def desk(self) -> Board:
        """Everything that was decided."""

    @property
    def state(self) -> State:
        """The state folder, for settings, samples and releases."""

    @property
    def people(self) -> Mapping[str, Person]:
        """Names and devices that volunteers chose to show; erasable."""

    @property
    def presence(self) -> Mapping[str, tuple[int, Beat]]:
        """The last beat of each node and when it came; in memory only."""

    @property
    def log(self) -> Log:
        """The transparency log."""

    def now(self) -> int:
        """Unix seconds."""


# ---------------------------------------------------------------- pages


def home(source: PageSource) -> Json:
    """The network at a glance."""
    desk, now = source.desk, source.now()
    judged = [work for work in desk.works.values() if work.judged is not None]
    judged.sort(key=lambda work: (work.judged.at if work.judged else 0, work.id), reverse=True)
    nodes = [node_row(source, key, node, now) for key, node in desk.nodes.items()]
    nodes.sort(key=lambda row: (not row["here"], -row["merged"], row["key"]))
    plan = desk.policy.plan
    return {
        **frame(source),
        "experts": [expert_row(source, expert, now) for expert in desk.experts],
        "merges": sum(merge.published for merge in desk.merges.values()),
        "planned": plan.rounds * len(desk.experts),
        "accepted": sum(bool(work.judged and work.judged.accepted) for work in judged),
        "refused": sum(bool(work.judged and not work.judged.accepted) for work in judged),
        "open": sum(work.state == "open" for work in desk.works.values()),
        "waiting": sum(work.state in ("uploading", "queued") for work in desk.works.values()),
        "nodes": nodes,
        "here": sum(row["here"] for row in nodes),
        "verdicts": [work_row(source, work) for work in judged[:LAST]],
        "samples": samples(source),
        "log_size": source.log.size,
        "scan": trust_views.scan(desk),
        "damaged": trust_views.damaged(source.state),
        "withdrawn": listed(desk)[::-1],
        "complete": desk.complete,
        "released": max((r.number for r in desk.releases.values()), default=None),
        "licences": [licence.model_dump() for licence in source.genesis.record.licences],
        "notes": list(source.genesis.record.notes),
    }


def expert_page(source: PageSource, index: int) -> Json:
    """An expert: its curve, the round in hand, every merge with its numbers."""
    desk, now = source.desk, source.now()
    if index >= len(desk.experts):
        raise ParisError("not-found", f"expert {index}")
    expert = desk.experts[index]
    merges = [merge_row(source, id, desk.merges[id]) for id in reversed(expert.merges)]
    units = [
        {
            "number": number,
            "clips": sum(shard.clips for shard in unit.shards),
            "shards": [shard.file.blob.id for shard in unit.shards],
            "accepted": unit.accepted,
            "works": [work_row(source, desk.works[id]) for id in unit.works],
        }
        for number, unit in enumerate(expert.units)
    ]
    row = expert_row(source, expert, now)
    reverts = [(id, revert) for id, revert in desk.reverts.items() if revert.expert == index]
    return {
        **frame(source),
        "expert": row,
        "merges": merges,
        "reverts": reverts[::-1],
        "head_reverted": expert.head.merge in desk.reverts,
        "units": [] if row["done"] else units,
        "head": expert.head,
    }


def contribution(source: PageSource, id: str) -> Json:
    """A contribution: what was assigned, what was handed in, every number, what became of it."""
    desk = source.desk
    if id not in desk.contributions:
        raise ParisError("not-found", f"contribution {id[:16]}")
    work = desk.work_of(id)
    verdict, policy = work.judged, work.record.policy
    statements = {
        "assignment": work.id,
        "commitment": work.commitment,
        "contribution": id,
        "verdict": work.verdict,
        "merge": work.merge,
        "revocation": work.revocation,
    }
    return {
        **frame(source),
        **work_row(source, work),
        "audit": trust_views.audit(desk, work),
        "record": work.record,
        "done": work.done,
        "layers": [
            {
                "layer": layer.layer,
                "passed": layer.passed,
                "code": layer.code,
                "sentence": sentence(layer.code),
                "fix": fix(layer.code),
                "numbers": [(name, value) for name, value in layer.numbers],
            }
            for layer in (verdict.layers if verdict else ())
        ],
        "policy": policy,
        "update_here": _has(source, work),
        "statements": {name: s for name, s in statements.items() if s is not None},
        "indices": {s: source.log.index_of(s) for s in statements.values() if s is not None},
    }


def node_page(source: PageSource, key: str) -> Json:
    """A volunteer: what it shows of itself, and everything it handed in."""
    desk = source.desk
    if key not in desk.nodes:
        raise ParisError("not-found", f"node {key[:24]}")
    node = desk.nodes[key]
    works = [work_row(source, desk.works[id]) for id in reversed(node.works)]
    return {
        **frame(source),
        "node": node_row(source, key, node, source.now()),
        "works": works,
        "trust": trust_views.standing(desk, key, node),
        "registration": node.registration,
        "limit": desk.policy.refusals_to_quarantine,
    }


def releases_page(source: PageSource) -> Json:
    """Every release, newest first."""
    rows = []
    for id, release in reversed(source.desk.releases.items()):
        rows.append(
            {
                "id": id,
                "number": release.number,
                "at": release.at,
                "files": len(release.files),
                "bytes": sum(file.size for file in release.files),
                "experts": [expert.model_dump() for expert in release.experts],
                "here": (source.state.releases / str(release.number) / "release.json").is_file(),
                "index": source.log.index_of(id),
            }
        )
    return {**frame(source), "releases": rows, "scan": trust_views.scan(source.desk)}


def policy_page(source: PageSource) -> Json:
    """The rules in force: limits, audits, tolerances, witnesses, secret sets."""
    return {**frame(source), **trust_views.policy_rules(source.desk)}


def log_page(source: PageSource) -> Json:
    """The newest decisions in the log, and how many of each type there are."""
    counts: dict[str, int] = {}
    rows = []
    for kind, id in trust_views.decisions(source.desk):
        counts[kind] = counts.get(kind, 0) + 1
        if (index := source.log.index_of(id)) is not None:
            rows.append({"index": index, "type": kind, "id": id})
    rows.sort(key=lambda row: (row["index"], row["id"]), reverse=True)
    return {
        **frame(source),
        "size": source.log.size,
        "counts": sorted(counts.items()),
        "rows": rows[: trust_views.LAST],
    }


# ---------------------------------------------------------------- parts


def frame(source: PageSource) -> Json:
    """What every page shows: the network's name, its id, and how to join it."""
    settings = source.state.settings()
    return {
        "name": source.genesis.record.name,
        "network": source.network,
        "invite": str(make_invite(settings.address, settings.port, source.network)),
        "now": source.now(),
    }


def expert_row(source: PageSource, expert: Expert, now: int) -> Json:
    """An expert and its round in hand."""
    desk = source.desk
    cluster = source.genesis.record.clusters[expert.index]
    plan = desk.policy.plan
    return {
        "index": expert.index,
        "clips": cluster.clips,
        "round": expert.round,
        "rounds": plan.rounds,
        "done": desk.ended(expert),
        "units": len(expert.units),
        "accepted": sum(unit.accepted is not None for unit in expert.units),
        "busy": sum(unit.accepted is None and not desk.free(unit, now) for unit in expert.units),
        "attempt": expert.attempt,
        "loss": loss_points(desk.merges[id] for id in expert.merges),
    }


def loss_points(merges: Iterable[Merge]) -> list[Json]:
    """The held-out loss before the first published merge and after each one."""
    points: list[Json] = []
    for merge in merges:
        found = {name: real(value) for name, value in merge.numbers}
        if not merge.published or not {"before", "after", "se"} <= set(found):
            continue
        shared = {"se": found["se"], "n": int(found.get("n", 0))}
        if not points:
            points.append({"round": 0, "loss": found["before"], **shared})
        points.append({"round": merge.round + 1, "loss": found["after"], **shared})
    return points


def merge_row(source: PageSource, id: str, merge: Merge) -> Json:
    """A merge with its inputs and numbers."""
    found = {name: real(value) for name, value in merge.numbers}
    return {
        "id": id,
        "round": merge.round,
        "at": merge.at,
        "published": merge.published,
        "inputs": [
            {
                "id": part.contribution,
                "weight": float.fromhex(part.weight),
                "scale": float.fromhex(part.scale),
            }
            for part in merge.inputs
        ],
        "before": found.get("before"),
        "after": found.get("after"),
        "delta": found.get("delta"),
        "se": found.get("se"),
        "n": found.get("n"),
        "root": merge.result.root,
        "blob": merge.result.blob.id,
        "index": source.log.index_of(id),
    }


def work_row(source: PageSource, work: Work) -> Json:
    """One assignment and what became of it, as a line of a table."""
    verdict = work.judged
    last = verdict.layers[-1] if verdict and verdict.layers else None
    return {
        "assignment": work.id,
        "id": work.contribution,
        "state": work.state,
        "expert": work.record.expert,
        "round": work.record.round,
        "unit": work.record.unit,
        "node": work.record.node,
        "node_name": name_of(source, work.record.node),
        "issued": work.record.issued,
        "at": verdict.at if verdict else None,
        "accepted": verdict.accepted if verdict else None,
        "layer": last.layer if last else None,
        "code": verdict.code if verdict else None,
        "sentence": sentence(verdict.code) if verdict else None,
        "merge": work.merge,
    }


def node_row(source: PageSource, key: str, node: Node, now: int) -> Json:
    """A volunteer as a line of a table."""
    beat = source.presence.get(key)
    seen = max(node.last, beat[0] if beat else 0)
    works = [source.desk.works[id] for id in node.works]
    here = now - seen <= SILENT
    return {
        "key": key,
        "name": name_of(source, key),
        "device": source.people[key].device if key in source.people else "",
        "since": node.since,
        "seen": seen,
        "here": here,
        "doing": beat[1].state if beat and here else "",
        "step": beat[1].step if beat and here else None,
        "accepted": sum(bool(work.judged and work.judged.accepted) for work in works),
        "merged": sum(work.state == "merged" for work in works),
        "refused": sum(bool(work.judged and not work.judged.accepted) for work in works),
        "refusals": node.refusals,
        "quarantined": node.quarantined,
        "revoked": node.revoked is not None,
        "standing": node.standing,
    }


def samples(source: PageSource) -> list[Json]:
    """Clips of the newest sampled heads with their prompts."""
    sampled = source.desk.sampled
    if sampled is None:
        return []
    prompts = source.state.settings().prompts
    current = sampled.roots == source.desk.roots
    return [
        {
            "file": file,
            "prompt": prompts[i] if i < len(prompts) else file,
            "current": current,
            "at": source.desk.sampled_at,
        }
        for i, file in enumerate(sampled.files)
    ]


def name_of(source: PageSource, key: str) -> str:
    """The name a volunteer chose, or the beginning of its key."""
    person = source.people.get(key)
    return person.name if person and person.name else key.removeprefix("ed25519:")[:12]


def sentence(code: str) -> str:
    """The catalogue's sentence of a code."""
    return REASONS[code].text if code in REASONS else ""


def fix(code: str) -> str:
    """What the catalogue says to do about a code."""
    return REASONS[code].fix if code in REASONS else ""


def _has(source: PageSource, work: Work) -> bool:
    """Whether the update's bytes are (still) kept and public."""
    blobs = source.state.store / "blobs"
    return (blobs / f"{work.done.update.blob.id}.blob").is_file()
