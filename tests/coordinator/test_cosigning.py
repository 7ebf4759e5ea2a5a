"""Witnesses of a real coordinator over loopback: they cosign, and a release waits for them."""

import asyncio

import pytest

from coordinator.fakes import FakeNode, found, new_shift, open_office, run_out
from coordinator.synthetic import refused
from coordinator.test_api import serving
from paris_coordinator.cosigning import Cosignatures
from paris_coordinator.policies import publish
from paris_models.commands.witness import run_witness
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, save_key
from paris_protocol.log import Checkpoint, origin
from paris_protocol.net.folder import verify_folder
from paris_protocol.net.logs import LogMemory, LogPlace, follow
from paris_protocol.witness import check_quorum, cosign, cosignatures

WITNESSES = [PrivateKey.from_seed(bytes([40 + i]) * 32) for i in range(3)]


@pytest.fixture
def state(tmp_path):
    """A network whose releases need two of three witnesses."""
    state = found(tmp_path, experts=2, plan={"rounds": 2})
    keys = [each.id for each in WITNESSES]
    publish(state, None, {"witnesses": keys, "witness_quorum": 2}, 1500)
    return state


def watcher(tmp_path, number, log, **more):
    """One look of a witness, as its command makes it."""
    key = tmp_path / f"witness{number}.key"
    if not key.exists():
        save_key(key, WITNESSES[number])
    told = []
    memory = tmp_path / f"memory{number}"
    return run_witness(log, key, memory, once=True, tell=told.append, **more)


def test_a_witness_by_the_coordinators_address(tmp_path, state):
    async def life():
        async with serving(state) as (office, url):
            invite = f"paris://{url.removeprefix('http://')}/{office.network}"
            look = lambda number: asyncio.to_thread(watcher, tmp_path, number, invite)  # noqa: E731
            assert office.cosigned.witnessed(office.policy().record) is None
            facts = await look(0)
            assert (facts["size"], facts["witness"]) == (office.log.size, WITNESSES[0].id)
            assert office.cosigned.witnessed(office.policy().record) is None, "one of two"
            await look(1)
            size, note = office.cosigned.witnessed(office.policy().record)
            assert size == office.log.size
            served = LogPlace(f"{url}/log")
            for name in ("checkpoint", "witnessed"):
                text = (await asyncio.to_thread(served.read, name, 1 << 16)).decode()
                assert set(cosignatures(text, [w.id for w in WITNESSES])) == {
                    WITNESSES[0].id, WITNESSES[1].id
                }  # fmt: skip
                assert Checkpoint.open(text, origin(office.network), {office.key.id}).size == size
            # A witness may look again; the time of its cosignature moves, nothing else.
            await look(1)
            assert office.cosigned.witnessed(office.policy().record)[0] == size
            # The log grows: the cosigned checkpoint stays until there is a newer one.
            await office.register(FakeNode(office.network, 7).registration())
            await office.project()
            assert office.log.size == size + 1
            assert office.cosigned.witnessed(office.policy().record)[0] == size
            return note

    note = asyncio.run(life())
    again = open_office(state)
    asyncio.run(again.project())
    assert again.cosigned.witnessed(again.policy().record)[1] == note, "it survives a restart"
    again.close()


def test_a_witness_of_a_folder_writes_the_cosigned_checkpoint(tmp_path, state):
    office = open_office(state)
    asyncio.run(office.project())
    out = tmp_path / "cosigned"
    facts = watcher(tmp_path, 2, str(state.log), out=out)
    assert facts["network"] == office.network
    assert list(check_quorum(out.read_text(), [WITNESSES[2].id], 1)) == [WITNESSES[2].id]
    assert asyncio.run(office.cosign(out.read_bytes())) == {"size": office.log.size, "witnesses": 1}
    with refused("network.mismatch"):
        watcher(tmp_path, 2, str(state.log), network="ab" * 32)
    with refused("usage"):
        watcher(tmp_path, 2, str(state.log), name=origin(office.network))
    office.close()


