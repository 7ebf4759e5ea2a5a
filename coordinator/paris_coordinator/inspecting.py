"""`inspect`: every number of every layer beside the cohort's, in words; also for a loose file.

The cohort of a contribution are the accepted ones of the same round; a number that stands far off
(by its robust z) is no refusal by itself, only the policy's limits are. A loose update file is
measured by the steps of the worker's `verify` job, as if it had been handed in for one unit on a
head; it has no commitment, and L1 says so. Names and devices of people never appear here::

    inspect(Path("state"), "3f2a")["layers"][2]["numbers"][0]["median"]
    inspect_file(Path("state"), Path("update.safetensors"), "0")      # against expert 0's head

Refused: ids and heads that do not exist (`not-found`), files that are no update (`tensor.header`
stands in layer L0).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from paris_coordinator import earlier, rounds
from paris_coordinator.board import Work
from paris_coordinator.config import State
from paris_coordinator.desk import Desk
from paris_coordinator.genesis import file_root
from paris_coordinator.planning import kind
from paris_coordinator.reading import one_of, open_desk
from paris_coordinator.secrets import operator_secret
from paris_models.config import ExpertConfig
from paris_protocol.canonical import real
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import Assignment, Contribution, Head, Layer, TensorFile

Json = dict[str, Any]

LAYERS: Final = {
    "L0": "structure",
    "L1": "commitments",
    "L2": "statistics of the update",
    "L3": "loss on secret clips",
    "L4": "replay audit",
    "L5": "known answer",
}
MEANING: Final = {
    "steps": "steps claimed",
    "samples": "samples claimed",
    "tensors": "tensors in the file",
    "parameters": "numbers in the file",
    "states": "committed states",
    "expected": "states that the unit has to commit to",
    "norm": "size of the update",
    "relative": "its size over the parent's",
    "reach": "its size over the farthest that the assigned steps can move",
    "max_abs": "largest single change",
    "descent": "cosine with the optimiser's own first step on secret clips",
    "closest": "largest cosine with an earlier update of another node",
    "others": "earlier updates compared with",
    "ratio": "its relative size over the round's median",
    "known": "updates in that median",
    "lineage": "cosine with what the last merge changed",
    "spectral": "largest singular value over the norm, mean over the matrices",
    "rank": "effective rank over the full one, mean over the matrices",
    "block_z": "largest robust z of a block's size in this lineage",
    "n": "secret clips looked at",
    "margin": "damage that the round allows",
    "bucket": "-1 better than the parent, 0 no evidence, 1 worse",
    "segments": "segments replayed",
    "exact": "1 if equal bits were demanded",
    "rho": "largest distance of a replayed segment, over its own length",
    "tensor": "the same of the worst tensor",
    "limit": "limit of the first",
    "tensor_limit": "limit of the second",
    "reports": "audit reports behind it",
    "equal": "committed states equal to the known answer's",
}
LEAST: Final = 3
"""So many others make a median worth comparing with."""
FAR: Final = 4.0
"""From this robust z on, the words say "far"."""


def inspect(folder: Path, beginning: str) -> Json:
    """A contribution with its cohort's numbers beside its own, its audit, and what became of it."""
    desk = open_desk(State(folder))
    work = desk.work_of(one_of(desk.contributions, beginning))
    verdict = work.judged
    layers = verdict.layers if verdict else ()
    draw = verdict.audit if verdict else None
    done, record = work.done, work.record
    return {
        "contribution": work.contribution,
        "assignment": work.id,
        "commitment": work.commitment,
        "node": record.node,
        "expert": record.expert,
        "round": record.round,
        "unit": record.unit,
        "state": work.state,
        "update": done.update.model_dump(mode="json"),
        "steps": done.steps,
        "loss": done.loss,
        "seconds": done.seconds,
        "verdict": work.verdict,
        "code": verdict and verdict.code,
        "merge": work.merge,
        "layers": compared(layers, cohort(desk, record, work.contribution)),
        "draw": draw and draw.model_dump(mode="json"),
        "reports": list(verdict.reports) if verdict else [],
        "revocation": work.revocation,
        "secret_set": desk.shelf.judge_of(work.contribution or ""),
    }


