"""Rows "log rewrite / split view", "checkpoint parser tricks", "rollback / freeze / mix-and-match".

A coordinator double writes logs with the real projector, honest ones and altered ones, all signed
with the real key: only memory, proofs, time and witnesses can tell them apart. The client is the
one that nodes, `paris verify` and mirrors use.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paris_coordinator.ledger import Logged
from paris_coordinator.projector import Projector
from paris_protocol.envelope import Sealed, seal
from paris_protocol.errors import ParisError
from paris_protocol.log import Checkpoint, Tree, leaf_hash, origin, sign_note
from paris_protocol.memory import STALE
from paris_protocol.net.logs import LogMemory, LogPlace, follow
from paris_protocol.records import Index
from paris_protocol.release import RELEASE
from paris_protocol.witness import check_quorum, cosign, witness_name
from protocol.world import COORDINATOR, NODES, OTHER, World, check, key

NOW = 1_800_000_000
WITNESSES = (key("witness 1"), key("witness 2"))


@pytest.fixture(scope="module")
def world() -> World:
    made = World().lived()
    made.release()
    return made


def write(
    folder: Path, world: World, log: list[Sealed[Any]], at: int = NOW, signer: Any = COORDINATOR
) -> Path:
    """A log folder over these statements, as the coordinator writes one."""
    rows = [Logged(n + 1, each.id, each.raw) for n, each in enumerate(log)]
    projector = Projector(folder, world.network, signer)
    folder.mkdir()
    projector.catch_up(lambda seq, most: [row for row in rows if row.seq > seq][:most])
    size, root = projector.head()
    releases = [each.id for each in log if each.record.TYPE == "release"]
    index = Index(
        policy=world.policies[-1].id, heads=tuple(world.heads),
        release=releases[-1] if releases else None,
        log_size=size, log_root=root, finished=False, at=at,
    )  # fmt: skip
    projector.show_index(seal(index, signer, world.network))
    return folder


def look(folder: Path, world: World, memory: LogMemory, now: int = NOW) -> str:
    """ "" when a client believes the log, else the code of its refusal."""
    try:
        follow(LogPlace(folder), world.network, memory, now)
    except ParisError as error:
        return error.code
    return ""


# ---------------------------------------------------------------- rewriting and splitting


def test_a_log_that_only_grows_is_believed(world: World, tmp_path: Path) -> None:
    memory = LogMemory(tmp_path / "memory")
    for size in (5, 6, 17, len(world.log)):
        folder = write(tmp_path / str(size), world, world.log[:size])
        assert look(folder, world, memory) == ""
        assert look(folder, world, memory) == ""


def rewritten(log: list[Sealed[Any]]) -> dict[str, list[Sealed[Any]]]:
    """Histories that differ from `log` somewhere before its end, all validly signed."""
    return {
        "one left out": [*log[:7], *log[8:]],
        "two exchanged": [*log[:7], log[8], log[7], *log[9:]],
        "one added in the middle": [*log[:9], log[4], *log[9:]],
        "the last one replaced": [*log[:-1], log[5]],
    }


def test_an_altered_history_raises_the_alarm_and_leaves_evidence(
    world: World, tmp_path: Path
) -> None:
    old = world.log[:12]
    seen = write(tmp_path / "seen", world, old)
    for number, (name, history) in enumerate(rewritten(old).items()):
        memory = LogMemory(tmp_path / f"memory{number}")
        assert look(seen, world, memory) == ""
        before = memory.load(world.network)
        grown = [*history, *world.log[12:]]
        folder = write(tmp_path / f"split{number}", world, grown)
        assert look(folder, world, memory) == "log.split", name
        assert memory.load(world.network) == before
        evidence = list((tmp_path / f"memory{number}").rglob("checkpoint-*"))
        assert len(evidence) == 2, "both signed checkpoints are kept to be shown to others"
        honest = write(tmp_path / f"honest{number}", world, world.log)
        assert look(honest, world, memory) == ""


def test_two_views_of_one_size_cannot_both_be_cosigned(world: World, tmp_path: Path) -> None:
    """A split view from the first look on: memory knows nothing, but the witnesses saw one log."""
    policy = tuple(witness.id for witness in WITNESSES)
    logs = [world.log, [*world.log[:-1], world.log[4]]]
    notes = []
    for log in logs:
        tree = Tree([leaf_hash(bytes.fromhex(each.id)) for each in log])
        checkpoint = Checkpoint(origin(world.network), tree.size, tree.root())
        notes.append(checkpoint.sign(COORDINATOR))
    cosigned = notes[0] + "".join(cosign(notes[0], witness_name(w.id), w, NOW) for w in WITNESSES)
    assert set(check_quorum(cosigned, policy, 2)) == set(policy)
    stolen = cosigned.rpartition("\n\n")[2].split("\n", 1)[1]
    for view in (notes[1], notes[1] + stolen):
        with pytest.raises(ParisError) as caught:
            check_quorum(view, policy, 2)
        assert caught.value.code == "log.witness"


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "longer", "entries"])
def test_damaged_tiles_prove_nothing(world: World, tmp_path: Path, damage: str) -> None:
    memory = LogMemory(tmp_path / "memory")
    assert look(write(tmp_path / "old", world, world.log[:7]), world, memory) == ""
    folder = write(tmp_path / "log", world, world.log)
    [tile] = list((folder / "tile" / "0").rglob(f"000.p/{len(world.log)}"))
    raw = tile.read_bytes()
    spoilt = {
        "missing": None, "truncated": raw[:-1], "longer": raw + bytes(32),
        "foreign": raw[:-32] + bytes(32), "entries": raw[32:] + raw[:32],
    }[damage]  # fmt: skip
    tile.unlink()
    if spoilt is not None:
        tile.write_bytes(spoilt)
    assert look(folder, world, memory) == "log.proof"


# ---------------------------------------------------------------- rollback, freeze, future


def test_an_old_log_is_not_the_log(world: World, tmp_path: Path) -> None:
    memory = LogMemory(tmp_path / "memory")
    assert look(write(tmp_path / "new", world, world.log), world, memory) == ""
    old = write(tmp_path / "old", world, world.log[:12])
    assert look(old, world, memory) == "log.rollback"
    # New index over old tiles, and new checkpoint over old tiles.
    for name, code in (("index.json", "log.rollback"), ("checkpoint", "log.proof")):
        mixed = tmp_path / f"mixed {name}"
        shutil.copytree(old, mixed)
        shutil.copy(tmp_path / "new" / name, mixed)
        assert look(mixed, world, LogMemory(tmp_path / "none")) == code, name


def test_a_frozen_log_and_one_from_the_future_are_named(world: World, tmp_path: Path) -> None:
    folder = write(tmp_path / "log", world, world.log)
    day = 86_400
    for now, code in (
        (NOW, ""), (NOW + STALE - 1, ""), (NOW + STALE + 1, "log.stale"),
        (NOW + 9 * day, "log.stale"),
        (NOW - 200, ""), (NOW - day, "log.future"),
    ):  # fmt: skip
        assert look(folder, world, LogMemory(tmp_path / f"memory {now}"), now) == code, now


def test_a_log_by_another_key_is_nobodys(world: World, tmp_path: Path) -> None:
    for name, signer in (("stranger", NODES[0]), ("former key", OTHER)):
        folder = write(tmp_path / name, world, world.log, signer=signer)
        assert look(folder, world, LogMemory(tmp_path / "m")) in ("record.signer", "log.checkpoint")


def test_an_empty_log_is_refused(world: World, tmp_path: Path) -> None:
    folder = write(tmp_path / "log", world, world.log)
    empty = Checkpoint(origin(world.network), 0, Tree().root()).sign(COORDINATOR)
    (folder / "checkpoint").write_text(empty)
    assert look(folder, world, LogMemory(tmp_path / "m")) in ("log.checkpoint", "log.rollback")


# ---------------------------------------------------------------- mix-and-match of releases


def mixed_folders(world: World) -> dict[str, dict[str, bytes]]:
    """Folders made of validly signed parts that do not belong together."""
    first = world.release(number=1)
    world.merge(1)
    second = world.release(number=2, previous=None)
    weights = "expert_0/diffusion_pytorch_model.safetensors"
    return {
        "weights of another release": first | {weights: b"weights of another release"},
        "statement of the other": first | {RELEASE: second[RELEASE]},
        "proof of the other": first | {"proof.json": second["proof.json"]},
        "a file left out": {path: data for path, data in first.items() if path != weights},
        "a file more": first | {"extra.bin": b""},
        "lineage of the other": {
            **{p: d for p, d in first.items() if not p.startswith("lineage/")},
            **{p: d for p, d in second.items() if p.startswith("lineage/")},
        },
        "policies left out": {p: d for p, d in first.items() if not p.startswith("policy/2")},
    }


def test_parts_of_two_releases_are_none(world: World) -> None:
    fresh = World().lived()
    assert check(fresh.release()).network == fresh.network
    for name, files in mixed_folders(fresh).items():
        with pytest.raises(ParisError) as caught:
            check(files)
        assert caught.value.code.startswith("release."), name


# ---------------------------------------------------------------- the parser of checkpoints

Trick = Callable[[str], str]


def line(number: int, change: Trick) -> Trick:
    def trick(note: str) -> str:
        lines = note.split("\n")
        lines[number] = change(lines[number])
        return "\n".join(lines)

    return trick


TEXT_TRICKS: dict[str, Trick] = {
    "leading zero": line(1, lambda size: "0" + size),
    "plus": line(1, lambda size: "+" + size),
    "underscore": line(1, lambda size: size[0] + "_" + size[1:]),
    "space before": line(1, lambda size: " " + size),
    "space behind": line(1, lambda size: size + " "),
    "hexadecimal": line(1, lambda size: hex(int(size))),
    "other digits": line(1, lambda size: size.replace(size[0], chr(0x660 + int(size[0])), 1)),
    "exponent": line(1, lambda size: size + "e0"),
    "carriage return": line(1, lambda size: size + "\r"),
    "base64 without padding": line(2, lambda root: root.rstrip("=")),
    "base64 of the web": line(2, lambda root: root.replace("+", "-").replace("/", "_") + "-"),
    "base64 with stray bits": line(
        2, lambda root: root[:-2] + chr(ord(root[-2]) + 1) + "="
    ),
    "longer root": line(2, lambda root: base64.b64encode(bytes(33)).decode()),
    "extension line": line(2, lambda root: root + "\nmore"),
    "empty line": line(2, lambda root: root + "\n"),
    "other origin": line(0, lambda name: name + "x"),
    "origin in capitals": line(0, lambda name: name.upper()),
}  # fmt: skip
NOTE_TRICKS: dict[str, Trick] = {
    "no newline at the end": lambda note: note[:-1],
    "two newlines at the end": lambda note: note + "\n",
    "text behind": lambda note: note + "unsigned\n",
    "unsigned text before": lambda note: "unsigned\n" + note,
    "line ends of Windows": lambda note: note.replace("\n", "\r\n"),
    "another dash": lambda note: note.replace("— ", "- "),
    "two spaces": lambda note: note.replace("— ", "—  "),
    "tab": lambda note: note.replace("\n\n— ", "\n\n—\t"),
    "no blank line": lambda note: note.replace("\n\n", "\n"),
    "three newlines": lambda note: note.replace("\n\n", "\n\n\n"),
    "signature twice": lambda note: note + note.rpartition("\n\n")[2],
    "signature of nobody": lambda note: note.rpartition("— ")[0],
    "cut signature": lambda note: note[:-6] + "\n",
    "NUL": lambda note: note.replace("\n\n", "\0\n\n"),
    "byte order mark": lambda note: "\ufeff" + note,
    "lone surrogate": lambda note: note.replace("\n\n", "\udcff\n\n"),
    "separator U+2028": lambda note: note.replace("\n", "\u2028", 1),
}  # fmt: skip


def opens(note: str, network: str) -> bool:
    try:
        Checkpoint.open(note, origin(network), {COORDINATOR.id})
    except ParisError as error:
        assert error.code == "log.checkpoint"
        return False
    return True


def test_a_checkpoint_has_one_form(world: World) -> None:
    tree = Tree([leaf_hash(bytes.fromhex(each.id)) for each in world.log])
    checkpoint = Checkpoint(origin(world.network), tree.size, tree.root())
    note = checkpoint.sign(COORDINATOR)
    assert opens(note, world.network)
    for name, trick in {**TEXT_TRICKS, **NOTE_TRICKS}.items():
        assert not opens(trick(note), world.network), name
    # The parser, not the signature, refuses: each text is signed by the right key as it stands.
    for name, trick in TEXT_TRICKS.items():
        text = trick(checkpoint.text)
        signed = sign_note(text, origin(world.network), COORDINATOR)
        assert not opens(signed, world.network), name
