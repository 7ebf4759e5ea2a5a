"""Following a log: rollback, split view, freeze, mix-up and clocks, with the evidence kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paris_models.commands.pull import run_pull
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.log import Checkpoint, Tree, leaf_hash, origin
from paris_protocol.memory import AHEAD, STALE, Seen, check_time, continued, read_seen
from paris_protocol.net.folder import verify_folder
from paris_protocol.net.logs import LogMemory, LogPlace, follow, recall
from protocol.world import (
    COORDINATOR,
    NODES,
    OTHER,
    ROOT,
    World,
    log_files,
    policy_record,
    put_files,
)

NOW = 1_700_001_060


@pytest.fixture(scope="module")
def world() -> World:
    """A network with a release, and some work after it."""
    world = World().lived()
    world.release()
    world.merge(1)
    return world


class Client:
    """Somebody who looks at a log now and then."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.memory = LogMemory(folder / "memory")

    def look(self, files: dict[str, bytes], now: int = NOW) -> Any:
        place = LogPlace(put_files(self.folder / "log", files))
        return follow(place, self.world.network, self.memory, now)

    def refused(self, files: dict[str, bytes], now: int = NOW) -> str:
        before = self.memory.load(self.world.network)
        with pytest.raises(ParisError) as caught:
            self.look(files, now)
        assert self.memory.load(self.world.network) == before, "a refusal changes nothing"
        return caught.value.code

    def evidence(self) -> list[str]:
        folder = self.memory.folder / f"{self.world.network}.evidence"
        return sorted(path.read_text() for path in folder.glob("*"))


@pytest.fixture
def client(tmp_path: Path, world: World) -> Client:
    return Client(tmp_path, world)


def size(world: World) -> int:
    return len(world.log)


def test_a_log_that_grows_is_followed(client: Client, world: World) -> None:
    first = client.look(log_files(world, 10))
    assert (first.before, first.checkpoint.size) == (None, 10)
    again = client.look(log_files(world))
    assert again.before.size == 10
    assert client.look(log_files(world)).before.size == size(world)
    assert again.policies == tuple(world.policies)
    assert client.evidence() == []


def test_a_shorter_log_is_a_rollback(client: Client, world: World) -> None:
    whole = log_files(world)
    client.look(whole)
    shorter = log_files(world, size(world) - 1)
    assert client.refused(shorter) == "log.rollback"
    assert client.evidence() == sorted(
        [whole["checkpoint"].decode(), shorter["checkpoint"].decode()]
    )


def test_a_rewritten_log_is_a_split_view(client: Client, world: World) -> None:
    client.look(log_files(world, 12))
    other = World()
    other.genesis, other.policies, other.log = world.genesis, world.policies, list(world.log)
    other.log[5], other.log[6] = other.log[6], other.log[5]
    for length in (12, size(world)):
        assert client.refused(log_files(other, length)) == "log.split"
    assert len(client.evidence()) == 3
    # From another size on, the two tell one story again.
    assert client.look(log_files(world)).checkpoint.size == size(world)


def test_a_frozen_log_is_stale_and_one_from_the_future_is_refused(
    client: Client, world: World
) -> None:
    files = log_files(world)
    at = 1_700_001_000
    assert client.look(files, at + STALE)
    assert client.refused(files, at + STALE + 1) == "log.stale"
    assert client.look(files, at - AHEAD)
    assert client.refused(files, at - AHEAD - 1) == "log.future"
    # A clock that is a day off, either way, is named as one of the two.
    assert client.refused(files, at - 86_400) == "log.future"
    assert client.refused(files, at + 86_400 + 1) == "log.stale"


def test_old_releases_cannot_be_shown_as_the_newest(client: Client, world: World) -> None:
    client.look(log_files(world))
    assert client.refused(log_files(world, release=None)) == "log.rollback"


def test_the_index_belongs_to_the_log(client: Client, world: World) -> None:
    fresh, old = log_files(world), log_files(world, 10)
    # A fresh index beside an old checkpoint, the other way round, and one of another root.
    assert client.refused({**old, "index.json": fresh["index.json"]}) == "log.rollback"
    assert client.look({**fresh, "index.json": log_files(world, 12)["index.json"]})
    assert client.refused(log_files(world, log_root="00" * 32)) == "log.split"
    assert client.refused({**fresh, "index.json": fresh["index.json"][:-1]}) == "record.malformed"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("index.json", "not-found"),
        ("checkpoint", "not-found"),
        ("tile/0/000.p/{size}", "log.proof"),
        ("statements/{genesis}.json", "not-found"),
    ],
)
def test_missing_files_are_named(client: Client, world: World, name: str, code: str) -> None:
    files = log_files(world)
    del files[name.format(size=size(world), genesis=world.network)]
    assert client.refused(files) == code


def test_truncated_and_foreign_files_are_refused(client: Client, world: World) -> None:
    files = log_files(world)
    tile = f"tile/0/000.p/{size(world)}"
    for data in (files[tile][:-32], files[tile][:-1], bytes(len(files[tile]))):
        assert client.refused({**files, tile: data}) == "log.proof"
    for data in (b"", b"\xff\xfe", files["checkpoint"][:-5], files["checkpoint"] * 2):
        assert client.refused({**files, "checkpoint": data}) == "log.checkpoint"
    assert client.refused({**files, "checkpoint": b"x" * 200_000}) == "record.too-large"
    policy = f"statements/{world.policies[-1].id}.json"
    assert client.refused({**files, policy: world.policies[0].raw}) == "log.proof"


