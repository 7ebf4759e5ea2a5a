"""Rules of the audit one by one: what comes next, whose word decides, who may audit, keys."""

import json

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from coordinator.synthetic import refused
from paris_coordinator import judging
from paris_coordinator.auditing import (
    Audit,
    address_block,
    auditors_for,
    chain_start,
    deciding,
    is_canary,
    is_checked,
    next_step,
    states_wanted,
)
from paris_coordinator.events import (
    Again,
    Ask,
    Called,
    Conclude,
    Filed,
    LeaseAsked,
    Measured,
    Opened,
    OpenSecret,
    Replay,
    Revoke,
    RunCanary,
    RunMerge,
    Tick,
    Uploaded,
)
from paris_protocol.audit import false_auditors, standing_after
from paris_protocol.records import AuditRules, Draw

A, B, C, D = (made.key_of(i) for i in range(4))
SOME = "c" * 64
"""A contribution that no desk knows."""


def record(**changed):
    """A lease of four segments."""
    [grant] = clerk_with(A, steps=8).desk.handle(LeaseAsked(A, made.request()), 0)
    return grant.draft.model_copy(update=changed)


def rules_of(**changed):
    return AuditRules.model_validate_json(json.dumps(made.RULES | changed))


def draw_of(audited=True, segments=(1,), secret="5" * 64):
    return Draw(
        number=0, size=1, root="0" * 64, secret=secret, standing=0, rate="1", audited=audited,
        segments=segments if audited else (),
    )  # fmt: skip


def audit_of(audited=True, states=(1, 2), canary=False, secret="5" * 64, **rules):
    fact = Measured(SOME, made.layers(), draw_of(audited, secret=secret), states, canary)
    return Audit(SOME, fact, rules_of(**rules))


def clerk_with(*nodes, audit=None, **plan):
    clerk = Clerk(made.desk(audit=audit or {}, **plan))
    for node in nodes:
        clerk.register(node)
    return clerk


def due(desk, now=0):
    return [e for e in desk.handle(Tick(), now) if not isinstance(e, OpenSecret)]


def report(audit, sound, auditor=None, segments=(1,), passed=None):
    record = made.report_for(SOME, segments, sound, auditor and "a" * 64, auditor or made.KEY)
    if passed is not None:
        record = record.model_copy(update={"passed": passed})
    audit.reports[made.digest("report", len(audit.reports))] = record


# ---------------------------------------------------------------- what is asked for


def test_every_audit_opens_the_last_state_so_that_another_result_is_seen():
    rules = rules_of()
    assert states_wanted(rules, draw_of(segments=(0,)), record(), True, False) == (4,)
    assert states_wanted(rules, draw_of(segments=(1, 2)), record(), True, True) == (1, 2, 4)
    assert states_wanted(rules, draw_of(False), record(), True, True) == ()


def test_another_class_needs_both_ends_of_a_segment_or_cannot_be_audited():
    assert states_wanted(rules_of(), draw_of(), record(), False, False) == ()
    assert states_wanted(rules_of(), draw_of(), record(), False, True) == (1, 2, 4)
    three = rules_of(auditors=3)
    assert states_wanted(three, draw_of(segments=(1,)), record(), True, False) == (1, 2, 4)


def test_a_unit_that_makes_up_for_a_residual_lays_it_open_too():
    begun, rules = record(residual="d" * 64), rules_of()
    assert states_wanted(rules, draw_of(segments=(0,)), begun, True, False) == (4, 5)
    assert states_wanted(rules, draw_of(segments=(2,)), begun, False, True) == (2, 3, 4, 5)
    assert states_wanted(rules, draw_of(), begun, False, False) == ()
    assert states_wanted(rules, draw_of(False), begun, True, True) == ()


def test_a_chain_that_is_used_up_gives_no_more_work():
    clerk = clerk_with(A, B, audit={"chain_length": 1})
    clerk.lease(A)
    with refused("work.none"):
        clerk.lease(B)


