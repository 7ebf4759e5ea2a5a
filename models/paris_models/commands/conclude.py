"""The demo's conclusions: measured quality, losses, attacks and pictures, as the report's data.

Facts of the network come from its signed log (`evidence`), numbers of quality from videos sampled
here with the pulled release. The judge is a stand-in and is named as such. Where the clips were not
the demo's own, quality is not measured and the report says so.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paris_models import worlds
from paris_models.checkpoint import load_tensors
from paris_models.commands.attacks import audits, is_hostile, refusals, told_attacks
from paris_models.commands.evidence import Evidence
from paris_models.commands.report import Row, contact_sheet
from paris_models.evaluate import held_out_losses, paired
from paris_models.expert import expert_from
from paris_models.judge import NAME, Judge
from paris_models.releases import LoadedRelease, generate, load_release
from paris_models.shards import read_shards
from paris_models.video import write_mp4
from paris_protocol.envelope import open_genesis

if TYPE_CHECKING:
    from paris_models.commands.demo import Demo

GATE = 0.95
HELD_SEED = 200
HELD_KEY = hashlib.sha256(b"paris/demo/judge").digest()[:16]
SHOWN = tuple(
    w * 72 + c * 12 + m * 3 + s
    for w in range(3)
    for m, c, s in ((0, 0, 0), (1, 2, 1), (2, 3, 2), (3, 4, 0))
)
"""Twelve captions: three worlds × four motions, with different colours and shapes."""
UNSEEN = (
    "L0 to L3 do not see missing steps, another order of the data or another rate; L4 sees them in "
    "the segments that it replays. Nobody sees poisoned shards, nor a lie in a segment that was "
    "not drawn: that is bounded by the audit rate, and taken back when the key is revoked."
)
PACKAGES = ("paris-ddm", "torch", "diffusers", "hivemind", "safetensors", "cryptography", "av")


def conclude(demo: Demo, evidence: Evidence) -> dict[str, Any]:
    """All of the report's data; writes sample sheets and videos beside it."""
    torch.set_num_threads(1)  # more threads than idle cores cost several times the time
    loaded = load_release(demo.out / "release")
    demos_own = demo.clips == demo.out / "clips"
    initial = initial_release(loaded, demo.out / "prepared" / "initial.safetensors")
    quality = (
        measure_quality(loaded, initial, demo.assets, demo.scale.prompts)
        if demos_own
        else no_quality()
    )
    passed = bool(quality["gate_passed"])
    smoke = demo.scale.recipe == "smoke.toml"
    sheets, videos = show(demo.out, loaded, initial) if demos_own else ([], [])
    names = node_names(demo)
    hostile = {node for node, name in names.items() if is_hostile(name)}
    judged = [each for each in evidence.judged() if each.on_merit]
    attacks = told_attacks(demo.out, evidence)
    # The log knows the liar's key, also if its status could not be asked for.
    lies = {attack["contribution"] for attack in attacks}
    hostile |= {each.node for each in judged if each.id in lies}
    report = {
        "verified": True,
        "smoke": smoke,
        "network": demo.coordinator.network,
        "updates": evidence.updates(),
        "contributions": {
            "honest": {
                "accepted": sum(j.accepted for j in judged if j.node not in hostile),
                "refused": sum(not j.accepted for j in judged if j.node not in hostile),
            },
            "hostile": {
                "accepted": [
                    {"attack": a["attack"], "contribution": a["contribution"], "layer": a["layer"]}
                    for a in attacks
                    if not a["caught"]
                ],
                "refused": sum(not j.accepted for j in judged if j.node in hostile),
            },
        },
        "refused": refusals(attacks),
        "audits": audits(evidence),
        "merges": [
            {
                "id": id,
                "expert": m.expert,
                "round": m.round,
                "inputs": len(m.inputs),
                "published": m.published,
            }
            for id, m in evidence.merges()
        ],
        "loss": losses(demo.out, loaded, initial),
        "router_accuracy": router_accuracy(loaded),
        "quality": quality,
        "gates": [
            {
                "name": "all factors right",
                "value": quality["all_right"],
                "limit": GATE,
                "passed": passed if demos_own and not smoke else None,  # smoke: no claim
            }
        ],
        "bytes": moved_bytes(demo),
        "seconds": {**demo.seconds, "all": round(demo.fleet.seconds(), 1)},
        "peak_pss_mb": round(demo.fleet.peak_pss_mb, 1),
        "interruptions": demo.interruptions,
        "release_digest": hashlib.sha256(
            (demo.out / "release" / "release.json").read_bytes()
        ).hexdigest(),
        "versions": versions(),
    }
    return {
        "report": report,
        "timeline": [asdict(span) for span in demo.fleet.spans] + log_spans(demo, evidence),
        "curves": evidence.curves(len(loaded.experts)),
        "attacks": attacks,
        "sheets": sheets,
        "videos": videos,
        "where_time_went": demo.seconds,
        "notes": [*genesis_notes(demo.out / "release" / "genesis.json"), *demo.notes, UNSEEN],
    }


