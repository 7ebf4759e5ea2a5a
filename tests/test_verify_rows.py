"""The rows of `benchmarks verify`: their ids, and that each counts what it says."""

from __future__ import annotations

from typing import Any

from benchmarks.table import as_json, as_text
from benchmarks.verify_rows import facts, rows

PART = {"judging": 1.0, "parent": 4.0, "replay": 10.0, "contribution": 100.0}
LOSSES = {
    "start": 1.1, "clean": 1.0, "average": 1.0, "all layers": 1.001, "noise x10": 1.002,
    "flip x5": 1.008,
}  # fmt: skip


def found(**changes: Any) -> dict[str, Any]:
    """What the parts found when all is well."""
    gross = [
        {"kind": kind, "refusal": refusal, "alike": kind != "random weights"}
        for kind, refusal in (
            ("honest", ""), ("flip", "L2 statistics.direction"), ("8 clips", "L3 loss.damage"),
            ("random weights", "L2 statistics.norm"), ("unchanged", "L2 statistics.zero"),
            ("copy", "L2 statistics.copy"),
        )
    ]  # fmt: skip
    caught = {"kind": "half batch", "exact": True, "near": True, "rho": 0.7}
    honest = {"refusal": "", "audit": "", "exact": False, "rho": 6e-6}
    quiet = [
        {"kind": kind, "refusal": "", "audit": "audit.mismatch"}
        for kind in ("lazy", "tenth of noise", "wrong cluster", "shuffled captions")
    ]
    run = {"losses": LOSSES, "refused": ["flip"], "accepted": [], "honest": 4, "honest_refused": []}
    cost = PART | {"counted": PART}
    return {
        "gross": gross, "segments float32": [caught], "segments bfloat16": [caught],
        "honest avx2": [honest], "honest same": [honest | {"exact": True}],
        "quiet": quiet, "power": {"float32 5": [{"caught": True, "rho": 0.05, "limit": 1e-4}]},
        "cost": {
            "reference": cost, "reference, all clips": cost, "demo": cost, "lora": [0.5, 0.6, 0.7],
        },
        "runs late 0": run, "learn": {}, "late": {}, "calibrate": [], "seconds": {"gross": 1.0},
    } | changes  # fmt: skip


def values(result: dict[str, Any]) -> dict[str, float | None]:
    return {row.id: row.ours for row in rows(result)}


def test_every_promised_row_is_there_with_its_value() -> None:
    got = values(found())
    expected = {
        "verify.gross": 1.0, "verify.unchanged": 1.0, "verify.copy": 1.0, "verify.replay": 1.0,
        "verify.false_rejects": 0.0, "verify.cost": 0.035, "verify.cost_probation": 0.13,
        "verify.hostile_quarter": 0.001, "verify.clip_only": 0.008, "verify.clean_penalty": 0.0,
        "verify.l0_lora": 0.6,
    }  # fmt: skip
    assert {id: round(got[id] or 0.0, 9) for id in expected} == expected
    assert "verify.clip_only.early" not in got
    assert as_text("verify", facts(found(), {}), rows(found()))
    assert as_json("verify", facts(found(), {}), rows(found()))


def test_what_slips_through_is_counted() -> None:
    usual = found()
    slipped = [one | {"refusal": ""} if one["kind"] == "flip" else one for one in usual["gross"]]
    assert values(found(gross=slipped))["verify.gross"] == 2 / 3
    half = [usual["segments float32"][0] | {"near": False}, *usual["segments float32"]]
    assert values(found(**{"segments float32": half}))["verify.replay"] == 0.5


def test_every_way_of_refusing_honest_work_is_counted() -> None:
    usual = found()
    [honest], [run] = usual["honest avx2"], [usual["runs late 0"]]
    gross = [
        one | {"refusal": "L2 x"} if one["kind"] == "honest" else one for one in usual["gross"]
    ]
    wrong = {
        "honest avx2": [honest | {"refusal": "L3 loss.damage"}, honest | {"audit": "x"}],
        "runs late 0": run | {"honest_refused": ["L2 statistics.noise"]},
        "gross": gross,
    }
    by_id = {row.id: row for row in rows(found(**wrong))}
    assert by_id["verify.false_rejects"].ours == 4
    assert by_id["verify.false_rejects"].n == 3 + 1 + 4


def test_clip_only_is_the_worse_of_its_attacks() -> None:
    losses = LOSSES | {"noise x10": 1.05}
    run = found()["runs late 0"] | {"losses": losses}
    got = values(found(**{"runs late 0": run, "runs early 0": run}))
    assert got["verify.clip_only"] == got["verify.clip_only.noise_x10"]
    assert got["verify.clip_only.early"] == got["verify.clip_only"]
