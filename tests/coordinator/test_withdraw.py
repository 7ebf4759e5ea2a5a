"""Withdrawn clips: what is leased no more, what does not count, which heads are named."""

import asyncio
import hashlib
import json
import struct
import sys

import pytest

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from coordinator.fakes import FakeNode, new_shift, open_office, prepared_folder, run_out, work_off
from coordinator.synthetic import refused
from coordinator.test_trust_verbs import Losses
from paris_coordinator import app, cli, withdrawing
from paris_coordinator import genesis as founding
from paris_coordinator.checking import Walk, check_log
from paris_coordinator.config import State
from paris_coordinator.events import Filed, Finished, LeaseAsked, Ordered, RunMerge, Tick, Withdraw
from paris_coordinator.genesis import Setup, init
from paris_coordinator.orders import Order, give_order, take_orders
from paris_coordinator.reading import open_desk, status, status_text
from paris_coordinator.shift import Shift
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.lineage import Lineage
from paris_protocol.records import Assignment, Withdrawal

A, B = made.key_of(0), made.key_of(1)
CLIP = made.digest("clip")


def clerk_with(*nodes, **plan):
    clerk = Clerk(made.desk(**plan))
    for node in nodes:
        clerk.register(node)
    return clerk


def blobs(work):
    return tuple(shard.file.blob.id for shard in work.record.shards)


def merges_due(desk, now=0):
    return [effect for effect in desk.handle(Tick(), now) if isinstance(effect, RunMerge)]


# ---------------------------------------------------------------- the desk


def test_a_unit_shrinks_and_its_shard_is_leased_no_more():
    clerk = clerk_with(A, experts=1, units=2)
    gone = clerk.desk.experts[0].units[0].shards[0].file.blob.id
    clerk.withdraw(CLIP, shards=(gone,))
    assert [len(unit.shards) for unit in clerk.desk.experts[0].units] == [1, 2]
    for _ in range(2):
        work = clerk.lease(A)
        assert gone not in blobs(work)
        clerk.judge(clerk.hand_in(work))
    [effect] = merges_due(clerk.desk)
    clerk.merge(effect)
    assert all(gone not in [s.file.blob.id for s in u.shards] for u in clerk.desk.experts[0].units)


def test_a_unit_without_shards_is_closed_and_the_round_goes_on():
    clerk = clerk_with(A, B, experts=1, units=2)
    gone = tuple(shard.file.blob.id for shard in clerk.desk.experts[0].units[0].shards)
    clerk.withdraw(CLIP, shards=gone)
    work = clerk.lease(A)
    assert work.record.unit == 1
    with refused("work.none"):
        clerk.lease(B)
    clerk.judge(clerk.hand_in(work))
    [effect] = merges_due(clerk.desk)
    clerk.merge(effect)
    assert clerk.desk.experts[0].round == 1


def test_an_expert_without_any_shard_is_at_its_end():
    clerk = clerk_with(A, experts=2, units=2)
    gone = [shard.file.blob.id for shard in clerk.desk.genesis.clusters[0].shards]
    clerk.withdraw(CLIP, shards=tuple(gone))
    assert clerk.desk.ended(clerk.desk.experts[0])
    assert not clerk.desk.complete
    assert clerk.lease(A).record.expert == 1
    other = clerk.desk.genesis.clusters[1].shards
    clerk.withdraw("1" * 64, shards=tuple(shard.file.blob.id for shard in other))
    assert clerk.desk.complete
    assert isinstance(clerk.lease(A), Finished)


def test_work_in_hand_is_refused_in_one_sentence_and_is_nobodys_fault():
    clerk = clerk_with(A, B, experts=1, units=2)
    work, other = clerk.lease(A), clerk.lease(B)
    commitment = clerk.commit(work)
    clerk.withdraw(CLIP, shards=blobs(work)[:1])
    for again in (lambda: clerk.commit(work, name="d"), lambda: clerk.contribute(work, commitment)):
        with refused("unit.withdrawn"):
            again()
    assert "withdrawn" in REASONS["unit.withdrawn"].text
    assert work.state == "closed"
    assert clerk.desk.nodes[A].refusals == 0
    fresh = clerk.lease(A)  # the same unit without that shard, at once
    assert fresh.record.unit == work.record.unit
    assert blobs(fresh) == blobs(work)[1:]
    clerk.hand_in(other)
    assert other.state == "queued"


def test_what_was_accepted_but_not_merged_is_taken_back():
    clerk = clerk_with(A, B, experts=1, units=2)
    works = [clerk.lease(A), clerk.lease(B)]
    ids = [clerk.hand_in(work) for work in works]
    for id in ids:
        clerk.judge(id)
    [effect] = merges_due(clerk.desk)
    clerk.withdraw(CLIP, shards=blobs(works[0])[:1])
    assert [work.state for work in works] == ["withdrawn", "accepted"]
    assert merges_due(clerk.desk) == []
    with refused("unit.closed"):
        clerk.merge(effect)  # a merge that was being computed comes too late
    clerk.judge(clerk.hand_in(clerk.lease(A)))
    [effect] = merges_due(clerk.desk)
    assert ids[0] not in effect.contributions
    clerk.merge(effect)


