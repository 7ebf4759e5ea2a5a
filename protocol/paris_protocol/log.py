"""The transparency log: an RFC 6962 Merkle tree in C2SP tlog-tiles files, under signed notes.

Entry i is the 32-byte id of statement i, its leaf hash SHA-256(0x00 || id). Everything here is
bytes in, bytes out; who holds the ledger writes the files. The note parser refuses whatever is not
byte for byte what a writer makes: numerals, separators, line ends, unsigned content
(`log.checkpoint`); lying proofs verify as False::

    tree = Tree([leaf_hash(bytes.fromhex(i)) for i in ids])
    note = Checkpoint(origin(network), tree.size, tree.root()).sign(key)
    assert Checkpoint.open(note, origin(network), {key.id}).root == tree.root()
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, key_bytes, verify

TILE: Final = 256
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
MAX_NOTE: Final = 128 << 10
MAX_PROOF: Final = 64


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 || data), RFC 6962 §2.1."""
    return hashlib.sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right), RFC 6962 §2.1."""
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(size: int) -> int:
    """The largest power of two below `size` (> 1): where RFC 6962 splits a tree."""
    return 1 << ((size - 1).bit_length() - 1)


class Subtrees:
    """Roots and proofs of a tree of which the root of every complete subtree can be had."""

    @property
    def size(self) -> int:
        """Number of leaves."""
        raise NotImplementedError

    def subtree(self, level: int, index: int) -> bytes:
        """Root over the leaves from index·2^level to (index + 1)·2^level, all of them there."""
        raise NotImplementedError

    def root(self, size: int | None = None) -> bytes:
        """Root of the first `size` leaves (all of them by default)."""
        return self._range(0, self._known(size))

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """RFC 6962 §2.1.1: the audit path of leaf `index` in the tree of `size` leaves."""
        begin, end, path = 0, self._known(size), []
        if not 0 <= index < end:
            raise IndexError(f"leaf {index} of {end}")
        while end - begin > 1:
            middle = begin + _split(end - begin)
            if index < middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(begin, middle))
                begin = middle
        return path[::-1]

    def consistency(self, old: int, size: int | None = None) -> list[bytes]:
        """RFC 6962 §2.1.2: proof that the first `old` leaves are a prefix of the first `size`."""
        begin, end, path, whole = 0, self._known(size), [], True
        if not 0 < old <= end:
            raise IndexError(f"{old} of {end} leaves")
        while old != end:
            middle = begin + _split(end - begin)
            if old <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(begin, middle))
                begin, whole = middle, False
        if not whole:
            path.append(self._range(begin, end))
        return path[::-1]

    def _known(self, size: int | None) -> int:
        if size is not None and not 0 <= size <= self.size:
            raise IndexError(f"{size} of {self.size} leaves")
        return self.size if size is None else size

    def _range(self, begin: int, end: int) -> bytes:
        size = end - begin
        if size == 0:
            return EMPTY_ROOT
        if size & (size - 1) == 0:
            level = size.bit_length() - 1
            return self.subtree(level, begin >> level)
        middle = begin + _split(size)
        return node_hash(self._range(begin, middle), self._range(middle, end))


class Tree(Subtrees):
    """A growing tree of leaf hashes that keeps every complete subtree's root (2 hashes a leaf)."""

    def __init__(self, hashes: Iterable[bytes] = ()) -> None:
        # _levels[k][i] is the root over the leaves from i·2^k to (i+1)·2^k.
        self._levels: list[list[bytes]] = [[]]
        for one in hashes:
            self.append(one)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0])

    def subtree(self, level: int, index: int) -> bytes:
        """See `Subtrees`."""
        return self._levels[level][index]

    def append(self, leaf: bytes) -> int:
        """Add a leaf hash (32 bytes) and return its index."""
        index, node, level = self.size, leaf, 0
        self._levels[0].append(leaf)
        while len(self._levels[level]) % 2 == 0:
            node = node_hash(*self._levels[level][-2:])
            level += 1
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level].append(node)
        return index

    def tiles(self, old: int = 0) -> Iterator[tuple[str, bytes]]:
        """Path and content of every tile that a log grown from `old` leaves has to write."""
        for level in range(0, len(self._levels), 8):
            nodes, before = self._levels[level], old >> level
            if len(nodes) > before:
                for n in range(before // TILE, -(-len(nodes) // TILE)):
                    part = nodes[n * TILE : (n + 1) * TILE]
                    yield tile_path(level // 8, n, len(part)), b"".join(part)


def merkle_root(hashes: Sequence[bytes]) -> bytes:
    """RFC 6962 root over leaf *hashes*; SHA-256 of nothing for none."""
    level = list(hashes)
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        level = [node_hash(*pair) for pair in zip(level[::2], level[1::2], strict=False)] + odd
    return level[0] if level else EMPTY_ROOT


def inclusion_proof(hashes: Sequence[bytes], index: int, size: int) -> list[bytes]:
    """The audit path of leaf `index` among the first `size` leaf hashes."""
    return Tree(hashes[:size]).inclusion(index)


def consistency_proof(hashes: Sequence[bytes], old: int, size: int) -> list[bytes]:
    """Proof that the tree of `old` leaves is a prefix of the tree of `size` leaves."""
    return Tree(hashes[:size]).consistency(old)


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> bool:
    """RFC 9162 §2.1.3.2: whether `proof` shows `leaf` (a leaf hash) at `index` under `root`."""
    if not 0 <= index < size or len(proof) > MAX_PROOF:
        return False
    if any(len(part) != 32 for part in (leaf, root, *proof)):
        return False
    here, last, node = index, size - 1, leaf
    for part in proof:
        if last == 0:
            return False
        if here & 1 or here == last:
            node = node_hash(part, node)
            while here & 1 == 0 and here:
                here, last = here >> 1, last >> 1
        else:
            node = node_hash(node, part)
        here, last = here >> 1, last >> 1
    return last == 0 and node == root


def verify_consistency(
    old: int, size: int, proof: Sequence[bytes], old_root: bytes, root: bytes
) -> bool:
    """RFC 9162 §2.1.4.2: whether the tree of `old` leaves is a prefix of that of `size`."""
    if not 0 <= old <= size or len(proof) > MAX_PROOF or any(len(part) != 32 for part in proof):
        return False
    if old == size:
        return not proof and old_root == root and (size > 0 or root == EMPTY_ROOT)
    # RFC 9162 asks for no proof from the empty tree, so none is believed.
    if old == 0:
        return False
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    here, last = old - 1, size - 1
    while here & 1:
        here, last = here >> 1, last >> 1
    if not path:
        return False
    left = right = path[0]
    for part in path[1:]:
        if last == 0:
            return False
        if here & 1 or here == last:
            left, right = node_hash(part, left), node_hash(part, right)
            while here & 1 == 0 and here:
                here, last = here >> 1, last >> 1
        else:
            right = node_hash(right, part)
        here, last = here >> 1, last >> 1
    return last == 0 and left == old_root and right == root


# ---------------------------------------------------------------- C2SP tlog-tiles


def _number_path(n: int) -> str:
    groups = [f"{n % 1000:03d}"]
    while n := n // 1000:
        groups.append(f"x{n % 1000:03d}")
    return "/".join(reversed(groups))


def tile_path(level: int, n: int, width: int = TILE) -> str:
    """`tile/<L>/<N>[.p/<W>]`; N in groups of three digits, all but the last with an `x`."""
    return f"tile/{level}/{_number_path(n)}" + (f".p/{width}" if width < TILE else "")


def bundle_path(n: int, width: int = TILE) -> str:
    """`tile/entries/<N>[.p/<W>]`: where the entries of a level-0 tile stand."""
    return f"tile/entries/{_number_path(n)}" + (f".p/{width}" if width < TILE else "")


def bundles(entries: Sequence[bytes], old: int = 0, first: int = 0) -> Iterator[tuple[str, bytes]]:
    """Path and content of every entry bundle that a log grown from `old` entries has to write.

    `entries` (and `old`) may begin with bundle `first` instead of the log's beginning.
    """
    for n in range(old // TILE, -(-len(entries) // TILE) if len(entries) > old else 0):
        part = entries[n * TILE : (n + 1) * TILE]
        yield (
            bundle_path(first + n, len(part)),
            b"".join(len(entry).to_bytes(2, "big") + entry for entry in part),
        )


def parse_bundle(raw: bytes, width: int = TILE) -> list[bytes]:
    """The statement ids (32 bytes each) of a bundle of `width` entries; else `log.proof`."""
    if len(raw) != 34 * width or any(raw[i : i + 2] != b"\0\x20" for i in range(0, len(raw), 34)):
        raise ParisError("log.proof", "an entry bundle of another form")
    return [raw[i + 2 : i + 34] for i in range(0, len(raw), 34)]


# ---------------------------------------------------------------- C2SP signed note, tlog-checkpoint

_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_SIGNATURE: Final = re.compile(r"— ([^\s+\x00-\x1f\x7f]{1,200}) ([A-Za-z0-9+/=]{1,8000})")
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]")


def origin(network: str) -> str:
    """The log's name, first line of its checkpoints and name of its key."""
    return f"paris-ddm.org/{network}"


def note_hash(name: str, key_id: str) -> bytes:
    """The 4-byte key hash of signed notes: SHA-256(name || 0x0A || 0x01 || public key)[:4]."""
    return hashlib.sha256(name.encode("utf-8") + b"\n\x01" + key_bytes(key_id)).digest()[:4]


def verifier_key(name: str, key_id: str) -> str:
    """The key as Go's note tools and witnesses take it: `name+hash+base64(0x01 || key)`."""
    public = base64.b64encode(b"\x01" + key_bytes(key_id)).decode("ascii")
    return f"{name}+{note_hash(name, key_id).hex()}+{public}"


def _bad(detail: str) -> NoReturn:
    raise ParisError("log.checkpoint", detail)


def _base64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        _bad("not base64")
    if base64.b64encode(data).decode("ascii") != text:
        _bad("base64 with stray bits")
    return data


def sign_note(text: str, name: str, key: PrivateKey) -> str:
    """`text` (ending in a newline) as a signed note with one signature."""
    blob = note_hash(name, key.id) + key.sign(text.encode("utf-8"))
    return f"{text}\n— {name} {base64.b64encode(blob).decode('ascii')}\n"


def note_signatures(note: str) -> tuple[str, list[tuple[str, str, bytes]]]:
    """A note's text, and (line, name, key hash || signature) of each signature; nothing verified.

    Refuses every note that is not byte for byte of the one form (`log.checkpoint`).
    """
    if len(note) > MAX_NOTE or _CONTROL.search(note):
        _bad("too long, or with characters that no note has")
    text, blank, signatures = note.rpartition("\n\n")
    if not blank or not signatures.endswith("\n"):
        _bad("no signature block")
    found = []
    for line in signatures[:-1].split("\n"):
        match = _SIGNATURE.fullmatch(line)
        if match is None:
            _bad("a malformed signature line")
        found.append((line, match[1], _base64(match[2])))
    return f"{text}\n", found


def open_note(note: str, name: str, keys: Collection[str]) -> str:
    """The text of a note that one of `keys` signed under `name`.

    Well-formed signatures of other keys (witnesses) are passed over, as signed-note asks; a wrong
    one of a known key, or two of it, is refused.
    """
    text, signatures = note_signatures(note)
    known = {note_hash(name, key): key for key in keys}
    signed: list[str] = []
    for _, signer, blob in signatures:
        key = known.get(blob[:4]) if signer == name else None
        if key is not None:
            if key in signed or not verify(key, blob[4:], text.encode("utf-8")):
                _bad("a signature that does not verify")
            signed.append(key)
    if not signed:
        _bad("not signed by a key of the log")
    return text


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's name, size and root (32 bytes)."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The three signed lines; extension lines are neither written nor read."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode('ascii')}\n"

    def sign(self, key: PrivateKey) -> str:
        """The signed note that is served as `checkpoint`."""
        return sign_note(self.text, self.origin, key)

    @classmethod
    def open(cls, note: str, origin: str, keys: Collection[str]) -> Checkpoint:
        """Read a checkpoint of the log `origin`, signed by one of `keys`; else `log.checkpoint`."""
        lines = open_note(note, origin, keys).split("\n")
        if len(lines) != 4 or lines[0] != origin or _SIZE.fullmatch(lines[1]) is None:
            _bad("not the three lines of this log")
        root = _base64(lines[2])
        if len(root) != 32:
            _bad("a root of another length")
        return cls(origin, int(lines[1]), root)
