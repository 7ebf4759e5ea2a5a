"""The next policy: by whose hand, a rotated coordinator key, and kills in the middle of it."""

import asyncio
from contextlib import suppress

import pytest

from coordinator import fakes
from coordinator.fakes import FakeNode, found, new_shift, open_office, run_out, work_off
from coordinator.synthetic import refused
from coordinator.test_audits import network, one_unit
from paris_coordinator import policies
from paris_coordinator.policies import changes, publish
from paris_protocol.audit import in_chain
from paris_protocol.keys import PrivateKey, load_key, save_key
from paris_protocol.log import Checkpoint, origin
from paris_protocol.net.folder import verify_folder
from paris_protocol.net.logs import LogMemory, LogPlace, follow

NOW = 2000


def founded(tmp_path, **plan):
    """A network with its root key away from the coordinator: (state, root key)."""
    root = tmp_path / "root.key"
    real = fakes.Setup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "Setup", lambda **given: real(**given, root_key=root))
        state = found(tmp_path, experts=2, plan={"rounds": 2} | plan)
    return state, load_key(root)


def log_of(state):
    return (state.log / "checkpoint").read_text()


async def lived(state):
    """Runs the network to its release."""
    office = open_office(state)
    try:
        await office.project()
        await run_out(
            office, new_shift(office), [FakeNode(office.network, s + 1) for s in range(3)]
        )
        await office.project()
    finally:
        office.close()


def test_fields_are_named_with_dots():
    assert changes(["plan.steps=20", "min_version=0.2.0", "witnesses=[]", 'plan.floor="0.1"']) == {
        "plan": {"steps": 20, "floor": "0.1"},
        "min_version": "0.2.0",
        "witnesses": [],
    }
    for bad in ("steps", "=3", ".a=1", "a..b=1"):
        with refused("usage"):
            changes([bad])
    with refused("usage"):
        changes(["a=1", "a.b=2"])


def test_the_root_key_may_be_away(tmp_path):
    state, root = founded(tmp_path)
    genesis, key = state.genesis(), state.key()
    assert genesis.signer == genesis.record.root_key == root.id != key.id
    assert not any(root.seed.hex().encode() in p.read_bytes() for p in state.folder.rglob("*.json"))
    (tmp_path / "root.key").unlink()
    asyncio.run(lived(state))
    verified = verify_folder(state.releases / "1", genesis.id)
    assert verified.release.signer == key.id
    assert verified.policies[0].record.coordinator_keys == (key.id,)


def test_policies_follow_each_other_and_are_logged(tmp_path):
    state, root = founded(tmp_path)
    first = publish(state, root, changes(["soft_deadline=77"]), NOW)
    second = publish(state, None, changes(["soft_deadline=78"]), NOW + 1)
    assert (second.record.number, second.record.previous) == (3, first.id)
    assert (first.signer, second.signer) == (root.id, state.key().id)
    office = open_office(state)
    assert office.desk.policy.soft_deadline == 78
    assert office.policy(2).record.since == NOW
    assert office.log.size == 0
    asyncio.run(office.project())
    assert [office.log.index_of(each.id) for each in (first, second)] == [2, 3]
    office.close()


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        ({"number": 9}, "recipe.invalid"),
        ({"previous": None}, "recipe.invalid"),
        ({"nonsense": 1}, "recipe.invalid"),
        ({"plan": {"units": -1}}, "recipe.invalid"),
        ({"coordinator_keys": []}, "recipe.invalid"),
        ({"coordinator_keys": ["ed25519:01" + "00" * 31]}, "key.weak"),
        ({"witness_quorum": 1}, "recipe.invalid"),
        ({"coordinator_keys": [PrivateKey.from_seed(b"x" * 32).id]}, "recipe.invalid"),
    ],
)
def test_what_cannot_be_a_policy_changes_nothing(tmp_path, wanted, code):
    state, root = founded(tmp_path)
    before = {p: p.read_bytes() for p in state.folder.rglob("*") if p.is_file()}
    with refused(code):
        publish(state, root, wanted, NOW)
    same = {p: p.read_bytes() for p in before if p.suffix not in (".sqlite", "")}
    assert same.items() <= before.items()
    assert open_office(state).desk.policy.number == 1