def test_a_challenge_has_two_windows_and_no_third():
    clerk = clerk_with(A)
    id = clerk.hand_in(clerk.lease(A))
    clerk.measure(id)
    assert due(clerk.desk) == [Ask(id, 1)]
    clerk.ask(id, now=0)
    assert due(clerk.desk, 60) == []
    assert due(clerk.desk, 61) == [Ask(id, 2)]
    with refused("audit.closed"):
        clerk.ask(id, 1, now=61)
    clerk.ask(id, 2, now=61)
    assert due(clerk.desk, 91) == []
    assert due(clerk.desk, 92) == [Conclude(id)]
    with refused("audit.closed"):
        clerk.open(id, 92)
    clerk.end_audit(id, 92)
    work = clerk.desk.work_of(id)
    assert (work.state, work.judged.code) == ("refused", "audit.unanswered")
    assert clerk.desk.nodes[A].condemned == ""
    assert clerk.desk.nodes[A].refusals == 1


def test_an_opening_in_the_retry_window_counts():
    clerk = clerk_with(A)
    id = clerk.hand_in(clerk.lease(A))
    clerk.measure(id)
    clerk.ask(id)
    clerk.ask(id, 2, now=61)
    clerk.open(id, 80)
    clerk.tell(Opened(id), 90)
    assert due(clerk.desk, 1000) == [Replay(id)]


def test_the_round_waits_for_an_audit_and_nobody_else_gets_the_unit():
    clerk = clerk_with(A, B, experts=1, units=1)
    id = clerk.hand_in(clerk.lease(A))
    clerk.measure(id)
    with refused("work.none"):
        clerk.lease(B, 50)
    assert not any(isinstance(e, RunMerge) for e in due(clerk.desk, 5000))


def test_nobody_escapes_an_audit_by_somebody_elses_work():
    """A late twin of the unit is accepted first; the cheat's audit goes to its end all the same."""
    clerk = clerk_with(A, B, experts=1, units=1)
    late = clerk.lease(A, 0)
    again = clerk.lease(B, 101)
    cheat = clerk.hand_in(late, 150)
    clerk.measure(cheat, now=150)
    clerk.audit(clerk.hand_in(again, 160), now=160)
    assert clerk.desk.work_of(cheat).state == "auditing"
    clerk.ask(cheat, now=160)
    clerk.open(cheat, 161)
    clerk.tell(Opened(cheat), 161)
    clerk.report(cheat, False, now=162)
    clerk.end_audit(cheat, 162)
    assert clerk.desk.work_of(cheat).judged.code == "audit.mismatch"
    assert Revoke(A) in due(clerk.desk, 162)


def test_an_honest_audit_that_ends_too_late_costs_nothing():
    clerk = clerk_with(A, B, experts=1, units=1)
    late, again = clerk.lease(A, 0), clerk.lease(B, 101)
    id = clerk.hand_in(late, 150)
    clerk.measure(id, now=150)
    clerk.audit(clerk.hand_in(again, 160), now=160)
    clerk.ask(id, now=160)
    clerk.open(id, 161)
    clerk.tell(Opened(id), 161)
    clerk.report(id, True, now=162)
    clerk.end_audit(id, 162)
    work = clerk.desk.work_of(id)
    assert (work.state, work.judged.code) == ("closed", "unit.closed")
    assert clerk.desk.nodes[A].refusals == 0


def test_what_is_queued_when_its_unit_is_taken_still_gets_a_verdict_with_its_draw():
    clerk = clerk_with(A, B, experts=1, units=1)
    late, again = clerk.lease(A, 0), clerk.lease(B, 101)
    first, second = clerk.hand_in(late, 150), clerk.hand_in(again, 150)
    clerk.audit(first, now=150)
    assert clerk.desk.dismissed == [second]
    work = clerk.desk.work_of(second)
    draw = made.draw_for(work, clerk.desk.policy.audit)
    clerk.judge(second, False, 151, code="unit.closed", found=(), draw=draw)
    assert (work.state, work.judged.audit.number) == ("closed", 1)
    assert clerk.desk.nodes[B].refusals == 0
    assert clerk.desk.dismissed == []


# ---------------------------------------------------------------- whose word decides


