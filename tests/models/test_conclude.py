"""The demo's conclusions from logs that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path

from paris_models.commands.conclude import coordinator_spans, training_spans


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_training_bars_run_from_the_first_step_to_the_commitment(tmp_path: Path) -> None:
    log = write(
        tmp_path / "node.log",
        [
            {"at": 100.0, "event": "phase.training", "unit": "u"},
            {"at": 110.0, "event": "trainer.started"},
            {"at": 120.0, "event": "trainer.started"},  # killed and started again
            {"at": 150.0, "event": "phase.commit", "unit": "u"},
            {"at": 160.0, "event": "phase.commit", "unit": "v"},  # resumed after its last step
        ],
    )
    spans = training_spans("node", log, 100.0, {"u": "expert 0 round 0 ✓"})
    assert [(s["start"], s["end"], s["label"]) for s in spans] == [
        (10.0, 20.0, "interrupted"),
        (20.0, 50.0, "expert 0 round 0 ✓"),
    ]


def test_a_node_without_a_log_has_no_bars(tmp_path: Path) -> None:
    assert training_spans("node", tmp_path / "none.log", 0.0, {}) == []


def test_the_coordinators_jobs_are_bars_with_their_kinds(tmp_path: Path) -> None:
    log = write(
        tmp_path / "events.jsonl",
        [
            {"at": 5.0, "what": "started"},
            {"at": 20.0, "what": "verify", "code": "accepted", "seconds": 2.0},
            {"at": 30.0, "what": "runmerge", "expert": 1, "seconds": 1.0},
        ],
    )
    spans = coordinator_spans(log, 10.0)
    assert [(s["kind"], s["start"], s["end"]) for s in spans] == [
        ("verify", 8.0, 10.0),
        ("merge", 19.0, 20.0),
    ]
