"""Ways out of an audit and out of its consequences; rounds that must end all the same."""

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from coordinator.synthetic import refused
from paris_coordinator.auditing import auditors_for, next_step
from paris_coordinator.earlier import relative_norms
from paris_coordinator.events import (
    Answered,
    Called,
    Conclude,
    Filed,
    Opened,
    OpenSecret,
    Ordered,
    Replay,
    RunMerge,
    Tick,
)
from paris_coordinator.verdicts import comparable
from paris_protocol.records import KeyRotation

A, B, C, D, E = (made.key_of(i) for i in range(5))


def clerk_with(*nodes, audit=None, **plan):
    clerk = Clerk(made.desk(audit=audit or {}, **plan))
    for node in nodes:
        clerk.register(node)
    return clerk


def due(desk, now=0):
    return desk.handle(Tick(), now)


def on_trial(clerk, node, now=0):
    id = clerk.hand_in(clerk.lease(node, now), now)
    clerk.measure(id, now=now)
    return id


def rotate(clerk, old, new):
    record = KeyRotation(old=old, new=new, consent="0" * 128, at=0)
    clerk.tell(Filed(made.digest("rotation", old, new), old, record), 0)


# ---------------------------------------------------------------- openings


def test_what_was_opened_stays_what_is_replayed():
    clerk = clerk_with(A)
    id = on_trial(clerk, A)
    audit = clerk.desk.audits[id]
    first = clerk.ask(id)
    clerk.ask(id, 2, now=61)
    clerk.open(id, 70)
    clerk.tell(Opened(id), 71)
    kept, audit.challenges[-1:] = audit.opening, [first]
    with refused("audit.closed"):  # other bytes, which nobody would wait for
        clerk.open(id, 72, name="elsewhere")
    assert audit.opening == kept
    assert Replay(id) in due(clerk.desk, 73)


def test_each_challenge_is_answered_once_in_whatever_order():
    clerk = clerk_with(A)
    id = on_trial(clerk, A)
    audit = clerk.desk.audits[id]
    first = clerk.ask(id)
    clerk.open(id, 10)
    second = clerk.ask(id, 2, now=61)
    clerk.open(id, 70)
    for challenge in (first, second):
        audit.challenges[:] = [second if challenge == first else first, challenge]
        with refused("unit.second-result"):
            clerk.open(id, 71, name="another")
    assert len(audit.openings) == 2


# ---------------------------------------------------------------- rotated keys


def test_a_refusal_finds_the_key_that_came_after():
    clerk = clerk_with(A)
    clerk.desk.nodes[A].standing = 7
    id = on_trial(clerk, A)
    rotate(clerk, A, B)
    clerk.ask(id)
    clerk.ask(id, 2, now=61)
    clerk.end_audit(id, 99)
    assert clerk.desk.work_of(id).judged.code == "audit.unanswered"
    assert (clerk.desk.nodes[B].standing, clerk.desk.nodes[B].refusals) == (0, 1)


def test_a_replay_that_was_passed_counts_for_the_key_that_came_after():
    clerk = clerk_with(A)
    id = on_trial(clerk, A)
    rotate(clerk, A, B)
    clerk.ask(id)
    clerk.open(id)
    clerk.tell(Opened(id), 0)
    clerk.report(id)
    clerk.end_audit(id)
    assert (clerk.desk.nodes[B].standing, clerk.desk.nodes[A].standing) == (1, 0)


def test_a_false_auditor_is_found_under_its_next_key():
    clerk = clerk_with(A, B, C, D, audit={"auditors": 3, "rate": "100"})
    id = clerk.hand_in(clerk.lease(A))
    clerk.measure(id, states=(1, 2))
    clerk.ask(id)
    clerk.open(id)
    clerk.tell(Opened(id), 0)
    clerk.tell(Called(id, (B, C, D)), 0)
    clerk.desk.nodes[B].standing = 5
    clerk.report(id, False, clerk.lease(B).id, B)
    rotate(clerk, B, E)
    assert clerk.desk.nodes[E].standing == 5
    clerk.report(id, True)
    clerk.end_audit(id)
    assert clerk.desk.nodes[E].standing == 0


