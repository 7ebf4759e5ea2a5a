"""Vectors of others: Ed25519 edge cases, Merkle proofs, canonical JSON (foreign/README.md)."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from paris_protocol.canonical import canonical, parse
from paris_protocol.errors import ParisError
from paris_protocol.keys import verify
from paris_protocol.log import verify_consistency, verify_inclusion

FOLDER = Path(__file__).parent / "foreign"


def read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_wycheproof_ed25519() -> None:
    count = 0
    for group in read("wycheproof_ed25519.json")["testGroups"]:
        key = f"ed25519:{group['publicKey']['pk']}"
        for case in group["tests"]:
            found = verify(key, bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"]))
            assert found == (case["result"] == "valid"), case["comment"]
            count += 1
    assert count == 151


def judged(case: dict[str, Any]) -> str:
    try:
        good = verify(f"ed25519:{case['key']}", bytes.fromhex(case["sig"]), case["msg"].encode())
    except ParisError as error:
        assert error.code == "key.weak"
        return "w"
    return "." if good else "x"


def test_edge_cases_of_ed25519_are_judged_as_ever() -> None:
    cases = json.loads(gzip.decompress((FOLDER / "cctv_ed25519.json.gz").read_bytes()))
    assert len(cases) == 914
    expected = (FOLDER / "cctv_expected.txt").read_text().replace("\n", "")
    assert "".join(map(judged, cases)) == expected
    for case, letter in zip(cases, expected, strict=True):
        if "low_order_A" in (case["flags"] or ()):
            assert letter == "w", case["number"]


def proof(case: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(part) for part in case["proof"] or ()]


def test_merkle_inclusion() -> None:
    cases = read("merkle.json")["inclusion"]
    assert len(cases) == 98
    for name, case in cases.items():
        leaf, root = base64.b64decode(case["leafHash"]), base64.b64decode(case["root"])
        found = verify_inclusion(leaf, case["leafIdx"], case["treeSize"], proof(case), root)
        assert found != case["wantErr"], name


def test_merkle_consistency() -> None:
    cases = read("merkle.json")["consistency"]
    assert len(cases) == 98
    for name, case in cases.items():
        old, new = base64.b64decode(case["root1"] or ""), base64.b64decode(case["root2"] or "")
        found = verify_consistency(case["size1"], case["size2"], proof(case), old, new)
        assert found != case["wantErr"], name


@pytest.mark.parametrize("name", ["arrays", "french", "unicode"])
def test_canonical_json_that_is_the_same_here(name: str) -> None:
    case = read("jcs.json")[name]
    assert canonical(json.loads(case["input"])).decode() == case["output"]
    assert canonical(parse(case["output"].encode())).decode() == case["output"]


@pytest.mark.parametrize(
    ("name", "why"), [("values", "float"), ("structures", "float"), ("weird", "order")]
)
def test_canonical_json_that_is_not(name: str, why: str) -> None:
    case = read("jcs.json")[name]
    value = json.loads(case["input"])
    if why == "float":
        with pytest.raises(ParisError, match="float"):
            canonical(value)
        return
    # A smiley (surrogates in UTF-16) sorts before U+FB33 there, and behind it by code point.
    with pytest.raises(ParisError, match="canonical form"):
        parse(case["output"].encode())
    assert sorted(canonical(value).decode()) == sorted(case["output"])
