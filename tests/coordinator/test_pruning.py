"""What may be deleted: updates whose time is over, and never anything that is still needed."""

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from coordinator.synthetic import refused
from paris_coordinator.events import Filed, RunMerge, Tick, Uploaded
from paris_coordinator.pruning import APPEAL, expendable, prune
from paris_protocol.blobs import Manifest
from paris_protocol.net.store import BlobStore

A, B = (made.key_of(i) for i in range(2))
KEPT = 1000


def clerk_with(kept=KEPT, audit=None):
    clerk = Clerk(made.desk(experts=1, units=2, audit=audit))
    policy = clerk.desk.policy.model_copy(update={"inputs_kept": kept})
    clerk.desk.policy, clerk.desk.policies = policy, {policy.number: policy}
    for node in (A, B):
        clerk.register(node)
    return clerk


def one_round(clerk, now=0, published=True):
    """Two units accepted and merged; the works."""
    works = [clerk.lease(node, now) for node in (A, B)]
    judge = clerk.judge if clerk.desk.policy.audit is None else clerk.audit
    for work in works:
        judge(clerk.hand_in(work, now), now=now)
    [effect] = [e for e in clerk.desk.handle(Tick(), now) if isinstance(e, RunMerge)]
    clerk.merge(effect, published, now)
    return works


def ids(works):
    return {work.done.update.blob.id for work in works}


def gone(clerk, now):
    """Ids of what may go. Verdicts and merges of the helpers are all of time 0."""
    return {blob.id for blob in expendable(clerk.desk, now)}


def test_inputs_are_kept_for_their_time_and_then_go():
    clerk = clerk_with()
    works = one_round(clerk)
    assert gone(clerk, KEPT - 1) == set()
    assert gone(clerk, KEPT) == ids(works)


def test_for_ever_is_for_ever():
    clerk = clerk_with(kept=0)
    one_round(clerk)
    assert gone(clerk, 1 << 40) == set()


def test_refused_updates_go_after_their_appeal_where_merges_stay_for_ever():
    clerk = clerk_with(kept=0)
    refused = clerk.lease(A)
    clerk.judge(clerk.hand_in(refused), accepted=False)
    assert gone(clerk, 1 << 40) == set()  # later updates to this head are compared with it
    one_round(clerk)
    assert gone(clerk, APPEAL - 1) == set()
    assert gone(clerk, APPEAL) == ids([refused])


def test_what_a_revert_may_need_stays():
    clerk = clerk_with(audit={"vesting": 1})
    works = one_round(clerk)
    assert gone(clerk, KEPT) == set()
    one_round(clerk)
    assert gone(clerk, KEPT) == ids(works)


def test_refused_and_open_work():
    clerk = clerk_with()
    refused, open_ = clerk.lease(A), clerk.lease(B)
    clerk.judge(clerk.hand_in(refused), accepted=False)
    last = clerk.hand_in(open_)
    assert gone(clerk, KEPT) == set(), "later updates to this head are compared with it"
    clerk.judge(last)
    again = clerk.lease(B)
    clerk.judge(clerk.hand_in(again))
    [effect] = [e for e in clerk.desk.handle(Tick(), 0) if isinstance(e, RunMerge)]
    clerk.merge(effect)
    clerk.hand_in(clerk.lease(A))
    assert gone(clerk, KEPT) == ids([refused, open_, again])


def test_what_never_arrived_whole_goes_too():
    clerk = clerk_with()
    half = clerk.lease(A)
    clerk.contribute(half, clerk.commit(half))
    over = half.record.soft_deadline + 1
    for node, now in ((B, 0), (B, over)):
        clerk.judge(clerk.hand_in(clerk.lease(node, now), now), now=now)
    [effect] = [e for e in clerk.desk.handle(Tick(), over) if isinstance(e, RunMerge)]
    clerk.merge(effect)
    assert half.state == "closed"
    assert half.done.update.blob.id not in gone(clerk, half.record.hard_deadline + KEPT - 1)
    assert half.done.update.blob.id in gone(clerk, half.record.hard_deadline + KEPT)


def test_naming_an_opened_state_as_an_update_does_not_end_its_audit():
    clerk = clerk_with(audit={})
    bad, good = clerk.lease(A), clerk.lease(B)
    audited = clerk.hand_in(good)
    clerk.measure(audited)
    clerk.ask(audited)
    clerk.open(audited)
    state = clerk.desk.audits[audited].opening.states[0].file
    commitment = clerk.commit(bad)
    record = made.contribution_for(bad.id, commitment, bad.record)
    id = made.digest("contribution", bad.id)
    clerk.tell(Filed(id, A, record.model_copy(update={"update": state})), 0)
    clerk.tell(Uploaded(id), 0)
    clerk.judge(id, accepted=False, draw=made.draw_for(bad, clerk.desk.policy.audit))
    clerk.desk.experts[0].head = clerk.desk.experts[0].head.model_copy(update={"round": 9})
    assert state.blob.id not in gone(clerk, 1 << 40)


def test_naming_a_shard_as_an_update_deletes_nothing():
    clerk = clerk_with()
    genesis = clerk.desk.genesis
    for node, file in ((A, genesis.initial), (B, genesis.clusters[0].shards[0].file)):
        work = clerk.lease(node)
        commitment = clerk.commit(work)
        record = made.contribution_for(work.id, commitment, work.record)
        record = record.model_copy(update={"update": file})
        id = made.digest("contribution", work.id)
        clerk.tell(Filed(id, node, record), 0)
        clerk.tell(Uploaded(id), 0)
        clerk.judge(id, accepted=False)
    assert gone(clerk, KEPT) == set()


def test_a_blob_that_somebody_still_needs_stays():
    clerk = clerk_with()
    first, second = clerk.lease(A), clerk.lease(B)
    clerk.judge(clerk.hand_in(first), accepted=False)
    commitment = clerk.commit(second)
    record = made.contribution_for(second.id, commitment, second.record)
    record = record.model_copy(update={"update": first.done.update})
    clerk.tell(Filed(made.digest("contribution", second.id), B, record), 0)
    assert gone(clerk, KEPT) == set()


def test_pruning_removes_what_is_there(tmp_path):
    store = BlobStore(tmp_path)
    here, kept = store.add_bytes(b"an old update"), store.add_bytes(b"a new one")
    missing = here.model_copy(update={"id": "0" * 64})
    assert prune(store, [here, missing]) == [here.id]
    assert store.ids() == [kept.id]
    half = Manifest.build([b"half of an update"])
    ref = here.model_copy(update={"id": half.id, "size": half.size})
    store.put_manifest(half.raw, ref)
    assert prune(store, [ref]) == [ref.id]
    with refused("blob.missing"):
        store.manifest(ref.id)
