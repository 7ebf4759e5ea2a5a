"""The audit draws of a whole network, checked by anybody: none is missing, none was chosen. Pure.

A verdict's draw can be checked alone as far as the statement goes (`check_verdict`): its secret is
the next one of the policy's hash chain, and rate and segments follow from the root and the standing
that it states. With the log at hand (`check_draws`) those two are computed as well, and the draws'
numbers may not repeat or skip. Refused with `audit.draw`, naming the verdict::

    check_verdict(verdict, assignment, policy, reports)
    facts = check_draws(statements_in_log_order, policies)       # {"draws": 12, "audited": 7, …}
    standing = Standing()
    standing.take(sealed); standing.of(node)                     # n of trust §2.5
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from paris_protocol.audit import check_draw, false_auditors, segments_of, standing_after
from paris_protocol.envelope import Sealed
from paris_protocol.errors import ParisError
from paris_protocol.log import Tree, leaf_hash
from paris_protocol.records import (
    Assignment,
    AuditReport,
    Commitment,
    Contribution,
    Draw,
    KeyRotation,
    Policy,
    Revocation,
    Verdict,
)


class Standing:
    """The fold of a log that says how many contributions in a row of a node were replayed.

    Verdicts count as `audit.standing_after` says; a revocation, and a report that the coordinator's
    own replay contradicts, set the node back to none. A rotated key takes its count along, and what
    becomes of the old key's work counts for the new one.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._heirs: dict[str, str] = {}
        self._reports: dict[str, AuditReport] = {}

    def of(self, node: str) -> int:
        """Contributions of this node in a row that were replayed."""
        return self._counts.get(node, 0)

    def take(self, sealed: Sealed[Any]) -> None:
        """The next statement of the log; those of other kinds change nothing."""
        match sealed.record:
            case Verdict() as verdict:
                self._judge(verdict)
            case AuditReport() as report:
                self._reports[sealed.id] = report
            case Revocation(key=key):
                self._counts[key] = 0
            case KeyRotation(old=old, new=new):
                self._counts[new] = self._counts.pop(old, 0)
                self._heirs[old] = new

    def _judge(self, verdict: Verdict) -> None:
        node = self._heir(verdict.node)
        self._counts[node] = standing_after(self.of(node), verdict)
        named = [self._reports[id] for id in verdict.reports if id in self._reports]
        for auditor in false_auditors(named):
            self._counts[self._heir(auditor)] = 0

    def _heir(self, node: str) -> str:
        while node in self._heirs:
            node = self._heirs[node]
        return node


def check_verdict(
    verdict: Verdict,
    assignment: Assignment,
    policy: Policy,
    reports: Mapping[str, AuditReport] | None = None,
) -> None:
    """That a verdict's draw follows from what it states, and that an audit was carried out.

    `policy` is the one of the assignment. With `reports`, an accepted contribution whose replayed
    segments the verdict counts has a passed report about each drawn one.
    """
    rules, draw = policy.audit, verdict.audit
    if rules is None or draw is None:
        if rules is not None or draw is not None:
            _refuse(verdict, "a draw and the policy's audit rules belong together")
        return
    try:
        check_draw(draw, rules, segments_of(assignment), root=draw.root, standing=draw.standing)
    except ParisError as error:
        _refuse(verdict, error.detail)
    if not (verdict.accepted and draw.audited):
        return
    if not any(layer.layer == "L4" and layer.passed for layer in verdict.layers):
        _refuse(verdict, "it was drawn for an audit and accepted without one")
    if reports is not None and standing_after(0, verdict):
        told = (reports[id] for id in verdict.reports if id in reports)
        seen = {s.index for report in told for s in report.segments if report.passed and s.passed}
        if not seen.issuperset(draw.segments):
            _refuse(verdict, "no report about a drawn segment")


def _refuse(verdict: Verdict, detail: str) -> NoReturn:
    raise ParisError("audit.draw", f"verdict on {verdict.contribution[:12]}: {detail}")


