"""Ed25519 keys: a node is its key, and a `KeyId` is the key itself in hex.

There is one verifier everywhere (pyca/cryptography). Refused: public keys of small order and other
non-canonical encodings (`key.weak`), and key files that are links, readable by others, of another
user, or not 64 hex digits and a newline (`key.file`)::

    key = PrivateKey.generate()
    save_key(folder / "key", key)
    assert verify(key.id, key.sign(b"data"), b"data")
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from paris_protocol.errors import ParisError

FIELD: Final = 2**255 - 19
_ORDER_8: Final = int.from_bytes(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
)
SMALL_ORDER: Final = frozenset(
    (y + sign).to_bytes(32, "little")
    for y in (0, 1, FIELD - 1, FIELD, FIELD + 1, _ORDER_8, FIELD - _ORDER_8)
    for sign in (0, 1 << 255)
)
"""The 14 encodings of the eight points of small order; a signature by such a key proves nothing."""

_KEY_ID: Final = re.compile(r"ed25519:([0-9a-f]{64})", re.ASCII)
_KEY_FILE: Final = re.compile(rb"[0-9a-f]{64}\n")
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PEER_PREFIX: Final = bytes.fromhex("002408011220")


@dataclass(frozen=True)
class PrivateKey:
    """A signing key; its `seed` (32 bytes) is the RFC 8032 private key."""

    seed: bytes

    def __post_init__(self) -> None:
        if len(self.seed) != 32:
            raise ParisError("key.file", "a key has 32 bytes")

    def __repr__(self) -> str:
        return f"PrivateKey({self.id})"

    @classmethod
    def generate(cls) -> PrivateKey:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def from_seed(cls, seed: bytes) -> PrivateKey:
        """The key of these 32 bytes."""
        return cls(bytes(seed))

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return self._key.public_key().public_bytes_raw()

    @cached_property
    def id(self) -> str:
        """The `KeyId`: `ed25519:` and the public key in hex."""
        return f"ed25519:{self.public.hex()}"

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature (RFC 8032) of `data`."""
        return self._key.sign(data)


def key_bytes(key_id: str) -> bytes:
    """The 32 bytes of a sound public key; refuses malformed, non-canonical and weak ones."""
    match = _KEY_ID.fullmatch(key_id)
    if match is None:
        raise ParisError("key.weak", "a key id is `ed25519:` and 64 hex digits")
    raw = bytes.fromhex(match[1])
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
    if raw in SMALL_ORDER or y >= FIELD:
        raise ParisError("key.weak", key_id)
    return raw


@lru_cache(maxsize=4096)
def public_key(key_id: str) -> Ed25519PublicKey:
    """The public key that a `KeyId` names; `key.weak` if it is of small order or malformed."""
    return Ed25519PublicKey.from_public_bytes(key_bytes(key_id))


def verify(key_id: str, signature: bytes, data: bytes) -> bool:
    """Whether `signature` is one of `data` by this key; weak keys raise `key.weak`."""
    try:
        public_key(key_id).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def rotation_text(network: str, old: str, new: str, at: int) -> bytes:
    """What a node's new key signs as its consent to take the place of the old one."""
    return f"paris/key-rotation/1\n{network}\n{old}\n{new}\n{at}\n".encode("ascii")


def peer_id(key_id: str) -> str:
    """The libp2p PeerID of the key: base58 of the identity multihash of its protobuf form."""
    raw = _PEER_PREFIX + key_bytes(key_id)
    number, digits = int.from_bytes(raw, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        digits = _BASE58[rest] + digits
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + digits


def load_key(path: Path) -> PrivateKey:
    """Read a key file; `key.file` unless it is a plain 0600 file of this user with one key."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise ParisError("key.file", f"{path}: {error.strerror}") from error
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise ParisError("key.file", f"{path} is not a plain file")
        if os.name == "posix" and facts.st_mode & 0o177:
            raise ParisError("key.file", f"{path} has mode {facts.st_mode & 0o777:04o}")
        if os.name == "posix" and facts.st_uid != os.geteuid():
            raise ParisError("key.file", f"{path} belongs to another user")
        text = os.read(handle, 128)
    finally:
        os.close(handle)
    if not _KEY_FILE.fullmatch(text):
        raise ParisError("key.file", f"{path} does not hold 64 hex digits and a newline")
    return PrivateKey(bytes.fromhex(text.decode("ascii")))


def save_key(path: Path, key: PrivateKey) -> None:
    """Write a new key file with mode 0600, whole or not at all; never replaces one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, key.seed.hex().encode("ascii") + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
        # A hard link fails where a key stands already; a rename would replace it.
        os.link(draft, path)
    except OSError as error:
        code = "disk.full" if error.errno in (28, 122) else "key.file"
        raise ParisError(code, f"{path}: {error.strerror}") from error
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
