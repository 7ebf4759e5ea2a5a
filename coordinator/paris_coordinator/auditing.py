"""The replay audit as rules: what one still needs, whose word decides it, who may audit. Pure.

`Audit` is everything that is known of one contribution's audit; the desk keeps it, and what comes
next follows from it. Nothing is refused here::

    audit = Audit("…", measured, rules)
    next_step(audit, now, patience=3600)     # "ask", "wait", "call", "replay", "canary", "conclude"
    deciding(audit)                          # the reports that the verdict follows from, or None
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, Literal

from paris_coordinator.events import Answered, Measured
from paris_protocol.audit import draw_auditors, segments_of, states_to_open
from paris_protocol.records import (
    Assignment,
    AuditReport,
    AuditRules,
    BlobRef,
    Challenge,
    Draw,
    Opening,
)

Step = Literal["wait", "ask", "call", "replay", "canary", "conclude"]

REVOKING: Final = frozenset({"audit.mismatch", "audit.state", "canary.mismatch"})
"""Refusals that are proofs: whoever gets one did not do the assigned work."""
STATE_COPIES: Final = 8
"""An opened state may be this often the initial checkpoint: weights, moments, and room to spare."""
ENOUGH: Final = 2
"""So many volunteers of one mind decide."""


@dataclass(slots=True)
class Audit:
    """What is known of one contribution's audit and canary, in the order in which it came."""

    contribution: str
    measured: Measured
    rules: AuditRules
    challenges: list[str] = field(default_factory=list)
    challenge: Challenge | None = None
    openings: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    opening: Opening | None = None
    opened: bool = False
    called: tuple[str, ...] | None = None
    called_at: int = 0
    check: bool = False
    tasks: dict[str, str] = field(default_factory=dict)
    reports: dict[str, AuditReport] = field(default_factory=dict)
    answer: Answered | None = None

    @property
    def draw(self) -> Draw:
        """The draw that ordered the audit, or did not."""
        return self.measured.draw

    @property
    def judged_by_answer(self) -> bool:
        """A canary, unless the coordinator could not train it: no roots are no answer."""
        return self.measured.canary and (self.answer is None or bool(self.answer.states))

    @property
    def own(self) -> AuditReport | None:
        """The coordinator's own replay."""
        return next((one for one in self.reports.values() if one.assignment is None), None)

    @property
    def votes(self) -> list[AuditReport]:
        """Volunteers' reports that say something: without segments a pass is an abstention."""
        return [
            one
            for one in self.reports.values()
            if one.assignment is not None and (one.segments or not one.passed)
        ]

    @property
    def lacking(self) -> tuple[BlobRef, ...]:
        """The opened states' blobs, while they are still being uploaded."""
        if self.opening is None or self.opened:
            return ()
        return tuple(state.file.blob for state in self.opening.states)

    def unanswered(self, now: int) -> bool:
        """The second window has passed and the states are not here."""
        asked = self.challenge
        overdue = asked is not None and asked.attempt == 2 and now > asked.deadline
        return overdue and not self.opened


def states_wanted(
    rules: AuditRules, draw: Draw, record: Assignment, exact: bool, calibrated: bool
) -> tuple[int, ...]:
    """Places of the states to open: the drawn segments' and always the last of all.

    The last one shows that the update is what the training made: honest states beside another
    result are no proof of work. Volunteers may be of another numeric class than the trainer, so
    they get both ends of each segment. Where no replay could prove anything, because the machines
    differ and no tolerance was calibrated for this model and plan, nothing is asked for.
    The place behind the last state is that of the residual that a unit began with, if it did.
    """
    if not draw.audited or not (exact or calibrated):
        return ()
    needed = states_to_open(draw.segments, exact=exact and not rules.auditors)
    last = segments_of(record)
    behind = () if record.residual is None else (last + 1,)
    return tuple(sorted({*needed, last, *behind}))


