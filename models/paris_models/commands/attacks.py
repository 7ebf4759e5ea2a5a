"""The demo's hostile volunteers: who attacks with what, and what the log says became of it.

A key costs nothing: when one is revoked, the next hostile volunteer joins with another and makes
the attacks that are left. What they did is their own word; what became of it is read from the log::

    hostiles = Hostiles(demo.join, out, ("skip-steps", "copy"))
    hostiles.look()                       # now and then: starts the next one when a key is gone
    told_attacks(out, evidence)           # rows of the report
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from paris_models.commands.evidence import Evidence, Judged
from paris_models.commands.fleet import Running
from paris_protocol.errors import REASONS

NAME: Final = "hostile"
NOTES: Final = "attacks.jsonl"
NOT_JUDGED: Final = "not judged"
REVOKED: Final = "node.revoked"


def is_hostile(name: str) -> bool:
    """Whether the demo started a process of this name to attack."""
    return name == NAME or name.startswith(f"{NAME}-")


@dataclass
class Hostiles:
    """The hostile volunteers of a run, one at a time."""

    join: Callable[[str, Sequence[str]], Running]
    out: Path
    attacks: tuple[str, ...]
    running: Running | None = None
    names: list[str] = field(default_factory=list)

    def start(self) -> None:
        """The next one joins with a new key, for the attacks that are left."""
        name = NAME if not self.names else f"{NAME}-{len(self.names) + 1}"
        self.names.append(name)
        self.running = self.join(name, self.left())

    def left(self) -> list[str]:
        """Attacks that nobody has made yet."""
        done = {line["attack"] for line in noted(self.out)}
        return [attack for attack in self.attacks if attack not in done]

    def look(self) -> bool:
        """Whether a revoked key was followed by the next one; a failure of another kind raises."""
        run = self.running
        if run is None or run.process.poll() is None:
            return False
        code = run.process.returncode
        if code not in (0, REASONS[REVOKED].exit):
            words = run.log.read_text(errors="replace")[-800:]
            raise RuntimeError(f"{run.name} ended with {code}: {words}")
        self.running = None
        if code == 0 or not self.left():
            return False
        self.start()
        return True


def noted(out: Path) -> list[dict[str, Any]]:
    """What the hostile volunteers wrote down, in the order of their attacks."""
    lines = []
    for path in sorted(out.glob(f"{NAME}*/{NOTES}")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: float(line["at"]))


def told_attacks(out: Path, evidence: Evidence) -> list[dict[str, Any]]:
    """What the hostile volunteers say they did, and what the log says became of it."""
    verdicts = {judged.id: judged for judged in evidence.judged() if judged.on_merit}
    kept = evidence.merged() - evidence.reverted()
    told = []
    for line in noted(out):
        contribution = line["contribution"]
        verdict = verdicts.get(contribution)
        row = {"attack": line["attack"], "contribution": contribution, "code": "", "detail": ""}
        if verdict is None:
            sentence = "too late or never handed in; it was not merged"
            row |= {"layer": NOT_JUDGED, "sentence": sentence, "caught": contribution not in kept}
        elif not verdict.accepted:
            reason = REASONS.get(verdict.code)
            row |= {
                "layer": verdict.layer,
                "code": verdict.code,
                "sentence": verdict.code if reason is None else reason.text,
                "caught": True,
                "detail": replay_in_words(verdict),
            }
        elif contribution in evidence.reverted():
            sentence = "accepted, and taken out again when the key was revoked"
            row |= {"layer": "L4", "sentence": sentence, "caught": True}
        else:
            sentence = "passed every layer that looked at it; it was not drawn for a replay"
            row |= {"layer": "L4", "sentence": sentence, "caught": False}
        told.append(row)
    return told


def replay_in_words(judged: Judged) -> str:
    """The numbers of L4 as text; "" where nothing was replayed."""
    found = {name: judged.numbers.get(f"L4 {name}") for name in ("segments", "rho", "limit")}
    if not found["segments"]:
        return ""
    count = f"{found['segments']:.0f} segment{'' if found['segments'] == 1 else 's'} replayed"
    if judged.numbers.get("L4 exact"):
        return f"{count}: " + ("equal bits" if not found["rho"] else "other bits than committed")
    return f"{count}: ρ {found['rho']:.3g}, limit {found['limit']:.3g}"


def refusals(attacks: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """attack → layer → how many were refused there."""
    table: dict[str, Counter[str]] = {}
    for attack in attacks:
        if attack["caught"] and attack["layer"] != NOT_JUDGED:
            table.setdefault(attack["attack"], Counter())[attack["layer"]] += 1
    return {attack: dict(count) for attack, count in table.items()}


def audits(evidence: Evidence) -> dict[str, Any]:
    """What the replay audit did: how much was drawn and replayed, and what it found."""
    judged = [each for each in evidence.judged() if each.on_merit]
    replayed = [each for each in judged if each.numbers.get("L4 segments")]
    bits = [each for each in replayed if each.numbers.get("L4 exact")]
    others = [each for each in replayed if each not in bits and each.accepted]
    return {
        "judged": len(judged),
        "drawn": sum(each.audited for each in judged),
        "replayed": len(replayed),
        "segments": sum(int(each.numbers["L4 segments"]) for each in replayed),
        "equal_bits": sum(each.accepted for each in bits),
        "within_tolerance": len(others),
        "worst_rho": max((each.numbers["L4 rho"] for each in others), default=None),
        "refused": sum(each.layer == "L4" and not each.accepted for each in judged),
        "revoked": len(evidence.statements.get("revocation", [])),
        "reverted": len(evidence.reverted()),
    }