def test_nobody_audits_itself_under_another_key():
    clerk = clerk_with(A, C, D)
    id = on_trial(clerk, A)
    rotate(clerk, A, B)
    audit, blocks = clerk.desk.audits[id], dict.fromkeys((A, B, C, D), "")
    everyone = [B, C, D]
    own = clerk.desk.keys_of(A)
    assert set(own) == {A, B}
    rules = audit.rules.model_copy(update={"auditors": 3})
    audit.rules = rules
    assert set(auditors_for(audit, own, everyone, blocks)) == {C, D}


def test_a_trainer_that_was_not_seen_could_be_anybodys_neighbour():
    clerk = clerk_with(A)
    audit = clerk.desk.audits[on_trial(clerk, A)]
    audit.rules = audit.rules.model_copy(update={"auditors": 3})
    blocks = {B: "x", C: "y", D: "z"}
    assert auditors_for(audit, [A], [B, C, D], blocks) == ()
    assert len(auditors_for(audit, [A], [B, C, D], blocks | {A: "w"})) == 3


# ---------------------------------------------------------------- copies


def test_a_copy_of_what_is_still_under_audit_is_compared_with_it():
    clerk = clerk_with(A, B)
    first, second = clerk.lease(A), clerk.lease(B)
    while second.record.expert != first.record.expert:
        second = clerk.lease(B, 10_000)
    original = clerk.hand_in(first)
    copied = clerk.desk.work_of(clerk.hand_in(second, second.record.issued))
    assert comparable(clerk.desk, copied) == []
    clerk.measure(original)
    assert [work.id for work in comparable(clerk.desk, copied)] == [first.id]


# ---------------------------------------------------------------- rounds that end


def test_a_round_that_is_over_does_not_wait_for_ever_new_audits():
    clerk = clerk_with(A, B, C, experts=1, units=2, close_after=100, audit={"answer_within": 90})
    done = clerk.hand_in(clerk.lease(A))
    clerk.audit(done)
    early = on_trial(clerk, B, now=50)
    assert RunMerge(0, (done,)) not in due(clerk.desk, 150)
    clerk.ask(early, now=50)
    clerk.ask(early, 2, now=141)
    clerk.end_audit(early, 180)
    on_trial(clerk, C, now=199)
    assert RunMerge(0, (done,)) not in due(clerk.desk, 1000), "within one more period"
    [last] = [c for c in clerk.desk.trials]
    clerk.ask(last, now=199)
    clerk.ask(last, 2, now=300)
    clerk.end_audit(last, 340)
    clerk.register(D)
    on_trial(clerk, D, now=400)
    assert RunMerge(0, (done,)) in due(clerk.desk, 401)


def test_a_set_is_not_opened_while_a_verdict_by_it_is_due():
    clerk = clerk_with(A, B, experts=1, units=1)
    slow = clerk.lease(A)
    late = clerk.lease(B, slow.record.soft_deadline + 1)
    id = clerk.hand_in(slow)
    clerk.measure(id)
    other = clerk.hand_in(late, late.record.issued)
    clerk.audit(other)
    clerk.merge(RunMerge(0, (other,)))
    assert clerk.desk.work_of(id).state == "auditing"
    assert not [e for e in due(clerk.desk) if isinstance(e, OpenSecret)]
    clerk.ask(id)
    clerk.ask(id, 2, now=61)
    clerk.end_audit(id, 99)
    assert [e for e in due(clerk.desk) if isinstance(e, OpenSecret)]


def test_a_canary_whose_answer_cannot_be_had_holds_up_nothing():
    clerk = clerk_with(A, audit={"rate": "0", "floor": "0"})
    work = clerk.lease(A)
    id = clerk.hand_in(work)
    clerk.measure(id, canary=True)
    clerk.tell(Answered(work.id, (), ""), 0)
    audit = clerk.desk.audits[id]
    assert next_step(audit, 0, 100) == "conclude"
    assert audit.judged_by_answer is False
    assert Conclude(id) in due(clerk.desk)


# ---------------------------------------------------------------- what is measured against


def test_revoked_work_is_no_yardstick():
    clerk = clerk_with(A, B, experts=1, units=2)
    works = [clerk.lease(node) for node in (A, B)]
    for work in works:
        clerk.audit(clerk.hand_in(work))
    like = works[0].record
    assert relative_norms(clerk.desk, like) == [0.01, 0.01]
    clerk.tell(Ordered("revoke", A, "stolen"), 0)
    clerk.revoke(A)
    assert relative_norms(clerk.desk, like) == [0.01]
