"""Logs and releases for the fuzzing: what a mirror, a witness or a false coordinator may serve.

Each reader answers or refuses by name::

    read_log(loose({"size": 300, "root": "…", "old": 255, "files": {…}}))
"""

from __future__ import annotations

import json
from random import Random

from fuzz.mutate import damaged, loose, spoiled
from fuzz.statements import predicate_of, released, signed, world
from paris_protocol import release
from paris_protocol.canonical import canonical, parse
from paris_protocol.envelope import (
    peek,
)
from paris_protocol.errors import ParisError
from paris_protocol.log import (
    Checkpoint,
    Tree,
    leaf_hash,
    origin,
    verify_consistency,
    verify_inclusion,
)
from paris_protocol.log import (
    bundles as bundle_files,
)
from paris_protocol.memory import Seen
from paris_protocol.records import (
    Genesis,
)
from paris_protocol.tiles import TileReader
from paris_protocol.witness import check_quorum, cosign, without_cosignatures, witness_name
from protocol.world import COORDINATOR, NODES, ROOT, check


def notes() -> list[bytes]:
    """Signed checkpoints, with one and with two signatures."""
    tree = Tree([leaf_hash(bytes([i]) * 32) for i in range(5)])
    note = Checkpoint(origin(world().network), tree.size, tree.root()).sign(COORDINATOR)
    other = Checkpoint(origin(world().network), tree.size, tree.root()).sign(NODES[0])
    return [note.encode(), (note + other.rpartition("\n\n")[2]).encode()]


def read_note(raw: bytes) -> object:
    """A checkpoint as text from the network."""
    keys = {COORDINATOR.id}
    return Checkpoint.open(raw.decode("utf-8", "surrogateescape"), origin(world().network), keys)


def cosigned() -> list[bytes]:
    """A checkpoint with a witness' line below it."""
    note = notes()[0].decode()
    return [(note + cosign(note, witness_name(NODES[1].id), NODES[1], 1_800_000_000)).encode()]


def read_cosigned(raw: bytes) -> object:
    """A note that is said to be cosigned."""
    text = raw.decode("utf-8", "surrogateescape")
    check_quorum(text, (NODES[1].id,), 1)
    return without_cosignatures(text, (NODES[1].id,))


NO_LOG = (
    ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def mirrors() -> list[bytes]:
    """The files of a log of 300 leaves, as JSON of hex."""
    entries = [bytes([i % 256, i // 256]) * 16 for i in range(300)]
    tree = Tree([leaf_hash(entry) for entry in entries])
    files = dict(tree.tiles()) | dict(bundle_files(entries))
    head = {"size": tree.size, "root": tree.root().hex(), "old": 255}
    return [loose(head | {"files": {name: data.hex() for name, data in files.items()}})]


def read_log(raw: bytes) -> object:
    """A mirror's files under a checkpoint: root, consistency, a leaf and all entries."""
    try:
        value = json.loads(raw)
        files = {name: bytes.fromhex(data) for name, data in value["files"].items()}
        size, old = int(value["size"]), int(value["old"])
        checkpoint = Checkpoint("log", max(0, min(size, 10**15)), bytes.fromhex(value["root"]))
    except NO_LOG as error:
        raise ParisError("record.malformed", "no log at all") from error

    def fetch(name: str) -> bytes:
        if name not in files:
            raise ParisError("not-found", name)
        return files[name]

    reader = TileReader(checkpoint, fetch)
    reader.root()
    if 0 < old <= reader.size:
        reader.consistency(old)
        reader.leaf(old - 1)
    return list(reader.entries(max(0, reader.size - 1000)))


def memories() -> list[bytes]:
    """What a client keeps of a log; a file that a crash or a stranger may have damaged."""
    return [Seen(notes()[0].decode(), 5, bytes(32), 2, 1).raw]


def bundles() -> list[bytes]:
    """Entry bundles: the width in the first byte, then the bundle itself."""
    return [
        bytes([n]) + b"".join(b"\0\x20" + bytes([i]) * 32 for i in range(n)) for n in (1, 3, 200)
    ]


def proofs() -> list[bytes]:
    """Inclusion and consistency proofs as JSON."""
    tree = Tree([leaf_hash(bytes([i]) * 32) for i in range(11)])

    def hexes(parts: list[bytes]) -> list[str]:
        return [part.hex() for part in parts]

    return [
        canonical({
            "leaf": leaf_hash(bytes([i]) * 32).hex(), "index": i, "size": 11, "old": i + 1,
            "inclusion": hexes(tree.inclusion(i)), "root": tree.root().hex(),
            "consistency": hexes(tree.consistency(i + 1)), "old_root": tree.root(i + 1).hex(),
        })
        for i in (0, 4, 10)
    ]  # fmt: skip


def read_proof(raw: bytes) -> object:
    """Both verifiers on whatever is bytes and numbers; they answer, they never raise."""
    value = parse(raw)
    try:
        leaf, root, old_root = (bytes.fromhex(value[k]) for k in ("leaf", "root", "old_root"))
        path = [bytes.fromhex(part) for part in value["inclusion"]]
        proof = [bytes.fromhex(part) for part in value["consistency"]]
        index, size, old = (int(value[k]) for k in ("index", "size", "old"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ParisError("record.malformed", "no proof at all") from error
    verify_inclusion(leaf, index, size, path, root)
    return verify_consistency(old, size, proof, old_root, root)


def folders() -> list[bytes]:
    """The statements of a release folder: path and bytes, as JSON."""
    return [loose({p: d.decode() for p, d in released().items() if release.is_provenance(p)})]


def spoil_folder(random: Random, seeds: list[bytes]) -> bytes:
    """One statement of the folder spoiled, moved or lost; the others as they were."""
    files = json.loads(random.choice(seeds))
    name = random.choice(sorted(files))
    way = random.randrange(5)
    if way == 0:
        del files[name]
    elif way == 1:
        files[name] = damaged(random, files[name].encode()).decode("utf-8", "replace")
    elif way == 2:
        files[random.choice(("policy/0.json", "policy/3.json", "policy/999999999.json",
                             f"lineage/{'0' * 64}.json"))] = files[name]  # fmt: skip
    elif way == 3 and name != release.PROOF:
        kind, network, _ = peek(files[name].encode())
        key = ROOT if kind == Genesis.TYPE else COORDINATOR
        spoilt = spoiled(random, predicate_of(files[name].encode()))
        files[name] = signed(kind, spoilt, network, key).decode()
    else:
        spoilt = spoiled(random, json.loads(files[release.PROOF]))
        files[release.PROOF] = loose(spoilt).decode("utf-8", "replace")
    return loose(files)


def read_folder(raw: bytes) -> object:
    """Judge the folder offline; digests of what is not a statement are as they were."""
    files = {path: text.encode() for path, text in json.loads(raw).items()}
    rest = {p: d for p, d in released().items() if not release.is_provenance(p)}
    return check(rest | files)
