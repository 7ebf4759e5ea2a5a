"""Strangers' statements for the fuzzing: valid ones, ways to spoil them, and whoever reads them.

A stranger has a key of his own, and a false coordinator has the network's: statements are spoiled
first and signed then, so that the damage gets past the signature::

    raw = signed("beat", spoiled(random, predicate), network, key)
"""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutate import damaged, loose, spoiled
from paris_node.leases import check_lease, needed_blobs, version_tuple
from paris_protocol import audit
from paris_protocol.canonical import canonical, digest, parse
from paris_protocol.draws import check_draws
from paris_protocol.envelope import (
    KINDS,
    SELF,
    open_genesis,
    peek,
    statement_id,
    unseal,
    unseal_any,
)
from paris_protocol.errors import ParisError
from paris_protocol.lineage import MOST_STATES, Lineage, check_contribution, committed_steps
from paris_protocol.records import (
    Assignment,
    AuditRules,
    AuditTask,
    Draw,
    Genesis,
    Merge,
    OpenState,
)
from protocol.auditworld import AuditWorld, lived
from protocol.world import COORDINATOR, NODES, ROOT

VECTORS = Path(__file__).parents[2] / "protocol" / "vectors"


@functools.cache
def world() -> AuditWorld:
    """A network of statements: audited rounds, merges, a revocation with its revert."""
    made = lived()
    merge = next(each.record for each in made.log if each.id == made.heads[0].merge)
    taken = [each for each in made.log if each.id == merge.inputs[0].contribution]
    made.revert(made.revoke(taken))
    return made


@functools.cache
def released() -> dict[str, bytes]:
    """The files of a release of that network."""
    return world().release()


@functools.cache
def vectors(name: str) -> Any:
    """One of the protocol's vector files."""
    return json.loads((VECTORS / f"{name}.json").read_text("utf-8"))


# ---------------------------------------------------------------- statements


def statements() -> list[bytes]:
    """One envelope of every kind that the world and the vectors have."""
    found = {each.record.TYPE: each.raw for each in world().log}
    for each in vectors("envelopes")["statements"]:
        raw = each["envelope"].encode()
        found.setdefault(peek(raw)[0], raw)
    return list(found.values())


def signed(kind: str, predicate: Any, network: str, key: Any) -> bytes:
    """An envelope around whatever predicate, signed as its kind demands: a stranger with a key."""
    try:
        named = digest(predicate)
    except ParisError:
        named = "0" * 64
    payload = loose({
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": f"https://paris-ddm.org/{kind}/v1",
        "subject": [{"name": kind, "digest": {"sha256": named}}],
        "predicate": predicate,
    })  # fmt: skip
    payload_type = f"application/vnd.in-toto+json; type={kind}; network={network}"
    pae = b"DSSEv1 %d %b %d %b" % (
        len(payload_type), payload_type.encode(), len(payload), payload,
    )  # fmt: skip
    return canonical({
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": key.id, "sig": base64.b64encode(key.sign(pae)).decode()}],
    })  # fmt: skip


def predicate_of(raw: bytes) -> Any:
    """What an envelope says, unchecked."""
    return json.loads(base64.b64decode(json.loads(raw)["payload"]))["predicate"]


def spoil_statement(random: Random, seeds: list[bytes]) -> bytes:
    """A statement that is spoiled outside (bytes, envelope) or inside (predicate, then signed)."""
    raw = random.choice(seeds)
    way = random.randrange(4)
    if way == 0:
        return damaged(random, raw, seeds)
    if way == 1:
        return loose(spoiled(random, json.loads(raw)))
    kind, network, _ = peek(raw)
    key = ROOT if kind == Genesis.TYPE else NODES[0]
    return signed(kind, spoiled(random, predicate_of(raw)), network, key)


def read_statement(raw: bytes) -> object:
    """Every way in which an envelope is opened."""
    statement_id(raw)
    kind, network, _ = peek(raw)
    if network == SELF:
        return open_genesis(raw)
    sealed = unseal_any(raw, network)
    return unseal(raw, KINDS[kind], network, {sealed.signer})


def spoil_merge(random: Random, seeds: list[bytes]) -> bytes:
    """A merge, signed by the coordinator, that is not quite what the rules ask for."""
    merge = next(each for each in world().log if isinstance(each.record, Merge))
    spoilt = spoiled(random, merge.record.model_dump(mode="json"))
    return signed(Merge.TYPE, spoilt, world().network, COORDINATOR)


def read_merge(raw: bytes) -> object:
    """A merge as the verifier of a release takes it: a false coordinator has a key as well."""
    sealed = unseal(raw, Merge, world().network, None)
    return Lineage(world().genesis.record).apply(sealed, world().accepted())


