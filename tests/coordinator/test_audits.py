"""Audits in the office, with instant jobs: draws, challenges, openings, revocations, volunteers."""

import asyncio
import json

import pytest

from coordinator import synthetic as made
from coordinator.fakes import FakeJobs, FakeNode, found, new_shift, open_office, run_out, work_off
from coordinator.synthetic import refused
from paris_coordinator.ledger import Ledger
from paris_coordinator.replay import replay
from paris_protocol.audit import check_draw, segments_of, standing_after
from paris_protocol.blobs import Manifest
from paris_protocol.draws import check_draws
from paris_protocol.log import Tree, leaf_hash
from paris_protocol.net.folder import verify_folder
from paris_protocol.records import LOGGED, Verdict

RULES = {
    "chain_length": 1 << 10, "segments": 1, "rate": "2", "probation": 2, "vesting": 3,
    "answer_within": 60, "retry_within": 30, "canary": "0",
}  # fmt: skip


class Clock:
    def __init__(self):
        self.at = 10_000

    def __call__(self):
        return self.at


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def office(tmp_path, clock):
    office = open_office(network(tmp_path), clock)
    yield office
    office.close()


def network(folder, audit=None, **kept):
    """A network with audits; every unit is audited until its node has some standing."""
    return found(folder, audit=RULES | (audit or {}), refusals_to_quarantine=9, **kept)


def nodes_of(office, count=2):
    return [FakeNode(office.network, seed + 1, office._clock) for seed in range(count)]


async def joined(office, *nodes):
    for node in nodes:
        await office.register(node.registration())


async def one_unit(office, node, remote=None):
    """Registered, trained, handed in: the contribution's id."""
    await joined(office, node)
    return await node.hand_in(office, await office.lease(node.request(), remote))


def verdicts_of(office):
    """All verdicts in the order of the log, and the log's leaves."""
    ids = office.ledger.statement_ids(LOGGED)
    sealed = [office.sealed(id) for id in ids]
    return ids, [s.record for s in sealed if isinstance(s.record, Verdict)]


def check_all_draws(office):
    """What anybody can check from the log: every draw is the only one possible, without gaps."""
    ids, verdicts = verdicts_of(office)
    tree, roots = Tree(), {0: ""}
    for size, id in enumerate(ids, 1):
        tree.append(leaf_hash(bytes.fromhex(id)))
        roots[size] = tree.root().hex()
    place = {id: index for index, id in enumerate(ids)}
    for verdict in verdicts:
        work = office.desk.works[verdict.assignment]
        before = place[work.commitment]
        standing = 0
        for other in verdicts:
            earlier = place[office.desk.work_of(other.contribution).verdict] < before
            if other.node == verdict.node and earlier:
                standing = standing_after(standing, other)
        rules = office.policy(verdict.policy).record.audit
        assert verdict.audit.size == before + 1
        check_draw(
            verdict.audit, rules, segments_of(work.record),
            root=roots[verdict.audit.size], standing=standing,
        )  # fmt: skip
    policies = {number: sealed.record for number, sealed in office.policies.items()}
    found = check_draws([office.sealed(id) for id in ids], policies)
    assert found["draws"] == len(verdicts)
    numbers = sorted(verdict.audit.number for verdict in verdicts)
    assert numbers == list(range(len(numbers)))
    return verdicts


def test_an_audited_network_runs_to_its_release_and_every_draw_is_the_only_one(office):
    async def life():
        await run_out(office, new_shift(office), nodes_of(office, 3))
        await office.project()

    asyncio.run(life())
    verdicts = check_all_draws(office)
    audited = [verdict for verdict in verdicts if verdict.audit.audited]
    assert audited
    for verdict in audited:
        assert verdict.layers[4].layer == "L4"
        assert dict(verdict.layers[4].numbers)["segments"] == "1"
        assert len(verdict.reports) == 1
    assert any(node.standing >= 2 for node in office.desk.nodes.values())
    assert verify_folder(office.state.releases / "1", office.network)
    opened = [
        state.file.blob
        for audit in office.desk.audits.values()
        for opening in audit.openings
        for state in office.sealed(opening).record.states
    ]
    assert opened
    assert not any(office.store.has(ref) for ref in opened), "opened states are thrown away"
    again, _ = replay(Ledger(office.state.ledger_file), office.state)
    assert made.snapshot(again) == made.snapshot(office.desk)


def test_a_network_without_audits_gives_verdicts_without_draws(tmp_path):
    office = open_office(found(tmp_path))
    asyncio.run(run_out(office, new_shift(office), nodes_of(office)))
    _, verdicts = verdicts_of(office)
    assert verdicts
    assert all(verdict.audit is None and len(verdict.layers) == 4 for verdict in verdicts)
    office.close()


