"""What the trainer does besides training: lay committed states open, and replay others' segments.

A state that was not kept is made again from the nearest earlier one, and must have the committed
root, else `audit.state`: this machine does not repeat its own training. A replay that need not be
exact needs a calibrated tolerance; without one it abstains, for a report is never a guess::

    found = open_states(order, commitment.states, [3, 7], say)     # [[3, path, root], …]
    report = replay_audit(order, job, say)                         # numerics, segments, passed
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from paris_models import checkpoint, lean
from paris_models.replay import SegmentFound, audit_segments, model_class, replay
from paris_node.kept import start_of
from paris_node.unit import (
    Order,
    header_of,
    keep_state,
    open_head,
    open_shards,
    root_of,
    root_of_tensors,
)
from paris_protocol.audit import segments_of, states_to_open, tolerance_for
from paris_protocol.errors import ParisError
from paris_protocol.lineage import committed_steps
from paris_protocol.records import AuditRules, Commitment

OPENED: Final = "opened"
"""Folder for states that were made again; whoever asked for them empties it."""
REPORT_EVERY: Final = 0.5
Say = Callable[[dict[str, Any]], None]
Tensors = dict[str, torch.Tensor]


def open_states(
    order: Order, roots: Sequence[str], wanted: Sequence[int], say: Say
) -> list[tuple[int, str, str]]:
    """(place, file, root) of each wanted state, from its file or by training again.

    After the states comes the residual that the unit began with, if it did. Says `opening` with the
    step after each state, and while it trains. `audit.unknown` for a place that does not exist.
    """
    steps = committed_steps(order.assignment.steps, order.assignment.commit_every)
    most = len(steps) - (order.assignment.residual is None)
    if len(roots) != len(steps) or not all(0 <= place <= most for place in wanted):
        raise ParisError("audit.unknown", f"states {list(wanted)} of {len(steps)}")
    shutil.rmtree(order.work / OPENED, ignore_errors=True)
    files = {place: order.kept(place) for place in range(1, len(steps))}
    files = {place: path for place, path in files.items() if path.exists()}
    found = []
    for place in sorted(set(wanted)):
        if place == len(steps):
            assert order.rest is not None
            found.append((place, str(order.residual), str(order.assignment.residual)))
            continue
        if place not in files or _read(files[place], roots[place]) is None:
            state = _make_again(order, files, roots, steps, place, say)
            if root_of(state) != roots[place]:
                raise ParisError("audit.state", f"training again gives another state {place}")
            files[place] = order.work / OPENED / f"{place}.safetensors"
            keep_state(state, files[place])
        say({"event": "opening", "step": steps[place]})
        found.append((place, str(files[place]), roots[place]))
    return found


def _make_again(
    order: Order,
    files: dict[int, Path],
    roots: Sequence[str],
    steps: Sequence[int],
    place: int,
    say: Say,
) -> lean.State:
    """The state at a place, trained from the nearest earlier file that is what was committed."""
    state = order.state(open_head(order.parent, order.expert))
    while (start := start_of(place, files)) > 0:
        tensors = _read(files[start], roots[start])
        if tensors is not None:
            lean.load_state_tensors(state, tensors)
            break
        del files[start]
    alive = _now_and_then(lambda step: say({"event": "opening", "step": step}))
    replay(state, open_shards(order), order.config, steps[place], alive)
    return state


def _now_and_then(tell: Callable[[int], None]) -> Callable[[int], None]:
    """Passes a step on when `REPORT_EVERY` seconds have gone by: whoever waits sees it is alive."""
    told = time.monotonic()

    def hear(step: int) -> None:
        nonlocal told
        if time.monotonic() - told >= REPORT_EVERY:
            told = time.monotonic()
            tell(step)

    return hear


def _read(path: Path, root: str) -> Tensors | None:
    """The tensors of an own file if they are still those with this root; else None."""
    try:
        tensors = checkpoint.load_tensors(path)
    except (OSError, ValueError, SafetensorError):
        return None
    return tensors if root_of_tensors(tensors) == root else None


def replay_audit(order: Order, job: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Replay the segments of an audit assignment: `numerics`, `segments` (plain), `passed`.

    `job`: the `commitment`, the `states` that were opened ([place, path] each), the `numerics` that
    the trainer claimed, and the policy's audit `rules`, both possibly None. Without segments,
    `passed` says that nothing could be told here, `not passed` that opened bytes are others than
    those that were committed.
    """
    assignment = order.assignment
    assert assignment.audit is not None
    commitment = Commitment.model_validate_json(json.dumps(job["commitment"]))
    own = order.numerics()
    exact = assignment.kernels == "reference" and job["numerics"] == own
    limits = None if exact else _limits(order, job["rules"])
    paths = {int(place): Path(path) for place, path in job["states"]}
    order = replace(order, residual=paths.pop(len(commitment.states), None))
    ends = states_to_open(assignment.audit.segments, exact=exact)
    lacks = assignment.residual is not None and order.residual is None
    if lacks or not (exact or limits) or not set(ends) <= set(paths):
        return {"numerics": own, "segments": [], "passed": True}
    parent = open_head(order.parent, order.expert)
    begins = _begins(order, parent, commitment.states[0])
    opened = _open(order, parent, paths, commitment.states) if begins else None
    if opened is None:
        return {"numerics": own, "segments": [], "passed": False}
    say({"event": "progress", "step": 0})
    clips = open_shards(order)
    found: list[SegmentFound] = []
    alive = _now_and_then(lambda _: say({"event": "progress", "step": len(found)}))
    for segment in assignment.audit.segments:
        found += audit_segments(
            order.expert,
            order.recipe,
            order.config,
            clips,
            order.start(parent),
            commitment.states,
            opened,
            [segment],
            exact=exact,
            limits=limits,
            root_of=root_of_tensors,
            device=order.device,
            told=alive,
            plan=order.plan,
        )
        say({"event": "progress", "step": len(found)})
    passed = all(one.passed for one in found) and _made(order, parent, opened, commitment)
    return {"numerics": own, "segments": [asdict(one) for one in found], "passed": passed}


