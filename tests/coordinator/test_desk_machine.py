"""The desk's promises, for any events in any order: a state machine that hypothesis drives."""

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from paris_coordinator.events import (
    Called,
    Conclude,
    Dismiss,
    Opened,
    Ordered,
    Revoke,
    RunMerge,
    RunRevert,
    Tick,
    Uploaded,
    Withdraw,
)
from paris_protocol.errors import ParisError

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["lease", "commit", "contribute", "upload", "accept", "refuse", "merge", "unpublished",
             "lift", "wait", "again", "measure", "ask", "open", "opened", "report", "lie",
             "volunteer", "conclude", "dismiss", "condemn", "revoke", "revert", "audit", "cheat",
             "withdraw", "withdrawn", "unit", "unit", "unit", "audit", "merge", "volunteer",
             "volunteer", "volunteer"]
        ),
        st.integers(0, 3),
        st.integers(0, 7),
    ),
    max_size=120,
)  # fmt: skip
RULES = st.sampled_from([None, {}, {"rate": "0"}, {"auditors": 3, "probation": 0}])


@settings(max_examples=200, deadline=None)
@given(ACTIONS, st.integers(1, 3), st.integers(1, 3), RULES)
def test_promises_hold_for_any_events(actions, experts, units, rules):
    clerk = Clerk(made.desk(experts=experts, units=units, audit=rules))
    nodes = [made.key_of(i) for i in range(4)]
    for node in nodes:
        clerk.register(node)
    now = 0
    for action, who, which in actions:
        before = made.snapshot(clerk.desk)
        try:
            now = act(clerk, action, nodes[who], which, now)
        except ParisError:
            assert made.snapshot(clerk.desk) == before, "a refusal changed the state"
        check(clerk.desk, now)
    half = made.desk(experts=experts, units=units, audit=rules)
    for at, fact in clerk.facts:
        half.handle(fact, at)
    assert made.snapshot(half) == made.snapshot(clerk.desk), "the replay differs"


def act(clerk, action, node, which, now):
    desk = clerk.desk
    works = list(desk.works.values())
    recent = works[-1 - which % len(works)] if works else None
    if action == "lease":
        clerk.lease(node, now)
    elif action == "unit":
        work = desk.open_work(node, now) or clerk.lease(node, now)
        if getattr(work, "state", "") == "open" and work.record.kind == "train":
            clerk.hand_in(work, now)
    elif action == "wait":
        return now + 60 * which
    elif action == "lift":
        clerk.tell(Ordered("lift", node), now)
    elif action == "condemn":
        clerk.tell(Ordered("revoke", node, "for a reason"), now)
    elif action == "withdraw":
        clerk.tell(Ordered("withdraw", made.digest("clip", which), "for a reason"), now)
    elif action in ("merge", "unpublished"):
        for effect in desk.handle(Tick(), now):
            if isinstance(effect, RunMerge):
                clerk.merge(effect, action == "merge", now)
    elif action in ("revoke", "revert", "dismiss", "withdrawn"):
        carry_out(clerk, action, now)
    elif recent is not None:
        work_on(clerk, action, recent, node, which, now)
    return now


def carry_out(clerk, action, now):
    """What the agenda says, of one kind."""
    for effect in clerk.desk.handle(Tick(), now):
        if action == "revoke" and isinstance(effect, Revoke):
            clerk.revoke(effect.node, now)
        elif action == "revert" and isinstance(effect, RunRevert):
            clerk.revert(effect, now)
        elif action == "withdrawn" and isinstance(effect, Withdraw):
            clerk.withdraw(effect.clip, now)
        elif action == "dismiss" and isinstance(effect, Dismiss):
            clerk.judge(effect.contribution, False, now, code="unit.closed", found=())


def work_on(clerk, action, work, node, which, now):
    contribution = work.contribution or "none"
    if action == "commit":
        clerk.commit(work, now, name=f"c{which % 2}")
    elif action == "contribute":
        clerk.contribute(work, work.commitment or made.digest("no"), now)
    elif action == "upload":
        clerk.tell(Uploaded(contribution), now)
    elif action == "again":
        clerk.hand_in(work, now)
    elif action in ("accept", "refuse"):
        clerk.judge(contribution, action == "accept", now)
    elif action == "opened":
        clerk.tell(Opened(contribution), now)
    elif work.number is not None:  # it has arrived, and this policy audits
        audit_of(clerk, action, contribution, node, which, now)