def inspect_file(folder: Path, file: Path, head: str) -> Json:
    """L0, L2 and L3 of an update file against a head, by the functions that judge contributions.

    `head`: an expert's number for its present head, or the beginning of a head's tensor root or of
    the merge that made it.
    """
    from paris_coordinator.worker import perform

    state = State(folder)
    desk = open_desk(state)
    if not file.is_file():
        raise ParisError("not-found", str(file))
    expert, parent = find_head(desk, head)
    job = _job(state, desk, file, expert, parent)
    answer = perform(job)
    if "error" in answer:
        raise ParisError(answer["error"]["code"], answer["error"]["detail"])
    layers = [Layer.model_validate_json(json.dumps(one)) for one in answer["result"]["layers"]]
    return {
        "file": str(file),
        "expert": expert,
        "parent": parent.model_dump(mode="json"),
        "layers": compared(
            layers,
            cohort(desk, Assignment.model_validate_json(json.dumps(job["assignment"])), None),
        ),
    }


def find_head(desk: Desk, name: str) -> tuple[int, Head]:
    """The head that `name` means, and its expert; the initial checkpoint is expert 0's."""
    if name.isdigit() and int(name) < len(desk.experts):
        return int(name), desk.experts[int(name)].head
    heads: dict[str, tuple[int, Head]] = {}
    for expert, head in _heads(desk):
        for id in (head.weights.root, head.merge or ""):
            heads.setdefault(id, (expert, head))
    return heads[one_of((id for id in heads if id), name)]


def _heads(desk: Desk) -> Iterator[tuple[int, Head]]:
    for expert in desk.experts:
        yield expert.index, expert.head
    for id, merge in desk.merges.items():
        yield merge.expert, merge.parent
        if merge.published:
            yield merge.expert, Head(round=merge.round + 1, weights=merge.result, merge=id)
    for id, revert in desk.reverts.items():
        yield revert.expert, Head(round=revert.parent.round, weights=revert.result, merge=id)


def _job(state: State, desk: Desk, file: Path, expert: int, parent: Head) -> Json:
    """A verify job about a file that nobody handed in: claims and seed are made up."""
    from paris_coordinator.jobs.loose import offered

    policy, plan, store = desk.policy, desk.policy.plan, BlobStore(state.store)
    rules = offered(policy, file, ExpertConfig.from_record(desk.genesis.expert))
    made_up = "0" * 64
    size = file.stat().st_size
    update = TensorFile.model_validate(
        {"blob": {"id": made_up, "size": size}, "root": file_root(file)}
    )
    assignment = Assignment(
        kind="train", plan=rules.plan, node=f"ed25519:{made_up}", expert=expert, round=parent.round,
        unit=0, parent=parent, shards=(), seed=made_up, steps=plan.steps,
        batch=desk.genesis.recipe.batch, rate=rounds.rate(plan, parent.round, real(rules.rate)),
        optimiser_state="fresh", dtype=rules.dtype, threads=policy.threads,
        kernels=policy.kernels, update_codec=rules.update_codec, commit_every=policy.commit_every,
        policy=policy.number, issued=0, soft_deadline=0, hard_deadline=0,
    )  # fmt: skip
    contribution = Contribution(
        assignment=made_up, commitment=made_up, update=update, steps=plan.steps,
        samples=plan.steps * assignment.batch, loss="0", seconds=0,
    )  # fmt: skip
    return {
        "job": "loose",
        "genesis": str(state.genesis_file),
        "policy": policy.model_dump(mode="json"),
        "assignment": assignment.model_dump(mode="json"),
        "contribution": contribution.model_dump(mode="json"),
        "update": str(file),
        "parent": str(store.path(parent.weights.blob)),
        "private": str(state.private_shard("validation", expert)),
        "secret": operator_secret(state.seed(), "held-out"),
        "history": earlier.relative_norms(desk, assignment),
    }


# ---------------------------------------------------------------- numbers beside the cohort's


def cohort(desk: Desk, like: Assignment, without: str | None) -> list[Sequence[Layer]]:
    """The layers of all other accepted contributions of its round and kind, of all experts."""
    return [
        work.judged.layers
        for work in desk.works.values()
        if work.judged is not None and work.judged.accepted
        if work.record.round == like.round and work.contribution != without
        if kind(work.record) == kind(like)
    ]


