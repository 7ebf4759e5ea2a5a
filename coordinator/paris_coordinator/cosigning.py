"""Witnesses' cosignatures of our own log: taken, kept, served under the checkpoint.

A witness hands in the note that it cosigned. It counts if the note is a checkpoint of this log
that our own tree reproduces, and the line is of a witness that the policy names. The newest note
that has the quorum is what a release is proved under; it is served as `witnessed`. Refused:
checkpoints of another log, size or root (`log.checkpoint`, `log.split`), wrong lines and strangers
(`log.witness`)::

    shelf = Cosignatures(log)
    await shelf.add(raw, policy)           # {"size": 42, "witnesses": 2}
"""

from __future__ import annotations

from typing import Any, Final

from paris_coordinator.projector import Projector
from paris_protocol.errors import ParisError
from paris_protocol.log import Checkpoint
from paris_protocol.net.store import write_atomic
from paris_protocol.records import Policy
from paris_protocol.witness import cosignatures, with_cosignatures, without_cosignatures

WITNESSED: Final = "witnessed"
_OPEN: Final = 64
"""Checkpoints for which cosignatures are collected at a time; the oldest give way."""


class Cosignatures:
    """Cosigned checkpoints of the log; those without a quorum are forgotten at a restart."""

    def __init__(self, log: Projector) -> None:
        self._log = log
        self._lines: dict[int, dict[str, tuple[int, str]]] = {}

    def add(self, raw: bytes, policy: Policy) -> dict[str, Any]:
        """Takes a cosigned note; how many of the policy's witnesses have signed that checkpoint."""
        note = raw.decode("utf-8", "replace")
        checkpoint = self._ours(note)
        found = cosignatures(note, policy.witnesses)
        if not found:
            raise ParisError("log.witness", "the policy names no witness with this key")
        lines = self._lines.setdefault(checkpoint.size, {})
        for key, (at, line) in found.items():
            if key not in lines or lines[key][0] < at:
                lines[key] = (at, line)
        while len(self._lines) > _OPEN:
            self._lines.pop(min(self._lines))
        self._serve(checkpoint, policy)
        return {"size": checkpoint.size, "witnesses": len(lines)}

    def witnessed(self, policy: Policy) -> tuple[int, str] | None:
        """Size and note of the newest checkpoint that the policy's quorum has cosigned."""
        try:
            note = (self._log.folder / WITNESSED).read_bytes().decode("utf-8", "replace")
            checkpoint = self._ours(note)
            enough = len(cosignatures(note, policy.witnesses)) >= policy.witness_quorum
        except (FileNotFoundError, ParisError):  # such as after a change of keys
            return None
        return (checkpoint.size, note) if enough else None

    def evidence(self, statements: list[str], policy: Policy) -> dict[str, Any]:
        """The log's evidence for these statements, under a checkpoint that the quorum cosigned.

        Raises `log.witness` while there is none that holds them all.
        """
        if policy.witness_quorum == 0:
            return self._log.evidence(statements)
        found = self.witnessed(policy)
        if found is None:
            raise ParisError("log.witness", f"{policy.witness_quorum} cosignatures are awaited")
        size, note = found
        if any((self._log.index_of(id) or 0) >= size for id in statements):
            raise ParisError("log.witness", f"the cosigned log ends after {size} statements")
        return self._log.evidence(statements, without_cosignatures(note, policy.witnesses), size)

    def _ours(self, note: str) -> Checkpoint:
        checkpoint = Checkpoint.open(note, self._log.origin, self._log.keys)
        if not 0 < checkpoint.size <= self._log.size:
            raise ParisError("log.checkpoint", f"a log of {checkpoint.size} statements")
        if checkpoint.root.hex() != self._log.root(checkpoint.size):
            raise ParisError("log.split", f"another root over {checkpoint.size} statements")
        return checkpoint

    def _serve(self, checkpoint: Checkpoint, policy: Policy) -> None:
        known = self._lines[checkpoint.size]
        lines = [known[key][1] for key in policy.witnesses if key in known]
        note = with_cosignatures(self._log.sign(checkpoint), lines)
        before = self.witnessed(policy)
        if len(lines) >= policy.witness_quorum and (before is None or before[0] <= checkpoint.size):
            write_atomic(self._log.folder / WITNESSED, note.encode())
        if checkpoint.size == self._log.size:
            write_atomic(self._log.folder / "checkpoint", note.encode())
