"""Full disks: at every write of what makes a folder, and for real on a tiny file system."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bad_input.saying import FullDisk, Said, every_moment, refused, tree
from bad_input.test_releases import FILES, written
from bad_input.test_states import TRACES
from coordinator.fakes import found
from node.test_app import living, make_kit, until
from nodeworld import Office, make_policy
from paris_coordinator.cli import main as coordinator
from paris_models.checkpoint import save_tensors
from paris_models.commands.cli import main as paris
from paris_models.commands.pull import run_pull
from paris_models.video import write_mp4
from paris_node import app
from paris_node.config import Settings
from paris_node.enrol import Found, enrol
from paris_protocol.errors import ParisError
from paris_protocol.invite import make_invite

Say = Callable[..., Said]


def test_joining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    office = Office()
    policy = make_policy(office.network).record
    place = Found(make_invite("127.0.0.1", 1, office.network), office.genesis, policy)

    def play(at: int) -> None:
        enrol(tmp_path / str(at), place, Settings(network=""))

    moments = every_moment(monkeypatch, play)
    assert moments >= 9
    whole = tree(tmp_path / str(moments + 1))
    assert set(whole) == {"key", "node.toml", "genesis.json"}
    for at in range(1, moments + 1):
        half = tree(tmp_path / str(at))
        assert set(half) <= set(whole), "something half-written was left"
        enrol(tmp_path / str(at), place, Settings(network=""))
        again = tree(tmp_path / str(at))
        assert {k: v for k, v in again.items() if k != "key"} == {
            k: v for k, v in whole.items() if k != "key"
        }
        assert half.get("key", again["key"]) == again["key"]


def test_founding_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a sample of moments: no network, no draft, and it can be founded there afterwards."""
    for at in (1, 5, 9, 16, 28, 45, 70, 100):
        folder = tmp_path / str(at)
        with monkeypatch.context() as inner:
            try:
                (folder / "prepared").mkdir(parents=True)
                disk = FullDisk(inner, at + 40)  # the first calls make the prepared folder
                found(folder, experts=1, shards=1)
            except ParisError as error:
                assert error.code == "disk.full"
            except OSError:
                assert not (folder / "state").exists(), "it was the test's own folder"
                continue
            else:
                assert disk.calls < disk.at
                continue
        left = tree(folder / "state")
        assert "settings.json" not in left
        assert not [n for n in left if n.rsplit("/", 1)[-1].startswith(".") or n.endswith(".new")]
        assert found(folder, experts=1, shards=1).settings().network


def test_founding_when_the_held_out_clips_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as inner:
        inner.setattr("os.sendfile", full)
        with pytest.raises(ParisError) as caught:
            found(tmp_path, experts=1, shards=1)
    assert caught.value.code == "disk.full"
    assert list((tmp_path / "state" / "private").iterdir()) == []