def test_a_witness_does_not_sign_another_past(tmp_path, state):
    office = open_office(state)
    asyncio.run(office.project())
    out = tmp_path / "cosigned"
    watcher(tmp_path, 0, str(state.log), out=out)
    note = out.read_bytes()
    smaller = Checkpoint(origin(office.network), 2, bytes.fromhex(office.log.root(2)))
    (state.log / "checkpoint").write_text(smaller.sign(office.key))
    with refused("log.rollback"):
        watcher(tmp_path, 0, str(state.log), out=out)
    assert out.read_bytes() == note
    evidence = list((tmp_path / "memory0").glob("*.evidence/*"))
    assert len(evidence) == 2
    office.close()


def test_foreign_and_wrong_cosignatures_are_refused_and_change_nothing(state):
    office = open_office(state)
    asyncio.run(office.project())
    note, name = office.log.checkpoint, origin(office.network)

    def offer(text):
        asyncio.run(office.cosign(text if isinstance(text, bytes) else text.encode()))

    stranger = PrivateKey.from_seed(b"s" * 32)
    line = cosign(note, "w", WITNESSES[0], 1)
    bent = line[:-14] + ("A" if line[-14] != "A" else "B") + line[-13:]
    other = Checkpoint(name, office.log.size, bytes(32)).sign(office.key)
    longer = Checkpoint(name, office.log.size + 1, bytes(32)).sign(office.key)
    for text, code in (
        (note, "log.witness"),
        (note + cosign(note, "w", stranger, 1), "log.witness"),
        (note + bent, "log.witness"),
        (note + line + line, "log.witness"),
        (note + line[:-1], "log.checkpoint"),
        (other + cosign(other, "w", WITNESSES[0], 1), "log.split"),
        (longer + cosign(longer, "w", WITNESSES[0], 1), "log.checkpoint"),
        (Checkpoint(name, 0, bytes(32)).sign(office.key) + line, "log.checkpoint"),
        (b"", "log.checkpoint"),
        (b"\xff" * 80, "log.checkpoint"),
    ):
        with refused(code):
            offer(text)
    assert not (state.log / "witnessed").exists()
    assert (state.log / "checkpoint").read_text() == note
    offer(note + line)
    assert (state.log / "checkpoint").read_text() == note + line
    office.close()


def test_a_release_waits_for_its_witnesses(tmp_path, state):
    async def life():
        office = open_office(state)
        await office.project()
        shift = new_shift(office)
        nodes = [FakeNode(office.network, s + 1) for s in range(3)]
        with pytest.raises(AssertionError, match=r"log\.witness"):
            await run_out(office, shift, nodes)
        assert not (state.releases / "1").exists()
        await office.project()
        for number in range(2):
            await office.cosign(cosigned(office, number))
        release = next(iter(office.desk.releases))
        proof = await office.proof(release, [])
        assert check_quorum(proof["checkpoint"], [w.id for w in WITNESSES], 2)
        await new_shift(office).step()
        office.close()

    asyncio.run(life())
    assert verify_folder(state.releases / "1").checkpoint.size > 0


def cosigned(office, number):
    note = office.log.checkpoint
    return (note + cosign(note, "w.example", WITNESSES[number], 1_000)).encode()


def test_only_the_newest_unfinished_checkpoints_are_kept(state):
    office = open_office(state)
    asyncio.run(office.project())
    shelf = Cosignatures(office.log)
    policy = office.policy().record
    for size in range(1, office.log.size + 1):
        root = bytes.fromhex(office.log.root(size))
        note = Checkpoint(origin(office.network), size, root).sign(office.key)
        shelf.add((note + cosign(note, "w", WITNESSES[0], 1)).encode(), policy)
    assert shelf.witnessed(policy) is None
    office.close()


def test_what_a_coordinator_serves_can_be_followed(tmp_path, state):
    async def life():
        async with serving(state) as (office, url):
            place, memory = LogPlace(f"{url}/log"), LogMemory(tmp_path / "memory")
            for _ in range(2):
                found = await asyncio.to_thread(follow, place, office.network, memory, office.now())
                assert found.checkpoint.size == office.log.size
                await office.register(FakeNode(office.network, 9).registration())
                await office.project()
            with pytest.raises(ParisError) as caught:
                await asyncio.to_thread(follow, place, office.network, memory, office.now() + 10**6)
            assert caught.value.code == "log.stale"

    asyncio.run(life())