def units() -> list[bytes]:
    """Assignment, commitment and contribution of one unit, as lines."""
    by_type = {each.record.TYPE: each.raw for each in reversed(world().log)}
    return [b"\n".join(by_type[kind] for kind in ("assignment", "commitment", "contribution"))]


def spoil_unit(random: Random, seeds: list[bytes]) -> bytes:
    """The three statements of a unit, one of them spoiled and signed again."""
    lines = random.choice(seeds).split(b"\n")
    place = random.randrange(3)
    kind, network, _ = peek(lines[place])
    lines[place] = signed(kind, spoiled(random, predicate_of(lines[place])), network, NODES[0])
    return b"\n".join(lines)


def read_unit(raw: bytes) -> object:
    """The story of a contribution, as a lineage check reads it."""
    lines = raw.split(b"\n")
    if len(lines) != 3:
        raise ParisError("record.malformed", "three lines expected")
    return check_contribution(*(unseal_any(line, world().network) for line in lines))


RULES = AuditRules(
    chain=audit.chain_head(bytes(32), 64), chain_length=64, segments=2, rate="3", floor="0.05",
    probation=5, probation_weight="0.25", vesting=3, answer_within=60, retry_within=60, auditors=0,
    canary="0",
)  # fmt: skip


def draws() -> list[bytes]:
    """Audit draws with their rules and what else decides them."""
    drawn = [
        audit.make_draw(
            RULES, 6, number=n, size=9, root="ab" * 32, standing=n,
            secret=audit.chain_value(bytes(32), 64, n),
        )
        for n in (0, 7)
    ]  # fmt: skip
    rules = RULES.model_dump(mode="json")
    return [
        canonical({"draw": draw.model_dump(mode="json"), "rules": rules, "segments": 6})
        for draw in drawn
    ]


def read_draw(raw: bytes) -> object:
    """A draw of a coordinator that may have signed anything, rules and chain included."""
    value = parse(raw)
    try:
        draw = Draw.model_validate_json(canonical(value["draw"]))
        rules = AuditRules.model_validate_json(canonical(value["rules"]))
        segments = min(max(0, int(value["segments"])), MOST_STATES)
    except (KeyError, TypeError, ValueError) as error:
        raise ParisError("record.malformed", "not a draw at all") from error
    return audit.check_draw(draw, rules, segments, root=draw.root, standing=draw.standing)


def histories() -> list[bytes]:
    """A whole log, one statement a line."""
    return [b"\n".join(each.raw for each in world().log)]


def spoil_history(random: Random, seeds: list[bytes]) -> bytes:
    """The log with one statement spoiled and signed again, moved, doubled or lost."""
    lines = random.choice(seeds).split(b"\n")
    place = random.randrange(1, len(lines))
    way = random.randrange(5)
    if way == 0:
        del lines[place]
    elif way == 1:
        lines.insert(random.randrange(1, len(lines)), lines.pop(place))
    elif way == 2:
        lines.insert(place, lines[place])
    else:
        kind, network, _ = peek(lines[place])
        spoilt = spoiled(random, predicate_of(lines[place]))
        lines[place] = signed(kind, spoilt, network, COORDINATOR)
    return b"\n".join(lines)


def read_history(raw: bytes) -> object:
    """All draws of a log that a coordinator may have made up."""
    log = [unseal_any(line, world().network) for line in raw.split(b"\n")]
    policies = {each.record.number: each.record for each in log if each.record.TYPE == "policy"}
    return check_draws(log, policies)


def leases() -> list[bytes]:
    """Assignments as a node gets them, for training and for an audit."""
    lease = next(each.record for each in world().log if isinstance(each.record, Assignment))
    file = lease.parent.weights
    task = AuditTask(
        contribution="ab" * 32, assignment="cd" * 32, commitment="ef" * 32, segments=(1,),
        states=(OpenState(index=1, file=file), OpenState(index=2, file=file)),
    )  # fmt: skip
    made = [lease, lease.model_copy(update={"kind": "audit", "audit": task})]
    return [canonical(each.model_dump(mode="json")) for each in made]


def spoil_lease(random: Random, seeds: list[bytes]) -> bytes:
    """A lease by a coordinator that signs anything."""
    spoilt = spoiled(random, json.loads(random.choice(seeds)))
    return signed("assignment", spoilt, world().network, COORDINATOR)


def read_lease(raw: bytes) -> object:
    """A lease as a node judges it, and the version that a policy may ask for."""
    if not raw.startswith(b'{"payload'):
        raw = signed("assignment", json.loads(raw), world().network, COORDINATOR)
    lease = unseal(raw, Assignment, world().network, {COORDINATOR.id}).record
    version_tuple(lease.plan)
    check_lease(lease, lease.node, world().genesis.record)
    committed_steps(lease.steps, lease.commit_every)
    return needed_blobs(lease)
