"""The coordinator's desk: the rules by which the board changes. Pure core.

`Desk.handle(event, now)` is given facts (`Filed` statements, `Uploaded`, …) and questions
(`LeaseAsked`, `Tick`). Facts change the state, or are refused with a ParisError and change nothing;
questions change nothing and are answered by effects. So the state is the fold of the facts in the
ledger, and a replay rebuilds it exactly. It owns no key and no clock: the office signs and files::

    desk = Desk(network, genesis, policy)
    [Grant(draft)] = desk.handle(LeaseAsked(node, request), now)   # draft: an unsigned Assignment
    desk.handle(Filed(sealed.id, sealed.signer, draft), now)       # now it counts

Promises: a node holds one open assignment, audits among them; units of a round have disjoint
shards; a unit is accepted once; a contribution merges once; whatever was accepted is in its round's
merge or was left out there by name, unless its node's key was revoked before, or a clip of its
shards withdrawn; no withdrawn shard is leased; every contribution that arrived whole under a policy
with audits has a draw number, without gaps, and gets a verdict.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from paris_coordinator import earlier, planning, rounds
from paris_coordinator.agenda import due
from paris_coordinator.auditdesk import AuditDesk
from paris_coordinator.board import Expert, Node, Work
from paris_coordinator.events import (
    Again,
    Answered,
    Called,
    Effect,
    Event,
    Fact,
    Filed,
    Finished,
    Grant,
    LeaseAsked,
    Measured,
    Opened,
    Ordered,
    Sampled,
    Scanned,
    Scored,
    Tick,
    Trained,
    Uploaded,
)
from paris_coordinator.withdrawals import spoiled
from paris_protocol.canonical import real
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    Assignment,
    AuditReport,
    Challenge,
    Commitment,
    Contribution,
    Genesis,
    Head,
    KeyRotation,
    LeaseRequest,
    Merge,
    Opening,
    PlanRules,
    Policy,
    Registration,
    Release,
    Revert,
    Revocation,
    SecretSet,
    SecretSetOpened,
    Verdict,
    Withdrawal,
)

ASK_AGAIN = 3.0
"""Seconds after which a node without work shall ask again."""


class Desk(AuditDesk):
    """The board, and `handle`."""

    def __init__(self, network: str, genesis: Genesis, policy: Policy, policy_id: str = "") -> None:
        super().__init__(network, genesis, policy, policy_id)
        for expert in self.experts:
            self._open_round(expert, 0)

    # ------------------------------------------------------------ the one entrance

    def handle(self, event: Event, now: int) -> list[Effect]:
        """Takes a fact or answers a question. `now` in unix seconds.

        Raises ParisError for what is refused; the state is then unchanged.
        """
        match event:
            case LeaseAsked(node, request):
                return [self._lease(node, request, now)]
            case Tick(every):
                return list(due(self, now, every))
            case Filed():
                self._file(event, now)
            case Uploaded(contribution):
                self._uploaded(contribution, now)
            case Measured():
                self._measured(event)
            case Opened(contribution):
                self._opened(contribution)
            case Called():
                self._called(event, now)
            case Answered():
                self._answered(event)
            case Scored(contribution, delta, se):
                self.shelf.measured(contribution, delta, se)
            case Trained(report):
                self.router = report
            case Sampled():
                self.sampled, self.sampled_at = event, now
            case Scanned(_, report):
                self.scanned, self.suspicious = event, bool(json.loads(report).get("flagged"))
            case Ordered():
                self._order(event)
        return []

    def replay(self, facts: Iterable[tuple[int, Fact]]) -> Desk:
        """Folds (time, fact) pairs of the ledger into this desk, and returns it."""
        for at, fact in facts:
            self.handle(fact, at)
        return self

    # ------------------------------------------------------------ questions

    def _lease(self, node: str, request: LeaseRequest, now: int) -> Effect:
        self._working(node)
        least = self.policy.min_version
        if rounds.release_number(request.version) < rounds.release_number(least):
            raise ParisError("network.version", f"{least} or newer")
        if (work := self.open_work(node, now)) is not None:
            return Again(work.id)
        if (audit := self.audit_task(node, now, planning.able(request.plans))) is not None:
            return Grant(self._audit_draft(audit, node, now))
        if self.complete:
            return Finished()
        plan = planning.choose(self.policy, request.plans)
        lean = plan.plan != planning.OWN
        rounds.check_fit(self.genesis, request.memory_mb, request.disk_mb, lean=lean)
        rules = self.policy.audit
        if rules is not None and self.leases.get(rules.chain, 0) >= rules.chain_length:
            raise ParisError("work.none", "the policy's hash chain is used up", retry_after=60.0)
        choice = self.choose(node, frozenset(request.cached), now)
        if choice is None:
            raise ParisError(
                "work.none", "all units of the open rounds are taken", retry_after=ASK_AGAIN
            )
        expert, number = choice
        residual = earlier.residual(self, node, expert.index, plan.update_codec, request.cached)
        return Grant(self._draft(node, plan, expert, number, now, residual))

    def _draft(
        self,
        node: str,
        rules: PlanRules,
        expert: Expert,
        number: int,
        now: int,
        residual: str | None,
    ) -> Assignment:
        policy, plan = self.policy, self.policy.plan
        return Assignment(
            kind="train",
            plan=rules.plan,
            node=node,
            expert=expert.index,
            round=expert.round,
            unit=number,
            parent=expert.head,
            shards=expert.units[number].shards,
            seed=rounds.seed(
                self.network,
                expert.index,
                expert.round,
                number,
                expert.head.weights.root,
                len(self.works),
            ),
            steps=plan.steps,
            batch=self.genesis.recipe.batch,
            rate=rounds.rate(plan, expert.round, real(rules.rate)),
            optimiser_state="fresh",
            dtype=rules.dtype,
            threads=policy.threads,
            kernels=policy.kernels,
            update_codec=rules.update_codec,
            commit_every=policy.commit_every,
            policy=policy.number,
            issued=now,
            soft_deadline=now + policy.soft_deadline,
            hard_deadline=now + policy.hard_deadline,
            residual=residual,
        )

    # ------------------------------------------------------------ facts

    def _file(self, event: Filed, now: int) -> None:
        match event.record:
            case Registration() as record:
                if record.node != event.signer:
                    raise ParisError("record.signer")
                self.nodes.setdefault(event.signer, Node(now, now, event.id))
            case Assignment() as record:
                assign = self._assigned if record.kind == "train" else self._audit_assigned
                assign(event.id, record, now)
            case Commitment() as record:
                self._committed(event, record, now)
            case Contribution() as record:
                self._handed_in(event, record, now)
            case Challenge() as record:
                self._challenged(event, record)
            case Opening() as record:
                self._opening(event, record, now)
            case AuditReport() as record:
                self._reported(event, record, now)
            case Verdict() as record:
                self._judged(event.id, record, now)
            case Merge() as record:
                self._merged(event.id, record, now)
            case Revocation() as record:
                self._revoked(event.id, record, now)
            case KeyRotation() as record:
                self._rotated(event, record, now)
            case Revert() as record:
                self._reverted(event.id, record, now)
            case Withdrawal() as record:
                self._withdrawn(event.id, record, now)
            case SecretSet() as record:
                head = self.experts[record.expert].head
                self.shelf.committed(event.id, record, head.weights.root)
            case SecretSetOpened() as record:
                self.shelf.opened(event.id, record)
            case Release() as record:
                self.releases[event.id] = record
                self.ordered = False
            case Policy() as record:
                self.policy, self.policy_id = record, event.id
                self.policies[record.number] = record
            case Genesis():
                pass
            case _:
                raise ParisError("record.type", event.record.TYPE)

    def _assigned(self, id: str, record: Assignment, now: int) -> None:
        expert, node = self.experts[record.expert], self._known(record.node)
        if record.parent != expert.head or record.unit >= len(expert.units):
            raise ParisError("unit.closed", "the head has moved on")
        unit = expert.units[record.unit]
        if record.shards != unit.shards:
            raise ParisError("unit.closed", "its shards are others now")
        if not self.free(unit, now) or self.open_work(record.node, now) is not None:
            raise ParisError("unit.closed", "the unit or the node is taken")
        rules = self.policies[record.policy].audit
        if rules is not None:
            self.leases[rules.chain] = self.leases.get(rules.chain, 0) + 1
        self.works[id] = Work(id, record, expert.attempt)
        unit.works.append(id)
        node.works.append(id)
        node.last = now
        expert.opened = now if expert.opened is None else expert.opened

    def _committed(self, event: Filed, record: Commitment, now: int) -> None:
        work = self._hand(event, record.assignment, now)
        if work.commitment is not None:
            raise ParisError("unit.second-result", "another commitment is known")
        work.commitment, work.committed = event.id, record
        work.standing = self.nodes[event.signer].standing
        self.commitments[event.id] = work.id
        self.nodes[event.signer].last = now

    def _hand(self, event: Filed, assignment: str, now: int) -> Work:
        """The open work that a node's statement is about; refuses strangers and the late."""
        self._unrevoked(event.signer)
        work = self.works.get(assignment)
        if work is None or work.record.kind != "train":
            raise ParisError("unit.unknown", assignment[:16])
        if work.record.node != event.signer:
            raise ParisError("unit.not-yours")
        if spoiled(self, work.record):
            raise ParisError("unit.withdrawn")
        if work.contribution is not None:
            raise ParisError("unit.second-result", "another contribution is known")
        if work.state != "open" or now > work.record.hard_deadline:
            raise ParisError("unit.closed")
        return work

    def _handed_in(self, event: Filed, record: Contribution, now: int) -> None:
        limit = 2 * self.genesis.initial.blob.size + (1 << 20)
        if record.update.blob.size > limit:
            raise ParisError(
                "blob.too-large", f"{record.update.blob.size} of at most {limit} bytes"
            )
        work = self._hand(event, record.assignment, now)
        if work.commitment is None or work.commitment != record.commitment:
            raise ParisError("commitment.missing")
        work.state, work.contribution, work.handed_in = "uploading", event.id, record
        self.contributions[event.id] = work.id
        self._known(event.signer).last = now

    def _uploaded(self, contribution: str, now: int) -> None:
        work = self.work_of(contribution)
        if work.state != "uploading":
            raise ParisError("unit.closed")
        work.state = "queued"
        self.nodes[work.record.node].last = now
        self.queue.append(contribution)
        rules = self.policies[work.record.policy].audit
        if rules is not None:  # the draws of one chain are numbered as the updates arrive
            work.number = self.draws.get(rules.chain, 0)
            self.draws[rules.chain] = work.number + 1

    def _merged(self, id: str, record: Merge, now: int) -> None:
        expert = self.experts[record.expert]
        accepted = [unit.accepted for unit in expert.units if unit.accepted is not None]
        merged = [part.contribution for part in record.inputs]
        follows = record.parent == expert.head and bool(merged)
        if not follows or merged != [one for one in accepted if one in merged]:
            raise ParisError("unit.closed", "the merge does not follow the head")
        for contribution in accepted:
            work = self.work_of(contribution)
            inside = record.published and contribution in merged
            work.state, work.merge = ("merged" if inside else "unpublished"), id
        self._close(work for unit in expert.units for work in unit.works)
        self.merges[id] = record
        self.shelf.merged(id, record)
        expert.merges.append(id)
        if record.published:
            expert.head = Head(round=expert.round + 1, weights=record.result, merge=id)
        expert.attempt = 0 if record.published else expert.attempt + 1
        self._open_round(expert, now)

    def _order(self, fact: Ordered) -> None:
        if fact.order == "release":
            self.ordered = True
            return
        if fact.order == "withdraw":
            self._withdraw(fact.subject, fact.reason or "the operator's order")
            return
        node = self._unrevoked(fact.subject)
        if fact.order == "lift":
            node.refusals, node.quarantined = 0, False
        else:
            self._condemn(fact.subject, fact.reason or "the operator's order")