# ---------------------------------------------------------------- quality


def initial_release(loaded: LoadedRelease, weights: Path) -> LoadedRelease:
    """The same release with the initial checkpoint in the place of every expert."""
    model = expert_from(loaded.settings.expert, load_tensors(weights)).eval().requires_grad_(False)
    return LoadedRelease(loaded.folder, loaded.settings, [model] * len(loaded.experts))


def sample(loaded: LoadedRelease, captions: Sequence[int], seed: int) -> Tensor:
    """Videos of captions, uint8 (n, 3, F, H, W), in batches that fit a small machine."""
    prompts = [worlds.CAPTIONS[c] for c in captions]
    return torch.cat(
        [
            generate(loaded, loaded.text.encode(prompts[i : i + 192]), seed=seed + i)
            for i in range(0, len(prompts), 192)
        ]
    )


def measure_quality(
    loaded: LoadedRelease, initial: LoadedRelease, assets: Path, n: int
) -> dict[str, Any]:
    """Scores of the release, of the initial checkpoint, and the floors, on n held-out prompts."""
    judge = Judge.load(assets / "judge.safetensors")
    clips, captions = (part[-n:] for part in worlds.render(1536, HELD_SEED))
    floors = judge.floors(clips, captions, loaded.codec)
    after = judge.score(sample(loaded, captions.tolist(), 7), captions)
    before = judge.score(sample(initial, captions.tolist(), 7), captions)
    return {
        **tidy(after),
        "n": n,
        "frozen_frame": tidy(floors["frozen_frame"]),
        "real": tidy(floors["real"]),
        "initial": tidy(before),
        "gate_passed": after["all_right"] >= GATE,
        "judge": NAME,
    }


def tidy(score: dict[str, float]) -> dict[str, float]:
    """The headline numbers of a score."""
    return {
        k: round(score[k], 4) for k in ("all_right", "world", "colour", "motion", "shape", "fvd")
    }


def no_quality() -> dict[str, Any]:
    """What stands in the report when the judge does not know the clips' world: nothing."""
    nothing = {"all_right": None, "motion": None, "fvd": None}
    return {
        **nothing,
        "n": 0,
        "frozen_frame": nothing,
        "initial": nothing,
        "gate_passed": False,
        "judge": "none: the clips were given",
    }


def losses(out: Path, loaded: LoadedRelease, initial: LoadedRelease) -> dict[str, Any]:
    """Held-out loss of initial checkpoint and release on the audit clips.

    Nobody trained on these clips, and no verdict was given with them.
    """
    found = {}
    settings = loaded.settings
    for k in range(len(loaded.experts)):
        clips = read_shards([out / "coordinator" / "private" / f"audit{k}.safetensors"])
        before, after = (
            held_out_losses(
                dict(each.experts[k].named_parameters()),
                settings.expert,
                settings.recipe,
                clips,
                HELD_KEY,
            )
            for each in (initial, loaded)
        )
        result = paired(before, after)
        found[str(k)] = {
            "before": round(result.before, 6),
            "after": round(result.after, 6),
            "se": round(result.se, 6),
            "n": result.n,
        }
    return found


def router_accuracy(loaded: LoadedRelease) -> float | None:
    """Held-out accuracy of the released router over all bins of t, from its calibration."""
    bins = dict(loaded.router.config).get("calibration") or []
    n = sum(int(each["n"]) for each in bins)
    return round(sum(each["accuracy"] * each["n"] for each in bins) / n, 4) if n else None


