"""The part of the desk that audits: challenges, openings, reports, revocations, reverts. Pure core.

`AuditDesk` is the board with the rules for these facts; `desk.Desk` adds the rest and is the one
entrance. A fact that does not follow from the state is refused with a ParisError and changes
nothing (`audit.*`, `node.revoked`, `unit.*`)::

    desk.handle(Measured(contribution, layers, draw, states, canary), now)   # the audit begins
    desk.handle(Filed(challenge_id, signer, challenge), now)
    desk.handle(Filed(opening_id, node, opening), now); desk.handle(Opened(contribution), now)
    desk.handle(Filed(report_id, auditor, report), now)

Promises: a contribution is asked for at most twice while a coordinator is there to be answered, and
its audit ends with a verdict; what a revocation names leaves its head; accepted work of others on
that head is merged before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from paris_coordinator import rounds
from paris_coordinator.auditing import REVOKING, STATE_COPIES, Audit
from paris_coordinator.board import Board, Expert, Node, Unit, Work
from paris_coordinator.events import Answered, Called, Filed, Measured
from paris_coordinator.planning import plan_name
from paris_coordinator.withdrawals import spoiled, touched
from paris_protocol.audit import NO_FAULT, false_auditors, standing_after
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    Assignment,
    AuditReport,
    AuditTask,
    Challenge,
    Head,
    KeyRotation,
    Opening,
    Revert,
    Revocation,
    Verdict,
    Withdrawal,
)


def _closed(detail: str = "") -> NoReturn:
    raise ParisError("audit.closed", detail)


class AuditDesk(Board):
    """The board with the rules of audits and of what follows from them."""

    def _known(self, node: str) -> Node:
        if node not in self.nodes:
            raise ParisError("record.signer", "this key is not registered")
        return self.nodes[node]

    def _unrevoked(self, node: str) -> Node:
        known = self._known(node)
        if known.revoked is not None:
            raise ParisError("node.revoked", known.condemned)
        return known

    def _working(self, node: str) -> Node:
        """A node that may get work: not revoked, not quarantined, its key not given up."""
        known = self._unrevoked(node)
        if known.after is not None:
            raise ParisError("record.signer", "this key gave way to another")
        if known.quarantined:
            raise ParisError("node.quarantined", f"{known.refusals} contributions were refused")
        return known

    # ------------------------------------------------------------ the audit

    def _trial(self, contribution: str) -> Audit:
        if contribution not in self.trials:
            _closed("this contribution is under no audit")
        return self.audits[contribution]

    def _measured(self, fact: Measured) -> None:
        work = self.work_of(fact.contribution)
        rules = self.policies[work.record.policy].audit
        if work.state != "queued" or rules is None:
            raise ParisError("unit.closed", "not waiting for its verdict")
        self.queue.remove(fact.contribution)
        self.trials.append(fact.contribution)
        self.audits[fact.contribution] = Audit(fact.contribution, fact, rules)
        work.state = "auditing"

    def _challenged(self, event: Filed, record: Challenge) -> None:
        audit = self._trial(record.contribution)
        # The second may be repeated: where it ran out while the coordinator was away.
        attempt = 1 if audit.challenge is None else 2
        node = self.work_of(record.contribution).record.node
        wanted = (node, audit.measured.states, attempt)
        if audit.opened or (record.node, record.states, record.attempt) != wanted:
            _closed("the challenge does not follow")
        audit.challenge = record
        audit.challenges.append(event.id)

    def _opening(self, event: Filed, record: Opening, now: int) -> None:
        """A node lays states open: those that it was asked for, with the roots it committed to."""
        known = self._unrevoked(event.signer)
        work = self.work_of(record.contribution)
        if work.record.node != event.signer:
            raise ParisError("unit.not-yours")
        audit = self.audits.get(record.contribution)
        if audit is None or record.challenge not in audit.challenges:
            raise ParisError("audit.unknown", record.challenge[:16])
        if record.contribution not in self.trials or audit.opened or audit.unanswered(now):
            _closed()
        if record.challenge in audit.answered:
            raise ParisError("unit.second-result", "the challenge has been answered otherwise")
        assert work.committed is not None
        if tuple(state.index for state in record.states) != audit.measured.states:
            raise ParisError("audit.unknown", f"asked for the states {audit.measured.states}")
        limit = STATE_COPIES * self.genesis.initial.blob.size + (1 << 20)
        for state in record.states:
            # After the states comes the residual that the unit began with.
            roots = (*work.committed.states, work.record.residual)
            if state.file.root != roots[state.index]:
                raise ParisError("audit.state", f"state {state.index}")
            if state.file.blob.size > limit:
                raise ParisError("blob.too-large", f"{state.file.blob.size} of at most {limit}")
        audit.opening = record
        audit.answered.add(record.challenge)
        audit.openings.append(event.id)
        known.last = now

    def _opened(self, contribution: str) -> None:
        audit = self._trial(contribution)
        if audit.opening is None or audit.opened:
            _closed("nothing is being opened")
        audit.opened = True

    def _called(self, fact: Called, now: int) -> None:
        audit = self._trial(fact.contribution)
        if audit.called is not None or not audit.opened:
            _closed("nobody is to be called now")
        audit.called, audit.called_at, audit.check = fact.auditors, now, fact.check

    def _audit_draft(self, audit: Audit, node: str, now: int) -> Assignment:
        """The audited assignment once more, for another node and with what is to be replayed."""
        work = self.work_of(audit.contribution)
        assert audit.opening is not None
        assert work.commitment is not None
        until = audit.called_at + self.policy.soft_deadline
        task = AuditTask(
            contribution=audit.contribution,
            assignment=work.id,
            commitment=work.commitment,
            segments=audit.draw.segments,
            states=audit.opening.states,
        )
        changed = {"kind": "audit", "node": node, "audit": task, "issued": now}
        return work.record.model_copy(
            update=changed | {"soft_deadline": until, "hard_deadline": until}
        )

    def _audit_assigned(self, id: str, record: Assignment, now: int) -> None:
        task, node = record.audit, self._known(record.node)
        audit = None if task is None else self.audit_task(record.node, now, (plan_name(record),))
        if task is None or audit is None or audit.contribution != task.contribution:
            raise ParisError("unit.closed", "nobody drew this auditor")
        if self.open_work(record.node, now) is not None:
            raise ParisError("unit.closed", "the node is taken")
        self.works[id] = Work(id, record, 0)
        audit.tasks[record.node] = id
        node.works.append(id)
        node.last = now

    def _reported(self, event: Filed, record: AuditReport, now: int) -> None:
        if record.assignment is None:
            if event.signer not in self.policy.coordinator_keys:
                raise ParisError("unit.not-yours", "an auditor names its assignment")
            audit = self._trial(record.contribution)
            if audit.own is not None:
                _closed("replayed already")
        else:
            audit = self._check_volunteer(event, record, now)
            self.works[record.assignment].state = "reported"
            self.nodes[event.signer].last = now
        audit.reports[event.id] = record

    def _check_volunteer(self, event: Filed, record: AuditReport, now: int) -> Audit:
        self._unrevoked(event.signer)
        work = self.works.get(record.assignment or "")
        task = None if work is None else work.record.audit
        if work is None or task is None or task.contribution != record.contribution:
            raise ParisError("audit.unknown", (record.assignment or "")[:16])
        if (work.record.node, record.auditor) != (event.signer, event.signer):
            raise ParisError("unit.not-yours")
        late = work.state != "open" or now > work.record.hard_deadline
        if late or record.contribution not in self.trials:
            _closed()
        places = tuple(segment.index for segment in record.segments)
        if places and places != task.segments:
            raise ParisError("audit.unknown", f"asked for the segments {task.segments}")
        if record.passed and not all(segment.passed for segment in record.segments):
            raise ParisError("record.malformed", "a report that contradicts itself")
        return self.audits[record.contribution]

    def _answered(self, fact: Answered) -> None:
        work = self.works.get(fact.assignment)
        if work is None or work.contribution is None:
            raise ParisError("unit.unknown", fact.assignment[:16])
        self._trial(work.contribution).answer = fact

    # ------------------------------------------------------------ verdicts

    def _judged(self, id: str, record: Verdict, now: int) -> None:
        work = self.work_of(record.contribution)
        if work.verdict is not None:
            raise ParisError("unit.closed", "already judged")
        if record.accepted and not (work.state in ("queued", "auditing") and self.current(work)):
            raise ParisError("unit.closed", "its unit needs no result any more")
        if work.state == "closed" and record.code not in NO_FAULT:
            raise ParisError("unit.closed", "nobody needs it any more")
        if work.state not in ("queued", "auditing", "closed"):
            raise ParisError("unit.closed")
        for waiting in (self.queue, self.trials, self.dismissed):
            if record.contribution in waiting:
                waiting.remove(record.contribution)
        work.verdict, work.judged = id, record
        self.shelf.judged(record, work.record.parent.weights.root)
        node = self.heir(work.record.node)
        node.standing = standing_after(node.standing, record)
        if record.contribution in self.audits:
            self._end_audit(self.audits[record.contribution], record)
        if record.accepted:
            self._accept(work, node)
        elif record.code in NO_FAULT:
            work.state = "closed"
        else:
            self._refuse(work, node, record.code, now)

    def _end_audit(self, audit: Audit, record: Verdict) -> None:
        """Audits that were not done are over; whoever reported otherwise than the replay pays."""
        self._close(audit.tasks.values())
        reports = [audit.reports[id] for id in record.reports if id in audit.reports]
        for auditor in false_auditors(reports):
            node = self.heir(auditor)
            node.standing = 0
            self._count_refusal(node)

    def _accept(self, work: Work, node: Node) -> None:
        unit = self.experts[work.record.expert].units[work.record.unit]
        work.state, unit.accepted = "accepted", work.contribution
        node.accepted += 1
        # A machine that was off for some nights of its life is no vandal.
        node.refusals = max(0, node.refusals - 1)
        self._close(other for other in unit.works if other != work.id)

    def _refuse(self, work: Work, node: Node, code: str, now: int) -> None:
        work.state = "refused"
        expert = self.experts[work.record.expert]
        if expert.head == work.record.parent and expert.attempt == work.attempt:
            unit = expert.units[work.record.unit]
            unit.free_since = now
            unit.refused.update(self.keys_of(work.record.node))
        self._count_refusal(node)
        if code in REVOKING:
            self._condemn(work.record.node, code)

    def _count_refusal(self, node: Node) -> None:
        node.refusals += 1
        if node.refusals >= max(1, self.policy.refusals_to_quarantine):
            node.quarantined = True
            self._close(id for id in node.works if self.works[id].state in ("open", "uploading"))

    def _close(self, works: Iterable[str]) -> None:
        """What is unfinished among these is over: another's was taken, or the round has ended.

        What arrived whole still gets a verdict where the policy audits, since its draw is used up.
        Audits under way go to their end: nobody escapes one by somebody else's work.
        """
        for id in works:
            work = self.works[id]
            if work.state not in ("open", "uploading", "queued"):
                continue
            if work.state == "queued" and work.contribution is not None:
                self.queue.remove(work.contribution)
                if work.number is not None:
                    self.dismissed.append(work.contribution)
            work.state = "closed"

    # ------------------------------------------------------------ keys, revocation and revert

    def _rotated(self, event: Filed, record: KeyRotation, now: int) -> None:
        """A key gives way to another, which keeps its standing and its refusals.

        The old key gets no more work. What becomes of what it has handed in is the new key's gain
        or loss, and whoever is revoked is revoked with all its keys.
        """
        old = self._unrevoked(event.signer)
        if record.old != event.signer or old.after is not None or old.condemned:
            raise ParisError("record.signer", "this key gives way to no other")
        if record.new in self.nodes:
            raise ParisError("record.signer", "the new key is in use already")
        self._close(id for id in old.works if self.works[id].state in ("open", "uploading"))
        self.nodes[record.new] = Node(
            now, now, event.id, old.refusals, 0, old.quarantined, old.standing, before=record.old
        )
        old.after, old.standing = record.new, 0

    def _condemn(self, node: str, reason: str) -> None:
        """The key is to be revoked, and with it all others of the same volunteer."""
        for key in self.keys_of(node):
            if not self.nodes[key].condemned:
                self.nodes[key].condemned = reason

    def _revoked(self, id: str, record: Revocation, now: int) -> None:
        """The key counts no more: its open work is over, its accepted work is not merged."""
        node = self._known(record.key)
        if node.revoked is not None:
            raise ParisError("node.revoked")
        if record.contributions != self.unvested(record.key):
            raise ParisError("unit.closed", "these are not its unvested contributions")
        node.revoked, node.condemned, node.standing = id, record.reason, 0
        self.revocations[id] = record
        for contribution in record.contributions:
            self.work_of(contribution).revocation = id
        for work in (self.works[work] for work in node.works):
            if work.state == "accepted":
                unit = self.experts[work.record.expert].units[work.record.unit]
                unit.accepted, unit.free_since, work.state = None, now, "revoked"
                work.revocation = id
            self._stop_audit(work)
        self._close(node.works)

    def _stop_audit(self, work: Work) -> None:
        """An audit under way ends here; its draw is still published with a verdict."""
        if work.state == "auditing" and work.contribution is not None:
            self.trials.remove(work.contribution)
            self.dismissed.append(work.contribution)
            self._close(self.audits[work.contribution].tasks.values())
            work.state = "closed"

    # ------------------------------------------------------------ withdrawn clips

    def _withdraw(self, clip: str, reason: str) -> None:
        """The clip is to be withdrawn; its shards are found by whoever carries that out."""
        self._not_withdrawn(clip)
        if clip in self.withdrawing:
            raise ParisError("clip.withdrawn", clip[:16])
        self.withdrawing[clip] = reason

    def _not_withdrawn(self, clip: str) -> None:
        if any(known.clip == clip for known in self.withdrawals.values()):
            raise ParisError("clip.withdrawn", clip[:16])

    def _withdrawn(self, id: str, record: Withdrawal, now: int) -> None:
        """Its shards are leased no more, and work on them that is in no head does not count."""
        self._not_withdrawn(record.clip)
        shards = (shard for cluster in self.genesis.clusters for shard in cluster.shards)
        if not record.shards or not {s.file.blob.id for s in shards}.issuperset(record.shards):
            raise ParisError("clip.unknown", record.clip[:16])
        if record.heads != touched(self, record.shards):
            raise ParisError("unit.closed", "these are not the heads that it touched")
        self.withdrawals[id] = record
        self.withdrawing.pop(record.clip, None)
        self.withdrawn |= frozenset(record.shards)
        for work in self.works.values():
            if not spoiled(self, work.record):
                continue
            if work.state == "accepted":
                unit = self.experts[work.record.expert].units[work.record.unit]
                unit.accepted, unit.free_since, work.state = None, now, "withdrawn"
            self._stop_audit(work)
            self._close([work.id])
        for expert in self.experts:
            left = self.left(expert)
            for unit in expert.units:
                unit.shards = tuple(shard for shard in unit.shards if shard in left)

    def _reverted(self, id: str, record: Revert, now: int) -> None:
        """A head without what a revocation took back; the round begins anew on it."""
        expert = self.experts[record.expert]
        due = self.reverting().get((record.expert, record.revocation), ())
        removed = tuple(part.contribution for part in record.removed)
        if record.parent != expert.head or not removed or removed != due:
            raise ParisError("unit.closed", "the revert does not follow the head")
        if any(unit.accepted is not None for unit in expert.units):
            raise ParisError("unit.closed", "accepted work is merged first")
        for contribution in removed:
            self.work_of(contribution).state = "revoked"
        self._close(work for unit in expert.units for work in unit.works)
        self.reverts[id] = record
        expert.head = Head(round=expert.round, weights=record.result, merge=id)
        expert.attempt += 1
        self._open_round(expert, now)

    def _open_round(self, expert: Expert, now: int) -> None:
        shards = self.left(expert)
        # A repeated round deals the shards anew: the same unit could fail the same way again.
        hands = rounds.deal(shards, self.policy.plan.units, expert.round + expert.attempt)
        expert.units, expert.opened = [Unit(hand, now) for hand in hands], None
