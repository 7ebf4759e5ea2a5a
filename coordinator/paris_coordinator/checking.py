"""`log --check`: the whole log derived again from its statements, as any stranger could.

Read are the log's own files (a folder or an address), never the ledger: genesis and policies back
to the root key, every tile and statement, the signers, every draw of an audit, every verdict from
its numbers, every merge, revert and head, every withdrawal of a clip with the heads that it names,
and every secret set that was opened. What does not follow is refused with the code of its kind
(`log.*`, `record.*`, `audit.draw`, `merge.lineage`, `secret.set`, `check.failed`), naming the
statement::

    check_log(Path("state/log"), network)     # {"size": 214, "draws": 12, "verdicts": 12, …}

Not checked here, because it needs files or secrets: the arithmetic of merges (`merge --recompute`),
replays (`audit`), the losses on secret sets that are still in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paris_coordinator import sequential
from paris_coordinator.judging import LayerName, decide
from paris_coordinator.withdrawals import is_on
from paris_protocol.audit import NO_FAULT
from paris_protocol.authority import Authority
from paris_protocol.canonical import real
from paris_protocol.draws import check_draws
from paris_protocol.envelope import Sealed, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.lineage import Lineage
from paris_protocol.net.logs import Followed, LogPlace, read_log
from paris_protocol.records import (
    Assignment,
    AuditReport,
    Challenge,
    Contribution,
    Merge,
    Policy,
    Release,
    Revert,
    Revocation,
    SecretSet,
    SecretSetOpened,
    Verdict,
    Withdrawal,
)
from paris_protocol.secretsets import check_opening, check_scores

Json = dict[str, Any]

OFFICIAL = (
    Assignment, Challenge, Verdict, Merge, Revert, Revocation, SecretSet, SecretSetOpened,
    Withdrawal, Release,
)  # fmt: skip
"""Statements that only the coordinator signs; policies are checked as a chain."""


def check_log(log: Path | str, network: str) -> Json:
    """Counts of what was checked; ParisError names the first thing that does not follow."""
    place = LogPlace(log)
    found = read_log(place, network)
    ids = found.reader.entries(0, found.reader.size)
    statements = [unseal_any(place.statement(id), network) for id in ids]
    policies = {policy.record.number: policy.record for policy in found.policies}
    _check_signers(found, statements)
    draws = check_draws(statements, policies)
    walk = Walk(policies, Lineage(found.genesis.record))
    for sealed in statements:
        walk.take(sealed)
    kinds: dict[str, int] = {}
    for sealed in statements:
        kinds[sealed.record.TYPE] = kinds.get(sealed.record.TYPE, 0) + 1
    return {
        "network": network,
        "size": len(statements),
        "root": found.checkpoint.root.hex(),
        "statements": kinds,
        "draws": draws["draws"],
        "audited": draws["audited"],
        "waiting": draws["waiting"],
        "heads": {str(index): head.weights.root for index, head in walk.lineage.heads.items()},
        "withdrawn": len(walk.withdrawn),
        "secret_sets_open": sum(kept.opened for kept in walk.sets.values()),
        "secret_sets_in_use": sum(not kept.opened for kept in walk.sets.values()),
    }


def _check_signers(found: Followed, statements: Sequence[Sealed[Any]]) -> None:
    indices = {sealed.id: index for index, sealed in enumerate(statements)}
    authority = Authority(found.genesis, found.policies, indices)
    for index, sealed in enumerate(statements):
        official = isinstance(sealed.record, OFFICIAL)
        if isinstance(sealed.record, AuditReport):
            official = sealed.record.assignment is None
        if official:
            authority.check(sealed, index)


@dataclass(slots=True)
class _Set:
    """A secret set in the log: its statement, the head it judges, whom it judged."""

    record: SecretSet
    head: str
    judged: dict[str, Verdict | Merge] = field(default_factory=dict)
    opened: bool = False


@dataclass(slots=True)
class Walk:
    """What the statements so far have made; `take` refuses one that does not follow."""

    policies: Mapping[int, Policy]
    lineage: Lineage
    assignments: dict[str, Assignment] = field(default_factory=dict)
    contributions: dict[str, Contribution] = field(default_factory=dict)
    accepted: dict[str, tuple[Contribution, Assignment]] = field(default_factory=dict)
    revocations: dict[str, Revocation] = field(default_factory=dict)
    sets: dict[str, _Set] = field(default_factory=dict)
    withdrawn: dict[str, Withdrawal] = field(default_factory=dict)
    merged: dict[str, list[Assignment]] = field(default_factory=dict)

    def take(self, sealed: Sealed[Any]) -> None:
        """The next statement of the log."""
        match sealed.record:
            case Assignment() as record:
                self._check_shards(f"assignment {sealed.id[:12]}", record)
                self.assignments[sealed.id] = record
            case Contribution() as record:
                self.contributions[sealed.id] = record
            case Verdict() as record:
                self._verdict(record)
            case Merge() as record:
                self._count(record.expert, record.parent.weights.root, sealed.id, record)
                self.lineage.apply(sealed, self.accepted)
                leases = [self.accepted[part.contribution][1] for part in record.inputs]
                for lease in leases:
                    self._check_shards(f"merge {sealed.id[:12]}", lease)
                if record.published:
                    self.merged[sealed.id] = leases
            case Withdrawal() as record:
                self._withdrawn(sealed.id, record)
            case Revocation() as record:
                self.revocations[sealed.id] = record
            case Revert() as record:
                if record.revocation not in self.revocations:
                    raise ParisError("merge.lineage", f"revert {sealed.id[:12]}: no revocation")
                self.lineage.revert(sealed, self.revocations[record.revocation])
            case SecretSet() as record:
                self._committed(sealed.id, record)
            case SecretSetOpened() as record:
                self._opened(record)

    def _verdict(self, verdict: Verdict) -> None:
        name = f"verdict on {verdict.contribution[:12]}"
        lease = self.assignments.get(verdict.assignment)
        handed_in = self.contributions.get(verdict.contribution)
        if lease is None or handed_in is None:
            raise ParisError("check.failed", f"{name}: nothing was handed in before it")
        failed = [layer.code for layer in verdict.layers if not layer.passed]
        if verdict.accepted:
            self._check_shards(name, lease)
            also: list[LayerName] = [x.layer for x in verdict.layers if x.layer in ("L4", "L5")]
            try:
                concluded = decide(verdict.layers, self.policies[lease.policy], lease.round, also)
            except ValueError as error:
                raise ParisError("check.failed", f"{name}: {error}") from error
            if concluded != (True, verdict.code):
                raise ParisError("check.failed", f"{name}: {concluded[1]} follows from its layers")
            self.accepted[verdict.contribution] = (handed_in, lease)
        elif failed and verdict.code not in failed and verdict.code not in OVER:
            raise ParisError("check.failed", f"{name}: no layer says {verdict.code}")
        if any(layer.layer == "L3" for layer in verdict.layers):
            root = lease.parent.weights.root
            self._count(lease.expert, root, verdict.contribution, verdict)

    # ------------------------------------------------------------ withdrawn clips

    def _check_shards(self, name: str, lease: Assignment) -> None:
        """Nothing is leased, accepted or merged on a shard after a clip of it was withdrawn."""
        for record in self.withdrawn.values():
            if is_on(lease, record.shards):
                raise ParisError("check.failed", f"{name}: clip {record.clip[:12]} is withdrawn")

    def _withdrawn(self, id: str, record: Withdrawal) -> None:
        """A withdrawal is the clip's first, of shards of the genesis, and names the right heads."""
        name = f"withdrawal {id[:12]}"
        heads = [
            merge
            for merge, leases in self.merged.items()
            if any(is_on(lease, record.shards) for lease in leases)
        ]
        if record.clip in self.withdrawn:
            raise ParisError("check.failed", f"{name}: the clip is withdrawn already")
        if not record.shards or not self.lineage.shards.issuperset(record.shards):
            raise ParisError("check.failed", f"{name}: shards that are not the network's")
        if record.heads != tuple(heads):
            raise ParisError("check.failed", f"{name}: {len(heads)} heads were trained on them")
        self.withdrawn[record.clip] = record

    # ------------------------------------------------------------ secret sets

    def _of(self, expert: int) -> Iterator[_Set]:
        return (kept for kept in self.sets.values() if kept.record.expert == expert)

    def _committed(self, id: str, record: SecretSet) -> None:
        if record.number != sum(1 for _ in self._of(record.expert)):
            raise ParisError("secret.set", f"{id[:12]}: its number is not the next one")
        self.sets[id] = _Set(record, self.lineage.heads[record.expert].weights.root)

    def _count(self, expert: int, head: str, subject: str, record: Verdict | Merge) -> None:
        """A verdict or merge was measured on the set of this head; there must be one."""
        policy = self.policies[record.policy]
        current = [kept for kept in self._of(expert) if kept.head == head and not kept.opened]
        if current:
            current[-1].judged[subject] = record
        elif policy.audit is not None:
            raise ParisError("secret.set", f"{subject[:12]} was judged before a set was committed")

    def _opened(self, record: SecretSetOpened) -> None:
        kept = self.sets.get(record.set)
        if kept is None or kept.opened:
            raise ParisError("secret.set", f"{record.set[:12]} is not there, or is open already")
        check_opening(kept.record, record)
        named = {subject for subject, _, _ in record.scores}
        # A loss that was no number has no score; such a contribution was refused.
        check_scores(record, [s for s, it in kept.judged.items() if s in named or _scored(it)])
        for subject, delta, se in record.scores:
            self._check_score(kept, subject, real(delta), real(se))
        kept.opened = True

    def _check_score(self, kept: _Set, subject: str, delta: float, se: float) -> None:
        """The published bucket is what the exact numbers say."""
        judged = kept.judged[subject]
        if isinstance(judged, Merge):
            found = dict(judged.numbers)
            if (real(found["delta"]), real(found["se"])) != (delta, se):
                raise ParisError("secret.set", f"merge {subject[:12]}: another score")
            return
        numbers, margins = _l3(judged), self.policies[judged.policy].margins
        errors, count = real(margins.standard_errors), int(real(numbers["n"]))
        looks = sequential.plan(margins.looks, kept.record.clips, errors)
        look = next((look for look in looks if look.clips == count), looks[-1])
        margin = real(numbers["margin"])
        bucket = sequential.conclude(delta, se, look, margin=margin, errors=errors)
        if bucket != real(numbers["bucket"]):
            raise ParisError("secret.set", f"{subject[:12]}: {numbers['bucket']} was published")


def _l3(verdict: Verdict) -> dict[str, str]:
    return next(dict(layer.numbers) for layer in verdict.layers if layer.layer == "L3")


def _scored(judged: Verdict | Merge) -> bool:
    """Whether its losses were numbers, as far as that is published."""
    if isinstance(judged, Merge):
        return {"delta", "se"} <= dict(judged.numbers).keys()
    return judged.code != "loss.damage"


OVER = NO_FAULT | {"internal", "tensor.header", "tensor.values"}
"""Codes of verdicts that end without a layer's refusal."""


def check_text(facts: Json) -> str:
    """The same for people."""
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(facts["statements"].items()))
    lines = [
        f"{facts['size']} statements, root {facts['root']}: {kinds}",
        f"{facts['draws']} draws without a gap, {facts['audited']} of them audited, "
        f"{len(facts['waiting'])} contributions wait for a verdict",
    ]
    lines += [f"expert {index}: head {root}" for index, root in facts["heads"].items()]
    lines.append(
        f"{facts['secret_sets_open']} secret sets opened and compared, "
        f"{facts['secret_sets_in_use']} in use"
    )
    return "\n".join(lines)
