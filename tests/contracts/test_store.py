"""The blob store: its contract, kills in mid-write, and full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contracts.store_contract import StoreContract, blob, pieces
from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore, write_atomic

WRITER = """
import os, sys
from pathlib import Path
from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.net import store as module
folder, source, moment, at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
data, store = source.read_bytes(), module.BlobStore(folder)
manifest = Manifest.build([data])
store.put_manifest(manifest.raw, manifest.ref)
calls, real = 0, getattr(os, moment)
def dying(*args):
    global calls
    calls += 1
    if calls == at:
        if moment == "write":
            real(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])
        os.kill(os.getpid(), 9)
    return real(*args)
setattr(os, moment, dying)
for i in store.missing(manifest.ref):
    offset, length = manifest.piece_range(i)
    store.put_piece(manifest.ref, i, data[offset : offset + length])
"""


class TestBlobStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> BlobStore:
        return BlobStore(tmp_path / "store")


class Reopened:
    """A store that is opened anew for every call: nothing of its state lives in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quota: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(BlobStore(self.folder, self.quota), name)


class TestReopenedStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Reopened:
        return Reopened(tmp_path / "store")


@pytest.mark.parametrize(
    ("moment", "at"), [("write", 1), ("write", 2), ("write", 4), ("fsync", 1), ("fsync", 2)]
)
def test_kill_9_in_mid_write_costs_at_most_that_piece(tmp_path: Path, moment: str, at: int) -> None:
    data = blob(2 * PIECE + 99)
    source, folder = tmp_path / "data", tmp_path / "store"
    source.write_bytes(data)
    root = str(Path(__file__).parents[2] / "protocol")
    command = [sys.executable, "-c", WRITER, str(folder), str(source), moment, str(at)]
    killed = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": root})
    assert killed.returncode == -signal.SIGKILL
    store = BlobStore(folder)
    manifest = Manifest.build([data])
    assert store.ids() == [] and not store.has(manifest.ref)
    missing = store.missing(manifest.ref)
    done = {("write", 1): 0, ("write", 2): 0, ("write", 4): 1, ("fsync", 1): 0, ("fsync", 2): 1}
    assert len(missing) == 3 - done[moment, at]
    for i in missing:
        store.put_piece(manifest.ref, i, pieces(manifest, data)[i])
    assert store.path(manifest.ref).read_bytes() == data
    assert store.used() == len(data)


def test_kill_between_last_piece_and_rename(tmp_path: Path, monkeypatch: Any) -> None:
    data = blob(10)
    manifest = Manifest.build([data])
    store = BlobStore(tmp_path)
    store.put_manifest(manifest.raw, manifest.ref)
    monkeypatch.setattr(BlobStore, "complete", lambda *_: False)
    store.put_piece(manifest.ref, 0, data)
    monkeypatch.undo()
    again = BlobStore(tmp_path)
    assert not again.has(manifest.ref) and again.missing(manifest.ref) == []
    assert again.complete(manifest.ref)
    assert again.path(manifest.ref).read_bytes() == data


def test_a_map_line_cut_off_is_no_piece(tmp_path: Path) -> None:
    data = blob(2 * PIECE + 5)
    manifest = Manifest.build([data])
    store = BlobStore(tmp_path)
    store.put_manifest(manifest.raw, manifest.ref)
    store.put_piece(manifest.ref, 2, pieces(manifest, data)[2])
    with next((tmp_path / "partial").glob("*.map")).open("ab") as file:
        file.write(b"\n000000")
    assert store.missing(manifest.ref) == [0, 1]
    store.put_piece(manifest.ref, 1, pieces(manifest, data)[1])
    assert store.missing(manifest.ref) == [0]


def full(number: int = errno.ENOSPC) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(number, "no space")

    return fail


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: Any, call: str, number: int
) -> None:
    store = BlobStore(tmp_path / "store")
    manifest = Manifest.build([b"abc"])
    store.put_manifest(manifest.raw, manifest.ref)
    (tmp_path / "file").write_bytes(b"from a file")
    before = files(store.folder)
    writes: list[Callable[[], Any]] = [
        lambda: store.add_bytes(b"other"),
        lambda: store.put_piece(manifest.ref, 0, b"abc"),
        lambda: store.put_manifest(Manifest.build([b"x"]).raw, Manifest.build([b"x"]).ref),
        lambda: store.add_file(tmp_path / "file"),
        lambda: write_atomic(tmp_path / "store" / "some", b"text"),
    ]
    for write in writes:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full(number))
            with pytest.raises(ParisError) as caught:
                write()
        assert caught.value.code == "disk.full"
        assert files(store.folder) == before
    store.put_piece(manifest.ref, 0, b"abc")
    assert store.path(manifest.ref).read_bytes() == b"abc"


def test_a_copy_is_made_where_no_link_is_possible(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_bytes(b"from afar")
    monkeypatch.setattr(os, "link", full(errno.EXDEV))
    store = BlobStore(tmp_path / "store")
    ref = store.add_file(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"changed now")
    assert store.path(ref).read_bytes() == b"from afar"


def test_a_reader_sees_old_or_new(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full())
        with pytest.raises(ParisError):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and files(tmp_path) == {"file"}
    write_atomic(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_manifest_is_fetched_again(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    ref = store.add_bytes(b"abc")
    raw = store.manifest(ref.id).raw
    next((tmp_path / "manifests").iterdir()).write_bytes(b"{}")
    again = BlobStore(tmp_path)
    with pytest.raises(ParisError) as caught:
        again.path(ref)
    assert caught.value.code == "blob.missing"
    again.put_manifest(raw, ref)
    assert again.path(ref).read_bytes() == b"abc"
