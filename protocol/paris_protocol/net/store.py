"""The blob store: a folder of content-addressed files, written whole or not at all.

A blob is a plain file whose every piece was verified before it was written; pieces arrive in any
order and survive a kill. Refused: data that are not what the reference names (`blob.corrupt`),
writes beyond the quota (`disk.quota`) or the disk (`disk.full`); nothing half-written stays.
One process writes a folder, any number may read it::

    store = BlobStore(state / "store", quota=20 << 30)
    ref = store.add_bytes(b"some bytes")
    assert store.path(ref).read_bytes() == b"some bytes"

Layout: `blobs/<id>.blob`, `manifests/<id>.json` (its time is that of the last use), `pins/<id>`,
`partial/<id>.part` with `<id>.map` (the pieces that are durable), `corrupt/<id>.blob` (set aside).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from paris_protocol.blobs import Manifest
from paris_protocol.errors import ParisError
from paris_protocol.records import BlobRef

CHUNK: Final = 1 << 20
_ID: Final = re.compile(r"[0-9a-f]{64}")
_SIZE: Final = re.compile(rb'"size":([0-9]{1,13})}$')
_LINE: Final = re.compile(rb"[0-9]{8}")
"""A line of a map; the fixed width tells a whole line from one cut off by a kill."""


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a used-up file-system quota into `disk.full`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ParisError("disk.full", str(where)) from error
        raise


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old content or the new, whatever happens when."""
    draft = path.with_name(f".{path.name}.new")
    with disk_errors(path):
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            try:
                _write_all(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _write_all(handle: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(handle, view) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows needs none and cannot open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


class BlobStore:
    """Content-addressed files below `folder`; `quota` caps the bytes of blobs and partial blobs."""

    def __init__(self, folder: Path, quota: int | None = None) -> None:
        self.folder = folder
        self.quota = quota
        self._lock = threading.RLock()
        self._manifests: dict[str, Manifest] = {}
        self._verified: dict[str, tuple[int, int, int]] = {}
        for name in ("blobs", "manifests", "partial", "pins", "corrupt"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------ reading

    def has(self, ref: BlobRef) -> bool:
        """Whether the whole blob is here; a reference that lies about its size names nothing."""
        path = self._file("blobs", ref.id)
        return path.exists() and path.stat().st_size == ref.size

    def ids(self) -> list[str]:
        """Ids of all whole blobs, sorted."""
        return sorted(path.stem for path in (self.folder / "blobs").glob("*.blob"))

    def used(self) -> int:
        """Bytes of blobs and of partial blobs, which count with the size that they will have."""
        total = 0
        for name in ("blobs", "partial", "corrupt"):
            for entry in os.scandir(self.folder / name):
                with suppress(FileNotFoundError):
                    total += entry.stat().st_size
        return total

    def manifest(self, blob_id: str) -> Manifest:
        """The manifest of a whole or partial blob; `blob.missing` when it is not known here."""
        known = self._manifests.get(blob_id)
        if known is None:
            path = self._file("manifests", blob_id)
            try:
                raw = path.read_bytes()
            except FileNotFoundError:
                raise ParisError("blob.missing", f"manifest of {blob_id[:12]}") from None
            known = self._parse(raw, blob_id)
            if len(self._manifests) >= 256:
                self._manifests.clear()
            self._manifests[blob_id] = known
        return known

    def path(self, ref: BlobRef) -> Path:
        """The file of a whole blob, hashed once per process and again whenever the file changed.

        Raises `blob.missing` when it is not here, and `blob.corrupt` after moving it aside.
        """
        path = self._file("blobs", ref.id)
        manifest = self.manifest(ref.id)
        try:
            facts = path.stat()
            seen = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if self._verified.get(ref.id) != seen:
                if Manifest.build(_chunks(path)).id != ref.id:
                    self._set_aside(ref.id)
                    raise ParisError("blob.corrupt", f"{ref.id[:12]} in {self.folder}")
                self._verified[ref.id] = seen
        except FileNotFoundError:
            raise ParisError("blob.missing", ref.id[:12]) from None
        if manifest.size != ref.size:
            raise ParisError("blob.corrupt", f"{ref.id[:12]} has {manifest.size} bytes")
        with suppress(FileNotFoundError):
            os.utime(self._file("manifests", ref.id))
        return path

    def read_piece(self, blob_id: str, i: int) -> bytes:
        """Piece `i` of a whole or partial blob, verified; `blob.missing` when it is not here."""
        manifest = self.manifest(blob_id)
        try:
            offset, length = manifest.piece_range(i)
        except IndexError:
            raise ParisError("blob.missing", f"piece {i} of {blob_id[:12]}") from None
        for path, there in (
            (self._file("blobs", blob_id), True),
            (self._file("partial", blob_id), i in self._mapped(blob_id)),
            (self._file("blobs", blob_id), True),  # it may have been completed meanwhile
        ):
            if there and path.exists():
                with suppress(FileNotFoundError), path.open("rb") as file:
                    file.seek(offset)
                    data = file.read(length)
                    manifest.check_piece(i, data)
                    return data
        raise ParisError("blob.missing", f"piece {i} of {blob_id[:12]}")

    def missing(self, ref: BlobRef) -> list[int]:
        """Numbers of the pieces that are not here; `blob.missing` when the manifest is unknown."""
        if self.has(ref):
            return []
        mapped = self._mapped(ref.id)
        return [i for i in range(len(self.manifest(ref.id).pieces)) if i not in mapped]

    # ------------------------------------------------------------ writing

    def add_bytes(self, data: bytes) -> BlobRef:
        """Store bytes as a blob."""
        manifest = Manifest.build([data])
        with self._lock:
            if self._begin(manifest):
                write_atomic(self._file("blobs", manifest.id), data)
                self._drop_partial(manifest.id)
        return manifest.ref

    def add_file(self, path: Path) -> BlobRef:
        """Store a file as a blob: by hard link where that is possible, else by copy.

        The file must not be written in place afterwards; replacing it by rename is fine.
        """
        manifest = Manifest.build(_chunks(path))
        with self._lock:
            if self._begin(manifest):
                target = self._file("blobs", manifest.id)
                draft = target.with_name(f".{target.name}.new")
                draft.unlink(missing_ok=True)
                with disk_errors(target):
                    try:
                        _link_or_copy(path, draft)
                        draft.replace(target)
                    except OSError:
                        draft.unlink(missing_ok=True)
                        raise
                    _sync_folder(target.parent)
                self._drop_partial(manifest.id)
                if target.stat().st_size != manifest.size:
                    self._set_aside(manifest.id)
                    raise ParisError("blob.corrupt", f"{path} changed while it was read")
        return manifest.ref

    def put_manifest(self, raw: bytes, ref: BlobRef) -> Manifest:
        """Keep the manifest that `ref` names, so that pieces can be taken; idempotent."""
        manifest = Manifest.parse(raw, ref)
        with self._lock:
            try:
                self.manifest(ref.id)
            except ParisError:  # unknown, or damaged on disk
                write_atomic(self._file("manifests", ref.id), raw)
            if manifest.size == 0 and not self.has(ref):
                write_atomic(self._file("blobs", ref.id), b"")
        return manifest

    def put_piece(self, ref: BlobRef, i: int, data: bytes | bytearray | memoryview) -> None:
        """Verify piece `i` and make it durable; the last piece makes the blob whole. Idempotent."""
        manifest = self.manifest(ref.id)
        try:
            manifest.check_piece(i, data)
        except IndexError:
            raise ParisError("blob.corrupt", f"there is no piece {i} of {ref.id[:12]}") from None
        with self._lock:
            if self.has(ref) or i in self._mapped(ref.id):
                return
            part = self._file("partial", ref.id)
            if not part.exists():
                self._make_room(manifest.size, ref.id)
            try:
                with disk_errors(part):
                    self._write_piece(part, manifest, i, data)
            except ParisError:
                if not self._mapped(ref.id):
                    part.unlink(missing_ok=True)
                raise
            self.complete(ref)

    def complete(self, ref: BlobRef) -> bool:
        """Make the blob whole if all its pieces are here; a kill may have come before that."""
        with self._lock:
            if self.has(ref):
                return True
            if self.missing(ref):
                return False
            with disk_errors(self.folder), suppress(FileNotFoundError):
                self._file("partial", ref.id).replace(self._file("blobs", ref.id))
                _sync_folder(self.folder / "blobs")
            self._drop_partial(ref.id)
            return self.has(ref)

    def pin(self, blob_id: str) -> None:
        """Keep a blob whatever the quota says; survives a restart."""
        with disk_errors(self.folder):
            self._file("pins", blob_id).touch()

    def unpin(self, blob_id: str) -> None:
        """Let a blob go when room is needed."""
        self._file("pins", blob_id).unlink(missing_ok=True)

    def remove(self, ref: BlobRef) -> None:
        """Forget a blob, whole or partial, and its manifest."""
        with self._lock:
            self._forget(ref.id)

    # ------------------------------------------------------------ inside

    def _file(self, kind: str, blob_id: str) -> Path:
        if _ID.fullmatch(blob_id) is None:
            raise ParisError("blob.missing", "that is not a blob's id")
        folder, suffix = {
            "blobs": ("blobs", ".blob"), "manifests": ("manifests", ".json"),
            "partial": ("partial", ".part"), "map": ("partial", ".map"),
            "pins": ("pins", ""), "corrupt": ("corrupt", ".blob"),
        }[kind]  # fmt: skip
        return self.folder / folder / f"{blob_id}{suffix}"

    @staticmethod
    def _parse(raw: bytes, blob_id: str) -> Manifest:
        """A manifest from our own disk: its digest is checked, its size is its own."""
        match = _SIZE.search(raw)
        if match is not None:
            with suppress(ParisError):
                return Manifest.parse(raw, BlobRef(id=blob_id, size=int(match[1])))
        raise ParisError("blob.missing", f"the manifest of {blob_id[:12]} is damaged")

    def _mapped(self, blob_id: str) -> frozenset[int]:
        """Pieces that the map lists."""
        try:
            lines = self._file("map", blob_id).read_bytes().split(b"\n")
        except FileNotFoundError:
            return frozenset()
        return frozenset(int(line) for line in lines if _LINE.fullmatch(line))

    @staticmethod
    def _write_piece(
        part: Path, manifest: Manifest, i: int, data: bytes | bytearray | memoryview
    ) -> None:
        """Piece first, made durable; its line in the map after it."""
        offset, _ = manifest.piece_range(i)
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(handle, manifest.size)
            os.lseek(handle, offset, os.SEEK_SET)
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        handle = os.open(part.with_suffix(".map"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _write_all(handle, b"\n%08d" % i)
        finally:
            os.close(handle)

    def _begin(self, manifest: Manifest) -> bool:
        """Room and manifest for a blob about to be added; False when it is here already."""
        if self.has(manifest.ref):
            return False
        self._make_room(manifest.size, manifest.id)
        write_atomic(self._file("manifests", manifest.id), manifest.raw)
        return True

    def _drop_partial(self, blob_id: str) -> None:
        self._file("map", blob_id).unlink(missing_ok=True)
        self._file("partial", blob_id).unlink(missing_ok=True)

    def _make_room(self, size: int, keep: str) -> None:
        """Remove what is not pinned, least recently used first, until `size` bytes fit."""
        if self.quota is None:
            return
        free = self.quota - self.used()
        if size <= free:
            return
        candidates = [
            entry
            for name in ("corrupt", "partial", "blobs")
            for entry in (self.folder / name).iterdir()
            if entry.stem != keep and not (self.folder / "pins" / entry.stem).exists()
        ]
        gain = sum(entry.stat().st_size for entry in candidates)
        if size > free + gain:  # decide before anything is removed
            raise ParisError("disk.quota", f"{size} bytes into {self.folder}")
        for entry in sorted(candidates, key=self._last_use):
            if size <= free:
                return
            with suppress(FileNotFoundError):
                free += entry.stat().st_size
                self._forget(entry.stem)
                entry.unlink(missing_ok=True)

    def _last_use(self, entry: Path) -> int:
        with suppress(FileNotFoundError):
            return (self.folder / "manifests" / f"{entry.stem}.json").stat().st_mtime_ns
        return 0

    def _forget(self, blob_id: str) -> None:
        if _ID.fullmatch(blob_id) is None:
            return
        for kind in ("blobs", "map", "partial", "manifests", "pins", "corrupt"):
            self._file(kind, blob_id).unlink(missing_ok=True)
        self._manifests.pop(blob_id, None)
        self._verified.pop(blob_id, None)

    def _set_aside(self, blob_id: str) -> None:
        with suppress(FileNotFoundError):
            self._file("blobs", blob_id).replace(self._file("corrupt", blob_id))
        self._verified.pop(blob_id, None)


def _link_or_copy(source: Path, draft: Path) -> None:
    try:
        os.link(source, draft)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, draft)
    handle = os.open(draft, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