def test_only_the_root_key_names_keys(tmp_path):
    state, root = founded(tmp_path)
    witness = PrivateKey.from_seed(b"w" * 32)
    wanted = {"witnesses": [witness.id], "witness_quorum": 1}
    for signer in (None, witness):
        with refused("record.signer"):
            publish(state, signer, wanted, NOW)
    with refused("record.signer"):
        publish(state, None, {}, NOW, rotate_to=tmp_path / "new.key")
    assert publish(state, root, wanted, NOW).record.witnesses == (witness.id,)


def test_a_running_coordinator_is_left_alone(tmp_path):
    state, root = founded(tmp_path)
    with state.lock(), refused("state.in-use"):
        publish(state, root, {}, NOW)


def test_a_rotated_key_signs_from_then_on_and_the_old_one_no_more(tmp_path):
    state, root = founded(tmp_path)
    network, old, secret = state.settings().network, state.key(), open_office(state).secret("x")
    memory = LogMemory(tmp_path / "memory")
    office = open_office(state)
    asyncio.run(office.project())
    office.close()
    follow(LogPlace(state.log), network, memory, office.now())
    policy = publish(state, root, {}, NOW, rotate_to=tmp_path / "new.key")
    new = load_key(tmp_path / "new.key")
    assert policy.record.coordinator_keys == (new.id,)
    assert state.key() == new
    assert old.id not in "".join(policy.record.bootstraps)
    assert Checkpoint.open(log_of(state), origin(network), {new.id}).size == 3
    with refused("log.checkpoint"):
        Checkpoint.open(log_of(state), origin(network), {old.id})
    asyncio.run(lived(state))
    office = open_office(state)
    assert office.secret("x") == secret, "held-out clips and chains stay as they are"
    office.close()
    verified = verify_folder(state.releases / "1", network)
    assert verified.release.signer == new.id
    assert follow(LogPlace(state.log), network, memory, office.now()).policies[-1].id == policy.id
    # Whoever has the old key now signs nobody's word.
    state.key_file.unlink()
    save_key(state.key_file, old)
    with refused("key.file"):
        open_office(state)


@pytest.mark.parametrize("step", range(8))
def test_a_kill_during_a_rotation_leaves_the_old_key_or_the_new(tmp_path, monkeypatch, step):
    state, root = founded(tmp_path)
    network, old = state.settings().network, state.key()
    left = [step]

    class Killed(Exception):
        pass

    def counted(name, real):
        def act(*given, **more):
            if left[0] == 0:
                raise Killed(name)
            left[0] -= 1
            return real(*given, **more)

        return act

    with monkeypatch.context() as patch:
        for name in ("save_key", "write_atomic", "operator_key"):
            patch.setattr(policies, name, counted(name, getattr(policies, name)))
        patch.setattr(policies.Ledger, "append", counted("append", policies.Ledger.append))
        patch.setattr(policies.Projector, "catch_up", counted("log", policies.Projector.catch_up))
        with suppress(Killed):
            publish(state, root, {}, NOW, rotate_to=tmp_path / "new.key")
    office = open_office(state)
    asyncio.run(office.project())
    number = office.desk.policy.number
    assert office.key.id in office.desk.policy.coordinator_keys
    assert (office.key == old) == (number == 1)
    Checkpoint.open(log_of(state), origin(network), {office.key.id})
    office.close()
    if number == 1:  # it can simply be given again
        publish(state, root, {}, NOW, rotate_to=tmp_path / "new.key")
    assert state.key() == load_key(tmp_path / "new.key")


def test_a_chain_that_is_used_up_gives_way_to_another(tmp_path):
    state = network(tmp_path, audit={"chain_length": 1})
    office = open_office(state)

    async def unit(office, node):
        id = await one_unit(office, node)
        await work_off(new_shift(office))
        return office.desk.audits[id].draw

    first = asyncio.run(unit(office, FakeNode(office.network, 1)))
    with refused("work.none"):
        asyncio.run(one_unit(office, FakeNode(office.network, 2)))
    office.close()
    for wrong in ("0", "true", "99999999999", '"many"'):
        with refused("recipe.invalid"):
            publish(state, None, changes([f"audit.chain_length={wrong}"]), NOW)
    with refused("recipe.invalid"):
        publish(state, None, changes([f"audit.chain={'0' * 64}"]), NOW)
    publish(state, None, changes(["audit.chain_length=8"]), NOW)
    office = open_office(state)
    second = asyncio.run(unit(office, FakeNode(office.network, 2)))
    assert (first.number, second.number) == (0, 0)
    rules = office.desk.policy.audit
    assert in_chain(rules.chain, rules.chain_length, 0, second.secret)
    assert first.secret != second.secret
    office.close()
