"""Rows "forged signature / other payloadType" and "Ed25519 edge keys, malleable signature"."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from adversary.light import FakeNode, counter, refusal
from fuzz.statements import signed
from paris_protocol.canonical import canonical
from paris_protocol.envelope import KINDS, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import FIELD, SMALL_ORDER, PrivateKey, key_bytes, verify
from paris_protocol.records import Beat
from protocol.world import NODES, World

ORDER = 2**252 + 27742317777372353535851937790883648493
"""The order of Ed25519's base point: s and s + ORDER sign the same text in lenient verifiers."""


@pytest.fixture(scope="module")
def world() -> World:
    return World().lived()


def accepted(raw: bytes, kind: Any, network: str) -> bool:
    try:
        unseal(raw, kind, network, None)
    except ParisError:
        return False
    return True


def test_damage_anywhere_in_an_envelope_is_refused(world: World) -> None:
    record = Beat(at=1, assignment=None, step=3, state="training")
    raw = world.put(record, NODES[0]).raw
    assert accepted(raw, Beat, world.network)
    for place in range(len(raw)):
        spoilt = bytearray(raw)
        spoilt[place] ^= 1
        assert not accepted(bytes(spoilt), Beat, world.network), place


def test_no_statement_passes_as_another_type_or_for_another_network(world: World) -> None:
    found = {each.record.TYPE: each for each in world.log}
    for name, sealed in found.items():
        if name == "genesis":
            continue
        assert accepted(sealed.raw, type(sealed.record), world.network)
        assert not accepted(sealed.raw, type(sealed.record), "0" * 64)
        for kind in KINDS.values():
            if name == kind.TYPE:
                continue
            assert not accepted(sealed.raw, kind, world.network), (name, kind.TYPE)
            renamed = json.loads(sealed.raw)
            old, new = f"type={name};", f"type={kind.TYPE};"
            renamed["payloadType"] = renamed["payloadType"].replace(old, new)
            assert not accepted(canonical(renamed), kind, world.network), (name, kind.TYPE)


def test_a_stranger_cannot_speak_for_a_node_or_for_the_coordinator(tmp_path: Path) -> None:
    async def life() -> None:
        async with counter(tmp_path) as (office, control):
            honest, thief = FakeNode(office.network, 1), FakeNode(office.network, 2)
            await control.post("register", honest.registration())
            # Eve's registration of Ada's key, an unknown key, and Ada's text under Eve's signature.
            stolen = json.loads(honest.registration())
            stolen["signatures"] = json.loads(thief.registration())["signatures"]
            for raw, code in (
                (canonical(stolen), "record.signature"),
                (signed("registration", body_of(honest.registration()), office.network, thief.key),
                 "record.signer"),
            ):  # fmt: skip
                assert await refusal(control.post("register", raw)) == code
            assert await refusal(control.post("lease", thief.request())) == "record.signer"
            assert thief.key.id not in office.desk.nodes
            answer = await control.post("lease", honest.request())
            forged = canonical(answer["assignment"])
            with pytest.raises(ParisError, match="signed by"):
                unseal(forged, KINDS["assignment"], office.network, {thief.key.id})

    asyncio.run(life())


def body_of(raw: bytes) -> Any:
    return json.loads(base64.b64decode(json.loads(raw)["payload"]))["predicate"]


# ---------------------------------------------------------------- Ed25519 edge cases


def edge_keys() -> list[bytes]:
    """Small-order points, and encodings of points that are not the canonical one."""
    high = [(FIELD + y).to_bytes(32, "little") for y in range(19)]
    return [*sorted(SMALL_ORDER), *high]


def test_keys_that_prove_nothing_cannot_be_registered(tmp_path: Path) -> None:
    assert len(SMALL_ORDER) == 14

    async def life() -> None:
        async with counter(tmp_path) as (office, control):
            honest = FakeNode(office.network, 1)
            predicate = body_of(honest.registration())
            for raw in edge_keys():
                weak = f"ed25519:{raw.hex()}"
                # With such keys an all-zero signature verifies for many texts in many verifiers.
                envelope = json.loads(honest.registration())
                payload = predicate | {"node": weak, "peer_id": ""}
                made = json.loads(signed("registration", payload, office.network, honest.key))
                for sig in (bytes(64), raw + bytes(32), b"\1" + bytes(63)):
                    text = base64.b64encode(sig).decode()
                    envelope = made | {"signatures": [{"keyid": weak, "sig": text}]}
                    code = await refusal(control.post("register", canonical(envelope)))
                    assert code == "key.weak", weak
            assert not office.desk.nodes
            assert await refusal(control.post("register", honest.registration())) == ""

    asyncio.run(life())


def test_a_signature_has_one_form(world: World) -> None:
    key = PrivateKey.from_seed(bytes(32))
    good = key.sign(b"text")
    assert verify(key.id, good, b"text")
    s = int.from_bytes(good[32:], "little")
    for other in (s + ORDER, s + 2 * ORDER, ORDER - s, s | 1 << 255):
        if other < 1 << 256:
            assert not verify(key.id, good[:32] + other.to_bytes(32, "little"), b"text")
    for length in (0, 32, 63, 65):
        assert not verify(key.id, (good + b"\0")[:length], b"text")
    for bad in ("", "ed25519:", "ed25519:" + "0" * 63, "ED25519:" + key.id[8:], key.id + "\n"):
        with pytest.raises(ParisError):
            key_bytes(bad)
