"""A made-up report with everything in it, for the tests of how it looks."""

from __future__ import annotations

import math
import random
from typing import Any


def report_data(hostile: str = "sign-flip") -> dict[str, Any]:
    """Six rounds of three experts; `hostile` stands where strangers' text can stand."""
    rng = random.Random(1)
    curves = {
        k: [
            {
                "round": r,
                "loss": 0.235 - 0.012 * k - 0.03 * (1 - math.exp(-r / 2.2)) + rng.gauss(0, 0.0008),
                "se": 0.0011,
                "n": 256,
            }
            for r in range(7)
        ]
        for k in range(3)
    }
    spans: list[tuple[str, str, float, float, str]] = [
        ("coordinator", "alive", 40, 170, "coordinator"),
        ("coordinator", "alive", 174, 440, "coordinator"),
        ("coordinator", "verify", 60, 64, "verify"),
        ("coordinator", "merge", 100, 106, "merge of expert 0"),
        ("coordinator", "kill", 170, 170, "kill -9"),
        ("coordinator", "restart", 174, 174, "back"),
        ("coordinator", "router", 400, 430, "router"),
        ("volunteer-2", "alive", 45, 440, "volunteer-2"),
        ("volunteer-2", "train", 50, 88, "unit"),
        ("volunteer-2", "kill", 88, 88, "kill -9"),
        ("volunteer-2", "restart", 95, 95, "back"),
        (hostile, "alive", 46, 300, hostile),
        (hostile, "train", 60, 80, "unit"),
        ("demo", "stage", 0, 40, "prepare"),
        ("demo", "stage", 40, 500, "network"),
    ]
    names = ("process", "kind", "start", "end", "label")
    score = {"all_right": 0.79, "motion": 0.941, "fvd": 100.1}
    quality = {
        "all_right": 0.962,
        "motion": 0.991,
        "fvd": 44.2,
        "n": 768,
        "initial": score,
        "frozen_frame": {"all_right": 0.217, "motion": 0.24, "fvd": 373.0},
        "gate_passed": True,
        "judge": "small classifier trained on real clips (a stand-in)",
    }
    report = {
        "verified": True,
        "smoke": False,
        "network": "9f" * 32,
        "contributions": {
            "honest": {"accepted": 36, "refused": 0},
            "hostile": {"accepted": [], "refused": 2},
        },
        "refused": {hostile: {"L3": 1}, "tamper": {"L0": 1}},
        "audits": {
            "judged": 38,
            "drawn": 30,
            "replayed": 29,
            "segments": 58,
            "equal_bits": 28,
            "within_tolerance": 0,
            "worst_rho": None,
            "refused": 1,
            "revoked": 1,
            "reverted": 1,
        },
        "merges": [
            {"id": "ab" * 32, "expert": k, "round": r, "inputs": 2, "published": True}
            for k in range(3)
            for r in range(6)
        ],
        "loss": {
            str(k): {"before": c[0]["loss"], "after": c[-1]["loss"], "se": 0.0011, "n": 256}
            for k, c in curves.items()
        },
        "router_accuracy": 0.973,
        "quality": quality,
        "gates": [{"name": "all factors right", "value": 0.962, "limit": 0.95, "passed": True}],
        "bytes": {"from peers": 183_000_000, "from the coordinator": 61_000_000},
        "seconds": {"prepare": 40.0, "network": 460.0, "all": 500.0},
        "peak_pss_mb": 3120.5,
        "interruptions": [
            {"kind": "kill", "at": 88.0, "recovered_after_s": 7.2, "process": "volunteer-2"},
            {"kind": "coordinator restart", "at": 170.0, "recovered_after_s": 4.1},
        ],
        "release_digest": "c3" * 32,
        "versions": {"paris-ddm": "0.1.0", "torch": "2.13.0"},
    }
    attack = {
        "attack": hostile,
        "contribution": "d0" * 32,
        "layer": "L3",
        "code": "loss.damage",
        "sentence": "L3: the update makes the expert worse on held-out clips.",
        "caught": True,
    }
    return {
        "report": report,
        "timeline": [dict(zip(names, span, strict=True)) for span in spans],
        "curves": curves,
        "attacks": [attack, {**attack, "attack": "tamper", "caught": False, "layer": "L4"}],
        "sheets": [{"title": hostile, "png": "samples.png"}],
        "videos": [{"title": hostile, "file": "videos/0.mp4"}],
        "where_time_went": {"training": 310.0, hostile: 33.0},
        "notes": [hostile],
    }