def next_step(audit: Audit, now: int, patience: int) -> Step:
    """What the audit needs next; `patience`: seconds within which a volunteer's report is due."""
    if audit.draw.audited:
        if audit.measured.states and not audit.opened:
            asked = audit.challenge
            if asked is not None and now <= asked.deadline:
                return "wait"
            return "conclude" if asked is not None and asked.attempt == 2 else "ask"
        if audit.own is None:
            if audit.rules.auditors and audit.measured.states and audit.called is None:
                return "call"
            if audit.called and not _over(audit, now, patience):
                return "wait"
            if deciding(audit) is None:
                return "replay"
        found = deciding(audit) or []
        if not all(report.passed for report in found):
            return "conclude"
    return "canary" if audit.measured.canary and audit.answer is None else "conclude"


def _over(audit: Audit, now: int, patience: int) -> bool:
    """No more reports need to be waited for."""
    outcomes = [vote.passed for vote in audit.votes]
    agreed = outcomes.count(True) >= ENOUGH or False in outcomes
    everyone = {report.auditor for report in audit.reports.values()} >= set(audit.called or ())
    return agreed or everyone or now > audit.called_at + patience


def deciding(audit: Audit) -> list[AuditReport] | None:
    """The reports that decide, or None while the coordinator itself has to replay.

    Its own replay decides whenever there is one. Two volunteers who both passed it decide without,
    but for the share of such outcomes that is checked (`is_checked`). A failed outcome
    is always arbitrated: nobody's key is revoked on the word of volunteers.
    """
    if audit.own is not None:
        return [audit.own]
    votes = audit.votes
    if len(votes) < ENOUGH or not all(vote.passed for vote in votes) or audit.check:
        return None
    return votes


def audited_layers(audit: Audit) -> tuple[Literal["L4", "L5"], ...]:
    """The layers that this contribution has to pass beyond the first four."""
    also: list[Literal["L4", "L5"]] = ["L4"] if audit.draw.audited else []
    return (*also, "L5") if audit.judged_by_answer else tuple(also)


# ---------------------------------------------------------------- who may audit


def address_block(remote: str | None) -> str:
    """The /24 or /48 of an address; "" for loopback and for what is no address."""
    try:
        address = ipaddress.ip_address((remote or "").split("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))


def auditors_for(
    audit: Audit, trainer: Collection[str], standing: Iterable[str], blocks: Mapping[str, str]
) -> tuple[str, ...]:
    """The volunteers drawn for an audit, none if there are fewer than decide.

    `trainer` are all keys of the trainer, `standing` the nodes of standing, `blocks` the address
    block of each node that was seen since the coordinator started. Whoever was not seen is not
    asked, nor anybody from the trainer's block; if the trainer was not seen, nobody is.
    """
    near = {blocks[key] for key in trainer if key in blocks}
    fit = [
        node
        for node in standing
        if near and node not in trainer and node in blocks and blocks[node] not in near - {""}
    ]
    drawn = draw_auditors(audit.draw, fit, audit.rules.auditors)
    return drawn if len(drawn) >= ENOUGH else ()


# ---------------------------------------------------------------- the operator's secrets


def chain_start(seed: bytes, policy: int) -> bytes:
    """Where the hash chain of a policy starts, from the seed of the operator's key."""
    return hmac.new(seed, f"paris/audit-chain/1/{policy}".encode(), hashlib.sha256).digest()


def is_canary(seed: bytes, assignment: str, share: str) -> bool:
    """Whether an assignment is a canary; nobody without the operator's key can tell."""
    return _chosen(seed, "canary", assignment, share)


def is_checked(seed: bytes, contribution: str, share: str) -> bool:
    """Whether this audit is replayed even if the volunteers agree: the share is the floor rate.

    Not by the audit's draw: a later contribution's verdict reveals a later value of the hash chain
    and with it this one's, so that auditors could know before they report.
    """
    return _chosen(seed, "check", contribution, share)


def _chosen(seed: bytes, purpose: str, subject: str, share: str) -> bool:
    found = hmac.new(seed, f"paris/{purpose}/1/{subject}".encode(), hashlib.sha256).digest()
    return int.from_bytes(found[:8], "big") < Fraction(share) * (1 << 64)