def test_ordering(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = found(tmp_path, experts=1, shards=1)
    before = tree(state.folder)
    for at in (1, 2, 3):
        with monkeypatch.context() as inner:
            FullDisk(inner, at)
            refused(say(coordinator, "release", "--state", state.folder), "disk.full")
        assert tree(state.folder) == before
    assert say(coordinator, "release", "--state", state.folder).exit == 0
    assert len(list(state.orders.iterdir())) == 1


def test_pulling_a_release(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder appears whole or not at all; what arrived is kept beside it and used again."""
    release, out = written(tmp_path / "release", FILES), tmp_path / "pulled"
    for at in (1, 2, 3, 5, 8, 13, 21, 34):
        with monkeypatch.context() as inner:
            disk = FullDisk(inner, at)
            try:
                run_pull(str(release), out)
            except ParisError as error:
                assert error.code == "disk.full" and not out.exists()
            else:
                assert disk.calls < at
                break
    with monkeypatch.context() as inner:
        FullDisk(inner, 1)
        refused(say(paris, "pull", release, "-o", tmp_path / "other"), "disk.full")
    run_pull(str(release), out)
    assert tree(out) == tree(release)
    assert not (tmp_path / "pulled.part").exists() and not (tmp_path / "other").exists()


def test_files_of_tensors_and_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"an earlier one")
    before = tree(tmp_path)
    clip = torch.zeros(3, 2, 16, 16, dtype=torch.uint8)
    writes: tuple[Callable[[], None], ...] = (
        lambda: write_mp4(tmp_path / "clip.mp4", clip, 8),
        lambda: save_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors"),
    )
    for write in writes:
        with monkeypatch.context() as inner:
            FullDisk(inner, 1)
            with pytest.raises(OSError, match="No space left"):
                write()
        assert tree(tmp_path) == before


@pytest.mark.parametrize("moment", [1, 2, 4, 7])
def test_a_node_at_work_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Wherever it happens the reason is `disk.full`, nothing is lost, and it goes on by itself."""
    monkeypatch.setattr(app, "DISK_RETRY", 0.05)
    office = Office(units=2)

    async def play() -> None:
        kit = make_kit(tmp_path / "a", office)
        async with living(kit) as agent:
            with monkeypatch.context() as inner:
                FullDisk(inner, moment)
                await until(lambda: agent.volunteer.why == "disk.full", "the refusal")
            await until(lambda: len(office.accepted) == 2, "both units")
        assert len(office.contributions) == 2

    asyncio.run(play())
    left = tree(tmp_path / "a", TRACES)
    assert not [n for n in left if n.endswith((".new", ".part", ".map"))]


def test_a_node_whose_journal_cannot_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "DISK_RETRY", 0.02)
    office, asked = Office(units=1), []

    async def play() -> None:
        kit = make_kit(tmp_path / "a", office)
        real = kit.journal.record

        def record(*words: Any) -> None:
            asked.append(words)
            if 2 <= len(asked) <= 4:
                raise ParisError("disk.full", "journal")
            real(*words)

        monkeypatch.setattr(kit.journal, "record", record)
        async with living(kit):
            await until(lambda: len(office.accepted) == 1, "the unit")

    asyncio.run(play())
    assert len({words[0] for words in asked[1:5]}) == 1, "it went on before it was written down"


# ---------------------------------------------------------------- a real file system

REAL = """
import errno, os, sys
from pathlib import Path
from bad_input.saying import tree
from paris_coordinator.ledger import Entry, Ledger
from paris_node.journal import Journal
from paris_node.volunteer import Phase, Snapshot
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore, write_atomic

root = Path(sys.argv[1])
store = BlobStore(root / "store")
kept = store.add_bytes(b"kept" * 100)
net = "ab" * 32
journal = Journal.open(root / "journal", net)
journal.record(Snapshot(Phase.TRAINING, "unit"), "before", 1.0)
journal.close()
ledger = Ledger(root / "ledger")
ledger.append([Entry(1, "sampled", None, "{}")])
ledger.close()
(root / "text").write_text("old")

def refused(call):
    try:
        call()
    except ParisError as error:
        assert error.code == "disk.full", error
        print("refused")
    else:
        raise AssertionError("it was written")

fill = open(root / "fill", "wb", 0)
try:
    while True:
        fill.write(bytes(512))
except OSError as error:
    assert error.errno == errno.ENOSPC

opened = []
refused(lambda: opened.append(Journal.open(root / "journal", net)) or
        opened[0].keep_unit("v", bytes(50_000), 1.0))
refused(lambda: opened.append(Ledger(root / "ledger")) or
        opened[-1].append([Entry(2, "sampled", None, "x" * 50_000)]))
refused(lambda: store.add_bytes(bytes(50_000)))
refused(lambda: write_atomic(root / "text", bytes(50_000)))
for each in opened:
    each.close()
names = {path.name for path in root.rglob("*")}
assert not [name for name in names if "damaged" in name or name.endswith(".new")], names
fill.close()
(root / "fill").unlink()
journal = Journal.open(root / "journal", net)
assert journal.renewed is None and journal.memory() == Snapshot(Phase.TRAINING, "unit")
assert journal.unit("v") is None
journal.keep_unit("v", bytes(50_000), 1.0)
ledger = Ledger(root / "ledger")
assert [entry.at for entry in ledger.entries()] == [1]
assert store.path(kept).read_bytes() == b"kept" * 100 and store.ids() == [kept.id]
assert (root / "text").read_text() == "old"
"""


def test_a_file_system_that_is_full_for_real(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    mount = ["-Urm", "sh", "-c", 'mount -t tmpfs -o size=512k none "$0" && exec "$@"', tmp_path]
    if unshare is None or subprocess.run([unshare, *mount, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system in a namespace of his own")
    command = [unshare, *mount, sys.executable, "-c", REAL, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert (done.returncode, done.stdout.count("refused")) == (0, 4), done.stderr
