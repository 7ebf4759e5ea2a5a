"""The desk's promises, for any events in any order."""

import pytest

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from coordinator.synthetic import refused
from paris_coordinator.events import (
    Again,
    CommitSecret,
    Filed,
    Finished,
    LeaseAsked,
    OpenSecret,
    Ordered,
    RunMerge,
    RunRelease,
    RunRouter,
    RunSamples,
    RunScan,
    Sampled,
    Scanned,
    Tick,
    Trained,
    Uploaded,
    Verify,
)
from paris_coordinator.rounds import deal, peak, rate
from paris_protocol.canonical import real

A, B, C = (made.key_of(i) for i in range(3))


def clerk_with(*nodes, **plan):
    clerk = Clerk(made.desk(**plan))
    for node in nodes:
        clerk.register(node)
    return clerk


def one_round(clerk, nodes, now=0):
    """All units of all experts leased, handed in, accepted and merged."""
    for _ in range(20):
        for node in nodes:
            work = clerk.lease(node, now) if clerk.desk.open_work(node, now) is None else None
            if work is None or isinstance(work, Finished):
                continue
            clerk.judge(clerk.hand_in(work, now), now=now)
        merges = [e for e in clerk.desk.handle(Tick(), now) if isinstance(e, RunMerge)]
        for effect in merges:
            clerk.merge(effect, now=now)
        if clerk.desk.complete:
            return


# ---------------------------------------------------------------- leases


def test_a_node_holds_one_open_assignment():
    clerk = clerk_with(A)
    work = clerk.lease(A)
    assert clerk.lease(A) == Again(work.id)
    clerk.hand_in(work)
    assert clerk.lease(A).id != work.id


def test_two_drafts_of_the_same_moment_do_not_both_count():
    clerk = clerk_with(A, B, experts=1)
    first, second = (
        clerk.desk.handle(LeaseAsked(node, made.request()), 0)[0].draft for node in (A, B)
    )
    clerk.tell(Filed("1" * 64, made.KEY, first), 0)
    with refused("unit.closed"):
        clerk.tell(Filed("2" * 64, made.KEY, second), 0)
    other_unit = first.model_copy(update={"unit": 1})
    with refused("unit.closed"):
        clerk.tell(Filed("3" * 64, made.KEY, other_unit), 0)


def test_experts_are_shared_out_and_shards_stay_in_their_cluster():
    clerk = clerk_with(A, B)
    works = [clerk.lease(A), clerk.lease(B)]
    assert {work.record.expert for work in works} == {0, 1}
    for work in works:
        cluster = clerk.desk.genesis.clusters[work.record.expert]
        assert set(work.record.shards) <= set(cluster.shards)


def test_cached_shards_come_first():
    clerk = clerk_with(A)
    wanted = clerk.desk.experts[1].units[1].shards
    work = clerk.lease(A, cached=tuple(shard.file.blob.id for shard in wanted))
    assert (work.record.expert, work.record.unit) == (1, 1)


def test_strangers_small_machines_and_old_versions_get_no_work():
    clerk = clerk_with(A)
    with refused("record.signer"):
        clerk.lease(B)
    with refused("network.version"):
        clerk.lease(A, version="0.0.9")
    clerk.desk.genesis = clerk.desk.genesis.model_copy(
        update={"initial": made.tensor_file("big", 1 << 30)}
    )
    with refused("machine.too-small"):
        clerk.lease(A, memory_mb=5000)


def test_an_expired_lease_goes_to_whoever_asks_and_the_late_result_still_counts():
    clerk = clerk_with(A, B, C, experts=1, units=1)
    late = clerk.lease(A, 0)
    with refused("work.none"):
        clerk.lease(B, 100)
    again = clerk.lease(B, 101)
    assert again.record.unit == late.record.unit
    assert again.record.seed != late.record.seed
    clerk.judge(clerk.hand_in(late, 299), now=299)
    with refused("unit.closed"):
        clerk.commit(again, 299)
    assert [type(e) for e in clerk.desk.handle(Tick(), 299)] == [RunMerge]


