"""What the pages show of trust: draws, audits, standing, vesting, rules, secret sets, the log.

As in `web.views`: functions from the coordinator's state to plain values and records, all to be
escaped by the template; no HTML and no request here::

    audit(source, work)["draw"]            # the verdict's draw, as anybody can repeat it
    policy_page(source)["rules"]           # the audit rules in force, or None
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from paris_coordinator.board import Board, Node, Work
from paris_coordinator.config import State
from paris_protocol.audit import audit_rate
from paris_protocol.canonical import decimal
from paris_protocol.records import AuditReport, Verdict

Json = dict[str, Any]

LAST: Final = 100
"""So many statements the log page lists."""


def audit(desk: Board, work: Work) -> Json:
    """The draw of a contribution, what its audit found, and whether its merge has vested."""
    verdict = work.judged
    found = desk.audits.get(work.contribution or "")
    draw = verdict.audit if verdict else found.draw if found and work.state != "auditing" else None
    return {
        "draw": draw,
        "standing_now": desk.nodes[work.record.node].standing,
        "reports": _reports(desk, work, verdict),
        "challenges": list(found.challenges) if found else [],
        "openings": list(found.openings) if found else [],
        "secret_set": desk.shelf.judge_of(work.contribution or ""),
        "score": _score(desk, work),
        "vesting": vesting(desk, work),
        "revocation": work.revocation,
        "reverts": [id for id, r in desk.reverts.items() if r.revocation == work.revocation]
        if work.revocation
        else [],
    }


def _reports(desk: Board, work: Work, verdict: Verdict | None) -> list[Json]:
    """The reports that the verdict names; none are shown before it."""
    found = desk.audits.get(work.contribution or "")
    if verdict is None or found is None:
        return []
    return [_report(id, found.reports[id]) for id in verdict.reports if id in found.reports]


def _report(id: str, report: AuditReport) -> Json:
    return {
        "id": id,
        "auditor": report.auditor,
        "volunteer": report.assignment is not None,
        "passed": report.passed,
        "at": report.at,
        "segments": list(report.segments),
    }


def _score(desk: Board, work: Work) -> Json | None:
    """The exact L3 numbers, once the secret set that gave them is open."""
    id = desk.shelf.judge_of(work.contribution or "")
    if id is None or desk.shelf.sets[id].opening is None:
        return None
    delta, se = desk.shelf.sets[id].scores[work.contribution or ""]
    return {"delta": delta, "se": se, "opening": desk.shelf.sets[id].opening}


def vesting(desk: Board, work: Work) -> Json | None:
    """Merges of its expert since its own, of those that it needs; None while it is not merged."""
    rules = desk.policies[work.record.policy].audit
    if rules is None or work.state != "merged" or work.merge is None:
        return None
    since = desk.experts[work.record.expert].round - desk.merges[work.merge].round - 1
    return {"since": since, "needed": rules.vesting, "vested": since >= rules.vesting}


def standing(desk: Board, key: str, node: Node) -> Json:
    """A node's standing, the rate at which it is audited now, and how its audits ended."""
    rules = desk.policy.audit
    works = [desk.works[id] for id in node.works]
    judged = [work.judged for work in works if work.judged is not None]
    audited = [verdict for verdict in judged if verdict.audit and verdict.audit.audited]
    return {
        "standing": node.standing,
        "rate": None if rules is None else decimal(float(audit_rate(rules, node.standing))),
        "probation": None if rules is None else rules.probation,
        "trusted": rules is not None and key in desk.of_standing(),
        "audited": len(audited),
        "audits_passed": sum(verdict.accepted for verdict in audited),
        "reported": sum(work.state == "reported" for work in works),
        "revoked": node.revoked,
        "revocation": desk.revocations[node.revoked] if node.revoked else None,
        "unvested": len(desk.unvested(key)),
    }


def policy_rules(desk: Board) -> Json:
    """The policy in force, the rates that follow from it, and the secret sets."""
    policy, rules = desk.policy, desk.policy.audit
    rates = (
        [(n, decimal(float(audit_rate(rules, n)))) for n in (0, 10, 20, 50, 200)] if rules else []
    )
    return {
        "policy": policy,
        "id": desk.policy_id,
        "policies": sorted(desk.policies),
        "rules": rules,
        "rates": rates,
        "draws": sum(desk.draws.values()),
        "of_standing": len(desk.of_standing()),
        "nodes": len(desk.nodes),
        "sets": [
            {
                "id": id,
                "expert": kept.record.expert,
                "number": kept.record.number,
                "clips": kept.record.clips,
                "answers": len(kept.scores),
                "opening": kept.opening,
            }
            for id, kept in reversed(desk.shelf.sets.items())
        ],
    }


def scan(desk: Board) -> Json | None:
    """The backdoor scan of the newest scanned heads."""
    if desk.scanned is None:
        return None
    report: Json = json.loads(desk.scanned.report)
    return {
        "current": desk.scanned.roots == desk.roots,
        "words": int(report.get("words", 0)),
        "flagged": list(report.get("flagged", ())),
        "experts": list(report.get("experts", ())),
        "waits": desk.suspicious and desk.releasing() and not desk.ordered,
    }


def damaged(state: State) -> list[str]:
    """Ids of files of the store that were no longer what their name says, and were set aside."""
    return sorted(path.stem for path in (state.store / "corrupt").glob("*.blob"))


def decisions(desk: Board) -> Iterator[tuple[str, str]]:
    """(type, id) of the statements by which the coordinator decided or bound itself."""
    yield "policy", desk.policy_id
    for id, kept in desk.shelf.sets.items():
        yield "secret-set", id
        if kept.opening is not None:
            yield "secret-set-opened", kept.opening
    for kind, known in (
        ("merge", desk.merges),
        ("revocation", desk.revocations),
        ("revert", desk.reverts),
        ("withdrawal", desk.withdrawals),
        ("release", desk.releases),
    ):
        yield from ((kind, id) for id in known)
    for contribution, found in desk.audits.items():
        yield from (("challenge", id) for id in found.challenges)
        yield from (("opening", id) for id in found.openings)
        if desk.work_of(contribution).verdict is not None:
            yield from (("audit-report", id) for id in found.reports)
    for work in desk.works.values():
        if work.verdict is not None:
            yield "verdict", work.verdict
