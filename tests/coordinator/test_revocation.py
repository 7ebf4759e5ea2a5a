"""Vesting, revocation, reverts and rotated keys at the desk."""

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from coordinator.synthetic import refused
from paris_coordinator.events import (
    Filed,
    LeaseAsked,
    OpenSecret,
    Ordered,
    Revoke,
    RunMerge,
    RunRevert,
    Tick,
)
from paris_protocol.records import KeyRotation

A, B, C, D = (made.key_of(i) for i in range(4))


def clerk_with(*nodes, audit=None, **plan):
    clerk = Clerk(made.desk(audit=audit or {}, **plan))
    for node in nodes:
        clerk.register(node)
    return clerk


def due(desk, now=0):
    return [e for e in desk.handle(Tick(), now) if not isinstance(e, OpenSecret)]


def merged(clerk, nodes, times=1):
    """Rounds of one expert, each unit by the next node."""
    for _ in range(times):
        units = len(clerk.desk.experts[0].units)
        for place in range(units):
            clerk.audit(clerk.hand_in(clerk.lease(nodes[place % len(nodes)])))
        [effect] = [e for e in due(clerk.desk) if isinstance(e, RunMerge)]
        clerk.merge(effect)


def condemned(clerk, node):
    clerk.tell(Ordered("revoke", node, "stolen"), 0)
    assert Revoke(node) in due(clerk.desk)
    clerk.revoke(node)


def test_what_has_vested_stays():
    clerk = clerk_with(A, B, experts=1, units=2, rounds=9, audit={"vesting": 2})
    merged(clerk, [A, B], 3)
    works = [work for work in clerk.desk.works.values() if work.record.node == A]
    assert [clerk.desk.vested(work.contribution) for work in works] == [True, False, False]
    condemned(clerk, A)
    [revocation] = clerk.desk.revocations.values()
    assert revocation.contributions == tuple(work.contribution for work in works[1:])
    [effect] = [e for e in due(clerk.desk) if isinstance(e, RunRevert)]
    before = clerk.desk.experts[0].head
    clerk.revert(effect)
    head = clerk.desk.experts[0].head
    assert (head.round, head.merge) == (before.round, next(iter(clerk.desk.reverts)))
    assert [work.state for work in works] == ["merged", "revoked", "revoked"]
    with refused("node.revoked"):
        clerk.lease(A)
    assert clerk.lease(B).record.parent == head


def test_others_accepted_work_is_merged_before_the_revert():
    clerk = clerk_with(A, B, experts=1, units=2, rounds=9)
    merged(clerk, [A, B])
    id = clerk.hand_in(clerk.lease(B))
    clerk.audit(id)
    condemned(clerk, A)
    [effect] = [e for e in due(clerk.desk) if isinstance(e, RunMerge | RunRevert)]
    assert effect == RunMerge(0, (id,))
    with refused("work.none"):
        clerk.lease(B)
    clerk.merge(effect)
    [effect] = [e for e in due(clerk.desk) if isinstance(e, RunMerge | RunRevert)]
    assert isinstance(effect, RunRevert)
    clerk.revert(effect)
    assert clerk.desk.work_of(id).state == "merged"
    assert clerk.desk.experts[0].round == 2


def test_a_revoked_nodes_accepted_work_is_not_merged():
    clerk = clerk_with(A, B, experts=1, units=2)
    mine, other = clerk.hand_in(clerk.lease(A)), clerk.hand_in(clerk.lease(B))
    clerk.audit(mine)
    clerk.audit(other)
    condemned(clerk, A)
    assert clerk.desk.work_of(mine).state == "revoked"
    unit = clerk.desk.experts[0].units[clerk.desk.work_of(mine).record.unit]
    assert unit.accepted is None
    assert not any(isinstance(e, RunMerge) for e in due(clerk.desk))
    assert clerk.lease(B, 5).record.unit == clerk.desk.work_of(mine).record.unit


def test_a_rotated_key_keeps_its_standing_and_cannot_leave_its_past():
    clerk = clerk_with(A, B, experts=1, units=2, rounds=9)
    merged(clerk, [A, B])
    old = clerk.desk.nodes[A].standing
    record = KeyRotation(old=A, new=C, consent="0" * 128, at=0)
    with refused("record.signer"):
        clerk.tell(Filed("7" * 64, B, record), 0)
    clerk.tell(Filed("7" * 64, A, record), 0)
    assert (clerk.desk.nodes[C].standing, clerk.desk.nodes[A].standing) == (old, 0)
    with refused("record.signer"):
        clerk.desk.handle(LeaseAsked(A, made.request()), 0)
    with refused("record.signer"):
        clerk.tell(Filed("8" * 64, A, record.model_copy(update={"new": D})), 0)
    assert clerk.lease(C).record.node == C
    clerk.tell(Ordered("revoke", C), 0)
    assert {Revoke(A), Revoke(C)} <= set(due(clerk.desk))
    assert clerk.desk.unvested(A)


def test_inputs_left_out_of_a_merge_are_unpublished():
    clerk = clerk_with(A, B, experts=1, units=2)
    ids = [clerk.hand_in(clerk.lease(node)) for node in (A, B)]
    for id in ids:
        clerk.audit(id)
    [effect] = [e for e in due(clerk.desk) if isinstance(e, RunMerge)]
    clerk.merge(effect._replace(contributions=effect.contributions[1:]))
    states = {clerk.desk.work_of(id).state for id in effect.contributions[1:]}
    assert states == {"merged"}
    assert clerk.desk.work_of(effect.contributions[0]).state == "unpublished"
    assert clerk.desk.vested(effect.contributions[0]) is None
