"""The office: the desk with a key, a ledger and a store. Every request and every result goes here.

A request is checked (form, network, signature), put to the desk, written into the ledger, and only
then answered: an answer means "on the disk". All requests are idempotent by content id. What the
desk refuses, the office refuses with the same ParisError, and nothing is written::

    office = Office(state, clock=time.time)
    await office.register(raw)
    answer = await office.lease(raw)      # {"assignment": {…}}
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from paris_coordinator.board import Work
from paris_coordinator.config import State
from paris_coordinator.events import (
    Again,
    Fact,
    Filed,
    Finished,
    Grant,
    LeaseAsked,
    Uploaded,
)
from paris_coordinator.ledger import Ledger, Person
from paris_coordinator.pen import Pen
from paris_coordinator.projector import Projector
from paris_coordinator.replay import entry_of, replay
from paris_protocol.envelope import Sealed, seal, unseal, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.keys import peer_id
from paris_protocol.net.store import BlobStore
from paris_protocol.records import (
    LOGGED,
    Beat,
    BlobRef,
    Commitment,
    Contribution,
    Head,
    Index,
    LeaseRequest,
    Policy,
    Registration,
    Statement,
)

S = TypeVar("S", bound=Statement)
Json = dict[str, Any]


class Office:
    """Everything that the coordinator knows, and the only hand that changes it."""

    def __init__(self, state: State, clock: Callable[[], float]) -> None:
        self.state, self._clock = state, clock
        self.genesis = state.genesis()
        self.network = self.genesis.id
        self.key = state.key()
        self.ledger = Ledger(state.ledger_file)
        self.desk, self.policies = replay(self.ledger, state)
        self.store = BlobStore(state.store)
        self.log = Projector(state.log, self.network, self.key)
        self.people = self.ledger.people()
        self.presence: dict[str, tuple[int, Beat]] = {}
        self.changed = asyncio.Event()
        self._pen = Pen(self.ledger, self._rebuild)
        self._uploads: dict[str, set[str]] = {}
        self._projecting = asyncio.Lock()
        for work in self.desk.works.values():
            self._expect(work)

    def now(self) -> int:
        """Unix seconds."""
        return int(self._clock())

    def close(self) -> None:
        """Lets go of the ledger."""
        self.ledger.close()

    # ------------------------------------------------------------ writing

    async def tell(self, fact: Fact, raw: bytes = b"") -> None:
        """Puts a fact to the desk; returns when it is in the ledger. A refusal leaves no trace."""
        now = self.now()
        self.desk.handle(fact, now)
        await self._pen.write(entry_of(fact, now, raw))
        self.changed.set()

    async def file(self, record: S) -> Sealed[S]:
        """Signs a record of the coordinator and files it."""
        sealed = seal(record, self.key, self.network)
        await self.tell(Filed(sealed.id, sealed.signer, record), sealed.raw)
        return sealed

    def _rebuild(self) -> None:
        """A commit failed: what the desk took in since then is forgotten."""
        self.desk, self.policies = replay(self.ledger, self.state)
        self._uploads.clear()
        for work in self.desk.works.values():
            self._expect(work)

    async def settled(self) -> None:
        """Waits until what the desk knows is on the disk: before, a power cut could undo it."""
        await self._pen.settled()

    async def project(self) -> bool:
        """Brings the log up to the ledger; True if anything was new."""
        async with self._projecting:
            await self._pen.settled()
            return await asyncio.to_thread(self._project)

    def _project(self) -> bool:
        return self.log.catch_up(self.ledger.statement_ids(LOGGED), lambda id: self.raw(id))

    # ------------------------------------------------------------ reading

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
        return hmac.new(self.key.seed, f"paris/{purpose}/1".encode(), hashlib.sha256).hexdigest()

    def head_file(self, head: Head) -> Path:
        """The file of a head's weights, verified."""
        return self.store.path(head.weights.blob)

    # ------------------------------------------------------------ nodes' requests

    def _open(self, raw: bytes, kind: type[S]) -> Sealed[S]:
        return unseal(raw, kind, self.network, lambda key: key in self.desk.nodes)

    async def register(self, raw: bytes) -> Json:
        """A node makes itself known."""
        sealed = unseal(raw, Registration, self.network, None)
        if sealed.record.node != sealed.signer:
            raise ParisError("record.signer", "a node registers itself")
        if sealed.record.peer_id not in ("", peer_id(sealed.signer)):
            raise ParisError("record.malformed", "the peer id is not that of the key")
        if sealed.signer not in self.desk.nodes:
            await self.tell(Filed(sealed.id, sealed.signer, sealed.record), sealed.raw)
        await self._pen.settled()
        return {"ok": True}

    async def lease(self, raw: bytes) -> Json:
        """Work for a node: a new assignment, its open one again, or the news that all is done."""
        sealed = self._open(raw, LeaseRequest)
        await self._introduce(sealed)
        [effect] = self.desk.handle(LeaseAsked(sealed.signer, sealed.record), self.now())
        match effect:
            case Grant(draft):
                assignment = await self.file(draft)
                return {"assignment": json.loads(assignment.raw)}
            case Again(id):
                await self._pen.settled()
                return {"assignment": json.loads(await asyncio.to_thread(self.raw, id))}
            case Finished():
                return {"finished": True}
        raise AssertionError(effect)

    async def _introduce(self, sealed: Sealed[LeaseRequest]) -> None:
        """Remembers the name and device that the volunteer shows, in the erasable table."""
        record, known = sealed.record, self.people.get(sealed.signer)
        person = Person(sealed.signer, record.name, record.device, self.now())
        self.people[sealed.signer] = person
        if known is None or (known.name, known.device) != (person.name, person.device):
            await asyncio.to_thread(self.ledger.remember, person)

    async def beat(self, raw: bytes) -> Json:
        """A node is alive; beats are kept in memory only."""
        sealed = self._open(raw, Beat)
        self.presence[sealed.signer] = (self.now(), sealed.record)
        return {"ok": True, "finished": self.desk.complete}

    async def commit(self, raw: bytes) -> Json:
        """A commitment, before its result."""
        sealed = self._open(raw, Commitment)
        if sealed.id not in self.desk.commitments:
            await self.tell(Filed(sealed.id, sealed.signer, sealed.record), sealed.raw)
        await self._pen.settled()
        return {"ok": True, "id": sealed.id}

    async def contribute(self, raw: bytes) -> Json:
        """A contribution; the answer says what of its update is still to be uploaded."""
        sealed = self._open(raw, Contribution)
        if sealed.id not in self.desk.contributions:
            await self.tell(Filed(sealed.id, sealed.signer, sealed.record), sealed.raw)
            self._expect(self.desk.work_of(sealed.id))
        await self._pen.settled()
        await self.arrived(sealed.record.update.blob)
        return self.upload_state(sealed.id)

    # ------------------------------------------------------------ uploads

    def _expect(self, work: Work) -> None:
        if work.state == "uploading" and work.contribution is not None:
            self._uploads.setdefault(work.done.update.blob.id, set()).add(work.contribution)

    def expected(self, blob: str, size: int | None = None) -> BlobRef:
        """The blob as an open contribution names it; nothing else may be uploaded.

        Whoever names another's blob with a wrong size must not stand in its way: the reference of
        `size` bytes is preferred.
        """
        works = [self.desk.work_of(contribution) for contribution in self._uploads.get(blob, ())]
        refs = [work.done.update.blob for work in works if work.state == "uploading"]
        if not refs:
            raise ParisError("not-found", "no open contribution names this blob")
        return next((ref for ref in refs if ref.size == size), refs[0])

    async def put_manifest(self, blob: str, size: int | None, raw: bytes) -> Json:
        """The manifest of an expected blob."""
        ref = self.expected(blob, size)
        if size is not None and size != ref.size:
            raise ParisError("blob.corrupt", f"{size} bytes instead of {ref.size}")
        await asyncio.to_thread(self.store.put_manifest, raw, ref)
        await self.arrived(ref)
        return {"missing": len(self.store.missing(ref))}

    async def put_piece(self, blob: str, number: int, data: bytes) -> Json:
        """A piece of an expected blob; verified before it is written, durable when answered."""
        whole = self._whole(blob)
        if whole is not None:
            return {"missing": 0}
        self.expected(blob)
        ref = self.expected(blob, self.store.manifest(blob).size)
        await asyncio.to_thread(self.store.put_piece, ref, number, data)
        await self.arrived(ref)
        return {"missing": len(self.store.missing(ref))}

    def _whole(self, blob: str) -> BlobRef | None:
        """A repeated request for a blob that is complete is no mistake."""
        for contribution in self._uploads.get(blob, ()):
            ref = self.desk.work_of(contribution).done.update.blob
            if self.store.has(ref):
                return ref
        return None

    async def arrived(self, ref: BlobRef) -> None:
        """Queues every contribution whose update is now complete."""
        if not self.store.has(ref):
            return
        for contribution in sorted(self._uploads.get(ref.id, ())):
            work = self.desk.work_of(contribution)
            if work.state == "uploading" and work.done.update.blob == ref:
                await self.tell(Uploaded(contribution))

    async def resume_uploads(self) -> None:
        """After a restart: what arrived completely but was not yet noted."""
        for blob in list(self._uploads):
            for contribution in self._uploads[blob]:
                ref = self.desk.work_of(contribution).done.update.blob
                await asyncio.to_thread(self._complete, ref)
                await self.arrived(ref)

    def _complete(self, ref: BlobRef) -> None:
        try:
            self.store.complete(ref)
        except ParisError:
            return  # its manifest has not arrived yet

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

    # ------------------------------------------------------------ answers about contributions

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
            "log_index": self.log.index_of(id),
        }

    async def receipt(self, id: str) -> Json:
        """Statements about a contribution with their log proofs under one checkpoint."""
        work = self.desk.work_of(id)
        if work.verdict is None:
            raise ParisError("not-found", "the contribution is not judged yet")
        ids = [work.id, work.commitment, id, work.verdict, work.merge]
        logged = [statement for statement in ids if statement is not None]
        evidence = await self.evidence(logged)
        return {
            "contribution": json.loads(self.raw(id)),
            "verdict": json.loads(self.raw(work.verdict)),
            "merge": work.merge,
            **evidence,
        }

    async def evidence(self, statements: list[str]) -> Json:
        """Checkpoint, indices and proofs of statements, all of the same moment."""
        if any(self.log.index_of(statement) is None for statement in statements):
            await self.project()
        async with self._projecting:
            return self.log.evidence(statements)

    def lineage(self, heads: Iterable[Head]) -> Iterator[str]:
        """Statement ids below these heads: merges, and for each input the whole evidence."""
        for head in heads:
            merge = head.merge
            while merge is not None:
                record = self.desk.merges[merge]
                yield merge
                for part in record.inputs:
                    work = self.desk.work_of(part.contribution)
                    evidence = (work.id, work.commitment, part.contribution, work.verdict)
                    yield from (statement for statement in evidence if statement is not None)
                merge = record.parent.merge


def shown_state(work: Work) -> str:
    """The state as the interface names it: uploading, queued, judged or closed."""
    if work.state in ("uploading", "queued", "closed"):
        return work.state
    return "judged"