def audit_of(clerk, action, contribution, node, which, now):
    desk = clerk.desk
    if action == "measure":
        clerk.measure(contribution, now=now)
    elif action in ("audit", "cheat"):
        clerk.audit(contribution, action == "audit", now)
    elif contribution in desk.audits:
        audit = desk.audits[contribution]
        if action == "ask":
            clerk.ask(contribution, 1 + which % 2, now)
        elif action == "open" and audit.challenge is not None:
            clerk.open(contribution, now, name=f"state{which % 2}")
        elif action in ("report", "lie"):
            clerk.report(contribution, action == "report", now=now)
        elif action == "volunteer":
            for number in range(6):
                try:
                    volunteer(clerk, audit, node, bool(which % 4), now)
                except ParisError:
                    if number == 0:
                        raise
                    break
        elif action == "conclude" and Conclude(contribution) in desk.handle(Tick(), now):
            clerk.end_audit(contribution, now)


def volunteer(clerk, audit, node, sound, now):
    """The next step of an audit by volunteers."""
    if audit.challenge is None:
        clerk.ask(audit.contribution, now=now)
    elif audit.opening is None:
        clerk.open(audit.contribution, now)
    elif not audit.opened:
        clerk.tell(Opened(audit.contribution), now)
    elif audit.called is None:
        clerk.tell(Called(audit.contribution, tuple(clerk.desk.nodes)[:3]), now)
    elif node in audit.tasks:
        clerk.report(audit.contribution, sound, audit.tasks[node], node, now)
    else:
        clerk.lease(node, now)


def check(desk, now):
    check_nodes(desk, now)
    for expert in desk.experts:
        shards = [shard for unit in expert.units for shard in unit.shards]
        assert len(shards) == len(set(shards))
        assert set(shards) == set(desk.left(expert)), "a shard is not dealt, or is withdrawn"
        for unit in expert.units:
            accepted = [id for id in unit.works if desk.works[id].state == "accepted"]
            assert len(accepted) == (unit.accepted is not None), "a unit is accepted once"
    check_merges(desk)
    check_withdrawals(desk)
    trained = [work for work in desk.works.values() if work.contribution is not None]
    queued = [work.contribution for work in trained if work.state == "queued"]
    assert sorted(queued) == sorted(desk.queue)
    trials = [work.contribution for work in trained if work.state == "auditing"]
    assert sorted(trials) == sorted(desk.trials)
    numbers = sorted(work.number for work in trained if work.number is not None)
    assert numbers == list(range(len(numbers))), "draw numbers have a gap"
    for work in trained:
        if work.number is not None and work.verdict is None:
            on = (desk.queue, desk.trials, desk.dismissed)
            assert any(work.contribution in waiting for waiting in on), "a draw is never published"


def check_nodes(desk, now):
    for node, entry in desk.nodes.items():
        open_now = [
            id for id in entry.works
            if desk.works[id].state in ("open", "uploading")
            and now <= desk.works[id].record.hard_deadline
        ]  # fmt: skip
        assert len(open_now) <= 1, "two open assignments"
        assert all(desk.works[id].record.node == node for id in entry.works)
        if entry.revoked is not None:
            assert not open_now, "a revoked key works on"
            states = {desk.works[id].state for id in entry.works}
            assert not states & {"queued", "auditing", "accepted"}, "a revoked key's work counts"


def check_withdrawals(desk):
    clips = [record.clip for record in desk.withdrawals.values()]
    assert len(clips) == len(set(clips)), "a clip is withdrawn twice"
    assert not set(clips) & set(desk.withdrawing)
    for work in desk.works.values():
        if any(shard.file.blob.id in desk.withdrawn for shard in work.record.shards):
            over = (
                "refused",
                "merged",
                "unpublished",
                "revoked",
                "withdrawn",
                "reported",
                "closed",
            )
            assert work.state in over, "work on a withdrawn shard goes on"
            if work.merge is not None and desk.merges[work.merge].published:
                first = next(
                    r
                    for r in desk.withdrawals.values()
                    if set(r.shards) & {s.file.blob.id for s in work.record.shards}
                )
                assert work.merge in first.heads, "a head is not named, or came later"  # fmt: skip


def check_merges(desk):
    inputs = [part.contribution for merge in desk.merges.values() for part in merge.inputs]
    assert len(inputs) == len(set(inputs)), "a contribution merges once"
    for work in desk.works.values():
        if work.judged is not None and work.judged.accepted:
            waiting = work.state == "accepted"
            left = work.revocation is not None or work.state == "withdrawn"
            merged = work.contribution in inputs
            assert left or waiting != merged, "an accepted contribution is lost"
    removed = [part.contribution for revert in desk.reverts.values() for part in revert.removed]
    assert len(removed) == len(set(removed)), "a contribution is taken out once"
    pending = [one for ones in desk.reverting().values() for one in ones]
    for revocation in desk.revocations.values():
        for contribution in revocation.contributions:
            assert (contribution in removed) != (contribution in pending), "unvested work stays"
    for expert in desk.experts:
        assert expert.round == sum(
            merge.published for merge in desk.merges.values() if merge.expert == expert.index
        )
