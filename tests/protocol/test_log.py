"""The log: proofs of every size, tiles that rebuild the tree, and a parser with one reading."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol.errors import ParisError
from paris_protocol.log import (
    EMPTY_ROOT,
    TILE,
    Checkpoint,
    Tree,
    bundle_path,
    bundles,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    merkle_root,
    node_hash,
    note_hash,
    open_note,
    origin,
    parse_bundle,
    sign_note,
    tile_path,
    verifier_key,
    verify_consistency,
    verify_inclusion,
)
from protocol.world import COORDINATOR, NODES

HASHES = [leaf_hash(i.to_bytes(4, "big")) for i in range(70)]
NAME = origin("ab" * 32)


def reference_root(hashes: list[bytes]) -> bytes:
    """RFC 6962 §2.1, word by word."""
    if not hashes:
        return EMPTY_ROOT
    if len(hashes) == 1:
        return hashes[0]
    k = 1
    while 2 * k < len(hashes):
        k *= 2
    return node_hash(reference_root(hashes[:k]), reference_root(hashes[k:]))


def test_roots_follow_the_rfc() -> None:
    tree = Tree(HASHES)
    for size in range(len(HASHES) + 1):
        expected = reference_root(HASHES[:size])
        assert merkle_root(HASHES[:size]) == tree.root(size) == expected
    assert merkle_root([]) == hashlib.sha256(b"").digest()


def test_every_inclusion_proof_verifies_and_no_other_place_does() -> None:
    for size in range(1, 20):
        root = merkle_root(HASHES[:size])
        for index in range(size):
            proof = inclusion_proof(HASHES, index, size)
            assert verify_inclusion(HASHES[index], index, size, proof, root)
            for other in range(size + 1):
                if other != index:
                    assert not verify_inclusion(HASHES[index], other, size, proof, root)
            assert not verify_inclusion(HASHES[-1], index, size, proof, root)
            assert not verify_inclusion(HASHES[index], index, size, [*proof, root], root)
            assert not verify_inclusion(HASHES[index], index, size, proof, HASHES[-1])
            if proof:
                assert not verify_inclusion(HASHES[index], index, size, proof[:-1], root)


def test_every_consistency_proof_verifies_and_no_other_root_does() -> None:
    for size in range(1, 20):
        root = merkle_root(HASHES[:size])
        for old in range(1, size + 1):
            before, proof = merkle_root(HASHES[:old]), consistency_proof(HASHES, old, size)
            assert verify_consistency(old, size, proof, before, root)
            assert not verify_consistency(old, size, proof, HASHES[-1], root)
            assert not verify_consistency(old, size, [*proof, root], before, root)
            if old < size:
                assert not verify_consistency(old, size, proof, before, HASHES[-1])
                assert not verify_consistency(old, size, proof[:-1], before, root)
                assert not verify_consistency(old + 1, size, proof, before, root)
    assert not verify_consistency(0, 1, [], EMPTY_ROOT, HASHES[0])


@settings(max_examples=200)
@given(
    st.integers(-1, 1 << 62),
    st.integers(-1, 1 << 62),
    st.lists(st.binary(min_size=31, max_size=33), max_size=70),
)
def test_made_up_proofs_are_refused(index: int, size: int, proof: list[bytes]) -> None:
    if proof:
        assert not verify_inclusion(HASHES[0], index, size, proof, HASHES[1])
        assert not verify_consistency(index, size, proof, HASHES[0], HASHES[1])


def test_out_of_range_is_an_error_of_the_caller() -> None:
    tree = Tree(HASHES)
    for attempt in (
        lambda: tree.root(71),
        lambda: tree.inclusion(70),
        lambda: tree.inclusion(3, 3),
        lambda: tree.consistency(0),
        lambda: tree.consistency(9, 8),
    ):
        with pytest.raises(IndexError):
            attempt()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_tiles_of_any_growth_rebuild_the_tree(growth: list[int]) -> None:
    tree, files, entries = Tree(), {}, []
    for step in growth:
        old = tree.size
        for _ in range(step):
            entries.append(hashlib.sha256(b"%d" % tree.size).digest())
            tree.append(leaf_hash(entries[-1]))
        files.update({**dict(tree.tiles(old)), **dict(bundles(entries, old))})
    assert not list(tree.tiles(tree.size))
    assert not list(bundles(entries, len(entries)))
    hashes, read = [], []
    for n in range(-(-tree.size // TILE)):
        width = min(TILE, tree.size - n * TILE)
        tile = files[tile_path(0, n, width)]
        hashes += [tile[i : i + 32] for i in range(0, len(tile), 32)]
        read += parse_bundle(files[bundle_path(n, width)], width)
    assert read == entries
    assert merkle_root(hashes) == tree.root()
    for n in range(tree.size // TILE):
        level1 = tree.size // TILE
        top = files[tile_path(1, 0, level1)]
        assert top[32 * n : 32 * n + 32] == merkle_root(hashes[n * TILE : (n + 1) * TILE])


def test_bundles_of_another_form_are_refused() -> None:
    ((_, raw),) = bundles([b"x" * 32, b"y" * 32])
    assert parse_bundle(raw, 2) == [b"x" * 32, b"y" * 32]
    for bad in (raw[:-1], raw + b"\0", b"\0\x21" + raw[2:], raw[:34]):
        with pytest.raises(ParisError):
            parse_bundle(bad, 2)


def test_example_of_the_signed_note_specification() -> None:
    """https://c2sp.org/signed-note, section Example."""
    name, number, public = (
        "example.com/foo",
        "530d903a",
        "AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
    )
    key = f"ed25519:{base64.b64decode(public)[1:].hex()}"
    note = (
        "This is an example message.\n\n— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi"
        "2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
    )
    assert note_hash(name, key).hex() == number
    assert verifier_key(name, key) == f"{name}+{number}+{public}"
    assert open_note(note, name, {key}) == "This is an example message.\n"


