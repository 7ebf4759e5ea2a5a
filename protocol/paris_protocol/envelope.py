"""Signed statements: in-toto Statement v1 inside a DSSE envelope with one Ed25519 signature.

`payloadType` carries type and network, `keyid` is the public key: all three are checked, and the
signature verified, before the payload is parsed. The id of a statement is the SHA-256 of its DSSE
pre-authentication encoding. Refused: any envelope that is not canonical JSON, unknown or duplicate
fields, more or fewer than one signature, weak keys, oversized records (`record.*`, `key.weak`)::

    sealed = seal(Beat(...), key, network)
    opened = unseal(sealed.raw, Beat, network, signers={key.id})
    assert opened.record == sealed.record and opened.id == sealed.id
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar

from pydantic import ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signature

from paris_protocol.canonical import canonical, digest, parse, sha256_hex
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, verify
from paris_protocol.records import STATEMENTS, Genesis, Statement

T = TypeVar("T", bound=Statement)
Signers: TypeAlias = Collection[str] | Callable[[str], bool] | None

SELF: Final = "self"
"""Stands for the network in a genesis envelope, whose own id is the network's."""
KINDS: Final = {kind.TYPE: kind for kind in STATEMENTS}
_STATEMENT: Final = "https://in-toto.io/Statement/v1"
_PAYLOAD_TYPE: Final = re.compile(
    r"application/vnd\.in-toto\+json; type=([a-z-]{1,40}); network=(self|[0-9a-f]{64})", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Sealed(Generic[T]):
    """A verified statement: the record, the envelope's bytes, the statement id and the signer."""

    record: T
    raw: bytes
    id: str
    signer: str


@dataclass(frozen=True, slots=True)
class _Outer:
    """An envelope whose form is right and whose signature nobody has checked yet."""

    payload: bytes
    payload_type: str
    type: str
    network: str
    signer: str
    signature: bytes

    @property
    def pae(self) -> bytes:
        pae: bytes = Envelope(self.payload, self.payload_type, {}).pae()
        return pae


def _base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise ParisError("record.malformed", "base64 text expected")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ParisError("record.malformed", "not base64") from error
    if base64.b64encode(data).decode("ascii") != text:
        raise ParisError("record.malformed", "base64 with stray bits")
    return data


def _fields(value: Any, *names: str) -> list[Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise ParisError("record.malformed", f"an object of {', '.join(names)} expected")
    return [value[name] for name in names]


def _outer(raw: bytes, limit: int) -> _Outer:
    if len(raw) > limit:
        raise ParisError("record.too-large", f"{len(raw)} bytes, at most {limit}")
    payload, payload_type, signatures = _fields(parse(raw), "payload", "payloadType", "signatures")
    match = _PAYLOAD_TYPE.fullmatch(payload_type) if isinstance(payload_type, str) else None
    if match is None:
        raise ParisError("record.type", "unknown payload type")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise ParisError("record.malformed", "exactly one signature expected")
    signer, signature = _fields(signatures[0], "keyid", "sig")
    if not isinstance(signer, str):
        raise ParisError("record.malformed", "keyid is no text")
    return _Outer(_base64(payload), match[0], match[1], match[2], signer, _base64(signature))


def _may_sign(signers: Signers, signer: str) -> bool:
    if signers is None:
        return True
    return signers(signer) if callable(signers) else signer in signers


def _open(outer: _Outer, kind: type[T], raw: bytes) -> Sealed[T]:
    """Parse the payload of an envelope that has passed every outer check."""
    if len(outer.payload) > kind.MAX_BYTES:
        raise ParisError("record.too-large", f"{len(outer.payload)} bytes of {kind.TYPE}")
    inner, predicate_type, subject, predicate = _fields(
        parse(outer.payload), "_type", "predicateType", "subject", "predicate"
    )
    text = canonical(predicate)
    named = [{"name": kind.TYPE, "digest": {"sha256": sha256_hex(text)}}]
    if inner != _STATEMENT or predicate_type != _predicate_type(kind) or subject != named:
        raise ParisError("record.malformed", "statement and predicate disagree")
    try:
        # A statement of the next version may have fields that are unknown here; they are signed.
        record = kind.model_validate_json(text, extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ParisError("record.malformed", f"{kind.TYPE}.{where}: {first['msg']}") from error
    return Sealed(record, raw, sha256_hex(outer.pae), outer.signer)


def _predicate_type(kind: type[Statement]) -> str:
    return f"https://paris-ddm.org/{kind.TYPE}/v1"


def seal(record: T, key: PrivateKey, network: str) -> Sealed[T]:
    """Sign a record for a network (`SELF` for a genesis); `record.too-large` beyond its cap."""
    if (network == SELF) != isinstance(record, Genesis):
        raise ParisError("record.network", f"{record.TYPE} for {network}")
    predicate = record.model_dump(mode="json")
    payload = canonical(
        {
            "_type": _STATEMENT,
            "predicateType": _predicate_type(type(record)),
            "subject": [{"name": record.TYPE, "digest": {"sha256": digest(predicate)}}],
            "predicate": predicate,
        }
    )
    if len(payload) > record.MAX_BYTES:
        raise ParisError("record.too-large", f"{len(payload)} bytes of {record.TYPE}")
    payload_type = f"application/vnd.in-toto+json; type={record.TYPE}; network={network}"
    if _PAYLOAD_TYPE.fullmatch(payload_type) is None:
        raise ParisError("record.network", f"{network[:80]} is no network id")
    envelope = Envelope(payload, payload_type, {})
    pae = envelope.pae()
    envelope.signatures[key.id] = Signature(key.id, key.sign(pae).hex())
    return Sealed(record, canonical(envelope.to_dict()), sha256_hex(pae), key.id)


def unseal(raw: bytes, kind: type[T], network: str, signers: Signers) -> Sealed[T]:
    """Open an envelope of one type, network and set (or predicate) of signers.

    Checked in this order: size, outer form, type, network, signer, signature; only then is the
    payload parsed. `signers=None` admits any sound key (for statements that name their signer).
    """
    outer = _outer(raw, 2 * kind.MAX_BYTES)
    if outer.type != kind.TYPE:
        raise ParisError("record.type", f"{outer.type} where {kind.TYPE} is expected")
    if outer.network != network:
        raise ParisError("record.network", f"of network {outer.network[:12]}")
    if not _may_sign(signers, outer.signer):
        raise ParisError("record.signer", f"{kind.TYPE} signed by {outer.signer[:80]}")
    if not verify(outer.signer, outer.signature, outer.pae):
        raise ParisError("record.signature", kind.TYPE)
    return _open(outer, kind, raw)


def unseal_any(raw: bytes, network: str, signers: Signers = None) -> Sealed[Any]:
    """Open an envelope of whatever type it names; the caller looks at `record` and `signer`."""
    type_name, _, _ = peek(raw)
    return unseal(raw, KINDS[type_name], SELF if type_name == Genesis.TYPE else network, signers)


def peek(raw: bytes) -> tuple[str, str, str]:
    """Type name, network and signer as the envelope claims them: a hint, until it is unsealed."""
    outer = _outer(raw, 2 * max(kind.MAX_BYTES for kind in STATEMENTS))
    if outer.type not in KINDS:
        raise ParisError("record.type", outer.type)
    return outer.type, outer.network, outer.signer


def statement_id(raw: bytes) -> str:
    """The id of an envelope, computed from its bytes without checking its signature."""
    return sha256_hex(_outer(raw, 2 * max(kind.MAX_BYTES for kind in STATEMENTS)).pae)


def network_id(genesis_raw: bytes) -> str:
    """The id of the network that this genesis envelope founds: its statement id."""
    return open_genesis(genesis_raw).id


def open_genesis(raw: bytes, expected_id: str | None = None) -> Sealed[Genesis]:
    """Open a genesis: signed by the root key that it names, and of the id that an invite gave.

    Raises `network.mismatch` for another id, otherwise as `unseal` does.
    """
    sealed = unseal(raw, Genesis, SELF, None)
    if sealed.record.root_key != sealed.signer:
        raise ParisError("record.signer", "a genesis is signed by the root key that it names")
    if expected_id is not None and sealed.id != expected_id:
        raise ParisError("network.mismatch", f"{sealed.id} instead of {expected_id}")
    return sealed
