"""A clerk files facts at a desk and keeps them, as the office does."""

from coordinator.synthetic import (
    KEY,
    STATES,
    commitment_for,
    contribution_for,
    digest,
    draw_for,
    layers,
    merge_of,
    opening_for,
    registration,
    report_for,
    request,
    tensor_file,
    verdict_for,
)
from paris_coordinator import auditing, judging
from paris_coordinator.events import Filed, LeaseAsked, Measured, Opened, Uploaded
from paris_coordinator.withdrawals import touched
from paris_protocol.records import Challenge, Revert, Revocation, SecretSet, Withdrawal


class Clerk:
    """Files facts at a desk and keeps them, as the office does."""

    def __init__(self, desk):
        self.desk, self.facts = desk, []

    def tell(self, fact, now):
        effects = self.desk.handle(fact, now)
        self.facts.append((now, fact))
        return effects

    def register(self, node, now=0):
        self.tell(Filed(digest("registration", node), node, registration(node)), now)

    def lease(self, node, now=0, **changed):
        [effect] = self.desk.handle(LeaseAsked(node, request(**changed)), now)
        if not hasattr(effect, "draft"):
            return effect
        id = digest("assignment", len(self.desk.works), effect.draft.seed)
        self.tell(Filed(id, KEY, effect.draft), now)
        return self.desk.works[id]

    def commit(self, work, now=0, name="c", node=None):
        record = commitment_for(work.id, work.record, name)
        id = digest("commitment", work.id, name)
        self.tell(Filed(id, node or work.record.node, record), now)
        return id

    def contribute(self, work, commitment, now=0, name="c", node=None):
        record = contribution_for(work.id, commitment, work.record, name)
        id = digest("contribution", work.id, name)
        self.tell(Filed(id, node or work.record.node, record), now)
        return id

    def hand_in(self, work, now=0, name="c"):
        id = self.contribute(work, self.commit(work, now, name), now, name)
        self.tell(Uploaded(id), now)
        self.secret_set(work, now)
        return id

    def secret_set(self, work, now=0):
        """The set that judges this head, if there is none."""
        shelf, head = self.desk.shelf, work.record.parent.weights.root
        if shelf.current(work.record.expert, head) is None:
            number = len(shelf.of(work.record.expert))
            record = SecretSet(
                expert=work.record.expert, number=number, clips=4, root=digest(head), at=now
            )
            self.tell(Filed(digest("set", head, number), KEY, record), now)

    def judge(self, contribution, accepted=True, now=0, **changed):
        record = verdict_for(self.desk.work_of(contribution), accepted, **changed)
        self.tell(Filed(digest("verdict", contribution), KEY, record), now)

    # audits

    def measure(self, contribution, states=None, now=0, canary=False):
        """L0 to L3 are passed; the audit begins if the draw says so."""
        work = self.desk.work_of(contribution)
        draw = draw_for(work, self.desk.policies[work.record.policy].audit)
        if states is None:
            states = tuple(sorted({*draw.segments, STATES - 1} - {0})) if draw.audited else ()
        self.tell(Measured(contribution, layers(), draw, states, canary), now)
        return draw

    def ask(self, contribution, attempt=1, now=0):
        audit, work = self.desk.audits[contribution], self.desk.work_of(contribution)
        within = audit.rules.answer_within if attempt == 1 else audit.rules.retry_within
        record = Challenge(
            contribution=contribution, node=work.record.node, states=audit.measured.states,
            attempt=attempt, deadline=now + within, at=now,
        )  # fmt: skip
        id = digest("challenge", contribution, attempt)
        self.tell(Filed(id, KEY, record), now)
        return id

    def open(self, contribution, now=0, node=None, name="state"):
        """Answers the last challenge; the bytes are still to come."""
        audit, work = self.desk.audits[contribution], self.desk.work_of(contribution)
        challenge = audit.challenges[-1] if audit.challenges else "0" * 64
        record = opening_for(challenge, audit.challenge, work.committed, name)
        id = digest("opening", challenge, name)
        self.tell(Filed(id, node or work.record.node, record), now)
        return id

    def report(self, contribution, sound=True, assignment=None, auditor=KEY, now=0):
        segments = self.desk.audits[contribution].draw.segments
        record = report_for(contribution, segments, sound, assignment, auditor)
        id = digest("report", contribution, auditor)
        self.tell(Filed(id, auditor, record), now)
        return id

    def audit(self, contribution, sound=True, now=0):
        """A whole audit by the coordinator, up to the verdict."""
        draw = self.measure(contribution, now=now)
        if not draw.audited:
            return self.judge(contribution, draw=draw, now=now)
        if self.desk.audits[contribution].measured.states:
            self.ask(contribution, now=now)
            self.open(contribution, now=now)
            self.tell(Opened(contribution), now)
        self.report(contribution, sound, now=now)
        return self.end_audit(contribution, now)

    def end_audit(self, contribution, now=0):
        """The verdict that follows from the reports."""
        audit = self.desk.audits[contribution]
        layer = judging.audit(auditing.deciding(audit) or [])
        late = layer.passed and not self.desk.current(self.desk.work_of(contribution))
        code = "unit.closed" if late else layer.code or "accepted"
        self.judge(
            contribution, code == "accepted", now, code=code, found=(*layers(), layer),
            reports=tuple(audit.reports), draw=audit.draw,
        )  # fmt: skip

    def revoke(self, node, now=0):
        record = Revocation(
            key=node, reason=self.desk.nodes[node].condemned,
            contributions=self.desk.unvested(node), at=now,
        )  # fmt: skip
        self.tell(Filed(digest("revocation", node), KEY, record), now)

    def withdraw(self, clip, now=0, shards=None):
        """Clip by clip the shards of the network, by the digest's first digit unless named."""
        desk = self.desk
        every = [s.file.blob.id for c in desk.genesis.clusters for s in c.shards]
        shards = shards or (every[int(clip[0], 16) % len(every)],)
        record = Withdrawal(
            clip=clip, shards=shards, heads=touched(desk, shards),
            reason=desk.withdrawing.get(clip, ""), at=now,
        )  # fmt: skip
        id = digest("withdrawal", clip)
        self.tell(Filed(id, KEY, record), now)
        return id

    def revert(self, effect, now=0):
        desk = self.desk
        expert = desk.experts[effect.expert]
        removed = tuple(
            part
            for contribution in effect.contributions
            for part in desk.merges[desk.work_of(contribution).merge].inputs
            if part.contribution == contribution
        )
        record = Revert(
            expert=effect.expert, revocation=effect.revocation, parent=expert.head,
            removed=removed, result=tensor_file(("reverted", effect, len(desk.reverts))),
            numbers=(), policy=1, at=now,
        )  # fmt: skip
        self.tell(Filed(digest("revert", effect, len(desk.reverts)), KEY, record), now)

    def merge(self, effect, published=True, now=0):
        record = merge_of(self.desk, effect, published)
        self.tell(
            Filed(
                digest("merge", record.expert, record.round, now, len(self.desk.merges)),
                KEY,
                record,
            ),
            now,
        )
