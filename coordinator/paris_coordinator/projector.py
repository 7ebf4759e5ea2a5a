"""From the ledger to the transparency log: tiles, entries, statements and a signed checkpoint.

The log is a projection of the ledger's logged statements in ledger order. `Projector.catch_up` is
idempotent: it goes on from whatever is on the disk, writes data before the checkpoint that promises
them, and every file whole or not at all. It never rewrites history: a checkpoint that the ledger
does not reproduce is refused (`state.corrupt`)::

    log = Projector(folder, network, key)
    log.catch_up(ledger.logged)
    log.evidence([statement_id])      # checkpoint, indices, proofs
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

from paris_coordinator.ledger import Logged
from paris_protocol.envelope import Sealed
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.log import TILE, Checkpoint, Tree, bundles, leaf_hash, origin
from paris_protocol.net.store import disk_errors, write_atomic
from paris_protocol.records import Index

INDEX_EVERY: Final = 600
"""Seconds after which the signed index is written anew, so that mirrors can tell a frozen log."""
BATCH: Final = 1024
"""Statements under one checkpoint, at most: so many are in memory at once."""
After = Callable[[int, int], Sequence[Logged]]
"""The logged statements behind a ledger event, in order: `Ledger.logged`."""


class Projector:
    """The log below `folder`, as far as it has been written.

    `former` are keys that signed earlier checkpoints, before the coordinator's key was rotated.
    """

    def __init__(
        self, folder: Path, network: str, key: PrivateKey, former: Collection[str] = ()
    ) -> None:
        self.folder, self._key = folder, key
        self.keys = frozenset({key.id, *former})
        self._origin = origin(network)
        self._tree = Tree()
        self._ids: list[str] = []
        self._index: dict[str, int] = {}
        self._seq = 0
        self._started = False
        self._shown = 0
        self.checkpoint = ""

    @property
    def size(self) -> int:
        """Statements that the current checkpoint promises."""
        return len(self._ids)

    @property
    def origin(self) -> str:
        """The log's name."""
        return self._origin

    def head(self) -> tuple[int, str]:
        """Size and root (hex) of the current checkpoint."""
        return self.size, self.root(self.size)

    def root(self, size: int) -> str:
        """Root (hex) over the first `size` statements; IndexError beyond the checkpoint."""
        if size > self.size:
            raise IndexError(f"{size} of {self.size} statements")
        return self._tree.root(size).hex()

    def index_of(self, statement: str) -> int | None:
        """The statement's place in the log, or None while it is not logged."""
        return self._index.get(statement)

    def evidence(
        self, statements: Sequence[str], note: str = "", size: int | None = None
    ) -> dict[str, Any]:
        """Checkpoint, indices and inclusion proofs (hex) of these statements; JSON values.

        `note` with its `size` is another checkpoint than the current one, such as a cosigned one.
        """
        size = self.size if size is None else size
        for statement in statements:
            if self._index.get(statement, size) >= size:
                raise ParisError("not-found", f"{statement[:16]} is not in the log yet")
        indices = {statement: self._index[statement] for statement in statements}
        return {
            "checkpoint": note or self.checkpoint,
            "indices": indices,
            "proofs": {
                statement: [part.hex() for part in self._tree.inclusion(index, size)]
                for statement, index in indices.items()
            },
        }

    # ------------------------------------------------------------ writing

    def catch_up(self, after: After) -> bool:
        """Brings the log up to the ledger; True if there was anything to write."""
        if not self._started:
            self._resume(after)
            self._started = True
        wrote = False
        while rows := after(self._seq, BATCH):
            self._extend(rows)
            wrote = True
        if not self.checkpoint:
            self._promise()
            wrote = True
        return wrote

    def index_due(self, now: int) -> bool:
        """Whether the index in the folder is too old; unix seconds."""
        return now - self._shown >= INDEX_EVERY

    def show_index(self, index: Sealed[Index]) -> None:
        """Puts the signed index beside the checkpoint, which must not be older."""
        write_atomic(self.folder / "index.json", index.raw)
        self._shown = index.record.at

    def _extend(self, rows: Sequence[Logged]) -> None:
        """Statements, tiles, entries, and last the checkpoint, which promises all that before."""
        old = self.size
        self._put_statements(rows)
        # After a failure the tree may be ahead of the files; the ledger only ever grows.
        for row in rows[self._tree.size - old :]:
            self._tree.append(leaf_hash(bytes.fromhex(row.id)))
        whole = old // TILE * TILE  # entries from the beginning of the last, partial bundle on
        tail = [*self._ids[whole:], *(row.id for row in rows)]
        files = dict(self._tree.tiles(old))
        files.update(bundles([bytes.fromhex(id) for id in tail], old - whole, whole // TILE))
        for name, content in files.items():
            _make(self.folder, (self.folder / name).parent)
            write_atomic(self.folder / name, content)
        self._promise()
        self._index.update((row.id, old + n) for n, row in enumerate(rows))
        self._ids += [row.id for row in rows]
        self._seq = rows[-1].seq
        self._prune(files)

    def _put_statements(self, rows: Sequence[Logged]) -> None:
        folder = self.folder / "statements"
        _make(self.folder, folder)
        with disk_errors(folder):
            for row in rows:
                _put(folder, row)

    def _repair(self, after: After, last: int) -> None:
        """Writes the statements' files again that a power cut took, up to this ledger event."""
        seq = 0
        while seq < last and (rows := after(seq, BATCH)):
            self._put_statements([row for row in rows if row.seq <= last])
            seq = rows[-1].seq

    def sign(self, checkpoint: Checkpoint) -> str:
        """The note of a checkpoint of this log, without cosignatures."""
        return checkpoint.sign(self._key)

    def _promise(self) -> None:
        checkpoint = self.sign(Checkpoint(self._origin, self._tree.size, self._tree.root()))
        _make(self.folder, self.folder)
        write_atomic(self.folder / "checkpoint", checkpoint.encode())
        self.checkpoint = checkpoint

    def _prune(self, names: Collection[str]) -> None:
        """Partial tiles go once the whole one is promised, as tlog-tiles allows."""
        for name in names:
            if ".p/" not in name:
                shutil.rmtree(self.folder / f"{name}.p", ignore_errors=True)

    def _resume(self, after: After) -> None:
        """What the checkpoint on the disk promises, after checking that the ledger agrees."""
        try:
            note = (self.folder / "checkpoint").read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return
        try:
            found = Checkpoint.open(note, self._origin, self.keys)
        except ParisError as error:
            raise ParisError("state.corrupt", f"{self.folder}/checkpoint") from error
        tree, ids, seq = Tree(), list[str](), 0
        while tree.size < found.size:
            rows = after(seq, min(BATCH, found.size - tree.size))
            if not rows:
                break
            for row in rows:
                tree.append(leaf_hash(bytes.fromhex(row.id)))
            ids += [row.id for row in rows]
            seq = rows[-1].seq
        if tree.size != found.size or tree.root() != found.root:
            raise ParisError("state.corrupt", f"{self.folder} is not the log of this ledger")
        self._repair(after, seq)
        self._tree, self._ids, self._seq = tree, ids, seq
        self._index = {id: n for n, id in enumerate(ids)}
        # Below a checkpoint may stand cosignatures; what is promised is the log's own signature.
        self.checkpoint = "".join(line + "\n" for line in note.split("\n")[:4]) + _own(note, found)


def _own(note: str, found: Checkpoint) -> str:
    lines = note.split("\n")[4:-1]
    return "".join(f"{line}\n" for line in lines if line.startswith(f"— {found.origin} "))


def _make(top: Path, folder: Path) -> None:
    """Makes a folder below `top`, durably: a new entry counts once its parent is on the disk."""
    if folder.is_dir():
        return
    with disk_errors(folder):
        if folder != top:
            _make(top, folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
        _sync(folder.parent)


def _put(folder: Path, row: Logged) -> None:
    """A statement's file, whole or not at all.

    It is not waited for: the ledger holds the statement durably, and what a power cut takes away
    or damages is written again at the next start.
    """
    path, draft = f"{folder}/{row.id}.json", f"{folder}/.{row.id}.new"
    if os.path.exists(path):  # noqa: PTH110 - a thousand times a second
        with open(path, "rb") as file:  # noqa: PTH123
            if file.read() == row.raw:
                return
    try:
        with open(draft, "wb") as file:  # noqa: PTH123
            file.write(row.raw)
        os.replace(draft, path)  # noqa: PTH105
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
