"""The archive: what a coordinator has on its disk, as it is asked for. It changes nothing.

The office is this and the hand that writes. What is not there is refused with `not-found`::

    archive.raw(statement_id)               # the signed envelope
    archive.contribution(contribution_id)   # where it stands, as JSON
    list(archive.lineage(heads))            # ids of all statements that prove these heads
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from paris_coordinator.auditing import chain_start, is_canary
from paris_coordinator.board import Work
from paris_coordinator.config import State
from paris_coordinator.cosigning import Cosignatures
from paris_coordinator.ledger import Ledger
from paris_coordinator.policies import operator_key
from paris_coordinator.projector import Projector
from paris_coordinator.replay import replay
from paris_coordinator.secrets import operator_secret
from paris_protocol.audit import chain_head, chain_value
from paris_protocol.averages import released
from paris_protocol.envelope import Sealed, seal, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import AuditRules, Head, Index, Policy

Json = dict[str, Any]


class Archive:
    """Key, ledger, store and log of one network, and the desk that follows from the ledger."""

    def __init__(self, state: State, clock: Callable[[], float]) -> None:
        self.state, self._clock = state, clock
        self.genesis = state.genesis()
        self.network = self.genesis.id
        self.ledger = Ledger(state.ledger_file)
        self.desk, self.policies = replay(self.ledger, state)
        self.key = operator_key(state, self.policies[self.desk.policy.number])
        self.seed = state.seed()
        self.store = BlobStore(state.store)
        former = {key for each in self.policies.values() for key in each.record.coordinator_keys}
        self.log = Projector(state.log, self.network, self.key, former)
        self.cosigned = Cosignatures(self.log)
        self._starts: dict[str, bytes] = {}

    def now(self) -> int:
        """Unix seconds."""
        return int(self._clock())

    def close(self) -> None:
        """Lets go of the ledger."""
        self.ledger.close()

    # ------------------------------------------------------------ statements

    def raw(self, statement: str) -> bytes:
        """The envelope of a statement, or ParisError("not-found")."""
        found = self.ledger.envelope(statement)
        if found is None:
            raise ParisError("not-found", f"statement {statement[:16]}")
        return found.raw

    def sealed(self, statement: str) -> Sealed[Any]:
        """A statement of the ledger."""
        return unseal_any(self.raw(statement), self.network)

    def policy(self, number: int | None = None) -> Sealed[Policy]:
        """The policy of this number, or the current one."""
        number = self.desk.policy.number if number is None else number
        if number not in self.policies:
            raise ParisError("not-found", f"policy {number}")
        return self.policies[number]

    def index(self) -> Sealed[Index]:
        """The signed index of this moment."""
        desk = self.desk
        size, root = self.log.head()
        record = Index(
            policy=desk.policy_id,
            heads=tuple(expert.head for expert in desk.experts),
            release=next(reversed(desk.releases), None),
            log_size=size,
            log_root=root,
            finished=desk.complete,
            at=self.now(),
        )
        return seal(record, self.key, self.network)

    def secret(self, purpose: str) -> str:
        """A secret (hex) of the operator's key for one purpose, such as the held-out clips."""
        return operator_secret(self.seed, purpose)

    def is_canary(self, work: Work) -> bool:
        """Whether this assignment was chosen, in secret, to be trained here as well."""
        rules = self.policy(work.record.policy).record.audit
        return rules is not None and is_canary(self.seed, work.id, rules.canary)

    def head_file(self, head: Head) -> Path:
        """The file of a head's weights, verified."""
        return self.store.path(head.weights.blob)

    def released_file(self, head: Head) -> Path:
        """The file of what a release of this head holds, verified: its average or its weights."""
        return self.store.path(released(head, self.desk.merges).blob)

    # ------------------------------------------------------------ audits

    def chain_secret(self, rules: AuditRules, number: int) -> str:
        """Value `number` of the chain, which started with the first policy that names its head."""
        if rules.chain not in self._starts:
            for policy, sealed in sorted(self.policies.items()):
                start = chain_start(self.seed, policy)
                named = sealed.record.audit is not None and sealed.record.audit.chain == rules.chain
                if named and chain_head(start, rules.chain_length) == rules.chain:
                    self._starts[rules.chain] = start
        if rules.chain not in self._starts:
            raise ParisError("audit.draw", "the chain is not of this coordinator's key")
        return chain_value(self._starts[rules.chain], rules.chain_length, number)

    def has_part(self, blob: str) -> bool:
        """Whether anything of a blob is in the store, were it only its manifest."""
        try:
            return bool(self.store.manifest(blob).pieces)
        except ParisError:
            return False

    def kept(self) -> set[str]:
        """Blobs that belong to the network, whoever else names them."""
        desk, genesis = self.desk, self.genesis.record
        files = [genesis.initial, genesis.codec.file, genesis.text.file]
        files += [shard.file for cluster in genesis.clusters for shard in cluster.shards]
        files += [file for merge in desk.merges.values() for file in (merge.result, merge.average)]
        files += [revert.result for revert in desk.reverts.values()]
        files += [work.handed_in.update for work in desk.works.values() if work.handed_in]
        kept = {file.blob.id for file in files if file is not None}
        for contribution in desk.trials:
            opening = desk.audits[contribution].opening
            kept |= {state.file.blob.id for state in opening.states} if opening else set()
        return kept

    # ------------------------------------------------------------ contributions

    def upload_state(self, contribution: str) -> Json:
        """The answer to a contribution: its state and the pieces that are missing."""
        work = self.desk.work_of(contribution)
        ref, state = work.done.update.blob, shown_state(work)
        answer: Json = {
            "id": contribution,
            "missing": [],
            "manifest_missing": False,
            "state": state,
        }
        if state == "uploading":
            try:
                answer["missing"] = self.store.missing(ref)
            except ParisError:
                answer["manifest_missing"] = True
        return answer

    def contribution(self, id: str) -> Json:
        """Where a contribution stands."""
        work = self.desk.work_of(id)
        verdict = None if work.verdict is None else json.loads(self.raw(work.verdict))
        return {
            "id": id,
            "state": shown_state(work),
            "outcome": work.state,
            "assignment": work.id,
            "node": work.record.node,
            "expert": work.record.expert,
            "round": work.record.round,
            "unit": work.record.unit,
            "accepted": None if work.judged is None else work.judged.accepted,
            "code": None if work.judged is None else work.judged.code,
            "verdict": verdict,
            "merge": work.merge,
            "vested": self.desk.vested(id),
            "log_index": self.log.index_of(id),
        }

    def lineage(self, heads: Iterable[Head]) -> Iterator[str]:
        """Statement ids below these heads: merges, for each input the whole evidence, reverts."""
        revocations: set[str] = set()
        for head in heads:
            step = head.merge
            while step is not None:
                yield step
                if step in self.desk.reverts:
                    revert = self.desk.reverts[step]
                    if revert.revocation not in revocations:
                        yield revert.revocation
                    revocations.add(revert.revocation)
                    step = revert.parent.merge
                    continue
                merge = self.desk.merges[step]
                for part in merge.inputs:
                    yield from self.evidence_of(part.contribution)
                step = merge.parent.merge

    def evidence_of(self, contribution: str) -> Iterator[str]:
        """Statement ids about one contribution, its audit among them, in the order of the log."""
        work, audit = self.desk.work_of(contribution), self.desk.audits.get(contribution)
        ids = [work.id, work.commitment, contribution]
        if audit is not None:
            ids += [*audit.challenges, *audit.openings, *audit.tasks.values(), *audit.reports]
        yield from (id for id in (*ids, work.verdict) if id is not None)


def shown_state(work: Work) -> str:
    """The state as the interface names it: uploading, queued, judged or closed."""
    if work.state in ("uploading", "queued", "closed"):
        return work.state
    return "queued" if work.state == "auditing" else "judged"