def _begins(order: Order, parent: Tensors, root: str) -> bool:
    """Whether a unit that made up for a residual began with parent + residual, as it committed."""
    try:
        return order.assignment.residual is None or root_of(order.state(parent)) == root
    except ParisError:
        return False


def _limits(order: Order, rules: Any) -> tuple[float, float] | None:
    """The calibrated limits for the unit's segments, if there are any."""
    if rules is None:
        return None
    tolerance = tolerance_for(
        AuditRules.model_validate_json(json.dumps(rules)),
        order.assignment.dtype,
        model_class(order.expert, order.recipe, order.plan),
        order.assignment.commit_every,
    )
    return None if tolerance is None else (float(tolerance.rho), float(tolerance.tensor))


def _open(
    order: Order, parent: Tensors, paths: Mapping[int, Path], roots: Sequence[str]
) -> dict[int, Tensors] | None:
    """A stranger's states behind the gate; None if any is not the one that was committed."""
    like = lean.start_state(
        order.plan, order.expert, order.recipe, order.start(parent), key=order.config.key
    )
    schema, opened = checkpoint.schema_of(lean.state_tensors(like)), {}
    for place, path in paths.items():
        try:
            header_of(path, schema)
        except ParisError:
            return None
        opened[place] = checkpoint.load_tensors(path)
        if root_of_tensors(opened[place]) != roots[place]:
            return None
    return opened


def _made(
    order: Order, parent: Tensors, opened: Mapping[int, Tensors], commitment: Commitment
) -> bool:
    """Whether the committed update is last state − parent, if the last state was opened."""
    last = opened.get(segments_of(order.assignment))
    if last is None:
        return True
    try:
        codec = order.assignment.update_codec
        update = lean.update_of(order.plan, parent, last, codec, order.rest)
        rest = lean.rest_of(order.plan, parent, last, update, codec, order.rest)
    except ValueError:  # values that no update can carry
        return False
    if commitment.residual != (None if rest is None else root_of_tensors(rest)):
        return False
    return root_of_tensors(update) == commitment.update_root