def test_foreign_keys_are_refused(client: Client, world: World) -> None:
    assert client.refused(log_files(world, signer=NODES[0])) == "record.signer"
    index = log_files(world)["index.json"]
    # OTHER's key was rotated away: what it signs now is nobody's word.
    assert (
        client.refused({**log_files(world, signer=OTHER), "index.json": index}) == "log.checkpoint"
    )
    assert client.refused(log_files(world, signer=OTHER)) == "record.signer"


def test_an_old_policy_cannot_be_shown_again(tmp_path: Path) -> None:
    world = World().lived()
    client = Client(tmp_path, world)
    client.look(log_files(world))
    thief = World()
    thief.genesis, thief.policies, thief.log = world.genesis, world.policies[:1], list(world.log)
    # The key of policy 1 was stolen after it was rotated away; its log is even longer.
    thief.put(policy_record(9, None, ()), ROOT)
    assert client.refused(log_files(thief, signer=OTHER)) == "log.rollback"


def test_a_log_of_size_zero_is_refused(client: Client, world: World) -> None:
    empty = log_files(world, 0)
    files = {
        **log_files(world),
        "checkpoint": empty["checkpoint"],
        "index.json": empty["index.json"],
    }
    assert client.refused(files) == "log.checkpoint"


def test_a_damaged_memory_is_named_and_not_overwritten(client: Client, world: World) -> None:
    client.look(log_files(world))
    path = client.memory.folder / f"{world.network}.json"
    for data in (b"", b"{}", b"[]", path.read_bytes()[:-9], b'{"note":1,"policy":0,"release":0}'):
        path.write_bytes(data)
        with pytest.raises(ParisError) as caught:
            client.look(log_files(world))
        assert (caught.value.code, path.read_bytes()) == ("state.corrupt", data)


def test_what_is_remembered_comes_back() -> None:
    tree = Tree([leaf_hash(b"a"), leaf_hash(b"b")])
    note = Checkpoint(origin("ab" * 32), 2, tree.root()).sign(COORDINATOR)
    seen = continued(None, note, tree, policy=3, release=4)
    assert read_seen(seen.raw) == seen == Seen(note, 2, tree.root(), 3, 4)
    with pytest.raises(ParisError, match="size 0"):
        continued(None, note, Tree())


def test_time_limits() -> None:
    check_time(1000, 1000 + 50, 50)
    for at, now, code in ((1000, 1051, "log.stale"), (1000 + AHEAD + 1, 1000, "log.future")):
        with pytest.raises(ParisError) as caught:
            check_time(at, now, 50)
        assert caught.value.code == code


def test_places_are_folders_https_or_loopback(tmp_path: Path, world: World) -> None:
    with pytest.raises(ParisError) as caught:
        LogPlace("http://log.example/log")
    assert caught.value.code == "network.plain-http"
    put_files(tmp_path / "log", log_files(world))
    (tmp_path / "secret").write_text("x")
    place = LogPlace(tmp_path / "log")
    for name in ("../secret", "/etc/passwd", "tile/../../secret", "", "statements"):
        with pytest.raises(ParisError) as caught:
            place.read(name)
        assert caught.value.code == "not-found"
    with pytest.raises(ParisError) as caught:
        LogPlace("http://127.0.0.1:9/log").read("checkpoint")
    assert caught.value.code == "network.down"


def test_a_statement_under_anothers_name_is_refused(tmp_path: Path, world: World) -> None:
    files = log_files(world)
    beat = seal(policy_record(7, None, ()), NODES[0], world.network)
    files[f"statements/{world.network}.json"] = beat.raw
    with pytest.raises(ParisError) as caught:
        LogPlace(put_files(tmp_path, files)).statement(world.network)
    assert caught.value.code == "log.proof"


def release_in(folder: Path, world: World, number: int) -> Path:
    return put_files(folder, world.release(number=number))


def test_a_release_is_compared_with_what_was_seen(tmp_path: Path) -> None:
    world = World().lived()
    first, second = (release_in(tmp_path / str(n), world, n) for n in (1, 2))
    memory = LogMemory(tmp_path / "memory")

    def seen(folder: Path, *, newest: bool = True) -> Seen:
        return recall(memory, folder, verify_folder(folder), newest=newest)

    memory.keep(world.network, seen(second))
    assert seen(second) == memory.load(world.network)
    with pytest.raises(ParisError) as caught:
        seen(first)
    assert caught.value.code == "log.rollback"
    assert seen(first, newest=False).release == 2
    # The same number of statements, but not the same ones.
    other = World().lived()
    other.release(number=1, router_root="00" * 32)
    split = release_in(tmp_path / "split", other, 2)
    with pytest.raises(ParisError) as caught:
        seen(split)
    assert caught.value.code == "log.split"
    assert len(list(memory.folder.glob("*.evidence/*"))) == 3
    # The log that is followed later has to continue the release that was pulled.
    place = LogPlace(put_files(tmp_path / "log", log_files(world)))
    assert follow(place, world.network, memory, NOW).before.size == len(world.log)
    place = LogPlace(put_files(tmp_path / "log", log_files(other)))
    with pytest.raises(ParisError) as caught:
        follow(place, world.network, memory, NOW)
    assert caught.value.code == "log.split"


def test_an_old_release_is_not_pulled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    world = World().lived()
    first, second = (release_in(tmp_path / str(n), world, n) for n in (1, 2))
    run_pull(str(first), tmp_path / "a")
    run_pull(str(second), tmp_path / "b")
    with pytest.raises(ParisError) as caught:
        run_pull(str(first), tmp_path / "c")
    assert caught.value.code == "log.rollback"
    assert not (tmp_path / "c").exists()
    assert run_pull(str(first), tmp_path / "c", older=True)["number"] == 1
    # A home that cannot be written keeps nobody from pulling.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "1" / "release.json"))
    assert run_pull(str(first), tmp_path / "d")["number"] == 1
