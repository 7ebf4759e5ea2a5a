"""A network's whole life in the office, with instant jobs: loop, repeats, restarts, faults."""

import asyncio
import json

import pytest

from coordinator import synthetic as made
from coordinator.fakes import (
    FakeJobs,
    FakeNode,
    found,
    new_shift,
    open_office,
    run_out,
    work_off,
)
from coordinator.synthetic import refused
from paris_coordinator.events import Tick, Verify
from paris_coordinator.inspecting import inspect
from paris_coordinator.ledger import Ledger
from paris_coordinator.orders import Order, give_order, take_orders
from paris_coordinator.reading import log, status, status_text
from paris_coordinator.replay import replay
from paris_coordinator.shift import TRIES
from paris_protocol.blobs import Manifest
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.net.folder import verify_folder
from paris_protocol.records import LOGGED, BlobRef


@pytest.fixture
def state(tmp_path):
    return found(tmp_path)


@pytest.fixture
def office(state):
    office = open_office(state)
    yield office
    office.close()


def nodes_of(office, count=2):
    return [FakeNode(office.network, seed + 1) for seed in range(count)]


def test_a_network_runs_to_its_release_and_the_release_verifies(state, office):
    async def life():
        await run_out(office, new_shift(office), nodes_of(office))
        await office.project()

    asyncio.run(life())
    desk = office.desk
    assert desk.complete
    assert [expert.round for expert in desk.experts] == [2, 2]
    assert all(work.state == "merged" for work in desk.works.values())
    [release] = desk.releases.values()
    verified = verify_folder(state.releases / "1", office.network)
    assert verified.release.record == release
    assert not list(state.releases.glob(".*"))
    facts = status(state.folder)
    assert facts["finished"]
    assert len(facts["releases"]) == 1
    assert "release 1" in status_text(facts)
    one = next(iter(desk.contributions))
    assert inspect(state.folder, one[:20])["state"] == "merged"
    assert [entry["id"] for entry in log(state.folder)] == office.ledger.statement_ids(LOGGED)


def test_a_replay_of_the_ledger_is_the_desk(state, office):
    async def life():
        await run_out(office, new_shift(office), nodes_of(office, 3))

    asyncio.run(life())
    again, policies = replay(Ledger(state.ledger_file), state)
    assert made.snapshot(again) == made.snapshot(office.desk)
    assert list(policies) == [1]


def test_every_request_may_be_repeated(office):
    async def life():
        [node] = nodes_of(office, 1)
        for _ in range(2):
            assert await office.register(node.registration()) == {"ok": True}
        answer = await office.lease(node.request())
        assert await office.lease(node.request()) == answer
        assert await office.beat(node.beat()) == {
            "ok": True, "finished": False, "challenges": []
        }  # fmt: skip
        commitment, result, data = node.statements(node.assignment(answer))
        for _ in range(2):
            assert (await office.commit(commitment.raw))["id"] == commitment.id
        for _ in range(2):
            state = await office.contribute(result.raw)
            assert state == {
                "id": result.id, "missing": [], "manifest_missing": True, "state": "uploading",
            }  # fmt: skip
        ref, manifest = result.record.update.blob, Manifest.build([data])
        for _ in range(2):
            assert await office.uploads.put_manifest(ref.id, ref.size, manifest.raw) == {
                "missing": 1
            }
        assert (await office.contribute(result.raw))["missing"] == [0]
        for _ in range(2):
            assert await office.uploads.put_piece(ref.id, 0, data) == {"missing": 0}
        assert (await office.contribute(result.raw))["state"] == "queued"
        return len(list(office.ledger.entries()))

    assert asyncio.run(life()) == 2 + 5  # genesis, policy; then each fact once


