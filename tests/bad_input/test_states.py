"""State folders of another network, of a newer version, in use, damaged; and ports in use."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bad_input.saying import Said, refused, tree
from bad_input.servers import serving
from bad_input.test_networks import invite
from contracts.server import refusals, routes
from coordinator.fakes import found, prepared_folder
from nodeworld import Office, make_genesis
from paris_coordinator.cli import main as coordinator
from paris_coordinator.config import State
from paris_node.cli import main as node
from paris_node.config import Settings
from paris_node.control import FolderLock
from paris_node.journal import SCHEMA, Journal
from paris_protocol.keys import PrivateKey, save_key
from paris_protocol.net.process import NetworkProcess
from paris_protocol.net.store import BlobStore
from paris_protocol.records import BlobRef

Say = Callable[..., Said]


@pytest.fixture
def office() -> Office:
    return Office()


@pytest.fixture
def enrolled(tmp_path: Path, office: Office) -> Path:
    """A node's folder as `join` and a first run leave it."""
    folder = tmp_path / "node"
    folder.mkdir()
    save_key(folder / "key", PrivateKey.generate())
    Settings(network=invite("http://127.0.0.1:1", office.network)).save(folder)
    (folder / "genesis.json").write_bytes(office.genesis.raw)
    Journal.open(folder / "journal.sqlite", office.network).close()
    return folder


# What only a process that looks may leave behind.
TRACES = ("agent.lock", "lock", "logs", "logs/node.log", "store", "journal.sqlite-shm")
TRACES += ("journal.sqlite-wal", *(f"store/{n}" for n in ("blobs", "manifests", "partial")))
TRACES += ("store/pins", "store/corrupt")


def newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={SCHEMA + 1}")
    connection.close()


# ---------------------------------------------------------------- nodes


def test_joining_with_the_folder_of_another_network(
    say: Say, enrolled: Path, office: Office
) -> None:
    other = make_genesis({n: BlobRef(id="1" * 64, size=1) for n in
                          ("initial", "shard00", "shard01", "shard10", "shard11")})  # fmt: skip
    (enrolled / "genesis.json").write_bytes(other.raw)
    before = tree(enrolled)
    with serving(*routes(office.control), middleware=refusals) as url:
        words = ("join", invite(url, office.network), "--yes", "--state", enrolled)
        refused(say(node, *words), "state.other-network")
    assert tree(enrolled) == before


def test_a_journal_of_another_network(say: Say, enrolled: Path) -> None:
    (enrolled / "journal.sqlite").unlink()
    Journal.open(enrolled / "journal.sqlite", "cd" * 32).close()
    before = tree(enrolled)
    refused(say(node, "run", "--no-swarm", "--state", enrolled), "state.other-network")
    assert tree(enrolled, TRACES) == before


@pytest.mark.parametrize("verb", [("run", "--no-swarm"), ("status",), ("why",), ("receipts",)])
def test_a_journal_of_a_newer_version(say: Say, enrolled: Path, verb: tuple[str, ...]) -> None:
    newer(enrolled / "journal.sqlite")
    before = tree(enrolled)
    refused(say(node, *verb, "--state", enrolled), "state.newer")
    assert tree(enrolled, TRACES) == before


def test_a_folder_that_another_process_uses(say: Say, enrolled: Path, office: Office) -> None:
    with FolderLock(enrolled), serving(*routes(office.control), middleware=refusals) as url:
        before = tree(enrolled)
        refused(say(node, "run", "--state", enrolled), "state.in-use")
        words = ("join", invite(url, office.network), "--yes", "--name", "x", "--state", enrolled)
        refused(say(node, *words), "state.in-use")
        assert tree(enrolled) == before


@pytest.mark.parametrize("verb", ["run", "status", "why", "receipts", "logs", "pause"])
def test_a_folder_without_state(say: Say, tmp_path: Path, verb: str) -> None:
    code = "agent.not-running" if verb == "pause" else "state.missing"
    refused(say(node, verb, "--state", tmp_path / "none"), code)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("file", "data", "code"),
    [
        ("genesis.json", b"{", "state.corrupt"),
        ("genesis.json", b'{"payload":"","payloadType":"","signatures":[]}', "state.corrupt"),
        ("node.toml", b"network = ", "state.corrupt"),
        ("node.toml", b'network = "x"\nunknown = 1\n', "state.corrupt"),
        ("node.toml", b'network = "somewhere"\n', "network.invite"),
        ("key", b"short", "key.file"),
    ],
)
def test_a_damaged_file_of_the_folder(
    say: Say, enrolled: Path, file: str, data: bytes, code: str
) -> None:
    (enrolled / file).write_bytes(data)
    before = tree(enrolled)
    refused(say(node, "run", "--no-swarm", "--state", enrolled), code)
    assert tree(enrolled, TRACES) == before