def test_after_the_hard_deadline_nothing_is_taken():
    clerk = clerk_with(A)
    work = clerk.lease(A, 0)
    with refused("unit.closed"):
        clerk.commit(work, 301)


# ---------------------------------------------------------------- handing in


def test_one_assignment_has_one_result():
    clerk = clerk_with(A, B)
    work = clerk.lease(A)
    with refused("unit.not-yours"):
        clerk.commit(work, node=B)
    with refused("commitment.missing"):
        clerk.contribute(work, made.digest("nothing"))
    first = clerk.commit(work)
    with refused("unit.second-result"):
        clerk.commit(work, name="other")
    clerk.contribute(work, first)
    with refused("unit.second-result"):
        clerk.contribute(work, first, name="other")


def test_a_judged_contribution_is_not_judged_again():
    clerk = clerk_with(A)
    id = clerk.hand_in(clerk.lease(A))
    clerk.judge(id)
    with refused("unit.closed"):
        clerk.judge(id, accepted=False)
    with refused("unit.closed"):
        clerk.tell(Uploaded(id), 0)


def test_a_refused_unit_goes_to_another_node_if_there_is_one():
    clerk = clerk_with(A, B, experts=1, units=1)
    clerk.judge(clerk.hand_in(clerk.lease(A)), accepted=False)
    with refused("work.none"):
        clerk.lease(A, 1)
    assert clerk.lease(B, 1).record.unit == 0


def test_a_refused_unit_goes_back_when_nobody_else_is_there():
    clerk = clerk_with(A, experts=1, units=1)
    clerk.judge(clerk.hand_in(clerk.lease(A)), accepted=False)
    assert clerk.lease(A, 1).record.unit == 0


def test_a_refused_unit_goes_back_when_the_others_stay_away():
    clerk = clerk_with(A, B, experts=1, units=1)
    clerk.judge(clerk.hand_in(clerk.lease(A, 50), 50), accepted=False, now=50)
    assert clerk.lease(A, 151).record.unit == 0


def test_too_many_refusals_end_in_quarantine_until_it_is_lifted():
    clerk = clerk_with(A)
    for _ in range(2):
        clerk.judge(clerk.hand_in(clerk.lease(A)), accepted=False)
    with refused("node.quarantined"):
        clerk.lease(A)
    clerk.tell(Ordered("lift", A), 0)
    assert clerk.lease(A).record.node == A


# ---------------------------------------------------------------- rounds and merges


def test_a_round_waits_for_all_its_units_or_for_its_time():
    clerk = clerk_with(A, B, experts=1)
    first, second = clerk.lease(A), clerk.lease(B)
    assert not set(first.record.shards) & set(second.record.shards)
    clerk.judge(clerk.hand_in(first))
    assert clerk.desk.handle(Tick(), 599) == []
    [effect] = clerk.desk.handle(Tick(), 600)
    assert effect == RunMerge(0, (first.contribution,))
    clerk.merge(effect, now=600)
    assert second.state == "closed"
    assert clerk.desk.experts[0].round == 1


def test_queued_work_is_judged_before_its_round_is_closed():
    clerk = clerk_with(A, B, experts=1)
    first, second = clerk.lease(A), clerk.lease(B)
    clerk.judge(clerk.hand_in(first))
    id = clerk.hand_in(second)
    assert clerk.desk.handle(Tick(), 1000) == [Verify(id)]


def test_a_merge_that_is_worse_leaves_the_head_and_repeats_the_round():
    clerk = clerk_with(A, experts=1, units=1)
    before = clerk.desk.experts[0].head
    clerk.judge(clerk.hand_in(clerk.lease(A)))
    [effect] = clerk.desk.handle(Tick(), 0)
    clerk.merge(effect, published=False)
    expert = clerk.desk.experts[0]
    assert (expert.head, expert.round, expert.attempt) == (before, 0, 1)
    again = clerk.lease(A)
    assert again.record.round == 0
    with refused("unit.closed"):
        clerk.merge(effect)


