"""Which contributions are audited and where: a draw that neither side can choose. Pure.

The seed is the hash of two things: the log's root at the moment when the commitment was its last
leaf, which the coordinator could not know in advance, and the next value of a hash chain whose head
stands in the policy, which the node cannot know. Both are published with the verdict (trust §2.4)::

    secret = chain_value(start, rules.chain_length, number)
    draw = make_draw(rules, segments, number=7, size=42, root=root, secret=secret, standing=3)
    check_draw(draw, rules, segments, root=root, standing=3)     # anybody, from the log

The order of the draws is the order in which updates arrived complete: a node that could see later
values of the chain before it had handed in would know its own draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Final

from paris_protocol.canonical import decimal
from paris_protocol.errors import ParisError
from paris_protocol.lineage import committed_steps
from paris_protocol.records import (
    Assignment,
    AuditReport,
    AuditRules,
    Draw,
    Tolerance,
    Verdict,
)

CHAIN_LENGTH: Final = 1 << 16
MOST_DRAWS: Final = 1 << 22
"""A longer chain than this would keep whoever checks a draw busy for minutes."""
_DOMAIN: Final = b"paris/audit/1"


def _next(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def chain_value(start: bytes, length: int, number: int) -> str:
    """Value `number` of the chain (hex): `start` hashed length − 1 − number times.

    Value 0 is the pre-image of the head, so that each value that is revealed proves itself against
    the head and tells nothing about later ones. `audit.draw` when the chain is used up.
    """
    if not 0 <= number < length:
        raise ParisError("audit.draw", f"value {number} of a chain of {length}")
    value = start
    for _ in range(length - 1 - number):
        value = _next(value)
    return value.hex()


def chain_head(start: bytes, length: int) -> str:
    """What the policy publishes: the hash (hex) of value 0."""
    return _next(bytes.fromhex(chain_value(start, length, 0))).hex()


def in_chain(head: str, length: int, number: int, value: str) -> bool:
    """Whether `value` is value `number` of the chain with this head."""
    if not 0 <= number < min(length, MOST_DRAWS):
        return False
    one = bytes.fromhex(value)
    for _ in range(number + 1):
        one = _next(one)
    return one.hex() == head


def audit_rate(rules: AuditRules, standing: int) -> Fraction:
    """q(n) = min(1, max(floor, rate / (n + 1))): how often a node of this standing is audited."""
    wanted = max(Fraction(rules.floor), Fraction(rules.rate) / (standing + 1))
    return min(Fraction(1), max(Fraction(0), wanted))


def segments_of(assignment: Assignment) -> int:
    """Number of segments between the committed states of a unit."""
    return len(committed_steps(assignment.steps, assignment.commit_every)) - 1


def segment_steps(assignment: Assignment, segment: int) -> tuple[int, int]:
    """First step of a segment and the step after its last; `audit.unknown` if there is none."""
    steps = committed_steps(assignment.steps, assignment.commit_every)
    if not 0 <= segment < len(steps) - 1:
        raise ParisError("audit.unknown", f"segment {segment} of {len(steps) - 1}")
    return steps[segment], steps[segment + 1]


def draw_seed(root: str, secret: str) -> bytes:
    """The seed of one draw, from the log's root and the chain's value (both hex)."""
    return hashlib.sha256(_DOMAIN + bytes.fromhex(root) + bytes.fromhex(secret)).digest()


def _number(seed: bytes, purpose: bytes, counter: int) -> int:
    block = hashlib.sha256(seed + purpose + counter.to_bytes(8, "big")).digest()
    return int.from_bytes(block[:8], "big")


def choose(seed: bytes, purpose: bytes, count: int, of: int) -> tuple[int, ...]:
    """`count` different numbers below `of` (all of them, if there are fewer), in drawn order."""
    left = list(range(of))
    chosen = []
    for place in range(min(count, of)):
        # 64 bits over at most a few thousand choices: the modulo's bias is below 2⁻⁵⁰.
        chosen.append(left.pop(_number(seed, purpose, place) % len(left)))
    return tuple(chosen)


def make_draw(
    rules: AuditRules,
    segments: int,
    *,
    number: int,
    size: int,
    root: str,
    secret: str,
    standing: int,
) -> Draw:
    """The draw for a contribution whose commitment is leaf `size` − 1 of the log with this root."""
    rate, seed = audit_rate(rules, standing), draw_seed(root, secret)
    audited = _number(seed, b"audited", 0) < rate * (1 << 64)
    places = choose(seed, b"segment", rules.segments, segments) if audited else ()
    return Draw(
        number=number,
        size=size,
        root=root,
        secret=secret,
        standing=standing,
        rate=decimal(float(rate)),
        audited=audited,
        segments=tuple(sorted(places)),
    )


def check_draw(draw: Draw, rules: AuditRules, segments: int, *, root: str, standing: int) -> None:
    """That a published draw is the only one possible; else `audit.draw` with what differs.

    `root` is the log's root over its first `draw.size` leaves, `standing` the node's by the log.
    """
    if not in_chain(rules.chain, rules.chain_length, draw.number, draw.secret):
        raise ParisError("audit.draw", f"the secret is not value {draw.number} of the chain")
    honest = make_draw(
        rules,
        segments,
        number=draw.number,
        size=draw.size,
        root=root,
        secret=draw.secret,
        standing=standing,
    )
    for name in type(draw).model_fields:
        if getattr(draw, name) != getattr(honest, name):
            stated, found = getattr(draw, name), getattr(honest, name)
            raise ParisError("audit.draw", f"{name}: {stated} is stated, {found} follows")


def states_to_open(segments: Sequence[int], *, exact: bool) -> tuple[int, ...]:
    """Places of the states that an audit of these segments needs, in order.

    The first state of all is the parent with a fresh optimiser, which anybody can make. Where equal
    bits are demanded, a segment's end is known by its root; a tolerance needs the end itself.
    Every audit asks for the last state of all besides, which alone shows that the update is what
    the committed training ended in: honest states can be committed beside any update.
    """
    wanted: set[int] = set()
    for segment in segments:
        wanted |= {segment} if exact else {segment, segment + 1}
    return tuple(sorted(wanted - {0}))


def draw_auditors(draw: Draw, standing: Iterable[str], count: int) -> tuple[str, ...]:
    """The nodes that audit, in drawn order: `count` of those of standing, by the same seed.

    The caller leaves out the trainer and whoever shares its address block.
    """
    nodes = sorted(standing)
    places = choose(draw_seed(draw.root, draw.secret), b"auditor", count, len(nodes))
    return tuple(nodes[place] for place in places)


def tolerance_for(rules: AuditRules, dtype: str, model: str, steps: int) -> Tolerance | None:
    """The calibrated tolerance for segments of `steps` steps: the shortest that is long enough.

    An honest replay drifts with the number of steps, so one that was measured on longer segments
    also holds for shorter ones. None where nothing was calibrated: such a replay proves nothing.
    """
    fitting = [
        one
        for one in rules.tolerances
        if (one.dtype, one.model) == (dtype, model) and one.steps >= steps
    ]
    return min(fitting, key=lambda one: one.steps, default=None)


# ---------------------------------------------------------------- standing

NO_FAULT: Final = frozenset({"unit.closed", "unit.withdrawn", "node.revoked"})
"""Codes of verdicts that say nothing about the work: it was not needed any more."""


def standing_after(standing: int, verdict: Verdict) -> int:
    """A node's standing once this verdict on its work is in the log.

    Standing is the number of its replay-verified contributions in a row: a passed replay adds one,
    a refusal ends the row, and what was accepted without a replay changes nothing.
    """
    if verdict.code in NO_FAULT:
        return standing
    if not verdict.accepted:
        return 0
    replayed = any(
        layer.layer == "L4" and layer.passed and dict(layer.numbers).get("segments", "0") != "0"
        for layer in verdict.layers
    )
    return standing + 1 if replayed else standing


def false_auditors(reports: Iterable[AuditReport]) -> tuple[str, ...]:
    """Volunteers who reported otherwise than the coordinator's own replay; they lose standing.

    `reports` are those that a verdict names. Without an own replay that shows anything, and for a
    report without segments (the auditor could not replay), nobody is called false.
    """
    everyone = list(reports)
    own = next((one for one in everyone if one.assignment is None), None)
    if own is None or (own.passed and not own.segments):
        return ()
    return tuple(
        one.auditor
        for one in everyone
        if one.assignment is not None
        and one.passed != own.passed
        and (one.segments or not one.passed)
    )