CHECKPOINT = Checkpoint(NAME, 70, merkle_root(HASHES))
NOTE = CHECKPOINT.sign(COORDINATOR)


def refused(note: str, **changes: object) -> None:
    with pytest.raises(ParisError) as caught:
        Checkpoint.open(note, NAME, {COORDINATOR.id})
    assert caught.value.code == "log.checkpoint"


def test_checkpoint_round_trip() -> None:
    assert Checkpoint.open(NOTE, NAME, {NODES[0].id, COORDINATOR.id}) == CHECKPOINT
    for name, keys in ((origin("cd" * 32), {COORDINATOR.id}), (NAME, {NODES[0].id}), (NAME, set())):
        with pytest.raises(ParisError):
            Checkpoint.open(NOTE, name, keys)


@settings(max_examples=300)
@given(st.integers(0, 1 << 20), st.integers(0, 6))
def test_any_changed_character_is_refused(place: int, bit: int) -> None:
    place %= len(NOTE)
    refused(NOTE[:place] + chr(ord(NOTE[place]) ^ 1 << bit) + NOTE[place + 1 :])


ROOT64 = base64.b64encode(CHECKPOINT.root).decode()


@pytest.mark.parametrize(
    "text",
    [
        f"{NAME}\n070\n{ROOT64}\n",
        f"{NAME}\n+70\n{ROOT64}\n",
        f"{NAME}\n 70\n{ROOT64}\n",
        f"{NAME}\n7_0\n{ROOT64}\n",
        f"{NAME}\n٧٠\n{ROOT64}\n",
        f"{NAME}\n70\n{ROOT64.rstrip('=')}\n",
        f"{NAME}\n70\n{ROOT64[:-2]}{chr(ord(ROOT64[-2]) + 1)}=\n",
        f"{NAME}\n70\n{ROOT64} \n",
        f"{NAME}\n70\n{ROOT64}\nextension\n",
        f"{NAME}\n70\n{ROOT64}\n\n",
        f"{NAME}\n70\n",
        f"{NAME}\n70\n{base64.b64encode(b'short').decode()}\n",
        f"{NAME}/\n70\n{ROOT64}\n",
        f"\n{NAME}\n70\n{ROOT64}\n",
    ],
)
def test_signed_texts_of_another_form_are_refused(text: str) -> None:
    refused(sign_note(text, NAME, COORDINATOR))


SIGNATURE = NOTE.split("\n")[-2]


@pytest.mark.parametrize(
    "note",
    [
        NOTE[:-1],
        NOTE + "\n",
        NOTE + "hello\n",
        NOTE.replace("\n\n", "\n\n\n"),
        NOTE.replace("\n\n", "\n"),
        NOTE.replace("\n", "\r\n"),
        NOTE.replace("— ", "-- "),
        NOTE.replace("— ", "—  "),
        NOTE.replace("— ", "—\u00a0"),
        NOTE.replace("— ", "— \t"),
        NOTE + SIGNATURE + "\n",
        NOTE[: -len(SIGNATURE) - 1],
        "\ufeff" + NOTE,
        NOTE + "— x AAAA=\n",
        NOTE + "— x+y AAAAAAAA\n",
        NOTE + "— " + "x" * 200_000 + " AAAAAAAA\n",
        "",
        "\n\n",
    ],
)
def test_notes_of_another_form_are_refused(note: str) -> None:
    refused(note)


def test_signatures_of_unknown_keys_are_passed_over_and_wrong_ones_of_known_keys_are_not() -> None:
    witness = sign_note(CHECKPOINT.text, "witness.example", NODES[0]).split("\n")[-2]
    assert Checkpoint.open(f"{NOTE}{witness}\n", NAME, {COORDINATOR.id}) == CHECKPOINT
    assert Checkpoint.open(
        NOTE[: -len(SIGNATURE) - 1] + f"{witness}\n{SIGNATURE}\n", NAME, {COORDINATOR.id}
    )
    wrong = base64.b64encode(note_hash(NAME, COORDINATOR.id) + bytes(64)).decode()
    refused(f"{NOTE}— {NAME} {wrong}\n")
    refused(NOTE[: -len(SIGNATURE) - 1] + f"{witness}\n")
