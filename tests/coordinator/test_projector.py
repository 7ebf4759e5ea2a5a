"""The log on the disk: a function of the ledger, whatever was there and whenever it was cut."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.synthetic import digest, refused
from paris_coordinator import projector
from paris_coordinator.ledger import Logged
from paris_coordinator.projector import Projector
from paris_protocol.keys import PrivateKey
from paris_protocol.log import (
    Checkpoint,
    leaf_hash,
    merkle_root,
    origin,
    parse_bundle,
    verify_inclusion,
)
from paris_protocol.net.logs import LogPlace
from paris_protocol.tiles import TileReader
from paris_protocol.witness import cosign

NETWORK = "a" * 64
KEY = PrivateKey.from_seed(b"k" * 32)
IDS = [digest("statement", i) for i in range(600)]


@pytest.fixture(autouse=True, scope="module")
def _no_fsync():
    """Order matters here, not the platters; hundreds of files a test are slow on a busy disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def rows(ids):
    """A ledger that holds these statements, as `Ledger.logged` gives it."""
    logged = [Logged(3 * n + 1, id, b'{"id":"%s"}' % id.encode()) for n, id in enumerate(ids)]

    def after(seq, most):
        return [row for row in logged if row.seq > seq][:most]

    return after


def log_in(folder, key=KEY):
    return Projector(folder, NETWORK, key)


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_every_statement_is_proved_under_the_checkpoint(tmp_path):
    log = log_in(tmp_path)
    assert log.catch_up(rows(IDS[:300]))
    assert not log.catch_up(rows(IDS[:300]))
    evidence = log.evidence([IDS[0], IDS[255], IDS[299]])
    checkpoint = Checkpoint.open(evidence["checkpoint"], origin(NETWORK), {KEY.id})
    assert checkpoint.size == 300
    for id, index in evidence["indices"].items():
        proof = [bytes.fromhex(part) for part in evidence["proofs"][id]]
        assert verify_inclusion(leaf_hash(bytes.fromhex(id)), index, 300, proof, checkpoint.root)
    assert parse_bundle((tmp_path / "tile/entries/000").read_bytes())[0].hex() == IDS[0]
    with refused("not-found"):
        log.evidence([IDS[300]])


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 300), max_size=4), st.integers(1, 300))
def test_any_way_of_growing_leaves_the_same_log(tmp_path_factory, cuts, size):
    steps, whole = tmp_path_factory.mktemp("steps"), tmp_path_factory.mktemp("whole")
    for cut in sorted(cut for cut in cuts if cut < size):
        log_in(steps).catch_up(rows(IDS[:cut]))
    log_in(steps).catch_up(rows(IDS[:size]))
    log_in(whole).catch_up(rows(IDS[:size]))
    left, right = files(steps), files(whole)
    # Partial tiles of smaller trees stay until the whole ones are there; all else is the same.
    assert {n: left[n] for n in right} == right
    assert all(".p/" in name for name in left.keys() - right.keys())


def test_a_kill_between_any_two_files_is_made_good(tmp_path, monkeypatch):
    real, left = projector.write_atomic, [0]

    class Killed(Exception):
        pass

    def cut(path, data, *rest):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(path, data, *rest)

    log_in(tmp_path).catch_up(rows(IDS[:255]))
    monkeypatch.setattr(projector, "write_atomic", cut)
    for survivors in range(20):
        left[0] = survivors
        try:
            log_in(tmp_path).catch_up(rows(IDS[:260]))
            break
        except Killed:
            note = (tmp_path / "checkpoint").read_text()
            assert Checkpoint.open(note, origin(NETWORK), {KEY.id}).size == 255
    else:
        raise AssertionError("it never finished")
    left[0] = 99
    again = log_in(tmp_path)
    again.catch_up(rows(IDS[:260]))
    assert again.size == 260


def test_the_same_object_goes_on_after_a_failed_write(tmp_path, monkeypatch):
    log, real = log_in(tmp_path), projector.write_atomic
    log.catch_up(rows(IDS[:3]))

    def fails(path, data, *rest):
        if path.name == "checkpoint":
            raise OSError(28, "full")
        real(path, data, *rest)

    monkeypatch.setattr(projector, "write_atomic", fails)
    with pytest.raises(OSError):
        log.catch_up(rows(IDS[:5]))
    monkeypatch.setattr(projector, "write_atomic", real)
    assert log.head()[0] == 3
    assert log.evidence([IDS[2]])["indices"] == {IDS[2]: 2}
    assert log.catch_up(rows(IDS[:6]))
    assert log.head()[0] == 6


def test_what_a_power_cut_took_from_the_statements_is_written_again(tmp_path):
    log_in(tmp_path).catch_up(rows(IDS[:300]))
    before = files(tmp_path)
    folder = tmp_path / "statements"
    (folder / f"{IDS[7]}.json").write_bytes(b"")
    (folder / f"{IDS[8]}.json").write_bytes(b'{"id":"')
    (folder / f"{IDS[299]}.json").unlink()
    again = log_in(tmp_path)
    assert not again.catch_up(rows(IDS[:300]))
    assert files(tmp_path) == before


def test_partial_tiles_go_once_the_whole_one_is_there(tmp_path):
    log = log_in(tmp_path)
    for size in (100, 200, 256, 300):
        log.catch_up(rows(IDS[:size]))
    assert sorted(p.name for p in (tmp_path / "tile/0").iterdir()) == ["000", "001.p"]
    assert sorted(p.name for p in (tmp_path / "tile/entries").iterdir()) == ["000", "001.p"]
    note = log.checkpoint
    reader = TileReader(Checkpoint.open(note, origin(NETWORK), {KEY.id}), LogPlace(tmp_path).read)
    assert list(reader.entries()) == IDS[:300]
    assert reader.consistency(200) == log._tree.consistency(200)


def test_roots_of_earlier_sizes(tmp_path):
    log = log_in(tmp_path)
    log.catch_up(rows(IDS[:9]))
    assert log.root(4) == merkle_root([leaf_hash(bytes.fromhex(id)) for id in IDS[:4]]).hex()
    with pytest.raises(IndexError):
        log.root(10)


def test_a_rotated_key_goes_on_with_the_log(tmp_path):
    log_in(tmp_path).catch_up(rows(IDS[:5]))
    other = PrivateKey.from_seed(b"x" * 32)
    again = Projector(tmp_path, NETWORK, other, {KEY.id})
    again.catch_up(rows(IDS[:6]))
    note = (tmp_path / "checkpoint").read_text()
    assert Checkpoint.open(note, origin(NETWORK), {other.id}).size == 6


def test_cosignatures_below_the_checkpoint_are_not_taken_for_our_own(tmp_path):
    log = log_in(tmp_path)
    log.catch_up(rows(IDS[:5]))
    path, own = tmp_path / "checkpoint", log.checkpoint
    path.write_text(own + cosign(own, "witness.example", PrivateKey.from_seed(b"w" * 32), 1))
    again = log_in(tmp_path)
    again.catch_up(rows(IDS[:5]))
    assert again.checkpoint == own


def test_history_is_never_rewritten(tmp_path):
    log_in(tmp_path).catch_up(rows(IDS[:5]))
    before = files(tmp_path)
    for other in (IDS[:4], [*IDS[:4], IDS[9]], IDS[1:6]):
        with refused("state.corrupt"):
            log_in(tmp_path).catch_up(rows(other))
    with refused("state.corrupt"):
        log_in(tmp_path, PrivateKey.from_seed(b"x" * 32)).catch_up(rows(IDS[:5]))
    assert files(tmp_path) == before