def test_what_arrived_gets_a_verdict_that_says_so():
    clerk = clerk_with(A, B, experts=1, units=2, audit={})
    works = [clerk.lease(A), clerk.lease(B)]
    ids = [clerk.hand_in(work) for work in works]
    clerk.measure(ids[1])
    clerk.withdraw(CLIP, shards=(*blobs(works[0])[:1], *blobs(works[1])[:1]))
    assert clerk.desk.dismissed == [ids[0], ids[1]]
    assert clerk.desk.trials == clerk.desk.queue == []
    for id in ids:
        clerk.judge(id, False, code="unit.withdrawn", found=())
        assert clerk.desk.work_of(id).state == "closed"
    assert [clerk.desk.nodes[node].refusals for node in (A, B)] == [0, 0]


def test_the_heads_it_touched_are_named_and_stay():
    clerk = clerk_with(A, B, experts=1, units=2, rounds=3)
    for _ in range(2):
        works = [clerk.lease(A), clerk.lease(B)]
        for work in works:
            clerk.judge(clerk.hand_in(work))
        clerk.merge(*merges_due(clerk.desk))
    head, merges = clerk.desk.experts[0].head, clerk.desk.experts[0].merges
    works = [clerk.lease(A), clerk.lease(B)]
    for work in works:
        clerk.judge(clerk.hand_in(work))
    clerk.merge(*merges_due(clerk.desk), published=False)
    assert len(merges) == 3
    id = clerk.withdraw(CLIP, shards=blobs(works[0])[:1])
    assert clerk.desk.withdrawals[id].heads == tuple(merges[:2])  # the third made no head
    assert clerk.desk.experts[0].head == head


def test_the_desk_refuses_what_does_not_follow_and_changes_nothing():
    clerk = clerk_with(A, experts=1, units=2, rounds=3)
    work = clerk.lease(A)
    before = made.snapshot(clerk.desk)
    for shards in ((), ("7" * 64,), (blobs(work)[0], "7" * 64)):
        with refused("clip.unknown"):
            clerk.tell(filed(shards), 0)
    with refused("unit.closed"):
        clerk.tell(filed(blobs(work), heads=("7" * 64,)), 0)
    assert made.snapshot(clerk.desk) == before
    clerk.tell(Ordered("withdraw", CLIP, "the owner asked"), 0)
    assert Withdraw(CLIP) in clerk.desk.handle(Tick(), 0)
    before = made.snapshot(clerk.desk)
    with refused("clip.withdrawn"):
        clerk.tell(Ordered("withdraw", CLIP), 0)
    assert made.snapshot(clerk.desk) == before
    clerk.withdraw(CLIP, shards=blobs(work)[:1])
    before = made.snapshot(clerk.desk)
    for again in (lambda: clerk.withdraw(CLIP), lambda: clerk.tell(Ordered("withdraw", CLIP), 0)):
        with refused("clip.withdrawn"):
            again()
    assert made.snapshot(clerk.desk) == before
    assert not any(isinstance(effect, Withdraw) for effect in clerk.desk.handle(Tick(), 0))


def filed(shards, heads=(), clip=CLIP):
    record = Withdrawal(clip=clip, shards=shards, heads=heads, reason="", at=0)
    return made_filed(record)


def made_filed(record):
    return Filed(made.digest(record), made.KEY, record)


def test_an_assignment_of_other_shards_than_the_units_is_refused():
    clerk = clerk_with(A, experts=1, units=2)
    [grant] = clerk.desk.handle(LeaseAsked(A, made.request()), 0)
    clerk.withdraw(CLIP, shards=(grant.draft.shards[0].file.blob.id,))
    with refused("unit.closed"):
        clerk.tell(made_filed(grant.draft), 0)


# ---------------------------------------------------------------- a network on the disk


