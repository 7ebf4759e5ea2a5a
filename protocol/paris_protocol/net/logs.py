"""Following a network's log from a folder or a web address, and remembering what was seen.

`follow` is the one thing a client does before it believes a log: signed index, policies back to the
root key, checkpoint, tiles, freshness, and consistency with the last look. Whatever is refused
leaves the memory as it was, and both checkpoints as evidence beside it::

    found = follow(LogPlace("https://train.example.org/log"), network, LogMemory(folder), now)
    found.reader.inclusion(index)

A log prefix holds `checkpoint`, `index.json`, `tile/…` and `statements/<id>.json`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from paris_protocol.authority import open_chain
from paris_protocol.canonical import parse
from paris_protocol.envelope import Sealed, open_genesis, statement_id, unseal
from paris_protocol.errors import ParisError
from paris_protocol.invite import is_loopback
from paris_protocol.log import MAX_NOTE, TILE, Checkpoint, origin
from paris_protocol.memory import STALE, Seen, check_time, continued, read_seen, released
from paris_protocol.net.store import disk_errors, write_atomic
from paris_protocol.records import Genesis, Index, Policy, Release
from paris_protocol.release import PROOF, Verified
from paris_protocol.tiles import TileReader

TIMEOUT: Final = 30.0
INDEX: Final = "index.json"
CHECKPOINT: Final = "checkpoint"
_STATEMENT: Final = 16 << 20
_MOST_POLICIES: Final = 10_000
_NAME: Final = re.compile(r"[a-z0-9.]+(/[a-z0-9.]+)*", re.ASCII)


class LogPlace:
    """Where a log's files are: a folder, or the address of one (https, http on loopback)."""

    def __init__(self, where: str | Path) -> None:
        self.where = str(where).rstrip("/")
        self._web = self.where.lower().startswith(("http://", "https://"))
        if self._web:
            _refuse_plain_http(self.where)

    def read(self, name: str, limit: int = TILE * 34) -> bytes:
        """A file of the log; ParisError: `not-found`, `network.down`, `record.too-large`."""
        if _NAME.fullmatch(name) is None or ".." in name:
            raise ParisError("not-found", name[:200])
        data = self._fetch(name, limit + 1) if self._web else self._open(name, limit + 1)
        if len(data) > limit:
            raise ParisError("record.too-large", f"{self.where}/{name}: more than {limit} bytes")
        return data

    def statement(self, id: str) -> bytes:
        """The envelope of this id, whoever serves it."""
        raw = self.read(f"statements/{id}.json", _STATEMENT)
        if statement_id(raw) != id:
            raise ParisError("log.proof", f"statements/{id}.json is another statement")
        return raw

    def _open(self, name: str, most: int) -> bytes:
        try:
            with (Path(self.where) / name).open("rb") as file:
                return file.read(most)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ParisError("not-found", f"{self.where}/{name}") from None

    def _fetch(self, name: str, most: int) -> bytes:
        request = Request(f"{self.where}/{name}")  # noqa: S310 - https, or http on loopback
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
                _refuse_plain_http(answer.geturl())  # after redirects
                data: bytes = answer.read(most)
                return data
        except HTTPError as error:
            code = "not-found" if error.code in (404, 410) else "network.down"
            raise ParisError(code, f"{self.where}/{name}: {error.code}") from error
        except (URLError, HTTPException, OSError) as error:
            raise ParisError("network.down", f"{self.where}/{name}: {error}") from error


def _refuse_plain_http(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ParisError("network.plain-http", url)


class LogMemory:
    """The last believed checkpoint of each network, one small file each, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, network: str) -> Seen | None:
        """What was seen last, or None; `state.corrupt` for a damaged file."""
        try:
            return read_seen(self._file(network).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ParisError as error:
            raise ParisError(error.code, f"{self._file(network)}: {error.detail}") from error

    def keep(self, network: str, seen: Seen) -> None:
        """Remember `seen`, whole or not at all."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file(network), seen.raw)

    def evidence(self, network: str, *notes: str) -> list[Path]:
        """Keep signed checkpoints that contradict each other, to be shown to others."""
        paths = []
        for note in notes:
            lines = [*note.split("\n", 3), "", ""]
            name = re.sub(r"[^0-9A-Za-z]", "", f"{lines[1][:16]}-{lines[2][:16]}")
            path = self.folder / f"{network}.evidence" / f"checkpoint-{name}"
            with disk_errors(self.folder):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, note.encode())
            paths.append(path)
        return paths

    @contextmanager
    def witnessing(self, network: str, seen: Seen | None, note: str) -> Iterator[None]:
        """Keeps both checkpoints when the block finds that they contradict each other."""
        try:
            yield
        except ParisError as error:
            if seen is not None and error.code in ("log.rollback", "log.split"):
                with suppress(ParisError, OSError):
                    self.evidence(network, seen.note, note)
            raise

    def _file(self, network: str) -> Path:
        return self.folder / f"{network}.json"


