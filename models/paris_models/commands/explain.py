"""`paris verify --explain`: where a release's weights came from, told as a chain.

Per expert: the video cluster and its shards, then head by head the contributions with their
assignment, verdict and audit draw, and the scalars with which they were merged, to the file in the
release. Every line is a signed statement of the release that `paris verify` has checked::

    story = explain(verified)
    print("\\n".join(lines(story)))
"""

from __future__ import annotations

from typing import Any

from paris_protocol.evidence import parts_of
from paris_protocol.lineage import Evidence
from paris_protocol.records import Assignment, Merge, MergeInput, Revert, Verdict
from paris_protocol.release import Verified

Json = dict[str, Any]


def explain(verified: Verified) -> Json:
    """The chain of every expert, from its video cluster to the released weights, as JSON values."""
    evidence = Evidence.of(verified.lineage.values())
    genesis, release = verified.genesis.record, verified.release.record
    experts = []
    for cluster, released in zip(genesis.clusters, release.experts, strict=True):
        experts.append(
            {
                "expert": cluster.index,
                "clips": cluster.clips,
                "prior": cluster.prior,
                "shards": [shard.file.root for shard in cluster.shards],
                "initial": genesis.initial.root,
                "steps": [
                    _step(each.id, each.record, evidence) for each in evidence.steps(cluster.index)
                ],
                "head": released.root,
                "folder": f"expert_{released.expert}",
            }
        )
    return {
        "network": verified.network,
        "name": genesis.name,
        "release": verified.release.id,
        "number": release.number,
        "experts": experts,
    }


def _step(id: str, record: Merge | Revert, evidence: Evidence) -> Json:
    facts: Json = {
        "kind": record.TYPE,
        "id": id,
        "round": record.parent.round,
        "parent": record.parent.weights.root,
        "result": record.result.root,
        "numbers": dict(record.numbers),
        "inputs": [_input(part, evidence) for part in parts_of(record)],
    }
    if isinstance(record, Merge):
        if record.average is not None:
            kept = float.fromhex(record.decay or "")
            facts["average"] = {"root": record.average.root, "kept": kept}
        return facts | {"published": record.published}
    revoked = evidence.revocations[record.revocation].record
    return facts | {"revocation": record.revocation, "key": revoked.key, "reason": revoked.reason}


def _input(part: MergeInput, evidence: Evidence) -> Json:
    contribution = evidence.contributions[part.contribution].record
    assignment = evidence.assignments[contribution.assignment].record
    verdicts = (each.record for each in evidence.verdicts.values())
    verdict = next((v for v in verdicts if v.contribution == part.contribution), None)
    return {
        "contribution": part.contribution,
        "assignment": contribution.assignment,
        "commitment": contribution.commitment,
        "node": assignment.node,
        "unit": assignment.unit,
        "shards": [shard.file.root for shard in assignment.shards],
        "steps": assignment.steps,
        "batch": assignment.batch,
        "update": part.update.root,
        "weight": float.fromhex(part.weight),
        "scale": float.fromhex(part.scale),
        **_judged(verdict, assignment),
    }


def _judged(verdict: Verdict | None, assignment: Assignment) -> Json:
    if verdict is None:
        return {"layers": [], "audit": None, "reports": []}
    return {
        "layers": [layer.model_dump(mode="json") for layer in verdict.layers],
        "audit": verdict.audit and verdict.audit.model_dump(mode="json"),
        "reports": list(verdict.reports),
        "policy": assignment.policy,
    }


# ---------------------------------------------------------------- for people


def lines(story: Json) -> list[str]:
    """The chain as indented text."""
    text = [f"Release {story['number']} of {_plain(story['name'])}, network {story['network']}"]
    for expert in story["experts"]:
        text += ["", f"Expert {expert['expert']}: {expert['clips']} clips, of which it is trained"]
        text += [f"  on {len(expert['shards'])} shards of its own video cluster alone"]
        text += [f"  shard {root[:16]}" for root in expert["shards"]]
        text += [f"  begins at the common initial checkpoint {expert['initial'][:16]}"]
        for step in expert["steps"]:
            text += _step_lines(step)
        text += [f"  released as {expert['folder']}/, tensors {expert['head'][:16]}"]
    return text


def _step_lines(step: Json) -> list[str]:
    if step["kind"] == "revert":
        head = f"  revert {step['id'][:16]}: {step['key'][:24]}… was revoked ({step['reason']})"
    else:
        state = "" if step["published"] else ", worse and not published"
        head = f"  merge {step['id'][:16]}, round {step['round']}{state}"
    sign = "−" if step["kind"] == "revert" else "+"
    text = [head]
    for part in step["inputs"]:
        text.append(
            f"    {sign} {part['weight']:.4g} × {part['scale']:.4g} × contribution"
            f" {part['contribution'][:16]} of {part['node'][:24]}…"
        )
        if sign == "+":
            text += [f"        {line}" for line in _input_lines(part)]
    numbers = step["numbers"]
    if "before" in numbers and "after" in numbers:
        text.append(f"    held-out loss {numbers['before']} → {numbers['after']}")
    text.append(f"    head {step['result'][:16]}")
    if (average := step.get("average")) is not None:
        kept = f"{average['kept']:.4g} of the one before it"
        text.append(f"    running average {average['root'][:16]}, which keeps {kept}")
    return text


def _input_lines(part: Json) -> list[str]:
    shards = ", ".join(root[:12] for root in part["shards"])
    text = [
        f"unit {part['unit']}: {part['steps']} steps of {part['batch']} clips on shards {shards}",
        f"committed {part['commitment'][:16]} before it was handed in",
    ]
    text += [_layer_line(layer) for layer in part["layers"]]
    if (draw := part["audit"]) is not None:
        drawn = f"segments {', '.join(map(str, draw['segments']))}" if draw["audited"] else "not"
        text.append(
            f"audit draw {draw['number']}: rate {draw['rate']} at standing {draw['standing']},"
            f" {drawn} audited; seed from log root {draw['root'][:12]} at {draw['size']}"
        )
    return text


def _layer_line(layer: Json) -> str:
    numbers = "  ".join(f"{_plain(name)} {value}" for name, value in layer["numbers"][:6])
    outcome = "passed" if layer["passed"] else layer["code"]
    return f"{layer['layer']} {outcome}  {numbers}".rstrip()


def _plain(text: str) -> str:
    """A stranger's text on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)
