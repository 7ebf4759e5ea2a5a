"""What a network did, read from nothing but its public log: the facts of a report.

Every statement is opened with its signature checked, so the report says what was signed, not what a
process claims. Files in, plain lists out; nothing is trusted that is not in the log::

    evidence = read_log(out / "coordinator" / "log", network)
    evidence.curves(experts=3)        # held-out loss of each expert over its merges
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paris_protocol.audit import NO_FAULT
from paris_protocol.canonical import real
from paris_protocol.envelope import Sealed, unseal_any
from paris_protocol.records import Assignment, Contribution, Merge, Revert, Verdict


@dataclass(frozen=True)
class Judged:
    """A contribution with the verdict about it."""

    id: str
    node: str
    expert: int
    round: int
    accepted: bool
    code: str
    layer: str
    numbers: Mapping[str, float]
    at: int
    audited: bool = False

    @property
    def on_merit(self) -> bool:
        """Whether the verdict says something about the work: else it was not needed any more."""
        return self.code not in NO_FAULT


@dataclass(frozen=True)
class Evidence:
    """The statements of a log by type, in log order."""

    statements: dict[str, list[Sealed[Any]]]

    def judged(self) -> list[Judged]:
        """Every verdict, in the order in which it was given."""
        found = []
        for sealed in self.statements.get(Verdict.TYPE, []):
            verdict: Verdict = sealed.record
            numbers = {
                f"{layer.layer} {k}": real(v) for layer in verdict.layers for k, v in layer.numbers
            }
            last = verdict.layers[-1].layer if verdict.layers else "L0"
            found.append(
                Judged(
                    verdict.contribution,
                    verdict.node,
                    verdict.expert,
                    verdict.round,
                    verdict.accepted,
                    verdict.code,
                    last,
                    numbers,
                    verdict.at,
                    verdict.audit is not None and verdict.audit.audited,
                )
            )
        return found

    def merges(self) -> list[tuple[str, Merge]]:
        """Every merge statement with its id, published or not."""
        return [(sealed.id, sealed.record) for sealed in self.statements.get(Merge.TYPE, [])]

    def merged(self) -> set[str]:
        """Ids of the contributions that stand in a published merge."""
        return {
            each.contribution
            for _, merge in self.merges()
            if merge.published
            for each in merge.inputs
        }

    def reverted(self) -> set[str]:
        """Ids of the contributions that were taken out of a head again."""
        reverts = self.statements.get(Revert.TYPE, [])
        return {each.contribution for sealed in reverts for each in sealed.record.removed}

    def assignments(self) -> dict[str, Assignment]:
        """Every lease by its id."""
        return {sealed.id: sealed.record for sealed in self.statements.get(Assignment.TYPE, [])}

    def contributions(self) -> dict[str, tuple[Contribution, str]]:
        """Every contribution by its id, with the node that signed it."""
        return {s.id: (s.record, s.signer) for s in self.statements.get(Contribution.TYPE, [])}

    def updates(self) -> list[dict[str, Any]]:
        """How work was done and handed in: by plan and codec, verdicts and bytes of a file."""
        judged = {each.id: each for each in self.judged() if each.on_merit}
        found: dict[tuple[str, str], list[tuple[bool, int]]] = {}
        for id, (contribution, _) in self.contributions().items():
            lease = self.assignments().get(contribution.assignment)
            if lease is not None and id in judged:
                kind = (lease.plan, lease.update_codec)
                size = contribution.update.blob.size
                found.setdefault(kind, []).append((judged[id].accepted, size))
        return [
            {
                "plan": plan,
                "codec": codec,
                "accepted": sum(accepted for accepted, _ in each),
                "refused": sum(not accepted for accepted, _ in each),
                "bytes": sum(size for _, size in each) // len(each),
            }
            for (plan, codec), each in sorted(found.items())
        ]

    def curves(self, experts: int) -> dict[int, list[dict[str, float]]]:
        """Held-out loss of each expert before the first merge and after each published one.

        A point's SE is that of its paired step (same clips, noise and times before and after), not
        of the level; clips rotate from round to round, so levels of rounds differ by that too.
        """
        curves: dict[int, list[dict[str, float]]] = {k: [] for k in range(experts)}
        for _, merge in self.merges():
            found = {k: real(v) for k, v in merge.numbers}
            if not merge.published or "after" not in found:
                continue
            points = curves[merge.expert]
            if not points:
                points.append(
                    {"round": 0, "loss": found["before"], "se": found["se"], "n": found["n"]}
                )
            points.append(
                {
                    "round": merge.round + 1,
                    "loss": found["after"],
                    "se": found["se"],
                    "n": found["n"],
                }
            )
        return curves


def read_log(folder: Path, network: str) -> Evidence:
    """Open every statement of a coordinator's public log folder, in log order where it is known.

    Raises ParisError record.* when a statement is not what it claims to be.
    """
    statements: dict[str, list[Sealed[Any]]] = {}
    for path in (folder / "statements").glob("*.json"):
        sealed = unseal_any(path.read_bytes(), network)
        statements.setdefault(sealed.record.TYPE, []).append(sealed)
    for of_a_kind in statements.values():
        of_a_kind.sort(
            key=lambda sealed: (
                getattr(sealed.record, "at", getattr(sealed.record, "issued", 0)),
                getattr(sealed.record, "round", 0),
                sealed.id,
            )
        )
    return Evidence(statements)
