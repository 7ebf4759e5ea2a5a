"""What the rules of the audit make of cheating: detection, incentive, displacement, sybils. Pure.

The formulas of the trust reference §2.5 on the policy's own numbers. A node skips or falsifies the
share φ of its segments; its contribution costs 1 and earns 1. They bound what may be expected, not
what happens once; `tests/coordinator/test_economics.py` plays them with the real draws. Shares and
probabilities outside [0, 1] are refused (ValueError)::

    p = detection(rules, standing=20, share=0.5)        # 0.375 · q: two of the segments, half bad
    p >= needed(0.5, unvested=20)                       # cheating does not pay
    displacement(p, weight=1 / 3)                       # expected, in clipped updates
"""

from __future__ import annotations

from typing import Final

from paris_protocol.audit import audit_rate
from paris_protocol.canonical import real
from paris_protocol.records import AuditRules

SHARES: Final = tuple(step / 100 for step in range(1, 101))
"""Shares of falsified segments that `weakest` tries."""


def detection(
    rules: AuditRules,
    standing: int,
    share: float,
    *,
    before: float = 0.0,
    blind: float = 0.0,
) -> float:
    """P = 1 − (1 − before)(1 − q(n)(1 − blind)(1 − (1 − φ)^m)) of one contribution.

    `before`: how often the layers before the replay refuse it; `blind`: how often a replay lets a
    falsified segment pass.
    """
    _within(share, before, blind)
    seen = 1 - (1 - share) ** rules.segments
    audited = float(audit_rate(rules, standing)) * (1 - blind) * seen
    return 1 - (1 - before) * (1 - audited)


def needed(share: float, unvested: int) -> float:
    """The detection from which cheating earns no more than honesty: φ / (1 + n).

    n contributions that have not vested are lost with the one that is found out.
    """
    _within(share)
    return share / (1 + unvested)


def gain(found: float, share: float, unvested: int) -> float:
    """What cheating earns beyond honesty, in contributions; below 0 where honesty earns more."""
    _within(found, share)
    return (1 - found) - (1 - share) - found * unvested


def weakest(rules: AuditRules, standing: int, unvested: int) -> tuple[float, float]:
    """(φ, gain) of the cheat that pays best; no gain above 0 means that none pays."""
    gains = [(gain(detection(rules, standing, share), share, unvested), share) for share in SHARES]
    best, share = max(gains)
    return share, best


def displacement(found: float, weight: float) -> float:
    """Expected movement of the head before detection, in clipped updates: at most weight / P.

    `weight` is the most that one contribution has of a merge; the clip bounds each update by the
    policy's norm budget.
    """
    _within(found, weight)
    if found == 0:
        raise ValueError("what is never found out moves the head for ever")
    return weight / found


def passes_probation(rules: AuditRules, share: float) -> float:
    """How often a cheat comes to standing: the product of 1 − P(n) over n below `probation`."""
    survived = 1.0
    for standing in range(rules.probation):
        survived *= 1 - detection(rules, standing, share)
    return survived


def sybil_weight(rules: AuditRules) -> float:
    """Most that any number of fresh identities has of a merge, once one node is of standing."""
    return real(rules.probation_weight)


def majority_cost(rules: AuditRules, trusted: int) -> int:
    """Contributions that have to be trained truly, and audited, to outweigh `trusted` nodes."""
    return trusted * rules.probation


def _within(*shares: float) -> None:
    if any(not 0 <= share <= 1 for share in shares):
        raise ValueError("shares and probabilities lie between 0 and 1")
