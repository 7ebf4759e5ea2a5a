"""The demo's hostile volunteers: one key after the other, and what the report says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paris_models.commands.attacks import (
    Hostiles,
    audits,
    is_hostile,
    noted,
    refusals,
    replay_in_words,
    told_attacks,
)
from paris_models.commands.evidence import Evidence, Judged
from paris_protocol.errors import REASONS


def verdict(id: str, code: str = "", layer: str = "L4", **numbers: float) -> Judged:
    found = {f"L4 {name}": value for name, value in numbers.items()}
    return Judged(id, "node", 0, 0, code == "", code, layer, found, 1, bool(numbers))


class Log(Evidence):
    """Evidence by hand."""

    def __init__(self, judged: list[Judged], merged: set[str], reverted: set[str]) -> None:
        super().__init__({"revocation": [SimpleNamespace()] if reverted else []})  # type: ignore
        self.rows, self.all, self.back = judged, merged, reverted

    def judged(self) -> list[Judged]:
        return self.rows

    def merged(self) -> set[str]:
        return self.all

    def reverted(self) -> set[str]:
        return self.back


def note(folder: Path, *lines: tuple[str, str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = [json.dumps({"attack": a, "contribution": c, "at": at}) for a, c, at in lines]
    (folder / "attacks.jsonl").write_text("\n".join(text) + "\n")


def test_each_attack_is_told_with_the_layer_that_caught_it(tmp_path: Path) -> None:
    note(tmp_path / "hostile", ("skip-steps", "a", 1.0), ("copy", "b", 2.0))
    note(tmp_path / "hostile-2", ("reorder", "c", 4.0), ("rate", "d", 5.0), ("noise", "e", 3.0))
    note(tmp_path / "volunteer-1", ("none", "x", 9.0))
    log = Log(
        [
            verdict("a", "audit.mismatch", segments=1.0, exact=1.0, rho=1e9, limit=0.0),
            verdict("b", "statistics.copy", "L2"),
            verdict("c", "unit.closed", "L0"),
            verdict("d", segments=2.0, rho=0.01, limit=0.05, exact=0.0),
            verdict("e"),
        ],
        merged={"d", "e"},
        reverted={"e"},
    )
    assert [line["attack"] for line in noted(tmp_path)] == [
        "skip-steps", "copy", "noise", "reorder", "rate",
    ]  # fmt: skip
    rows = {row["attack"]: row for row in told_attacks(tmp_path, log)}
    assert (rows["skip-steps"]["layer"], rows["skip-steps"]["code"]) == ("L4", "audit.mismatch")
    assert rows["skip-steps"]["detail"] == "1 segment replayed: other bits than committed"
    assert rows["copy"]["layer"] == "L2" and rows["copy"]["detail"] == ""
    assert rows["reorder"]["layer"] == "not judged" and rows["reorder"]["caught"]
    assert not rows["rate"]["caught"]
    assert rows["noise"]["caught"] and "taken out again" in rows["noise"]["sentence"]
    assert refusals(list(rows.values())) == {
        "skip-steps": {"L4": 1}, "copy": {"L2": 1}, "noise": {"L4": 1},
    }  # fmt: skip
    found = audits(log)
    assert (found["judged"], found["replayed"], found["segments"]) == (4, 2, 3)
    assert (found["within_tolerance"], found["worst_rho"], found["refused"]) == (1, 0.01, 1)
    assert (found["revoked"], found["reverted"]) == (1, 1)


def test_a_replay_in_words() -> None:
    exact = verdict("a", segments=2.0, exact=1.0, rho=0.0, limit=0.0)
    assert replay_in_words(exact) == "2 segments replayed: equal bits"
    within = verdict("a", segments=1.0, exact=0.0, rho=0.0123, limit=0.05)
    assert replay_in_words(within) == "1 segment replayed: \u03c1 0.0123, limit 0.05"
    assert replay_in_words(verdict("a")) == ""


def test_a_revoked_key_is_followed_by_the_next_for_what_is_left(tmp_path: Path) -> None:
    started: list[tuple[str, list[str]]] = []
    log = tmp_path / "x.log"
    log.write_text("its last words")

    def join(name: str, attacks: Sequence[str]) -> Any:
        started.append((name, list(attacks)))
        process = SimpleNamespace(returncode=None)
        process.poll = lambda: process.returncode
        return SimpleNamespace(name=name, process=process, log=log)

    hostiles = Hostiles(join, tmp_path, ("skip-steps", "copy", "reorder"))
    hostiles.start()
    assert not hostiles.look()
    note(tmp_path / "hostile", ("skip-steps", "a", 1.0))
    assert hostiles.running is not None
    hostiles.running.process.returncode = REASONS["node.revoked"].exit
    assert hostiles.look()
    note(tmp_path / "hostile-2", ("copy", "b", 2.0), ("reorder", "c", 3.0))
    hostiles.running.process.returncode = REASONS["node.revoked"].exit
    assert not hostiles.look() and hostiles.running is None
    assert started == [
        ("hostile", ["skip-steps", "copy", "reorder"]),
        ("hostile-2", ["copy", "reorder"]),
    ]
    assert all(is_hostile(name) for name in hostiles.names) and not is_hostile("volunteer-1")


def test_a_hostile_volunteer_that_fails_otherwise_ends_the_demo(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("its last words")
    process = SimpleNamespace(returncode=50, poll=lambda: 50)
    run: Any = SimpleNamespace(name="hostile", process=process, log=log)
    hostiles = Hostiles(lambda name, attacks: run, tmp_path, ("copy",))
    hostiles.start()
    with pytest.raises(RuntimeError, match="last words"):
        hostiles.look()