def test_two_passes_decide_and_anything_else_is_arbitrated():
    audit = audit_of(auditors=3, floor="0")
    audit.opened, audit.called = True, (A, B, C)
    assert next_step(audit, 0, 100) == "wait"
    report(audit, True, A)
    assert next_step(audit, 0, 100) == "wait"
    report(audit, True, B)
    assert next_step(audit, 0, 100) == "conclude"
    assert len(deciding(audit)) == 2
    report(audit, False, C)
    assert (next_step(audit, 0, 100), deciding(audit)) == ("replay", None)
    report(audit, True)
    assert (next_step(audit, 0, 100), len(deciding(audit))) == ("conclude", 1)


def test_volunteers_alone_revoke_nobody():
    audit = audit_of(auditors=3, floor="0")
    audit.opened, audit.called = True, (A, B, C)
    for node in (A, B, C):
        report(audit, False, node)
    assert next_step(audit, 0, 100) == "replay"


def test_absent_and_abstaining_auditors_leave_it_to_the_coordinator():
    audit = audit_of(auditors=3, floor="0")
    audit.opened, audit.called = True, (A, B, C)
    report(audit, True, A)
    assert next_step(audit, 100, 100) == "wait"
    assert next_step(audit, 101, 100) == "replay"
    for node in (B, C):
        report(audit, True, node, segments=())
    assert next_step(audit, 0, 100) == "replay"


def test_unanimous_outcomes_are_checked_at_the_floor_rate():
    found = [is_checked(b"\1" * 32, made.digest(i), "0.25") for i in range(1000)]
    assert 200 < sum(found) < 300
    assert found != [is_checked(b"\2" * 32, made.digest(i), "0.25") for i in range(1000)]
    for check, step in ((False, "conclude"), (True, "replay")):
        audit = audit_of(auditors=3)
        audit.opened, audit.called, audit.check = True, (A, B, C), check
        for node in (A, B, C):
            report(audit, True, node)
        assert next_step(audit, 0, 100) == step


def test_canaries_come_last_and_only_for_what_passed():
    audit = audit_of(False, (), canary=True)
    assert next_step(audit, 0, 100) == "canary"
    audit = audit_of(canary=True)
    audit.opened = True
    report(audit, False)
    assert next_step(audit, 0, 100) == "conclude"


def test_a_canary_is_due_after_everything_else():
    clerk = clerk_with(A, audit={"rate": "0", "floor": "0"})
    work = clerk.lease(A)
    id = clerk.hand_in(work)
    clerk.measure(id, canary=True)
    assert due(clerk.desk) == [RunCanary(work.id)]


# ---------------------------------------------------------------- standing


def verdict(clerk, node=A, sound=True, audited=True):
    work = clerk.lease(node)
    id = clerk.hand_in(work)
    if audited:
        clerk.audit(id, sound)
    else:
        clerk.judge(id, sound)
    return work.judged


def test_standing_counts_replayed_contributions_in_a_row():
    clerk = clerk_with(A, audit={"rate": "100"})
    first = verdict(clerk)
    assert standing_after(0, first) == 1
    assert standing_after(4, first.model_copy(update={"layers": made.layers()})) == 4
    refusal = first.model_copy(update={"accepted": False, "code": "loss.damage"})
    assert standing_after(4, refusal) == 0
    assert standing_after(4, refusal.model_copy(update={"code": "unit.closed"})) == 4
    nothing = (*made.layers(), judging.audit([made.report_for(SOME, ())]))
    assert standing_after(4, first.model_copy(update={"layers": nothing})) == 4
    assert clerk.desk.nodes[A].standing == 1


def test_the_standing_of_a_draw_is_that_before_its_commitment():
    clerk = clerk_with(A, audit={"rate": "100"})
    first = clerk.lease(A)
    one = clerk.hand_in(first)
    second = clerk.lease(A)
    promised = clerk.commit(second)
    clerk.audit(one)
    clerk.contribute(second, promised)
    assert (clerk.desk.nodes[A].standing, second.standing) == (1, 0)
    clerk.tell(Uploaded(second.contribution), 0)
    third = clerk.lease(A)
    clerk.commit(third)
    assert third.standing == 1


def test_only_a_replay_that_shows_something_proves_an_auditor_false():
    own = made.report_for(SOME, (1,))
    liar = made.report_for(SOME, (1,), False, "a" * 64, A)
    honest = made.report_for(SOME, (1,), True, "b" * 64, B)
    shy = made.report_for(SOME, (), True, "d" * 64, C)
    assert false_auditors([liar, own, honest, shy]) == (A,)
    assert false_auditors([liar, honest]) == ()
    assert false_auditors([liar, honest, made.report_for(SOME, ())]) == ()
    assert false_auditors([liar, honest, shy, made.report_for(SOME, (1,), False)]) == (B,)


