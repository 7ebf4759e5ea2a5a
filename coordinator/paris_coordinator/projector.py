"""From the ledger to the transparency log: tiles, entries, statements and a signed checkpoint.

The log is a projection of the ledger's logged statements in ledger order. `Projector.catch_up` is
idempotent: it goes on from whatever is on the disk, writes data before the checkpoint that promises
them, and every file whole or not at all. It never rewrites history: a checkpoint that the ledger
does not reproduce is refused (`state.corrupt`)::

    log = Projector(folder, network, key)
    log.catch_up(ledger.statement_ids(LOGGED), raw_of)
    log.evidence([statement_id])      # checkpoint, indices, proofs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.log import Checkpoint, Tree, bundles, leaf_hash, origin
from paris_protocol.net.store import write_atomic


class Projector:
    """The log below `folder`, as far as it has been written."""

    def __init__(self, folder: Path, network: str, key: PrivateKey) -> None:
        self.folder, self._key = folder, key
        self._origin = origin(network)
        self._tree = Tree()
        self._ids: list[str] = []
        self._index: dict[str, int] = {}
        self._started = False
        self.checkpoint = ""

    @property
    def size(self) -> int:
        """Statements that the current checkpoint promises."""
        return len(self._ids)

    def head(self) -> tuple[int, str]:
        """Size and root (hex) of the current checkpoint."""
        size = self.size
        return size, self._tree.root(size).hex()

    def index_of(self, statement: str) -> int | None:
        """The statement's place in the log, or None while it is not logged."""
        return self._index.get(statement)

    def evidence(self, statements: Sequence[str]) -> dict[str, Any]:
        """Checkpoint, indices and inclusion proofs (hex) of these statements; JSON values."""
        for statement in statements:
            if statement not in self._index:
                raise ParisError("not-found", f"{statement[:16]} is not in the log yet")
        indices = {statement: self._index[statement] for statement in statements}
        return {
            "checkpoint": self.checkpoint,
            "indices": indices,
            "proofs": {
                statement: [part.hex() for part in self._tree.inclusion(index, self.size)]
                for statement, index in indices.items()
            },
        }

    def catch_up(self, ids: Sequence[str], raw_of: Callable[[str], bytes]) -> bool:
        """Brings the log to exactly `ids`; True if there was anything to write.

        `ids` are all logged statements in ledger order, `raw_of` gives a statement's envelope.
        """
        old = 0
        if not self._started:
            old = self._resume(ids)
            self._started = True
        elif len(ids) == len(self._ids):
            return False
        else:
            old = len(self._ids)
            if list(ids[:old]) != self._ids:
                raise ParisError("state.corrupt", f"{self.folder} is not the log of this ledger")
        if len(ids) == old and self.checkpoint:
            return False
        for id in ids[old:]:
            path = self.folder / "statements" / f"{id}.json"
            if not path.exists():
                _write(path, raw_of(id))
        for id in ids[self._tree.size :]:
            self._tree.append(leaf_hash(bytes.fromhex(id)))
        for path_name, content in self._tree.tiles(old):
            _write(self.folder / path_name, content)
        for path_name, content in bundles([bytes.fromhex(id) for id in ids], old):
            _write(self.folder / path_name, content)
        checkpoint = Checkpoint(self._origin, self._tree.size, self._tree.root()).sign(self._key)
        _write(self.folder / "checkpoint", checkpoint.encode())
        self.checkpoint = checkpoint
        self._index.update((id, n) for n, id in enumerate(ids[len(self._ids) :], len(self._ids)))
        self._ids = list(ids)
        return True

    def _resume(self, ids: Sequence[str]) -> int:
        """What the checkpoint on the disk promises, after checking that the ledger agrees."""
        try:
            note = (self.folder / "checkpoint").read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return 0
        try:
            found = Checkpoint.open(note, self._origin, {self._key.id})
        except ParisError as error:
            raise ParisError("state.corrupt", f"{self.folder}/checkpoint") from error
        for id in ids[: found.size]:
            self._tree.append(leaf_hash(bytes.fromhex(id)))
        if self._tree.size != found.size or self._tree.root() != found.root:
            raise ParisError("state.corrupt", f"{self.folder} is not the log of this ledger")
        self._ids = list(ids[: found.size])
        self._index = {id: n for n, id in enumerate(self._ids)}
        self.checkpoint = note
        return found.size


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