def compared(layers: Iterable[Layer], others: Sequence[Sequence[Layer]]) -> list[Json]:
    """Each layer with its numbers; each number with the cohort's count, range, median and z."""
    found = []
    for layer in layers:
        numbers = [
            {"name": name, "value": value, **_beside(real(value), _known(others, layer, name))}
            for name, value in layer.numbers
        ]
        found.append(
            {"layer": layer.layer, "passed": layer.passed, "code": layer.code, "numbers": numbers}
        )
    return found


def _known(others: Sequence[Sequence[Layer]], layer: Layer, name: str) -> list[float]:
    return [
        real(value)
        for each in others
        for one in each
        if one.layer == layer.layer
        for known, value in one.numbers
        if known == name
    ]


def _beside(value: float, known: Sequence[float]) -> Json:
    """Count, least, median, greatest, and (value − median) / (1.4826 · MAD) where that exists."""
    if not known:
        return {"others": 0, "min": None, "median": None, "max": None, "z": None}
    middle = median(known)
    spread = 1.4826 * median(abs(x - middle) for x in known)
    z = round((value - middle) / spread, 2) if len(known) >= LEAST and spread > 0 else None
    return {"others": len(known), "min": min(known), "median": middle, "max": max(known), "z": z}


# ---------------------------------------------------------------- words


def inspect_text(facts: Json) -> str:
    """The facts of a contribution for people."""
    unit = f"expert {facts['expert']}, round {facts['round']}, unit {facts['unit']}"
    state = facts["state"] + (f": {sentence(facts['code'])}" if facts["code"] else "")
    lines = [f"contribution {facts['contribution']}", f"of {facts['node']}", unit, state]
    lines += layers_text(facts["layers"])
    if draw := facts["draw"]:
        places = ", ".join(map(str, draw["segments"]))
        lines.append(
            f"draw {draw['number']}: rate {draw['rate']} at standing {draw['standing']}, "
            + (f"audited on segments {places}" if draw["audited"] else "not audited")
        )
    lines += [f"audit report {id}" for id in facts["reports"]]
    if facts["secret_set"]:
        lines.append(f"judged by secret set {facts['secret_set']}")
    if facts["merge"]:
        lines.append(f"merge {facts['merge']}")
    if facts["revocation"]:
        lines.append(f"taken back by revocation {facts['revocation']}")
    return "\n".join(lines)


def file_text(facts: Json) -> str:
    """The facts of a loose file for people."""
    head = facts["parent"]["weights"]["root"][:16]
    first = f"{facts['file']} against head {head}… of expert {facts['expert']}"
    return "\n".join([first, *layers_text(facts["layers"])])


def layers_text(layers: Iterable[Json]) -> list[str]:
    """A line per layer and per number."""
    lines = []
    for layer in layers:
        outcome = "passed" if layer["passed"] else f"refused: {sentence(layer['code'])}"
        lines.append(f"{layer['layer']} {LAYERS[layer['layer']]}: {outcome}")
        lines += [f"    {_line(number)}" for number in layer["numbers"]]
    return lines


def _line(number: Json) -> str:
    name, value = number["name"], number["value"]
    meaning = MEANING.get(name, "size of this block" if name.startswith("block.") else "")
    text = f"{name} {value}" + (f" ({meaning})" if meaning else "")
    if number["others"]:
        low, middle, high = (f"{number[key]:.4g}" for key in ("min", "median", "max"))
        text += f"; {number['others']} others of the round: {low} to {high}, median {middle}"
    if number["z"] is not None:
        far = "far off" if abs(number["z"]) >= FAR else "not far off"
        text += f"; {far}, robust z {number['z']:+.1f}"
    return text


def sentence(code: str) -> str:
    """The catalogue's words for a code."""
    return f"{REASONS[code].text} [{code}]" if code in REASONS else code


def shown(work: Work) -> str:
    """A contribution as a list names it: its id, its node, its unit."""
    record = work.record
    unit = f"expert {record.expert}, round {record.round}, unit {record.unit}"
    return f"{(work.contribution or work.id)[:16]}  {unit}  of {record.node[:24]}…"
