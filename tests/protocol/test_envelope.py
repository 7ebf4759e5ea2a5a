"""Nothing unsigned is believed: every change of an envelope is refused, and before it is parsed."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol import envelope
from paris_protocol.canonical import canonical
from paris_protocol.envelope import (
    SELF,
    network_id,
    open_genesis,
    peek,
    seal,
    statement_id,
    unseal,
    unseal_any,
)
from paris_protocol.errors import ParisError
from paris_protocol.records import Beat, Genesis, Statement
from protocol.world import NODES, ROOT, World, genesis_record, key

WORLD = World().lived()
NETWORK = WORLD.network
BEAT = seal(Beat(at=1, assignment=None, step=2, state="idle"), NODES[0], NETWORK)
ONE_OF_EACH = {type(each.record): each for each in [*WORLD.log, BEAT]}


def code(raw: bytes, kind: type[Statement] = Beat, **changes: Any) -> str:
    arguments = {"network": NETWORK, "signers": {NODES[0].id}} | changes
    with pytest.raises(ParisError) as caught:
        unseal(raw, kind, **arguments)
    return caught.value.code


def test_round_trip_of_every_kind() -> None:
    for kind, sealed in ONE_OF_EACH.items():
        network = SELF if kind is Genesis else NETWORK
        assert unseal(sealed.raw, kind, network, {sealed.signer}) == sealed
        assert unseal(sealed.raw, kind, network, lambda signer: bool(signer)) == sealed
        assert unseal_any(sealed.raw, NETWORK) == sealed
        assert peek(sealed.raw) == (kind.TYPE, network, sealed.signer)
        assert statement_id(sealed.raw) == sealed.id


@settings(max_examples=300)
@given(st.integers(0, 1 << 20), st.integers(0, 7))
def test_any_flipped_bit_is_refused(place: int, bit: int) -> None:
    raw = bytearray(BEAT.raw)
    raw[place % len(raw)] ^= 1 << bit
    with pytest.raises(ParisError):
        unseal(bytes(raw), Beat, NETWORK, {NODES[0].id})


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_garbage_is_refused_with_a_code(raw: bytes) -> None:
    for attempt in (lambda: unseal(raw, Beat, NETWORK, None), lambda: unseal_any(raw, NETWORK)):
        with pytest.raises(ParisError):
            attempt()


def test_types_are_not_interchangeable() -> None:
    for kind, sealed in ONE_OF_EACH.items():
        for other in ONE_OF_EACH.keys() - {kind}:
            network = SELF if kind is Genesis else NETWORK
            assert code(sealed.raw, other, network=network, signers=None) == "record.type"


def test_network_and_signer_are_checked_before_the_signature_and_the_payload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("reached too early")

    monkeypatch.setattr(envelope, "_open", never)
    outer = json.loads(BEAT.raw)
    broken = base64.b64encode(bytes(64)).decode()
    unsigned = canonical(outer | {"signatures": [{"keyid": NODES[0].id, "sig": broken}]})
    assert code(unsigned) == "record.signature"
    monkeypatch.setattr(envelope, "verify", never)
    assert code(unsigned, network="0" * 64) == "record.network"
    assert code(unsigned, signers=set()) == "record.signer"
    assert code(unsigned, signers=lambda signer: False) == "record.signer"


def test_size_is_checked_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "parse", lambda raw: pytest.fail("parsed"))
    assert code(b"x" * (2 * Beat.MAX_BYTES + 1)) == "record.too-large"


def signed(payload: bytes) -> bytes:
    """An envelope with a good signature over any payload."""
    outer = json.loads(BEAT.raw)
    made = envelope.Envelope(payload, outer["payloadType"], {})
    sig = base64.b64encode(NODES[0].sign(made.pae())).decode()
    text = base64.b64encode(payload).decode()
    return canonical(outer | {"payload": text, "signatures": [{"keyid": NODES[0].id, "sig": sig}]})


def test_signed_nonsense_is_refused() -> None:
    inner = json.loads(base64.b64decode(json.loads(BEAT.raw)["payload"]))
    assert unseal(signed(canonical(inner)), Beat, NETWORK, None).record == BEAT.record

    def with_predicate(**changes: Any) -> bytes:
        predicate = inner["predicate"] | changes
        digest = {"sha256": envelope.digest(predicate)}
        return canonical(
            inner | {"predicate": predicate, "subject": [{"name": "beat", "digest": digest}]}
        )

    assert unseal(signed(with_predicate(step=3)), Beat, NETWORK, None).record.step == 3
    # What the next version adds is signed, and unknown here.
    assert unseal(signed(with_predicate(extra=1)), Beat, NETWORK, None).record == BEAT.record
    nonsense = [
        b"", b"{}", b"[]", b"null", b"\xff", canonical(inner) + b" ",
        canonical(inner).replace(b'"step":2', b'"step":2,"step":3'),
        canonical(inner).replace(b'"step":2', b'"step":2.0'),
        canonical(inner | {"_type": "other"}),
        canonical(inner | {"predicateType": "https://paris-ddm.org/index/v1"}),
        canonical(inner | {"subject": []}),
        canonical(inner | {"extra": 1}),
        with_predicate(step="2"), with_predicate(step=-1),
        with_predicate(protocol=2), with_predicate(state="x" * 201),
    ]  # fmt: skip
    for payload in nonsense:
        assert code(signed(payload)) == "record.malformed", payload
    assert code(signed(b"x" * (Beat.MAX_BYTES + 1))) == "record.too-large"


def test_weak_keys_cannot_sign() -> None:
    outer = json.loads(BEAT.raw)
    weak = "ed25519:" + "00" * 32
    raw = canonical(outer | {"signatures": [outer["signatures"][0] | {"keyid": weak}]})
    assert code(raw, signers=None) == "key.weak"


def test_records_too_large_are_not_sealed() -> None:
    record = World().policies[0].record.model_copy(update={"bootstraps": ("x" * 200,) * 400})
    with pytest.raises(ParisError) as caught:
        seal(record, ROOT, NETWORK)
    assert caught.value.code == "record.too-large"


def test_genesis_pins_the_network_and_its_root_key() -> None:
    raw = WORLD.genesis.raw
    assert network_id(raw) == NETWORK == open_genesis(raw, NETWORK).id
    with pytest.raises(ParisError) as caught:
        open_genesis(raw, "0" * 64)
    assert caught.value.code == "network.mismatch"
    usurped = seal(genesis_record(), key("usurper"), SELF)
    with pytest.raises(ParisError) as caught:
        open_genesis(usurped.raw)
    assert caught.value.code == "record.signer"
    for record, network in ((genesis_record(), NETWORK), (BEAT.record, SELF), (BEAT.record, "x")):
        with pytest.raises(ParisError):
            seal(record, ROOT, network)