def show(
    out: Path, loaded: LoadedRelease, initial: LoadedRelease
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Videos of the release and the sheet real / before / after for twelve prompts."""
    after, before = sample(loaded, SHOWN, 9), sample(initial, SHOWN, 9)
    clips, captions = worlds.render(1536, HELD_SEED)
    rows, videos = [], []
    for i, caption in enumerate(SHOWN):
        matches = (captions == caption).nonzero()[:, 0].tolist()
        real = clips[matches[0]] if matches else torch.zeros_like(clips[0])
        text = worlds.CAPTIONS[caption]
        rows.append(Row(text, real=real.numpy(), before=before[i].numpy(), after=after[i].numpy()))
        name = f"videos/{text.replace(' ', '-')}.mp4"
        write_mp4(out / name, after[i], worlds.GEOMETRY.fps, scale=10)
        videos.append({"title": text, "file": name})
    contact_sheet(rows, out / "samples.png")
    return [
        {"title": "real · before (initial checkpoint) · after (release)", "png": "samples.png"}
    ], videos


# ---------------------------------------------------------------- the network


def node_names(demo: Demo) -> dict[str, str]:
    """Node id → the name under which the demo started it."""
    return {
        str(status["node"]): name for name, status in demo.last_status.items() if "node" in status
    }


def log_spans(demo: Demo, evidence: Evidence) -> list[dict[str, Any]]:
    """Training of every node and jobs of the coordinator as bars, from the processes' own logs."""
    zero = demo.fleet.began_at
    verdicts = {judged.id: judged for judged in evidence.judged()}
    units = {}
    for id, (contribution, _) in evidence.contributions().items():
        lease = evidence.assignments().get(contribution.assignment)
        if lease is not None and id in verdicts:
            mark = "✓" if verdicts[id].accepted else f"✗ {verdicts[id].code}"
            units[contribution.assignment] = f"expert {lease.expert} round {lease.round} {mark}"
    spans = []
    for name in demo.last_status:
        spans += training_spans(name, demo.out / name / "logs" / "node.log", zero, units)
    return spans + coordinator_spans(demo.state / "logs" / "events.jsonl", zero)


def training_spans(
    name: str, path: Path, zero: float, units: dict[str, str]
) -> list[dict[str, Any]]:
    """Bars from the trainer's first step to the commitment; a killed trainer's bar ends where
    the next one begins."""
    spans: list[dict[str, Any]] = []
    begun: float | None = None
    for line in path.read_text().splitlines() if path.exists() else []:
        event = json.loads(line)
        at = event["at"] - zero
        if event["event"] not in ("trainer.started", "phase.commit"):
            continue
        if begun is not None:
            label = units.get(event.get("unit") or "", "interrupted")
            span = {"process": name, "kind": "train", "label": label}
            spans.append({**span, "start": begun, "end": at})
        begun = at if event["event"] == "trainer.started" else None
    return spans


KINDS = {
    "verify": "verify",
    "replay": "replay",
    "runcanary": "replay",
    "runmerge": "merge",
    "runrevert": "merge",
    "runrouter": "router",
    "runrelease": "release",
}


def coordinator_spans(path: Path, zero: float) -> list[dict[str, Any]]:
    """The coordinator's jobs as bars: what it did, and for how long."""
    spans = []
    for line in path.read_text().splitlines():
        event = json.loads(line)
        kind, seconds = KINDS.get(event["what"]), event.get("seconds")
        if kind is not None and seconds is not None:
            end = event["at"] - zero
            label = " ".join(str(event[k]) for k in ("what", "code", "expert") if k in event)
            span = {"process": "worker", "kind": kind, "label": label}
            spans.append({**span, "start": end - seconds, "end": end})
    return spans


def genesis_notes(path: Path) -> list[str]:
    """How this network differs from the paper's, in its manifest's own words."""
    return list(open_genesis(path.read_bytes()).record.notes)


def moved_bytes(demo: Demo) -> dict[str, int]:
    """Bytes that the volunteers moved, by way."""
    total: Counter[str] = Counter()
    for status in demo.last_status.values():
        total.update({k: int(v) for k, v in (status.get("bytes") or {}).items()})
    return dict(total)


def versions() -> dict[str, str]:
    """Versions of Python and of what matters most."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