def shard_bytes(first):
    """A shard of four clips whose latents are `first`, `first` + 1, …, two values each."""
    data = struct.pack("<8f", *(float(first + i // 2) for i in range(8)))
    entry = {"dtype": "F32", "shape": [4, 1, 1, 1, 2], "data_offsets": [0, 32]}
    text = json.dumps({"latents": entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def digest_of(value):
    return hashlib.sha256(struct.pack("<2f", value, value)).hexdigest()


def network(folder, table=True):
    """A network whose shard s of cluster k holds the clips 100 k + 10 s to + 3, as a folder."""
    prepared = prepared_folder(folder / "prepared")
    lines = []
    for k in range(2):
        for s in range(4):
            name = f"shards/cluster{k}/shard{s}.safetensors"
            (prepared / name).write_bytes(shard_bytes(100 * k + 10 * s))
            lines += [
                {"clip": digest_of(100 * k + 10 * s + i), "name": f"{k}{s}{i // 2}.mp4",
                 "source": "here", "licence": "CC0", "bucket": 0, "file": name}
                for i in range(4)
            ]  # fmt: skip
        name = f"private/validation{k}.safetensors"
        lines.append({"clip": digest_of(-k - 1), "name": f"held{k}.mp4", "source": "here",
                      "licence": "CC0", "bucket": 0, "file": name})  # fmt: skip
    if table:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (prepared / "private" / "provenance.jsonl").write_text(text)
    real, founding.expert_schema = founding.expert_schema, lambda _: None
    try:
        init(prepared, folder / "state", Setup(overrides={"audit": {"canary": "0"}}), 1000)
    finally:
        founding.expert_schema = real
    return State(folder / "state")


def shard_of(state, k, s):
    return state.genesis().record.clusters[k].shards[s].file.blob.id


@pytest.mark.parametrize("table", [True, False])
def test_a_clip_is_found_by_its_digest_with_and_without_the_table(tmp_path, table):
    state = network(tmp_path, table)
    genesis = state.genesis().record
    for k, s, i in ((0, 0, 0), (1, 3, 2)):
        clip = digest_of(100 * k + 10 * s + i)
        assert withdrawing.find(state, genesis, clip) == [(clip, shard_of(state, k, s))]
    for name in ("nothing.mp4", "7" * 64, "", digest_of(-1)):
        with refused("clip.unknown"):
            withdrawing.find(state, genesis, name)


def test_a_name_stands_for_all_clips_of_its_video(tmp_path):
    state = network(tmp_path)
    found = withdrawing.find(state, state.genesis().record, "011.mp4")
    assert found == [(digest_of(clip), shard_of(state, 0, 1)) for clip in (12, 13)]
    with pytest.raises(ParisError, match="held out") as caught:
        withdrawing.find(state, state.genesis().record, "held0.mp4")
    assert caught.value.code == "clip.unknown"
    assert state.origins_file.stat().st_mode & 0o077 == 0
    assert all("file" not in line for line in withdrawing.origins(state))


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["paris-coordinator", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            sys.exit(0)
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return call


def test_the_command_leaves_an_order_and_refuses_the_rest(tmp_path, run):
    state = network(tmp_path)
    for clip in ("nothing.mp4", "held1.mp4", "7" * 64):
        code, _, told = run("withdraw", clip, "--state", state.folder)
        assert code == 20
        assert "[clip.unknown]" in told
    code, _, told = run("withdraw", "000.mp4", "--reason", "x" * 201, "--state", state.folder)
    assert code == 2
    assert list(state.orders.iterdir()) == []
    code, out, told = run(
        "withdraw", "000.mp4", "--reason", "asked", "--state", state.folder, "--json"
    )
    assert code == 0
    facts = json.loads(out)
    assert sorted(facts["clips"]) == sorted([digest_of(0), digest_of(1)])
    assert facts["shards"] == [shard_of(state, 0, 0)]
    assert facts["experts"] == [0]
    orders = take_orders(state, state.key())
    assert {(o.order, o.subject, o.reason) for o in orders} == {
        ("withdraw", digest_of(i), "asked") for i in (0, 1)
    }
    assert open_desk(state).withdrawals == {}


def test_a_running_coordinator_carries_it_out(tmp_path, run, monkeypatch):
    state = network(tmp_path)
    done = asyncio.Event()
    noted, note = [], app.Coordinator.note

    def listen(self, what, facts):
        note(self, what, facts)
        noted.append((what, facts))
        if [word for word, _ in noted].count("withdraw") == 2:
            done.set()

    monkeypatch.setattr(app.Coordinator, "note", listen)

    async def life():
        coordinator = app.Coordinator(state, app.Options(swarm=False))
        node = FakeNode(coordinator.office.network, 1)
        await coordinator.office.register(node.registration())
        answer = await coordinator.office.lease(node.request())
        taken = node.assignment(answer).record
        name = next(
            line["name"]
            for line in withdrawing.origins(state)
            if line["shard"] == taken.shards[0].file.blob.id
        )
        working = asyncio.create_task(coordinator.work())
        code, out, _ = await asyncio.to_thread(
            run, "withdraw", name, "--reason", "the owner asked", "--state", state.folder, "--json"
        )
        assert code == 0
        assert len(json.loads(out)["work"]) == 1
        await done.wait()
        with refused("unit.withdrawn"):
            await node.hand_in(coordinator.office, answer)
        coordinator.stopping.set()
        await working
        await coordinator.worker.close()
        coordinator.office.close()
        return name, taken

    name, taken = asyncio.run(life())
    facts = status(state.folder)
    assert {one["reason"] for one in facts["withdrawn"]} == {"the owner asked"}
    assert {tuple(one["shards"]) for one in facts["withdrawn"]} == {(taken.shards[0].file.blob.id,)}
    assert "withdrawn  clip" in status_text(facts)
    code, _, told = run("withdraw", name, "--state", state.folder)
    assert code == 20
    assert "[clip.withdrawn]" in told
    assert list(state.orders.iterdir()) == []


def test_an_order_for_no_clip_is_noted_and_changes_nothing(tmp_path, monkeypatch):
    state = network(tmp_path)
    coordinator = app.Coordinator(state, app.Options(swarm=False))
    noted = []
    monkeypatch.setattr(coordinator, "note", lambda what, facts: noted.append(facts))
    give_order(state, state.key(), Order("withdraw", "7" * 64), 5)
    asyncio.run(coordinator._orders())
    assert [facts["error"] for facts in noted] == ["clip.unknown"]
    assert coordinator.office.desk.withdrawing == {}
    coordinator.office.close()


class Jobs(Losses):
    """With a model's class, which calibrations are looked up by."""

    def numerics(self, job):
        return super().numerics(job) | {"model": "flux-1-adamw-x0"}


def trained(state, stop_after=3):
    """A network that trains for a while, has a clip withdrawn, and goes on to its release."""
    office = open_office(state)
    nodes = [FakeNode(office.network, seed) for seed in (1, 2)]

    async def first():
        shift = new_shift(office, Jobs())
        for node in nodes:
            await office.register(node.registration())
        for _ in range(stop_after):
            for node in nodes:
                await node.turn(office)
            await work_off(shift)
            for node in nodes:
                await node.beats(office)
            await work_off(shift)
        await office.tell(Ordered("withdraw", digest_of(0), "the owner asked"))

    asyncio.run(first())
    office.close()  # the order is in the ledger, its statement is not
    office = open_office(state)
    assert list(office.desk.withdrawing) == [digest_of(0)]

    async def second():
        await run_out(office, new_shift(office, Jobs()), nodes)
        await office.project()

    asyncio.run(second())
    return office


def test_the_log_holds_it_and_check_derives_it_again(tmp_path, run):
    state = network(tmp_path)
    office = trained(state)
    desk = office.desk
    [(id, record)] = desk.withdrawals.items()
    assert record.shards == (shard_of(state, 0, 0),)
    assert record.heads
    assert set(record.heads) <= set(desk.experts[0].merges)
    assert office.log.index_of(id) is not None
    assert desk.complete
    assert desk.releases
    jobs = Shift(office, Jobs(), print)._router_job()["shards"]
    assert len(jobs) == 7, "the router is not trained on a withdrawn shard"
    network_id = office.network
    office.close()
    facts = check_log(state.log, network_id)
    assert facts["withdrawn"] == facts["statements"]["withdrawal"] == 1
    code, _, _ = run("log", "--check", "--state", state.folder)
    assert code == 0
    assert made.snapshot(open_desk(state)) == made.snapshot(desk)


def walk_of(office):
    genesis = office.genesis.record
    policies = {n: sealed.record for n, sealed in office.policies.items()}
    return Walk(policies, Lineage(genesis))


def test_a_log_whose_withdrawal_does_not_follow_is_refused(tmp_path):
    office = trained(network(tmp_path))
    statements = [office.sealed(entry.statement.id) for entry in office.ledger.entries()
                  if entry.statement is not None]  # fmt: skip
    place = next(i for i, s in enumerate(statements) if isinstance(s.record, Withdrawal))
    own = statements[place]
    lied = {
        "other heads": own.record.model_copy(update={"heads": ()}),
        "other shards": own.record.model_copy(update={"shards": ("7" * 64,), "heads": ()}),
        "no shards": own.record.model_copy(update={"shards": (), "heads": ()}),
    }
    for record in lied.values():
        with refused("check.failed"):
            replayed(office, [*statements[:place], with_record(own, record)])
    with refused("check.failed"):
        replayed(office, [*statements[: place + 1], own])
    early = next(
        i for i, s in enumerate(statements)
        if isinstance(s.record, Assignment)
        and shard_of(office.state, 0, 0) in [x.file.blob.id for x in s.record.shards]
    )  # fmt: skip
    moved = with_record(own, own.record.model_copy(update={"heads": ()}))
    with refused("check.failed"):
        replayed(office, [*statements[:early], moved, *statements[early:place]])
    replayed(office, statements)
    office.close()


def with_record(sealed, record):
    return type(sealed)(record, sealed.raw, sealed.id, sealed.signer)


def replayed(office, statements):
    walk = walk_of(office)
    for sealed in statements:
        walk.take(sealed)