def test_a_cheat_is_revoked_and_its_earlier_work_leaves_the_head(tmp_path):
    """Merged first, caught later: what was merged leaves the head by a revert in its lineage."""
    office = open_office(network(tmp_path, plan={"units": 2, "steps": 4, "rounds": 3}))
    honest, cheat = nodes_of(office, 2)
    caught = []

    def cheated(assignment):
        if assignment["node"] == cheat.key.id and assignment["round"] >= 1:
            caught.append(assignment["expert"])
        return bool(caught) and assignment["node"] == cheat.key.id

    asyncio.run(run_out(office, new_shift(office, FakeJobs(cheated=cheated)), [honest, cheat]))
    desk = office.desk
    assert desk.nodes[cheat.key.id].revoked is not None
    assert desk.nodes[honest.key.id].revoked is None
    [revocation] = desk.revocations.values()
    assert (revocation.key, revocation.reason) == (cheat.key.id, "audit.mismatch")
    assert revocation.contributions
    removed = [part.contribution for revert in desk.reverts.values() for part in revert.removed]
    assert sorted(removed) == sorted(revocation.contributions)
    for revert in desk.reverts.values():
        for part in revert.removed:
            merge = desk.merges[desk.work_of(part.contribution).merge]
            assert part in merge.inputs
            assert desk.work_of(part.contribution).state == "revoked"
    assert desk.complete
    check_all_draws(office)
    assert verify_folder(office.state.releases / "1", office.network)
    with refused("node.revoked"):
        asyncio.run(office.lease(cheat.request()))
    office.close()


def test_the_operator_revokes_by_order(office):
    from paris_coordinator.events import Ordered

    async def life():
        nodes = nodes_of(office, 2)
        await run_out(office, new_shift(office), nodes)
        taken = office.desk.unvested(nodes[0].key.id)
        assert taken
        await office.tell(Ordered("revoke", nodes[0].key.id, "stolen"))
        await work_off(new_shift(office))
        [revocation] = office.desk.revocations.values()
        assert (revocation.reason, revocation.contributions) == ("stolen", taken)
        assert len(office.desk.releases) == 2, "a release of the mended heads follows"
        return nodes[0]

    node = asyncio.run(life())
    for record in (node.request(), node.beat()):
        assert record
    assert verify_folder(office.state.releases / "2", office.network)


def test_an_unanswered_challenge_is_repeated_once_and_then_refused(office, clock):
    async def life():
        [node] = nodes_of(office, 1)
        id = await one_unit(office, node)
        shift = new_shift(office)
        await work_off(shift)
        assert office.contribution(id)["outcome"] == "auditing"
        assert office.contribution(id)["state"] == "queued"
        [first] = node.challenges(await office.beat(node.beat()))
        assert (first.record.attempt, first.record.deadline) == (1, clock.at + 60)
        clock.at += 61
        await work_off(shift)
        blob = await half_opened(office, node, first)
        [second] = node.challenges(await office.beat(node.beat()))
        assert (second.record.attempt, second.record.deadline) == (2, clock.at + 30)
        clock.at += 31
        with refused("audit.closed"):
            await office.open_states(node.opening(second)[0].raw)
        await work_off(shift)
        facts = office.contribution(id)
        assert (facts["accepted"], facts["code"]) == (False, "audit.unanswered")
        assert office.desk.revocations == {}
        assert (await office.beat(node.beat()))["challenges"] == []
        with refused("blob.missing"):  # not even the half of it is kept
            office.store.manifest(blob)

    asyncio.run(life())


async def half_opened(office, node, challenge):
    """An opening of which nothing but a manifest arrives: the blob's id."""
    opening, files = node.opening(challenge)
    await office.open_states(opening.raw)
    blob, data = next(iter(files.items()))
    await office.uploads.put_manifest(blob, len(data), Manifest.build([data]).raw)
    assert office.store.manifest(blob)
    return blob