def test_an_audit_counts_as_the_nodes_one_open_assignment():
    clerk = clerk_with(A, B, C, audit={"auditors": 3})
    id = clerk.hand_in(clerk.lease(A))
    clerk.measure(id, states=(1, 2))
    clerk.ask(id)
    clerk.open(id)
    clerk.tell(Opened(id), 0)
    with refused("audit.closed"):
        clerk.tell(Called(made.digest("other"), (B, C)), 0)
    busy = clerk.lease(B)
    assert busy.record.kind == "train"
    clerk.tell(Called(id, (B, C)), 0)
    assert clerk.lease(B) == Again(busy.id)
    [grant] = clerk.desk.handle(LeaseAsked(C, made.request()), 0)
    stolen = grant.draft.model_copy(update={"node": B})
    for draft in (stolen, grant.draft.model_copy(update={"node": A})):
        with refused("unit.closed"):
            clerk.tell(Filed("9" * 64, made.KEY, draft), 0)
    task = clerk.lease(C)
    assert (task.record.kind, clerk.lease(C)) == ("audit", Again(task.id))


def test_a_false_report_costs_standing_and_counts_as_a_refusal():
    clerk = clerk_with(A, B, C, D, audit={"auditors": 3, "rate": "100"})
    id = clerk.hand_in(clerk.lease(A))
    clerk.measure(id, states=(1, 2))
    clerk.ask(id)
    clerk.open(id)
    clerk.tell(Opened(id), 0)
    clerk.tell(Called(id, (B, C, D)), 0)
    task = clerk.lease(B)
    assert (task.record.kind, task.record.node) == ("audit", B)
    with refused("unit.unknown"):
        clerk.commit(task)
    clerk.desk.nodes[B].standing = 5
    clerk.report(id, False, task.id, B)
    assert due(clerk.desk) == [Replay(id)]
    clerk.report(id, True)
    clerk.end_audit(id)
    assert (clerk.desk.nodes[B].standing, clerk.desk.nodes[B].refusals) == (0, 1)
    assert clerk.desk.work_of(id).state == "accepted"


# ---------------------------------------------------------------- who may audit


def test_address_blocks():
    assert address_block("192.0.2.77") == "192.0.2.0/24"
    assert address_block("::ffff:192.0.2.77") == "192.0.2.0/24"
    assert address_block("2001:db8:1:2::3") == "2001:db8:1::/48"
    assert address_block("fe80::1%eth0") == "fe80::/48"
    for none in ("127.0.0.1", "::1", "", None, "unix", "::ffff:127.0.0.1"):
        assert address_block(none) == ""


def test_auditors_are_of_standing_seen_and_from_elsewhere():
    audit = audit_of(auditors=3)
    blocks = {A: "x", B: "y", C: "x", D: "z"}
    assert set(auditors_for(audit, [A], [A, B, C, D], blocks)) == {B, D}
    assert auditors_for(audit, [A], [A, B, C], blocks) == (), "one is not enough"
    assert auditors_for(audit, [A], [B, C, D], {A: "x", B: "y"}) == ()
    nowhere = dict.fromkeys(blocks, "")
    drawn = auditors_for(audit, [A], [A, B, C, D], nowhere)
    assert set(drawn) == {B, C, D}
    assert drawn == auditors_for(audit, [A], [D, C, B, A], nowhere)


def test_the_operators_secrets_depend_on_key_and_purpose():
    assert len({chain_start(bytes([k]) * 32, n) for k in range(3) for n in range(3)}) == 9
    found = [is_canary(b"\1" * 32, made.digest(i), "0.1") for i in range(2000)]
    assert 140 < sum(found) < 260
    assert found != [is_canary(b"\2" * 32, made.digest(i), "0.1") for i in range(2000)]
    assert not any(is_canary(b"\1" * 32, made.digest(i), "0") for i in range(100))
    assert all(is_canary(b"\1" * 32, made.digest(i), "1") for i in range(100))
