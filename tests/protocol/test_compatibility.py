"""Every released version and this one read each other: statements kept as they were signed then.

`protocol/vectors/<version>/` is never made anew. A statement whose new fields are unused has the
bytes that the old version wrote, so the old version reads it; a statement of a later version, with
fields that nobody here knows, is opened too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paris_protocol.canonical import sha256_hex
from paris_protocol.envelope import KINDS, SELF, seal, unseal, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.records import STATEMENTS, Beat, Contribution, Policy, Record, Verdict
from paris_protocol.release import is_provenance, verify_release
from protocol.world import NODES

FOLDER = Path(__file__).parents[2] / "protocol" / "vectors"
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if path.name[:1].isdigit())


def kept(version: str, name: str) -> Any:
    return json.loads((FOLDER / version / name).read_text(encoding="utf-8"))


def statements() -> list[Any]:
    found = []
    for version in VERSIONS:
        whole = kept(version, "statements.json")
        for each in whole["statements"]:
            key = PrivateKey.from_seed(bytes.fromhex(whole["seeds"][each["signer"]]))
            found.append(pytest.param(whole["network"], key, each, id=f"{version}-{each['type']}"))
    return found


def test_what_is_released_is_kept() -> None:
    assert "0.1" in VERSIONS


@pytest.mark.parametrize(("network", "key", "each"), statements())
def test_old_statements_open_and_are_written_as_before(
    network: str, key: PrivateKey, each: dict[str, Any]
) -> None:
    opened = unseal_any(each["envelope"].encode(), network)
    assert (opened.id, opened.signer, opened.record.TYPE) == (each["id"], key.id, each["type"])
    assert opened.record.model_dump(mode="json") == each["record"]
    again = seal(opened.record, key, SELF if each["type"] == "genesis" else network)
    assert again.raw == each["envelope"].encode()


@pytest.mark.parametrize("version", VERSIONS)
def test_old_releases_verify(version: str) -> None:
    release = kept(version, "release.json")
    files = {path: text.encode() for path, text in release["files"].items()}
    digests = {path: (sha256_hex(data), len(data)) for path, data in files.items()}
    provenance = {path: data for path, data in files.items() if is_provenance(path)}
    assert verify_release(digests, provenance, release["network"]).merges > 0


class LaterBeat(Beat):
    """A beat of the next version."""

    mood: str
    parts: tuple[int, ...] = ()


def test_statements_of_the_next_version_open() -> None:
    network = "ab" * 32
    later = LaterBeat(at=1, assignment=None, step=2, state="idle", mood="fine", parts=(1, 2))
    opened = unseal(seal(later, NODES[0], network).raw, Beat, network, {NODES[0].id})
    assert opened.record == Beat(at=1, assignment=None, step=2, state="idle")
    with pytest.raises(ParisError):  # what this version needs may not be missing
        unseal(seal(later, NODES[0], network).raw, Policy, network, {NODES[0].id})


def records() -> list[type[Record]]:
    found, waiting = [], [Record]
    while waiting:
        waiting += (children := waiting.pop().__subclasses__())
        found += [each for each in children if each.__module__ == Record.__module__]
    return found


def test_later_fields_have_defaults_and_are_left_out_while_unused() -> None:
    for kind in records():
        assert set(kind.model_fields) >= kind.LATER
        for name in kind.LATER:
            assert not kind.model_fields[name].is_required(), f"{kind.__name__}.{name}"
    assert {"audit", "witnesses"} <= Policy.LATER
    assert "numerics" in Contribution.LATER
    assert "audit" in Verdict.LATER


def test_no_old_record_grew_a_field_that_is_always_written() -> None:
    for version in VERSIONS:
        for each in kept(version, "statements.json")["statements"]:
            kind = KINDS[each["type"]]
            assert set(kind.model_fields) - kind.LATER <= set(each["record"]), each["type"]
    assert len(STATEMENTS) == len(KINDS)