def test_openings_survive_a_restart_and_are_idempotent(tmp_path, clock):
    state = network(tmp_path)
    office = open_office(state, clock)
    [node] = nodes_of(office, 1)

    async def before():
        id = await one_unit(office, node)
        await work_off(new_shift(office))
        [challenge] = node.challenges(await office.beat(node.beat()))
        opening, files = node.opening(challenge)
        first = await office.open_states(opening.raw)
        assert first == await office.open_states(opening.raw)
        assert first["lacking"] == sorted(files) or set(first["lacking"]) == set(files)
        for blob, data in list(files.items())[:-1]:
            await put(office, blob, data)
        return id, opening, files

    id, opening, files = asyncio.run(before())
    office.close()
    again = open_office(state, clock)

    async def after():
        await again.resume_uploads()
        state = await again.open_states(opening.raw)
        blob = list(files)[-1]
        assert (state["state"], state["lacking"]) == ("uploading", [blob])
        assert state["missing"] == {}, "its manifest is not here"
        manifest = Manifest.build([files[blob]])
        await again.uploads.put_manifest(blob, len(files[blob]), manifest.raw)
        state = await again.open_states(opening.raw)
        assert state["missing"] == {blob: list(range(len(manifest.pieces)))}
        await put(again, blob, files[blob])
        assert (await again.open_states(opening.raw))["state"] == "complete"
        assert again.desk.audits[id].opened
        await work_off(new_shift(again))
        assert again.contribution(id)["accepted"] is True
        assert not any(again.store.has(s.file.blob) for s in opening.record.states)

    asyncio.run(after())
    again.close()


async def put(office, blob, data):
    await office.uploads.put_manifest(blob, len(data), Manifest.build([data]).raw)
    await office.uploads.put_piece(blob, 0, data)


def test_false_openings_change_nothing(office):
    async def life():
        node, other = nodes_of(office, 2)
        id = await one_unit(office, node)
        await joined(office, other)
        await work_off(new_shift(office))
        [challenge] = node.challenges(await office.beat(node.beat()))
        good, _ = node.opening(challenge)
        before = made.snapshot(office.desk)
        states = good.record.states

        async def fails(code, by=node, **changed):
            with refused(code):
                await office.open_states(by.seal(good.record.model_copy(update=changed)).raw)
            assert made.snapshot(office.desk) == before

        file = states[0].file
        await fails("unit.not-yours", by=other)
        await fails("audit.unknown", challenge="0" * 64)
        await fails("audit.unknown", states=())
        await fails("unit.unknown", contribution="0" * 64)
        wrong = file.model_copy(update={"root": "0" * 64})
        await fails("audit.state", states=swapped(states, wrong))
        blob = file.blob.model_copy(update={"size": 1 << 40})
        await fails(
            "blob.too-large", states=swapped(states, file.model_copy(update={"blob": blob}))
        )
        moved = states[0].model_copy(update={"index": 99})
        await fails("audit.unknown", states=(moved, *states[1:]))
        await node.beats(office)
        assert office.desk.audits[id].opened

    asyncio.run(life())


def swapped(states, file):
    return (states[0].model_copy(update={"file": file}), *states[1:])


def test_opened_states_that_name_the_networks_own_blobs_do_not_remove_them(office):
    async def life():
        [node] = nodes_of(office, 1)
        await one_unit(office, node)
        shift = new_shift(office)
        await work_off(shift)
        [challenge] = node.challenges(await office.beat(node.beat()))
        opening, _ = node.opening(challenge)
        initial = office.genesis.record.initial.blob
        states = tuple(
            state.model_copy(update={"file": state.file.model_copy(update={"blob": initial})})
            for state in opening.record.states
        )
        raw = node.seal(opening.record.model_copy(update={"states": states})).raw
        assert (await office.open_states(raw))["state"] == "complete"
        await work_off(shift)
        assert office.store.has(initial)

    asyncio.run(life())


def test_canaries_are_compared_with_the_known_answer(tmp_path):
    office = open_office(network(tmp_path, audit={"canary": "1", "rate": "0", "floor": "0"}))

    async def life():
        [node] = nodes_of(office, 1)
        id = await one_unit(office, node)
        await work_off(new_shift(office))
        return office.contribution(id)

    facts = asyncio.run(life())
    assert (facts["accepted"], facts["code"]) == (False, "canary.mismatch")
    verdict = json.loads(office.raw(office.desk.work_of(facts["id"]).verdict))
    assert verdict
    [record] = verdicts_of(office)[1]
    assert [layer.layer for layer in record.layers] == ["L0", "L1", "L2", "L3", "L5"]
    assert len(office.desk.revocations) == 1
    office.close()


def test_another_class_of_machine_without_a_tolerance_proves_nothing(office):
    async def life():
        [node] = nodes_of(office, 1)
        await joined(office, node)
        assignment = node.assignment(await office.lease(node.request()))
        commitment, result, data = node.statements(assignment)
        result = node.seal(result.record.model_copy(update={"numerics": "b" * 64}))
        await office.commit(commitment.raw)
        state = await office.contribute(result.raw)
        await node.upload(office, result, data, state)
        await work_off(new_shift(office))
        return result.id, node.key.id

    id, node = asyncio.run(life())
    [verdict] = verdicts_of(office)[1]
    assert (verdict.contribution, verdict.accepted) == (id, True)
    assert dict(verdict.layers[4].numbers)["segments"] == "0"
    assert office.desk.nodes[node].standing == 0
