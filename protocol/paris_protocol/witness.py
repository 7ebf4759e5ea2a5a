"""Cosignatures of checkpoints by witnesses: C2SP tlog-cosignature, Ed25519, cosignature/v1.

A witness has seen that the log only grew, and says when. Its line stands below the log's own
signature; the policy names the keys that count and how many of them a release needs. Lines of
other keys are passed over, as signed notes ask; a wrong line of a known key is refused, and so is a
second one (`log.witness`)::

    note += cosign(note, name, key, now)
    check_quorum(note, policy.witnesses, policy.witness_quorum)      # {key id: time}
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable
from typing import Final

from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, key_bytes, verify
from paris_protocol.log import MAX_NOTE, note_signatures

_TYPE: Final = b"\x04"
_MAX_TIME: Final = 1 << 40
"""The largest time of a statement; the format itself allows 2⁶³ − 1."""


def witness_name(key_id: str) -> str:
    """The name of a witness that has no better one."""
    return f"paris-ddm.org/witness/{key_bytes(key_id).hex()[:16]}"


def cosigner_hash(name: str, key_id: str) -> bytes:
    """The 4-byte key hash of a witness: SHA-256(name || 0x0A || 0x04 || public key)[:4]."""
    return hashlib.sha256(name.encode("utf-8") + b"\n" + _TYPE + key_bytes(key_id)).digest()[:4]


def cosigner_key(name: str, key_id: str) -> str:
    """The witness' key as other tools take it: `name+hash+base64(0x04 || key)`."""
    public = base64.b64encode(_TYPE + key_bytes(key_id)).decode("ascii")
    return f"{name}+{cosigner_hash(name, key_id).hex()}+{public}"


def _message(text: str, at: int) -> bytes:
    return f"cosignature/v1\ntime {at}\n{text}".encode()


def cosign(note: str, name: str, key: PrivateKey, at: int) -> str:
    """The line (with its newline) that `key` puts below a checkpoint at unix second `at`."""
    text, _ = note_signatures(note)
    signature = at.to_bytes(8, "big") + key.sign(_message(text, at))
    blob = cosigner_hash(name, key.id) + signature
    return f"— {name} {base64.b64encode(blob).decode('ascii')}\n"


def cosignatures(note: str, witnesses: Collection[str]) -> dict[str, tuple[int, str]]:
    """Time and line of every cosignature of a known witness, by its key id.

    Raises `log.witness` for a wrong signature of a known key, or two of one; `log.checkpoint` for a
    note of another form.
    """
    text, lines = note_signatures(note)
    origin = text.partition("\n")[0]  # under this name the log signs, and no witness
    found: dict[str, tuple[int, str]] = {}
    for line, name, blob in lines:
        for key in witnesses:
            if name == origin or blob[:4] != cosigner_hash(name, key):
                continue
            at = int.from_bytes(blob[4:12], "big")
            if len(blob) != 76 or at > _MAX_TIME or not verify(key, blob[12:], _message(text, at)):
                raise ParisError("log.witness", f"a cosignature of {name} does not verify")
            if key in found:
                raise ParisError("log.witness", f"two cosignatures of {name}")
            found[key] = (at, line)
    return found


def check_quorum(note: str, witnesses: Collection[str], quorum: int) -> dict[str, int]:
    """Who of `witnesses` cosigned, and when; `log.witness` if they are fewer than `quorum`."""
    found = {key: at for key, (at, _) in cosignatures(note, witnesses).items()}
    if len(found) < quorum:
        raise ParisError("log.witness", f"{len(found)} of {quorum} cosignatures")
    return found


def with_cosignatures(note: str, lines: Iterable[str]) -> str:
    """The note with further signature lines (without newlines) below; `log.checkpoint` if long."""
    text = note + "".join(f"{line}\n" for line in lines)
    if len(text) > MAX_NOTE:
        raise ParisError("log.checkpoint", "too many signatures")
    return text


def without_cosignatures(note: str, witnesses: Collection[str]) -> str:
    """The note with the log's signatures and those of `witnesses`, without what others added."""
    text, lines = note_signatures(note)
    origin = text.partition("\n")[0]
    known = {line for _, line in cosignatures(note, witnesses).values()}
    own = [line for line, name, _ in lines if name == origin]
    kept = own[:1] + [line for line, _, _ in lines if line in known]
    return with_cosignatures(f"{text}\n", kept)
