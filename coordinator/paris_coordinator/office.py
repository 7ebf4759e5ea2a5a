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
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from paris_coordinator.archive import Archive
from paris_coordinator.auditing import address_block
from paris_coordinator.board import Work
from paris_coordinator.config import State
from paris_coordinator.events import (
    Again,
    Fact,
    Filed,
    Finished,
    Grant,
    LeaseAsked,
)
from paris_coordinator.ledger import Person
from paris_coordinator.pen import Pen
from paris_coordinator.planning import able
from paris_coordinator.replay import entry_of, replay
from paris_coordinator.uploads import Uploads
from paris_protocol.audit import make_draw, segments_of
from paris_protocol.authority import check_rotation
from paris_protocol.envelope import Sealed, seal, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import peer_id
from paris_protocol.records import (
    AuditReport,
    Beat,
    Commitment,
    Contribution,
    Draw,
    KeyRotation,
    LeaseRequest,
    Opening,
    Registration,
    Statement,
)

S = TypeVar("S", bound=Statement)
Json = dict[str, Any]


class Office(Archive):
    """Everything that the coordinator knows, and the only hand that changes it."""

    def __init__(self, state: State, clock: Callable[[], float]) -> None:
        super().__init__(state, clock)
        self.people = self.ledger.people()
        self.presence: dict[str, tuple[int, Beat]] = {}
        self.changed = asyncio.Event()
        self._pen = Pen(self.ledger, self._rebuild)
        self.uploads = Uploads(self.store, lambda: self.desk, self.tell)
        self.blocks: dict[str, str] = {}
        self.plans: dict[str, Sequence[str]] = {}
        self._projecting = asyncio.Lock()

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
        self.uploads.restart()

    async def settled(self) -> None:
        """Waits until what the desk knows is on the disk: before, a power cut could undo it."""
        await self._pen.settled()

    async def project(self) -> bool:
        """Brings the log up to the ledger; True if anything was new."""
        async with self._projecting:
            await self._pen.settled()
            wrote = await asyncio.to_thread(self._project)
            if wrote or self.log.index_due(self.now()):
                await self._pen.settled()  # what the index names is on the disk
                await asyncio.to_thread(self.log.show_index, self.index())
            return wrote

    def _project(self) -> bool:
        return self.log.catch_up(self.ledger.logged)

    # ------------------------------------------------------------ the audit's draw

    async def draw(self, work: Work) -> Draw | None:
        """The audit draw of a contribution that arrived whole; None where nothing is audited.

        The log is brought up to date first: its root right after the commitment is in the seed.
        Raises `audit.draw` when the policy's hash chain is used up.
        """
        rules = self.policy(work.record.policy).record.audit
        if rules is None or work.number is None or work.commitment is None:
            return None
        await self.project()
        index = self.log.index_of(work.commitment)
        if index is None:
            raise ParisError("log.proof", f"commitment {work.commitment[:16]} is not logged")
        return make_draw(
            rules,
            segments_of(work.record),
            number=work.number,
            size=index + 1,
            root=self.log.root(index + 1),
            secret=await asyncio.to_thread(self.chain_secret, rules, work.number),
            standing=work.standing,
        )

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

    async def lease(self, raw: bytes, remote: str | None = None) -> Json:
        """Work for a node: a new assignment, its open one again, or the news that all is done.

        `remote` is the address that it asks from; its block is kept in memory and nowhere else.
        """
        sealed = self._open(raw, LeaseRequest)
        self.blocks[sealed.signer] = address_block(remote)
        self.plans[sealed.signer] = able(sealed.record.plans)
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

    async def beat(self, raw: bytes, remote: str | None = None) -> Json:
        """A node is alive; beats are kept in memory only. The answer asks for states to open."""
        sealed = self._open(raw, Beat)
        self.blocks[sealed.signer] = address_block(remote)
        self.presence[sealed.signer] = (self.now(), sealed.record)
        asked = self.desk.challenges(sealed.signer)
        if asked:
            await self._pen.settled()
        challenges = [json.loads(self.raw(id)) for id in asked]
        return {"ok": True, "finished": self.desk.complete, "challenges": challenges}

    async def rotate(self, raw: bytes) -> Json:
        """A node's key gives way to another; both have signed that."""
        sealed = self._open(raw, KeyRotation)
        check_rotation(sealed, self.network)
        known = self.desk.nodes.get(sealed.record.new)
        if known is None or known.registration != sealed.id:
            await self.tell(Filed(sealed.id, sealed.signer, sealed.record), sealed.raw)
        await self._pen.settled()
        return {"ok": True, "id": sealed.id}

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
            self.uploads.expect(sealed.id)
        await self._pen.settled()
        await self.uploads.arrived(sealed.record.update.blob)
        return self.upload_state(sealed.id)

    async def open_states(self, raw: bytes) -> Json:
        """A node's answer to a challenge; ours says what is still to be uploaded."""
        sealed = self._open(raw, Opening)
        contribution = sealed.record.contribution
        audit = self.desk.audits.get(contribution)
        if audit is None or sealed.id not in audit.openings:
            await self.tell(Filed(sealed.id, sealed.signer, sealed.record), sealed.raw)
            self.uploads.expect(contribution)
        await self._pen.settled()
        for state in sealed.record.states:
            await self.uploads.arrived(state.file.blob)
        lacking = self.uploads.lacking(contribution)
        state_now = "uploading" if lacking else "complete"
        missing = self.uploads.missing(contribution)
        return {"id": sealed.id, "state": state_now, "lacking": lacking, "missing": missing}

    async def audit(self, raw: bytes) -> Json:
        """A volunteer's report on an audit that was assigned to it."""
        sealed = self._open(raw, AuditReport)
        if sealed.record.assignment is None:
            raise ParisError("audit.unknown", "a report names its assignment")
        audit = self.desk.audits.get(sealed.record.contribution)
        if audit is None or sealed.id not in audit.reports:
            await self.tell(Filed(sealed.id, sealed.signer, sealed.record), sealed.raw)
        await self._pen.settled()
        return {"ok": True, "id": sealed.id}

    # ------------------------------------------------------------ uploads

    async def resume_uploads(self) -> None:
        """After a restart: what arrived but was not noted, and what was to be thrown away."""
        await self.uploads.resume()
        for contribution in self.desk.audits:
            await self.forget_states(contribution)

    async def forget_states(self, contribution: str) -> None:
        """Removes opened states that nobody needs any more; what the network needs is never one."""
        audit = self.desk.audits.get(contribution)
        if audit is None or not audit.openings or contribution in self.desk.trials:
            return
        named = {
            state.file.blob
            for opening in audit.openings
            for state in self.sealed(opening).record.states
        }
        here = [ref for ref in named if self.has_part(ref.id)]
        if here:
            kept = self.kept()
            for ref in here:
                if ref.id not in kept:
                    await asyncio.to_thread(self.store.remove, ref)

    # ------------------------------------------------------------ answers about contributions

    async def receipt(self, id: str) -> Json:
        """Statements about a contribution with their log proofs under one checkpoint."""
        work = self.desk.work_of(id)
        if work.verdict is None:
            raise ParisError("not-found", "the contribution is not judged yet")
        later = [work.merge, work.revocation]
        logged = [*self.evidence_of(id), *(statement for statement in later if statement)]
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

    async def proof(self, release: str, statements: list[str]) -> Json:
        """Evidence for a release: the policies too, under a checkpoint with enough cosignatures.

        Raises `log.witness` while the witnesses that its policy demands have not cosigned.
        """
        if self.log.index_of(release) is None:
            await self.project()
        async with self._projecting:
            place = self.log.index_of(release) or 0
            policies = [each for _, each in sorted(self.policies.items())]
            before = [each for each in policies if (self.log.index_of(each.id) or 0) < place]
            ids = [release, *(each.id for each in before), *statements]
            return self.cosigned.evidence(ids, before[-1].record)

    async def cosign(self, raw: bytes) -> Json:
        """Takes a checkpoint of the log that a witness has cosigned."""
        async with self._projecting:
            return await asyncio.to_thread(self.cosigned.add, raw, self.policy().record)
