"""Who may sign what: the root key, and the coordinator keys of the policy that is in force.

Statements that name a policy are judged by its keys, the others by the time they state; work is
signed by whoever it was given to, which the rules of lineage check::

    keys_of(genesis, policies, 2)             # the keys of policy 2 and the root key
    may_sign(genesis, policies, sealed)       # False for a revocation that a volunteer signed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paris_protocol.envelope import Sealed
from paris_protocol.records import (
    Assignment,
    AuditReport,
    Challenge,
    Genesis,
    Merge,
    Policy,
    Revert,
    Revocation,
    Verdict,
)


def keys_of(
    genesis: Sealed[Genesis], policies: Sequence[Sealed[Policy]], number: int
) -> frozenset[str]:
    """Who may sign under policy `number`: the root key and that policy's coordinator keys."""
    named = (each.record.coordinator_keys for each in policies if each.record.number == number)
    return frozenset({genesis.record.root_key}.union(*named))


def keys_at(
    genesis: Sealed[Genesis], policies: Sequence[Sealed[Policy]], at: int
) -> frozenset[str]:
    """Who may sign at a time (unix seconds): under the last policy that was in force by then."""
    begun = [each.record.number for each in policies if each.record.since <= at]
    return keys_of(genesis, policies, max(begun, default=1))


def may_sign(
    genesis: Sealed[Genesis], policies: Sequence[Sealed[Policy]], sealed: Sealed[Any]
) -> bool:
    """Whether a statement of the lineage has the signer that its kind demands.

    Who may sign work is the node of its assignment: the lineage rules check that.
    """
    match sealed.record:
        case Verdict(policy=number):
            # It names the policy of its unit, and may be given under a later one.
            return any(
                sealed.signer in keys_of(genesis, policies, each.record.number)
                for each in policies
                if each.record.number >= number
            )
        case Assignment(policy=number):
            return sealed.signer in keys_of(genesis, policies, number)
        case Merge(policy=number) | Revert(policy=number):
            return sealed.signer in keys_of(genesis, policies, number)
        case Challenge(at=at) | Revocation(at=at):
            return sealed.signer in keys_at(genesis, policies, at)
        case AuditReport(assignment=None, at=at, auditor=auditor):
            return sealed.signer == auditor and auditor in keys_at(genesis, policies, at)
        case AuditReport(auditor=auditor):
            return sealed.signer == auditor
    return True