@dataclass(slots=True)
class _Walk:
    """What is known after so many statements of the log."""

    policies: Mapping[int, Policy]
    tree: Tree = field(default_factory=Tree)
    standing: Standing = field(default_factory=Standing)
    assignments: dict[str, Assignment] = field(default_factory=dict)
    commitments: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    """Commitment → size of the log with it, the root then, and its node's standing before it."""
    contributions: dict[str, Contribution] = field(default_factory=dict)
    reports: dict[str, AuditReport] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    """Contribution without a verdict → head of the chain that its draw belongs to."""
    numbers: dict[str, dict[int, str]] = field(default_factory=dict)
    """Chain → number → contribution."""
    audited: int = 0

    def take(self, sealed: Sealed[Any]) -> None:
        self.tree.append(leaf_hash(bytes.fromhex(sealed.id)))
        match sealed.record:
            case Assignment() as assignment:
                self.assignments[sealed.id] = assignment
            case Commitment() as commitment:
                lease = self.assignments.get(commitment.assignment)
                before = self.standing.of(lease.node) if lease else 0
                size = self.tree.size
                self.commitments[sealed.id] = (size, self.tree.root().hex(), before)
            case Contribution() as contribution:
                self.contributions[sealed.id] = contribution
                if (chain := self._chain(contribution.assignment)) is not None:
                    self.waiting[sealed.id] = chain
            case AuditReport() as report:
                self.reports[sealed.id] = report
            case Verdict() as verdict:
                self._verdict(verdict)
        self.standing.take(sealed)

    def _chain(self, assignment: str) -> str | None:
        lease = self.assignments.get(assignment)
        policy = self.policies.get(lease.policy) if lease else None
        return policy.audit.chain if policy and policy.audit else None

    def _verdict(self, verdict: Verdict) -> None:
        lease = self.assignments.get(verdict.assignment)
        handed_in = self.contributions.get(verdict.contribution)
        if lease is None or handed_in is None or lease.policy not in self.policies:
            _refuse(verdict, "its assignment, contribution or policy is not in the log before it")
        check_verdict(verdict, lease, self.policies[lease.policy], self.reports)
        self.waiting.pop(verdict.contribution, None)
        if verdict.audit is not None:
            self._draw(verdict, verdict.audit, handed_in.commitment)

    def _draw(self, verdict: Verdict, draw: Draw, commitment: str) -> None:
        if commitment not in self.commitments:
            _refuse(verdict, "its commitment is not in the log before it")
        found = dict(zip(("size", "root", "standing"), self.commitments[commitment], strict=True))
        for name, value in found.items():
            if getattr(draw, name) != value:
                _refuse(verdict, f"{name}: {getattr(draw, name)} is stated, {value} follows")
        chain = self._chain(verdict.assignment) or ""
        taken = self.numbers.setdefault(chain, {})
        if taken.setdefault(draw.number, verdict.contribution) != verdict.contribution:
            _refuse(verdict, f"draw {draw.number} was already {taken[draw.number][:12]}'s")
        self.audited += draw.audited


def check_draws(
    statements: Iterable[Sealed[Any]], policies: Mapping[int, Policy]
) -> dict[str, Any]:
    """Every draw of a log, from all its statements in log order and the policies by number.

    {"draws", "audited", "waiting"}: waiting are the contributions without a verdict. A number that
    no verdict has must be one of theirs: there may be no more such numbers than contributions that
    wait, or a draw was thrown away (`audit.draw`).
    """
    walk = _Walk(policies)
    for sealed in statements:
        walk.take(sealed)
    waiting = list(walk.waiting.values())
    for chain, taken in walk.numbers.items():
        gaps = sorted(set(range(max(taken) + 1)) - taken.keys())
        if len(gaps) > waiting.count(chain):
            raise ParisError("audit.draw", f"no verdict has draw {gaps[0]} of chain {chain[:12]}")
    return {
        "draws": sum(len(taken) for taken in walk.numbers.values()),
        "audited": walk.audited,
        "waiting": sorted(walk.waiting),
    }