def test_a_wrong_size_neither_jams_the_queue_nor_stops_the_blobs_owner(office):
    """Naming a blob that is here, or another's, with a wrong size must get nobody anywhere."""

    async def life():
        honest, liar = nodes_of(office, 2)
        results = []
        for node in (honest, liar):
            await office.register(node.registration())
            commitment, result, data = node.statements(
                node.assignment(await office.lease(node.request()))
            )
            await office.commit(commitment.raw)
            results.append((result.record, data))
        (record, data), (lie, _) = results
        ref = record.update.blob
        wrong = BlobRef(id=ref.id, size=ref.size + 1)
        lie = lie.model_copy(update={"update": lie.update.model_copy(update={"blob": wrong})})
        await office.contribute(liar.seal(lie).raw)
        honest_raw = honest.seal(record).raw
        await office.contribute(honest_raw)
        await office.uploads.put_manifest(ref.id, ref.size, Manifest.build([data]).raw)
        assert await office.uploads.put_piece(ref.id, 0, data) == {"missing": 0}
        assert (await office.contribute(honest_raw))["state"] == "queued"
        assert (await office.contribute(liar.seal(lie).raw))["state"] == "uploading"
        assert len(office.desk.queue) == 1

    asyncio.run(life())


def test_only_named_blobs_are_taken(office):
    async def life():
        [node] = nodes_of(office, 1)
        await office.register(node.registration())
        answer = await office.lease(node.request())
        commitment, result, data = node.statements(node.assignment(answer))
        ref = result.record.update.blob
        with refused("not-found"):
            await office.uploads.put_manifest(ref.id, ref.size, Manifest.build([data]).raw)
        await office.commit(commitment.raw)
        await office.contribute(result.raw)
        with refused("blob.corrupt"):
            await office.uploads.put_manifest(ref.id, ref.size, Manifest.build([data + b"x"]).raw)
        await office.uploads.put_manifest(ref.id, ref.size, Manifest.build([data]).raw)
        with refused("blob.corrupt"):
            await office.uploads.put_piece(ref.id, 0, data[:-1] + b"x")
        assert not office.store.has(ref)

    asyncio.run(life())