def test_joining_again_over_a_damaged_genesis(say: Say, enrolled: Path, office: Office) -> None:
    (enrolled / "genesis.json").write_bytes(office.genesis.raw[:-9])
    before = tree(enrolled)
    with serving(*routes(office.control), middleware=refusals) as url:
        words = ("join", invite(url, office.network), "--yes", "--state", enrolled)
        refused(say(node, *words), "state.corrupt")
    assert tree(enrolled) == before


# ---------------------------------------------------------------- coordinators


@pytest.fixture
def state(tmp_path: Path) -> State:
    return found(tmp_path)


SERVE = ("serve", "--no-swarm", "--state")
READ = (("status", "--state"), ("log", "--state"))
SEEN = ("lock", "ledger.sqlite-shm", "ledger.sqlite-wal", "logs/worker.log")


def test_a_coordinators_folder_of_another_network(say: Say, state: State) -> None:
    state.save(state.settings().model_copy(update={"network": "0" * 64}))
    before = tree(state.folder)
    for words in (SERVE, READ[0]):
        refused(say(coordinator, *words, state.folder), "network.mismatch")
    assert tree(state.folder, SEEN) == {k: v for k, v in before.items() if k not in SEEN}


def test_a_second_network_in_one_folder(say: Say, state: State, tmp_path: Path) -> None:
    before = tree(state.folder)
    said = say(coordinator, "init", tmp_path / "prepared", "--state", state.folder)
    refused(said, "state.other-network")
    assert tree(state.folder) == before


@pytest.mark.parametrize("part", ["settings", "ledger"])
def test_a_coordinators_folder_of_a_newer_version(say: Say, state: State, part: str) -> None:
    if part == "settings":
        text = state.settings_file.read_text().replace('"version":1', '"version":2')
        state.settings_file.write_text(text.replace('"version": 1', '"version": 2'))
    else:
        connection = sqlite3.connect(state.ledger_file)
        connection.execute("UPDATE alembic_version SET version_num='9999'")
        connection.commit()
        connection.close()
    before = tree(state.folder, SEEN)
    for words in (SERVE, *READ):
        refused(say(coordinator, *words, state.folder), "state.newer")
    assert tree(state.folder, SEEN) == before


def test_a_coordinators_folder_in_use(say: Say, state: State) -> None:
    with state.lock():
        before = tree(state.folder)
        refused(say(coordinator, *SERVE, state.folder), "state.in-use")
        assert tree(state.folder) == before
        assert say(coordinator, "status", "--state", state.folder).exit == 0


def test_a_folder_without_a_network(say: Say, tmp_path: Path) -> None:
    for words in (SERVE, *READ, ("release", "--state"), ("inspect", "ab", "--state")):
        refused(say(coordinator, *words, tmp_path / "none"), "state.missing")
    assert tree(tmp_path) == {}


def test_a_prepared_folder_that_is_none(say: Say, tmp_path: Path) -> None:
    said = say(coordinator, "init", tmp_path / "none", "--state", tmp_path / "state")
    refused(said, "recipe.invalid")
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------- ports


def test_a_port_in_use(say: Say, state: State) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        before = tree(state.folder, SEEN)
        said = say(coordinator, *SERVE, state.folder, "--port", port)
        refused(said, "port.in-use")
        assert str(port) in said.err
        assert tree(state.folder, SEEN) == before


@pytest.mark.parametrize("words", [("--port", "0"), ("--port", "70000"), ("--port", "http")])
def test_what_is_no_port(say: Say, tmp_path: Path, words: tuple[str, str]) -> None:
    prepared: Any = prepared_folder(tmp_path / "prepared")
    said = say(coordinator, "init", prepared, "--state", tmp_path / "state", *words)
    assert (said.exit, (tmp_path / "state").exists()) == (2, False)
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_the_peers_port_in_use(tmp_path: Path) -> None:
    """The network process says why it has no peers; whoever uses it goes on without them."""

    async def play() -> None:
        with socket.socket() as busy:
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            swarm = NetworkProcess(
                BlobStore(tmp_path / "store"), PrivateKey.generate(), "ab" * 32,
                host_maddrs=[f"/ip4/127.0.0.1/tcp/{busy.getsockname()[1]}"],
            )  # fmt: skip
            await swarm.start()
            try:
                for _ in range(600):
                    status = (await swarm.status()).as_json()
                    if "address already in use" in status["detail"]:
                        break
                    await asyncio.sleep(0.1)
                else:
                    raise AssertionError(status)
                assert not status["alive"]
                assert await swarm.providers("1" * 64) == []
            finally:
                await swarm.close()

    asyncio.run(play())
