"""What a client remembers of a log between two looks: the last checkpoint that it believed.

A log that is shorter than it was, or does not continue what was seen, is refused, and so is a
coordinator's word that is too old or from the future (trust §1.5). Rollback and rewriting need the
memory; a freeze needs the signed time, for a checkpoint has none::

    seen = continued(seen, note, reader, policy=2, release=7)   # log.rollback, log.split
    check_time(index.at, now, limit=86_400)                     # log.stale, log.future
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, replace
from typing import Any, Final

from paris_protocol.canonical import canonical, parse
from paris_protocol.errors import ParisError
from paris_protocol.log import Checkpoint, Subtrees, note_signatures, verify_consistency

AHEAD: Final = 300
"""Seconds by which two honest clocks may differ."""
STALE: Final = 86_400
"""Seconds after which a client no longer calls the coordinator's word current."""
_SIZE: Final = re.compile(r"[1-9][0-9]{0,15}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint that was believed: its note, the policy in force and the newest release then."""

    note: str
    size: int
    root: bytes
    policy: int = 0
    release: int = 0

    @property
    def raw(self) -> bytes:
        """The form in which it is kept."""
        return canonical({"note": self.note, "policy": self.policy, "release": self.release})


def read_seen(raw: bytes) -> Seen:
    """What `Seen.raw` wrote; `state.corrupt` for anything else.

    Size and root come from the note: what is kept is evidence that can be shown to others.
    """
    try:
        value: Any = parse(raw)
        note, policy, release = value["note"], value["policy"], value["release"]
        lines = note_signatures(note)[0].split("\n")
        if not (isinstance(policy, int) and isinstance(release, int) and _SIZE.fullmatch(lines[1])):
            raise ValueError("other fields")
        return Seen(note, int(lines[1]), base64.b64decode(lines[2], validate=True), policy, release)
    except (ParisError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ParisError("state.corrupt", "the remembered checkpoint is damaged") from error


def continued(
    seen: Seen | None, note: str, tree: Subtrees, *, policy: int = 0, release: int = 0
) -> Seen:
    """What to remember after the log showed `tree` under the checkpoint `note`.

    `tree` has the checkpoint's size and root. Refused: an empty log, a shorter one or an older
    policy (`log.rollback`), and one that is no continuation (`log.split`).
    """
    root = tree.root()
    if tree.size == 0:
        raise ParisError("log.checkpoint", "a log of size 0 holds not even the genesis")
    if seen is not None:
        if tree.size < seen.size:
            raise ParisError("log.rollback", f"{tree.size} statements, {seen.size} were seen")
        if policy < seen.policy:
            raise ParisError("log.rollback", f"policy {policy}, {seen.policy} was seen")
        if release < seen.release:
            raise ParisError("log.rollback", f"release {release}, {seen.release} was seen")
        proof = tree.consistency(seen.size)
        if not verify_consistency(seen.size, tree.size, proof, seen.root, root):
            raise ParisError("log.split", f"after {seen.size} statements that were seen")
    return Seen(note, tree.size, root, policy, release)


def released(
    seen: Seen | None, note: str, checkpoint: Checkpoint, number: int, *, newest: bool = True
) -> Seen:
    """What to remember after a release was verified under the checkpoint `note`.

    Its log cannot be compared without tiles, but for one of the same size; so the checkpoint that
    was seen first stays, until the log itself is followed. Refused: another root (`log.split`)
    and, where the `newest` release is wanted, one that is older than one seen (`log.rollback`).
    """
    if seen is None:
        return Seen(note, checkpoint.size, checkpoint.root, release=number)
    if checkpoint.size == seen.size and checkpoint.root != seen.root:
        raise ParisError("log.split", f"another log of {seen.size} statements was seen")
    if newest and number < seen.release:
        raise ParisError("log.rollback", f"release {number}, release {seen.release} was seen")
    return replace(seen, release=max(number, seen.release))


def check_time(at: int, now: int, limit: int = STALE) -> None:
    """That a signed time is at most `limit` seconds old and not in the future; unix seconds."""
    if at > now + AHEAD:
        raise ParisError("log.future", f"{at - now} s ahead of this machine")
    if now - at > limit:
        raise ParisError("log.stale", f"{now - at} s old, at most {limit}")