def test_the_last_merge_is_followed_by_router_samples_and_release():
    clerk = clerk_with(A, B)
    one_round(clerk, [A, B])
    desk = clerk.desk
    assert desk.complete
    assert isinstance(clerk.lease(A), Finished)
    assert due(desk) == [RunRouter()]
    clerk.tell(Trained("{}"), 0)
    assert due(desk) == [RunSamples(desk.roots)]
    clerk.tell(Sampled(desk.roots, ()), 0)
    assert due(desk) == [RunRelease()]
    clerk.tell(Filed("1" * 64, made.KEY, release_of(desk)), 0)
    assert due(desk) == []


@pytest.mark.parametrize("flagged", ["[]", '[{"word": "x"}]'])
def test_suspicious_heads_are_released_only_by_the_operators_order(flagged):
    clerk = clerk_with(A, B, audit={"rate": "0", "floor": "0"})
    one_round(clerk, [A, B])
    roots = clerk.desk.roots
    for fact in (Trained("{}"), Sampled(roots, ())):
        clerk.tell(fact, 0)
    assert due(clerk.desk) == [RunScan(roots)]
    clerk.tell(Scanned(roots, f'{{"flagged": {flagged}}}'), 0)
    assert due(clerk.desk) == ([RunRelease()] if flagged == "[]" else [])
    clerk.tell(Ordered("release", ""), 0)
    assert due(clerk.desk) == [RunRelease()]


def test_a_head_is_judged_by_a_secret_set_that_was_committed_before():
    clerk = clerk_with(A, audit={})
    work = clerk.lease(A)
    id = clerk.contribute(work, clerk.commit(work))
    clerk.tell(Uploaded(id), 0)
    assert clerk.desk.handle(Tick(), 0) == [CommitSecret(work.record.expert)]
    clerk.secret_set(work)
    assert clerk.desk.handle(Tick(), 0) == [Verify(id)]


def due(desk, now=0):
    """What is due, but for the opening of secret sets that have retired."""
    return [e for e in desk.handle(Tick(), now) if not isinstance(e, OpenSecret)]


def test_a_release_can_be_ordered_before_the_end():
    clerk = clerk_with(A)
    clerk.tell(Ordered("release", ""), 0)
    assert clerk.desk.handle(Tick(), 0) == [RunRouter()]


def release_of(desk):
    from paris_protocol.records import Release, ReleasedExpert

    experts = tuple(
        ReleasedExpert(expert=e.index, merge=e.head.merge, root=e.head.weights.root)
        for e in desk.experts
    )
    return Release(number=1, previous=None, files=(), experts=experts, router_root="0" * 64, at=0)


# ---------------------------------------------------------------- the plan


def test_hands_are_disjoint_and_complete_and_turn():
    shards = made.genesis(shards=5).clusters[0].shards
    seen = set()
    for turn in range(4):
        hands = deal(shards, 2, turn)
        flat = [shard for hand in hands for shard in hand]
        assert len(flat) == len(set(flat)) == 5
        seen.add(hands[0])
    assert len(seen) == 2
    assert len(deal(shards[:1], 2, 0)) == 1


def test_slices_join_into_one_cosine():
    plan = made.policy(rounds=6).plan
    assert rate(plan, 0).start == "1"
    assert real(rate(plan, 5).end) == pytest.approx(0.02)
    for turn in range(5):
        assert rate(plan, turn).end == rate(plan, turn + 1).start
    assert peak(plan, 3) == pytest.approx((1 + 0.02) / 2)
    whole = plan.model_copy(update={"schedule": "unit-cosine"})
    assert (rate(whole, 4).start, rate(whole, 4).end) == ("1", "0.02")