def test_strangers_and_forgers_are_refused(office):
    async def life():
        node, other = nodes_of(office, 2)
        with refused("record.signer"):
            await office.lease(node.request())
        await office.register(node.registration())
        foreign = FakeNode("0" * 64, 1)
        with refused("record.network"):
            await office.lease(foreign.request())
        with refused("record.type"):
            await office.lease(node.beat())
        with refused("record.signer"):
            await office.register(seal(json_registration(node), other.key, office.network).raw)
        spoiled = bytearray(node.request())
        spoiled[len(spoiled) // 2] ^= 1
        with pytest.raises(ParisError):
            await office.lease(bytes(spoiled))

    asyncio.run(life())
    assert len(office.desk.nodes) == 1


def json_registration(node):
    from paris_protocol.records import Registration

    return Registration(node=node.key.id, peer_id="", version="0.1.0", at=0)


def test_receipts_prove_what_happened(office):
    from paris_protocol.log import Checkpoint, leaf_hash, origin, verify_inclusion

    async def life():
        [node] = nodes_of(office, 1)
        await office.register(node.registration())
        id = await node.hand_in(office, await office.lease(node.request()))
        with refused("not-found"):
            await office.receipt(id)
        await work_off(new_shift(office))
        return id, await office.receipt(id), office.contribution(id)

    id, receipt, facts = asyncio.run(life())
    assert facts["accepted"] is True
    assert facts["state"] == "judged"
    checkpoint = Checkpoint.open(receipt["checkpoint"], origin(office.network), {office.key.id})
    for statement, index in receipt["indices"].items():
        proof = [bytes.fromhex(part) for part in receipt["proofs"][statement]]
        leaf = leaf_hash(bytes.fromhex(statement))
        assert verify_inclusion(leaf, index, checkpoint.size, proof, checkpoint.root)
    assert id in receipt["indices"]


def test_a_restart_in_mid_upload_goes_on(state, office):
    async def before():
        [node] = nodes_of(office, 1)
        await office.register(node.registration())
        commitment, result, data = node.statements(
            node.assignment(await office.lease(node.request()))
        )
        await office.commit(commitment.raw)
        await office.contribute(result.raw)
        ref = result.record.update.blob
        await office.uploads.put_manifest(ref.id, ref.size, Manifest.build([data]).raw)
        # Killed between the last piece and the ledger's note of it:
        office.store.put_piece(ref, 0, data)
        return result

    result = asyncio.run(before())
    office.close()
    again = open_office(state)
    assert again.upload_state(result.id)["state"] == "uploading"
    asyncio.run(again.resume_uploads())
    assert again.desk.handle(Tick(), again.now()) == [Verify(result.id)]
    again.close()


def test_a_full_disk_at_a_commit_leaves_no_trace(office, monkeypatch):
    async def life():
        [node] = nodes_of(office, 1)
        await office.register(node.registration())
        before = made.snapshot(office.desk)
        real = office.ledger.append

        def full(entries):
            raise ParisError("disk.full", "made up")

        monkeypatch.setattr(office.ledger, "append", full)
        with refused("disk.full"):
            await office.lease(node.request())
        assert made.snapshot(office.desk) == before
        monkeypatch.setattr(office.ledger, "append", real)
        answer = await office.lease(node.request())
        assert "assignment" in answer

    asyncio.run(life())


def test_a_merge_that_is_worse_is_published_as_such_and_the_round_repeated(office):
    first = []

    def worse(job):
        first.append(job)
        return len(first) == 1

    asyncio.run(run_out(office, new_shift(office, FakeJobs(worse=worse)), nodes_of(office)))
    merges = list(office.desk.merges.values())
    assert [merge.published for merge in merges].count(False) == 1
    assert office.desk.complete


@pytest.mark.parametrize("sound", [True, False])
def test_what_breaks_the_verifier_is_refused_only_by_a_machine_that_can_judge(office, sound):
    class Broken(FakeJobs):
        def verify(self, job):
            raise ParisError("internal", "made up")

        def ready(self, job):
            if not sound:
                raise ParisError("internal", "torch cannot be imported")
            return {}

    async def life():
        [node] = nodes_of(office, 1)
        await office.register(node.registration())
        id = await node.hand_in(office, await office.lease(node.request()))
        shift = new_shift(office, Broken())
        for _ in range(TRIES + 2):
            if not await shift.step():
                break
            assert not await shift.step()
            shift._later = {e: t._replace(until=0.0) for e, t in shift._later.items()}
        return office.contribution(id)

    facts = asyncio.run(life())
    if sound:
        assert (facts["accepted"], facts["code"]) == (False, "internal")
    else:
        assert facts["state"] == "queued"


def test_names_can_be_erased_and_are_not_in_the_log(state, office):
    async def life():
        [node] = nodes_of(office, 1)
        await office.register(node.registration())
        await office.lease(node.request(name="Somebody"))
        await office.project()
        return node.key.id

    id = asyncio.run(life())
    assert office.ledger.person(id).name == "Somebody"
    assert all(b"Somebody" not in p.read_bytes() for p in state.log.rglob("*") if p.is_file())
    office.ledger.erase(id)
    assert office.ledger.person(id) is None


def test_orders_need_the_operators_key(state, office):
    give_order(state, PrivateKey.generate(), Order("release"), 1)
    (state.orders / "0.json").write_text(json.dumps({"order": "release"}))
    assert take_orders(state, office.key) == []
    give_order(state, office.key, Order("lift", "x"), 2)
    assert take_orders(state, office.key) == [Order("lift", "x")]
    assert take_orders(state, office.key) == []


def test_the_index_is_signed_and_names_the_heads(office):
    asyncio.run(office.project())
    index = office.index().record
    assert index.heads == tuple(expert.head for expert in office.desk.experts)
    assert (index.log_size, index.finished) == (2, False)
    for head in index.heads:
        assert office.store.has(BlobRef.model_validate(head.weights.blob))


def test_another_network_or_a_damaged_ledger_is_refused(state, office):
    office.close()
    settings = state.settings()
    state.save(settings.model_copy(update={"network": "0" * 64}))
    with refused("network.mismatch"):
        open_office(state)
    state.save(settings)
    state.ledger_file.write_bytes(b"no database" * 1000)
    with refused("state.corrupt"):
        open_office(state)
