"""Who may sign for a network, and when: root key, policies, coordinator keys, rotated node keys.

Only the root key names coordinator keys. A coordinator's statement counts if its key stood in the
policy that was in force at the statement's place in the log: after a rotation the old key signs
nothing more, and what it signed before stays::

    chain = open_chain(genesis, raws)                        # record.signer, record.malformed
    Authority(genesis, chain, indices).check(sealed, index)

A node's key gives way to another by a `KeyRotation` that both keys sign.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paris_protocol.envelope import Sealed, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import rotation_text, verify
from paris_protocol.records import (
    Assignment,
    AuditReport,
    Challenge,
    Genesis,
    KeyRotation,
    Merge,
    Policy,
    Release,
    Revert,
    Revocation,
    SecretSet,
    SecretSetOpened,
    Statement,
    Verdict,
    Withdrawal,
)


def check_next(
    genesis: Sealed[Genesis], before: Sealed[Policy] | None, policy: Sealed[Policy]
) -> None:
    """That `policy` may follow `before` (None for the first); else `record.signer`.

    It has the next number, names the id of the one before, and is signed by the root key, or by a
    coordinator key of the one before if it leaves keys and witnesses as they are.
    """
    record, root = policy.record, genesis.record.root_key
    number = 1 if before is None else before.record.number + 1
    if (record.number, record.previous) != (number, None if before is None else before.id):
        raise ParisError("record.signer", f"policy {record.number} is not the next policy")
    if policy.signer == root:
        return
    if before is None or policy.signer not in before.record.coordinator_keys:
        raise ParisError("record.signer", f"policy {record.number} is signed by {policy.signer}")
    if _trusted(record) != _trusted(before.record):
        raise ParisError("record.signer", f"policy {record.number}: only the root key names keys")


def _trusted(policy: Policy) -> tuple[object, ...]:
    return policy.coordinator_keys, policy.witnesses, policy.witness_quorum


def open_chain(genesis: Sealed[Genesis], raws: Iterable[bytes]) -> tuple[Sealed[Policy], ...]:
    """The policies from number 1 on, each allowed to follow the one before."""
    chain: list[Sealed[Policy]] = []
    for raw in raws:
        policy = unseal(raw, Policy, genesis.id, None)
        check_next(genesis, chain[-1] if chain else None, policy)
        chain.append(policy)
    return tuple(chain)


class Authority:
    """Who may sign for the coordinator at each place of the log.

    `indices` gives the policies' places, by statement id; each stands behind the one before.
    """

    def __init__(
        self,
        genesis: Sealed[Genesis],
        policies: Sequence[Sealed[Policy]],
        indices: Mapping[str, int],
    ) -> None:
        self._root = genesis.record.root_key
        self._policies = tuple(policies)
        try:
            self._places = [indices[policy.id] for policy in policies]
        except KeyError as error:
            raise ParisError("log.proof", f"the place of policy {error} is not shown") from error
        if sorted(set(self._places)) != self._places:
            raise ParisError("log.proof", "the policies stand in the log in another order")

    def policy_at(self, index: int) -> Sealed[Policy] | None:
        """The policy in force for the statement at `index`: the last one logged before it."""
        count = bisect_left(self._places, index)
        return self._policies[count - 1] if count else None

    def keys_at(self, index: int) -> frozenset[str]:
        """Who may sign the coordinator's statement at `index`, the root key among them."""
        policy = self.policy_at(index)
        return frozenset({self._root, *(policy.record.coordinator_keys if policy else ())})

    def check(self, sealed: Sealed[Any], index: int) -> None:
        """That a coordinator's statement at `index` has an allowed signer; else `record.signer`."""
        if sealed.signer not in self.keys_at(index):
            what = f"{sealed.record.TYPE} {sealed.id[:12]}"
            raise ParisError("record.signer", f"{what} by a key that was not in force")


def of_coordinator(record: Statement) -> bool:
    """Whether a logged statement of this kind is the coordinator's word."""
    if isinstance(record, AuditReport):
        return record.assignment is None
    return isinstance(
        record,
        Assignment | Challenge | Verdict | Merge | Revocation | Revert | Release
        | SecretSet | SecretSetOpened | Withdrawal,
    )  # fmt: skip


def check_rotation(sealed: Sealed[KeyRotation], network: str) -> None:
    """That both keys of a node's rotation agree: the old one signed it, the new one consents."""
    record = sealed.record
    if sealed.signer != record.old:
        raise ParisError("record.signer", "a rotation is signed by the old key")
    if record.old == record.new:
        raise ParisError("record.malformed", "a rotation to the same key")
    text = rotation_text(network, record.old, record.new, record.at)
    if not verify(record.new, bytes.fromhex(record.consent), text):
        raise ParisError("record.signature", "the new key does not consent")
