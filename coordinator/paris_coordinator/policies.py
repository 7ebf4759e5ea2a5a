"""The next policy of a network: made from the one in force, signed by the root key, put in the log.

The coordinator must be stopped. The root key may be on a stick: it signs here and goes again. A
policy may also rotate the coordinator's key; the old key then signs nothing more, and the
operator's secrets, which were derived from the first key, stay as they are. Naming
`audit.chain_length` begins a new hash chain, as is needed when the old one is used up. Refused:
unknown fields and values out of range (`recipe.invalid`), a signer who may not (`record.signer`), a
running coordinator (`state.in-use`). A kill at any moment leaves the old policy or the new::

    publish(state, load_key(stick / "root.key"), changes(["plan.steps=20"]), now)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from paris_coordinator import planning
from paris_coordinator.auditing import chain_start
from paris_coordinator.config import State
from paris_coordinator.ledger import STATEMENT, Entry, Envelope, Ledger
from paris_coordinator.projector import Projector
from paris_coordinator.replay import replay
from paris_protocol.audit import MOST_DRAWS, chain_head
from paris_protocol.authority import check_next
from paris_protocol.envelope import Sealed, seal
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, key_bytes, load_key, peer_id, save_key
from paris_protocol.net.store import write_atomic
from paris_protocol.records import Policy

Json = dict[str, Any]
_OURS: Final = ("protocol", "number", "previous", "since")
"""Fields that follow from the policy before, and cannot be set."""


def changes(texts: Iterable[str]) -> Json:
    """`plan.steps=20` and the like as nested fields; a value is JSON, or else plain text."""
    found: Json = {}
    for text in texts:
        name, sign, value = text.partition("=")
        *path, last = name.strip().split(".")
        if not sign or not last or not all(path):
            raise ParisError("usage", f"FIELD=VALUE expected instead of {text[:80]}")
        place = found
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ParisError("usage", f"{name} is set twice")
        place[last] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def following(before: Sealed[Policy], changed: Mapping[str, Any], now: int) -> Policy:
    """The policy after `before`, with these fields changed; `recipe.invalid` names a wrong one."""
    for name in changed:
        if name in _OURS:
            raise ParisError("recipe.invalid", f"policy.{name} follows from the policy before")
    value = _merged(before.record.model_dump(mode="json"), changed)
    value |= {"number": before.record.number + 1, "previous": before.id, "since": now}
    try:
        policy = Policy.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ParisError("recipe.invalid", f"policy.{where}: {first['msg']}") from error
    for key in (*policy.coordinator_keys, *policy.witnesses):
        key_bytes(key)
    if not policy.coordinator_keys:
        raise ParisError("recipe.invalid", "policy.coordinator_keys: nobody could sign")
    if policy.witness_quorum > len(set(policy.witnesses)):
        raise ParisError("recipe.invalid", "policy.witness_quorum: more than there are witnesses")
    planning.check(policy)
    return policy


def _merged(value: Json, changed: Mapping[str, Any]) -> Json:
    result = dict(value)
    for name, new in changed.items():
        old = result.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            result[name] = _merged(old, new)
        else:
            result[name] = new
    return result


def publish(
    state: State,
    signer: PrivateKey | None,
    changed: Mapping[str, Any],
    now: int,
    rotate_to: Path | None = None,
) -> Sealed[Policy]:
    """Signs the next policy, puts it into ledger and log, and takes up the new key.

    `signer` None stands for the coordinator's own key, which may change no keys. `rotate_to` is
    the new coordinator key's file, made if there is none. `now` in unix seconds.
    """
    state.settings()  # says so when there is no network here
    with state.lock():
        ledger = Ledger(state.ledger_file)
        try:
            return _publish(state, ledger, signer, dict(changed), now, rotate_to)
        finally:
            ledger.close()


def _publish(
    state: State,
    ledger: Ledger,
    signer: PrivateKey | None,
    changed: Json,
    now: int,
    rotate_to: Path | None,
) -> Sealed[Policy]:
    genesis, (_, policies) = state.genesis(), replay(ledger, state)
    before = policies[max(policies)]
    key = operator_key(state, before)
    new = key
    if rotate_to is not None:
        if not rotate_to.exists():
            save_key(rotate_to, PrivateKey.generate())
        new = load_key(rotate_to)
        changed = rotation(before.record, key, new) | changed
    changed = _chained(changed, before.record.number + 1, state.seed())
    sealed = seal(following(before, changed, now), signer or key, genesis.id)
    check_next(genesis, before, sealed)
    if new.id not in (*sealed.record.coordinator_keys, genesis.record.root_key):
        raise ParisError("recipe.invalid", "policy.coordinator_keys: not the key that serves here")
    if new.id != key.id:
        state.next_key_file.unlink(missing_ok=True)
        save_key(state.next_key_file, new)
    envelope = Envelope(sealed.id, Policy.TYPE, sealed.signer, sealed.raw)
    ledger.append([Entry(now, STATEMENT, envelope)])
    write_atomic(state.policy / f"{sealed.record.number}.json", sealed.raw)
    new = operator_key(state, sealed)
    named = {key for each in (*policies.values(), sealed) for key in each.record.coordinator_keys}
    Projector(state.log, genesis.id, new, named).catch_up(ledger.logged)
    return sealed


def _chained(changed: Json, number: int, seed: bytes) -> Json:
    """A new hash chain where its length is named: the one before may be used up."""
    audit = changed.get("audit")
    if not isinstance(audit, dict):
        return changed
    if "chain" in audit:
        raise ParisError("recipe.invalid", "policy.audit.chain follows from the operator's key")
    length = audit.get("chain_length")
    if "chain_length" not in audit:
        return changed
    if type(length) is not int or not 1 <= length <= MOST_DRAWS:
        raise ParisError("recipe.invalid", f"policy.audit.chain_length: 1 to {MOST_DRAWS}")
    return changed | {"audit": audit | {"chain": chain_head(chain_start(seed, number), length)}}


def rotation(before: Policy, old: PrivateKey, new: PrivateKey) -> Json:
    """The fields that change when the coordinator's key gives way to another."""
    keys = [new.id if key == old.id else key for key in before.coordinator_keys]
    was, now = f"/p2p/{peer_id(old.id)}", f"/p2p/{peer_id(new.id)}"
    return {
        "coordinator_keys": keys if new.id in keys else [*keys, new.id],
        "bootstraps": [address.replace(was, now) for address in before.bootstraps],
    }


def operator_key(state: State, policy: Sealed[Policy]) -> PrivateKey:
    """The key that signs under this policy, after finishing a rotation that was cut short.

    Refused with `key.file` when the policy names neither this key nor the one that was to follow.
    """
    key, root = state.key(), state.genesis().record.root_key
    allowed = {root, *policy.record.coordinator_keys}
    if state.next_key_file.exists():
        following = load_key(state.next_key_file)
        if following.id in allowed:
            state.keep_seed(key)
            state.next_key_file.replace(state.key_file)
            return following
    if key.id not in allowed:
        raise ParisError("key.file", f"policy {policy.record.number} does not name {key.id}")
    return key
