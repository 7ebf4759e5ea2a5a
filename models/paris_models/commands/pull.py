"""`paris pull`: fetch a release from a folder or an HTTP mirror, resumable, verified as it arrives.

First come the statements (genesis, policies, release), which say what every file must be; then
each file, into `<out>.part/`, stopped at its signed size and checked against its signed digest. The
folder gets its name when the whole has passed the checks of `paris verify`; an interrupted pull
goes on where it stopped. Plain http is accepted on loopback only::

    run_pull("https://example.org/release-7", Path("release"))
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from paris_protocol.envelope import Sealed, open_genesis, peek, unseal
from paris_protocol.errors import ParisError
from paris_protocol.invite import is_loopback
from paris_protocol.net.folder import hash_file, named_network, verify_folder
from paris_protocol.net.logs import LogMemory, memory_folder, recall
from paris_protocol.records import Release, ReleaseFile
from paris_protocol.release import GENESIS, MAX_PROOF, PROOF, RELEASE, open_policies
from paris_protocol.signers import keys_of

CHUNK: Final = 256 << 10
TIMEOUT: Final = 30.0
TRIES: Final = 3
STATEMENT: Final = 16 << 20
Progress = Callable[[int, int], None] | None


class Source(Protocol):
    """Where a release is fetched from."""

    def read(self, path: str, begin: int) -> Iterator[bytes]:
        """The bytes of a file from `begin` on; ParisError("release.missing") without it."""


class FolderSource:
    """A release folder on this machine, or on a mounted disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, path: str, begin: int) -> Iterator[bytes]:
        """As `Source.read`."""
        try:
            with (self._folder / path).open("rb") as file:
                file.seek(begin)
                while chunk := file.read(CHUNK):
                    yield chunk
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ParisError("release.missing", path) from None


def refuse_plain_http(url: str) -> None:
    """ParisError("network.plain-http") for http that leaves this machine."""
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ParisError("network.plain-http", url)


