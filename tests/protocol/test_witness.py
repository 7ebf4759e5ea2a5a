"""Cosignatures: the specification's form, the quorum, and lines that are wrong or a stranger's."""

from __future__ import annotations

import base64

import pytest

from paris_protocol.errors import ParisError
from paris_protocol.log import Checkpoint, origin, sign_note
from paris_protocol.witness import (
    check_quorum,
    cosign,
    cosignatures,
    cosigner_hash,
    cosigner_key,
    with_cosignatures,
    without_cosignatures,
    witness_name,
)
from protocol.world import COORDINATOR, NODES, OTHER

NAME = origin("ab" * 32)
NOTE = Checkpoint(NAME, 7, bytes(range(32))).sign(COORDINATOR)
KEYS = (NODES[0].id, NODES[1].id, OTHER.id)
LINES = [cosign(NOTE, witness_name(key.id), key, 1_700_000_000) for key in (*NODES[:2], OTHER)]


def refused(note: str, quorum: int = 1) -> str:
    with pytest.raises(ParisError) as caught:
        check_quorum(note, KEYS, quorum)
    return caught.value.code


def test_example_of_the_cosignature_specification() -> None:
    """https://c2sp.org/tlog-cosignature: its example, whose key is not printed, but its hash is."""
    line = (
        "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJs"
        "X3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA=="
    )
    blob = base64.b64decode(line.split(" ")[2])
    assert (len(blob), int.from_bytes(blob[4:12], "big")) == (76, 1_679_315_147)
    ours = base64.b64decode(LINES[0].split(" ")[2])
    assert len(ours) == 76
    assert ours[:4] == cosigner_hash(witness_name(NODES[0].id), NODES[0].id)
    assert int.from_bytes(ours[4:12], "big") == 1_700_000_000
    name, number, public = cosigner_key("w", NODES[0].id).split("+")
    assert (name, len(number), base64.b64decode(public)[:1]) == ("w", 8, b"\x04")


def test_the_signed_message_is_that_of_the_specification() -> None:
    text = NOTE.partition("\n\n")[0] + "\n"
    message = f"cosignature/v1\ntime 1700000000\n{text}".encode()
    blob = base64.b64decode(LINES[0].split(" ")[2])
    assert blob[12:] == NODES[0].sign(message)


def test_a_quorum_of_known_witnesses() -> None:
    note = NOTE + LINES[0] + LINES[2]
    assert check_quorum(note, KEYS, 2) == dict.fromkeys((KEYS[0], KEYS[2]), 1_700_000_000)
    assert check_quorum(NOTE, KEYS, 0) == {}
    assert refused(note, 3) == "log.witness"
    assert refused(NOTE) == "log.witness"
    assert Checkpoint.open(note, NAME, {COORDINATOR.id}).size == 7


def test_lines_of_strangers_are_passed_over() -> None:
    stranger = cosign(NOTE, "witness.example/w", COORDINATOR, 1)
    assert check_quorum(NOTE + stranger + LINES[0], KEYS, 1) == {KEYS[0]: 1_700_000_000}
    assert refused(NOTE + stranger) == "log.witness"
    # A plain note signature by a witness' key is no cosignature, and the log's name is no witness'.
    plain = sign_note(NOTE.partition("\n\n")[0] + "\n", "w", NODES[0]).split("\n")[-2]
    assert refused(f"{NOTE}{plain}\n") == "log.witness"
    assert refused(NOTE + cosign(NOTE, NAME, NODES[0], 1)) == "log.witness"


@pytest.mark.parametrize("place", [0, 5, 11, 12, 40, 75])
def test_wrong_lines_of_known_witnesses_are_refused(place: int) -> None:
    name = witness_name(NODES[0].id)
    blob = bytearray(base64.b64decode(LINES[0].split(" ")[2]))
    blob[place] ^= 1
    line = f"— {name} {base64.b64encode(bytes(blob)).decode()}\n"
    note = NOTE + line + LINES[1]
    if place == 0:  # the hash of no known key: a stranger
        assert list(check_quorum(note, KEYS, 1)) == [KEYS[1]]
    else:
        assert refused(note) == "log.witness"


def test_two_lines_of_one_witness_and_other_notes_are_refused() -> None:
    again = cosign(NOTE, "another.example/name", NODES[0], 1_700_000_001)
    assert refused(NOTE + LINES[0] + again) == "log.witness"
    other = Checkpoint(NAME, 8, bytes(32)).sign(COORDINATOR)
    assert refused(other + LINES[0]) == "log.witness"
    assert refused(NOTE + LINES[0][:-1]) == "log.checkpoint"
    with pytest.raises(ParisError):
        with_cosignatures(NOTE, [LINES[0][:-1]] * 2000)


def test_what_strangers_added_can_be_left_out() -> None:
    stranger = cosign(NOTE, "witness.example/w", COORDINATOR, 1)
    note = without_cosignatures(NOTE + stranger + LINES[1] + LINES[0], KEYS)
    assert note == NOTE + LINES[1] + LINES[0]
    assert set(cosignatures(note, KEYS)) == {KEYS[0], KEYS[1]}