def memory_folder() -> Path:
    """Where a user's programs remember logs: below $XDG_STATE_HOME, or ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME", "")
    home = Path(base) if base else Path("~").expanduser() / ".local" / "state"
    return home / "paris" / "logs"


def recall(memory: LogMemory, folder: Path, found: Verified, *, newest: bool = True) -> Seen:
    """What is known of the log of a verified release in `folder`, this one included.

    Compares it with what was seen before (`log.split`, `log.rollback`: `memory.released`); keeps
    nothing but evidence. The caller keeps the answer.
    """
    note = str(parse((folder / PROOF).read_bytes())["checkpoint"])
    before = memory.load(found.network)
    with memory.witnessing(found.network, before, note):
        number = found.release.record.number
        return released(before, note, found.checkpoint, number, newest=newest)


@dataclass(frozen=True, slots=True)
class Followed:
    """A log that was found sound: what it rests on, its tree, and how it was seen before."""

    genesis: Sealed[Genesis]
    policies: tuple[Sealed[Policy], ...]
    index: Sealed[Index]
    note: str
    checkpoint: Checkpoint
    reader: TileReader
    before: Seen | None


def follow(
    place: LogPlace,
    network: str,
    memory: LogMemory | None,
    now: int,
    *,
    stale: int = STALE,
) -> Followed:
    """Look at a log and believe it or refuse it: the `log.*` codes of trust §1.5, `record.*`.

    `now` in unix seconds; `stale` is the greatest age of the coordinator's signed word. With
    `memory` None nothing is compared or kept.
    """
    raw, note = _shown(place, network)
    if memory is None:
        found = _judged(place, network, raw, note)
        check_time(found.index.record.at, now, stale)
        continued(None, found.note, found.reader)
        return found
    before = memory.load(network)
    with memory.witnessing(network, before, note):
        found = _judged(place, network, raw, note)
        check_time(found.index.record.at, now, stale)
        seen = continued(
            before,
            found.note,
            found.reader,
            policy=found.policies[-1].record.number,
            release=_release_number(place, found),
        )
    memory.keep(network, seen)
    return Followed(
        found.genesis,
        found.policies,
        found.index,
        found.note,
        found.checkpoint,
        found.reader,
        before,
    )


def read_log(place: LogPlace, network: str) -> Followed:
    """What a log shows at this moment, every signature checked; neither age nor memory is asked."""
    return _judged(place, network, *_shown(place, network))


def _shown(place: LogPlace, network: str) -> tuple[bytes, str]:
    """Index and checkpoint, in this order: the checkpoint is then not the older of the two."""
    raw = place.read(INDEX, 2 * Index.MAX_BYTES)
    note = place.read(CHECKPOINT, MAX_NOTE).decode("utf-8", "replace")
    first = note.partition("\n")[0]
    if first != origin(network) and first.startswith(origin("")):
        raise ParisError("network.mismatch", f"{place.where} is the log of {first[-64:]}")
    return raw, note


def _judged(place: LogPlace, network: str, raw: bytes, note: str) -> Followed:
    genesis = open_genesis(place.statement(network), network)
    policies = _policies(place, genesis, unseal(raw, Index, network, None).record.policy)
    keys = policies[-1].record.coordinator_keys
    index = unseal(raw, Index, network, keys)
    checkpoint = Checkpoint.open(note, origin(network), keys)
    reader = TileReader(checkpoint, place.read)
    stated = index.record
    if stated.log_size > reader.size:
        detail = f"{reader.size} statements, the signed index names {stated.log_size}"
        raise ParisError("log.rollback", detail)
    if reader.root(stated.log_size).hex() != stated.log_root:
        raise ParisError("log.split", "the signed index names another root")
    return Followed(genesis, policies, index, note, checkpoint, reader, None)


def _policies(place: LogPlace, genesis: Sealed[Genesis], newest: str) -> tuple[Sealed[Policy], ...]:
    """The chain that ends with the policy that the index names."""
    raws: list[bytes] = []
    wanted: str | None = newest
    while wanted is not None and len(raws) < _MOST_POLICIES:
        raws.append(place.statement(wanted))
        wanted = unseal(raws[-1], Policy, genesis.id, None).record.previous
    return open_chain(genesis, reversed(raws))


def _release_number(place: LogPlace, found: Followed) -> int:
    current = found.index.record.release
    if current is None:
        return 0
    keys = {found.genesis.record.root_key}.union(
        *(policy.record.coordinator_keys for policy in found.policies)
    )
    return unseal(place.statement(current), Release, found.genesis.id, keys).record.number
