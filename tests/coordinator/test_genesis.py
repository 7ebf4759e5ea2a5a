"""`init`: all of a network or nothing of it."""

import json

import pytest

from coordinator.fakes import found, prepared_folder
from coordinator.synthetic import refused
from paris_coordinator import genesis as founding
from paris_coordinator.config import State
from paris_coordinator.genesis import Setup, file_root, init
from paris_coordinator.ledger import Ledger
from paris_protocol.envelope import unseal
from paris_protocol.invite import parse_network
from paris_protocol.net.store import BlobStore
from paris_protocol.records import Policy
from paris_protocol.tensors import tensor_root


@pytest.fixture(autouse=True)
def without_models(monkeypatch):
    monkeypatch.setattr(founding, "expert_schema", lambda expert: None)


def test_the_invite_pins_the_network(tmp_path):
    invite = init(prepared_folder(tmp_path / "p"), tmp_path / "s", Setup(address="x.example"), 5)
    state = State(tmp_path / "s")
    sealed = state.genesis()
    assert parse_network(str(invite)) == invite
    assert invite.network == sealed.id
    assert sealed.record.root_key == state.key().id == sealed.signer
    assert (state.key_file.stat().st_mode & 0o777, invite.port) == (0o600, 8420)
    policy = unseal(
        (state.policy / "1.json").read_bytes(), Policy, sealed.id, {sealed.signer}
    ).record
    assert policy.addresses == ("https://x.example:8420",)
    assert policy.bootstraps[0].startswith("/dns/x.example/tcp/8421/p2p/12D3KooW")
    assert [entry.statement.type for entry in Ledger(state.ledger_file).entries()] == [
        "genesis",
        "policy",
    ]
    assert (state.log / "checkpoint").exists()


def test_public_files_are_in_the_store_and_private_ones_are_not(tmp_path):
    state = found(tmp_path)
    genesis, store = state.genesis().record, BlobStore(state.store)
    public = [genesis.initial, genesis.codec.file]
    public += [shard.file for cluster in genesis.clusters for shard in cluster.shards]
    for file in public:
        assert file_root(store.path(file.blob)) == file.root
    assert len(store.ids()) == len(public)
    served = {path.read_bytes() for path in (state.store / "blobs").iterdir()}
    for kind in ("validation", "audit"):
        for cluster in genesis.clusters:
            path = state.private_shard(kind, cluster.index)
            assert path.read_bytes() not in served
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.stat().st_nlink == 1


def test_policy_fields_of_the_operator_win(tmp_path):
    state = found(tmp_path, plan={"rounds": 7}, commit_every=9)
    raw = (state.policy / "1.json").read_bytes()
    policy = unseal(raw, Policy, state.settings().network, None).record
    assert (policy.plan.rounds, policy.plan.units, policy.commit_every) == (7, 2, 9)


def test_a_wrong_field_is_named(tmp_path):
    setup = Setup(overrides={"plan": {"rounds": "many"}})
    with refused("recipe.invalid"):
        init(prepared_folder(tmp_path / "p"), tmp_path / "s", setup, 5)
    assert not State(tmp_path / "s").exists


def test_a_folder_holds_one_network(tmp_path):
    state = found(tmp_path)
    before = state.genesis_file.read_bytes()
    with refused("state.other-network"):
        init(tmp_path / "prepared", state.folder, Setup(), 6)
    assert state.genesis_file.read_bytes() == before


def test_a_broken_init_can_be_repeated(tmp_path):
    folder = prepared_folder(tmp_path / "p")
    shard = folder / "shards/cluster1/shard2.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with refused("tensor.header"):
        init(folder, tmp_path / "s", Setup(), 5)
    state = State(tmp_path / "s")
    with refused("state.missing"):
        state.settings()
    shard.write_bytes(whole)
    assert init(folder, state.folder, Setup(), 6).network == state.genesis().id


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_a_damaged_description_is_refused(tmp_path, text):
    folder = prepared_folder(tmp_path / "p")
    (folder / "prepared.json").write_text(text)
    with refused("recipe.invalid"):
        init(folder, tmp_path / "s", Setup(), 5)


def test_files_outside_the_prepared_folder_are_refused(tmp_path):
    folder = prepared_folder(tmp_path / "p")
    (tmp_path / "secret").write_bytes(b"x")
    described = json.loads((folder / "prepared.json").read_text())
    described["initial"]["path"] = "../secret"
    (folder / "prepared.json").write_text(json.dumps(described))
    with refused("recipe.invalid"):
        init(folder, tmp_path / "s", Setup(), 5)


def test_one_process_owns_the_folder(tmp_path):
    state = found(tmp_path)
    with state.lock(), refused("state.in-use"), State(state.folder).lock():
        pass
    with state.lock():
        pass


def test_settings_that_are_newer_or_damaged_are_refused(tmp_path):
    state = found(tmp_path)
    value = json.loads(state.settings_file.read_text())
    state.settings_file.write_text(json.dumps(value | {"version": 2, "more": 1}))
    with refused("state.newer"):
        state.settings()
    state.settings_file.write_text("{")
    with refused("state.corrupt"):
        state.settings()


def test_a_file_root_is_the_root_over_its_tensors(tmp_path):
    from coordinator.synthetic import safetensors

    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"b": ((2, 2), 1.0), "a": ((1,), 2.0)}))
    data = path.read_bytes()[-20:]
    assert file_root(path) == tensor_root(
        [("a", "F32", (1,), data[:4]), ("b", "F32", (2, 2), data[4:])]
    )