class HttpSource:
    """Any web server that holds a copy of the folder; Range is used where it is understood."""

    def __init__(self, url: str) -> None:
        refuse_plain_http(url)
        self._url = url.rstrip("/")

    def read(self, path: str, begin: int) -> Iterator[bytes]:
        """As `Source.read`; ParisError("network.down") when the server does not answer."""
        request = Request(f"{self._url}/{quote(path)}")  # noqa: S310 - https, or http on loopback
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
                refuse_plain_http(answer.geturl())  # after redirects
                skip = begin if answer.status != 206 else 0
                while chunk := answer.read(CHUNK):
                    yield chunk[skip:]
                    skip = max(0, skip - len(chunk))
        except HTTPError as error:
            if error.code == 416:
                return
            code = "release.missing" if error.code in (404, 410) else "network.down"
            raise ParisError(code, f"{path}: {error.code}") from error
        except (URLError, HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in (28, 122):
                raise
            raise ParisError("network.down", f"{path}: {error}") from error


def run_pull(
    source: str,
    out: Path,
    network: str | None = None,
    progress: Progress = None,
    *,
    older: bool = False,
) -> dict[str, Any]:
    """Fetch and verify; `out` appears whole or not at all.

    An `out` that already is this release is left as it is; any other existing `out` is refused, and
    so is a release older than one that this user has seen (`log.rollback`), unless `older`.
    """
    expected = named_network(network)
    place = _source(source)
    draft = out.absolute().with_name(f"{out.absolute().name}.part")
    with _disk():
        draft.mkdir(parents=True, exist_ok=True)
        release = _statements(place, draft, expected)
        memory = LogMemory(memory_folder())
        if not older:
            _not_older(memory, open_genesis((draft / GENESIS).read_bytes()).id, release)
        if out.exists():
            _same_release(out, release, expected)
            shutil.rmtree(draft, ignore_errors=True)
        else:
            _files(place, draft, release.record.files, progress)
            _drop_strangers(draft, release.record.files)
            found = verify_folder(draft, expected)
            seen = recall(memory, draft, found, newest=not older)
            draft.rename(out)
            with suppress(OSError, ParisError):  # such as a home that cannot be written
                memory.keep(found.network, seen)
    total = sum(entry.size for entry in release.record.files)
    return {"out": str(out), "number": release.record.number, "release": release.id, "bytes": total}


def _not_older(memory: LogMemory, network: str, release: Sealed[Release]) -> None:
    """Refuses an old release before anything large is fetched."""
    seen, number = memory.load(network), release.record.number
    if seen is not None and number < seen.release:
        raise ParisError("log.rollback", f"release {number}, release {seen.release} was seen")


def _source(text: str) -> Source:
    if text.lower().startswith(("http://", "https://")):
        return HttpSource(text)
    if not (Path(text) / RELEASE).is_file():
        raise ParisError("release.none", text)
    return FolderSource(Path(text))


def _statements(place: Source, draft: Path, expected: str | None) -> Sealed[Release]:
    """Fetch what says what the rest must be; nothing large is fetched on anybody else's word."""
    raw = {name: _small(place, name, STATEMENT) for name in (GENESIS, RELEASE)}
    try:
        genesis = open_genesis(raw[GENESIS], expected)
        claimed = unseal(raw[RELEASE], Release, genesis.id, {peek(raw[RELEASE])[2]})
    except ParisError as error:
        if error.code == "network.mismatch":
            raise
        raise ParisError("release.file", f"{GENESIS} or {RELEASE}: {error.sentence}") from error
    for entry in claimed.record.files:
        if entry.path.startswith("policy/"):
            raw[entry.path] = _small(place, entry.path, STATEMENT)
    policies = open_policies(genesis, raw)
    if claimed.signer not in keys_of(genesis, policies, policies[-1].record.number):
        raise ParisError("release.key", claimed.signer)
    raw[PROOF] = _small(place, PROOF, MAX_PROOF)
    for name, data in raw.items():
        _write(draft / name, data)
    return claimed


def _small(place: Source, path: str, limit: int) -> bytes:
    data = bytearray()
    for chunk in place.read(path, 0):
        data += chunk
        if len(data) > limit:
            raise ParisError("blob.too-large", path)
    return bytes(data)


def _files(place: Source, draft: Path, files: tuple[ReleaseFile, ...], progress: Progress) -> None:
    total, done = sum(entry.size for entry in files), 0
    for entry in files:
        target = draft / entry.path
        if not (target.is_file() and hash_file(target) == (entry.sha256, entry.size)):
            _fetch(place, target, entry)
        done += entry.size
        if progress is not None:
            progress(done, total)


def _fetch(place: Source, target: Path, entry: ReleaseFile) -> None:
    """One file: go on where the last try stopped, begin again where the bytes were wrong."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    refusal = ParisError("release.file", entry.path)
    for _attempt in range(TRIES):
        begin = partial.stat().st_size if partial.exists() else 0
        try:
            _append(place, partial, entry, begin)
        except ParisError as error:
            if error.code != "network.down":
                raise
            refusal = error
            continue
        if hash_file(partial) == (entry.sha256, entry.size):
            partial.replace(target)
            return
        refusal = ParisError("release.file", entry.path)
        partial.unlink()
    raise refusal


def _append(place: Source, partial: Path, entry: ReleaseFile, begin: int) -> None:
    """Bytes from `begin` up to the signed size, however much the source would go on sending."""
    missing = entry.size - begin
    with partial.open("ab") as file:
        for chunk in place.read(entry.path, begin) if missing > 0 else ():
            file.write(chunk[:missing])
            missing -= len(chunk)
            if missing <= 0:
                break
        file.flush()
        os.fsync(file.fileno())
    if missing > 0:
        raise ParisError("network.down", f"{entry.path}: {missing} bytes are missing")


def _drop_strangers(draft: Path, files: tuple[ReleaseFile, ...]) -> None:
    """Remove what an earlier pull of another release left in the draft."""
    listed = {entry.path for entry in files} | {RELEASE, PROOF}
    for path in [p for p in draft.rglob("*") if not p.is_dir()]:
        if path.relative_to(draft).as_posix() not in listed:
            path.unlink()


def _same_release(out: Path, release: Sealed[Release], expected: str | None) -> None:
    if not (out / RELEASE).is_file() or (out / RELEASE).read_bytes() != release.raw:
        raise ParisError("usage", f"{out} exists and is another thing; name a new folder")
    verify_folder(out, expected)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (28, 122):
            raise ParisError("disk.full", str(error)) from error
        raise
