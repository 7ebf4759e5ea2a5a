"""Units of the tiny network that were trained under any plan and sent by any codec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paris_coordinator.worker import perform
from paris_models import lean
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.config import UnitConfig
from paris_models.plans import PLANS
from paris_models.replay import committed_steps, replay
from paris_models.shards import read_shards
from paris_protocol.audit import chain_head
from paris_protocol.records import Assignment, AuditRules, Rate
from paris_protocol.streams import unit_key
from tinynet import STEPS, TinyNet, Unit, plain, root_of

Json = dict[str, Any]
RULES = AuditRules(
    chain=chain_head(b"start", 4), chain_length=4, segments=2, rate="10", floor="0.05",
    probation=5, probation_weight="0.25", vesting=3, answer_within=60, retry_within=60,
    auditors=0, canary="0", tolerances=(),
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A contribution, and the files of its committed states."""

    unit: Unit
    states: list[Path]
    rest: Path | None = None


def lease(
    net: TinyNet, number: int, plan: str, codec: str, rate: float = 1.0, **changes: Any
) -> Assignment:
    """Unit `number` of expert 0 under a plan; sub-rounds commit to their start and end alone."""
    how = PLANS[plan]
    if how.audit == "sub-round":
        changes = {"commit_every": STEPS} | changes
    asked = Rate(start=f"{rate:g}", end=f"{0.02 * rate:g}", shape="cosine", warmup=2)
    fields = {"plan": plan, "update_codec": codec, "dtype": how.compute, "rate": asked}
    return net.assignment(0, number, **(fields | changes))


def work(
    net: TinyNet,
    assignment: Assignment,
    head: Path | None = None,
    begun: Path | None = None,
    **other: Any,
) -> Done:
    """Trains an assignment, keeping its states; `other` is what the node does otherwise.

    `begun` is the residual that it begins with; `key` trains with another unit's key, `skip` leaves
    so many steps out at the end.
    """
    plan = PLANS[assignment.plan]
    skip, key = other.pop("skip", 0), other.pop("key", unit_key(assignment.seed))
    unit = replace(UnitConfig.from_record(assignment, key), **other)
    parent = load_tensors(head or net.head_file)
    clips = read_shards([net.shard(assignment.expert, assignment.unit % 2)])
    rest = None if begun is None else load_tensors(begun)
    start = parent if rest is None else lean.start_of(parent, rest)
    state = lean.new_state(plan, net.config, net.recipe, start, key=unit.key)
    paths, roots = [], []
    for step in committed_steps(unit):
        replay(state, clips, unit, min(step, unit.steps - skip))
        tensors = lean.state_tensors(state)
        if skip and step == unit.steps:
            tensors["step"] = tensors["step"] + skip
        roots.append(root_of(tensors))
        paths.append(net.folder / f"state-{roots[-1]}.safetensors")
        save_tensors(tensors, paths[-1])
    codec = assignment.update_codec
    update = lean.update_of(plan, parent, tensors, codec, rest)
    left = lean.rest_of(plan, parent, tensors, update, codec, rest)
    made = net.hand_in(assignment, update, roots)
    if left is None:
        return Done(made, paths)
    path = net.folder / f"rest-{root_of(left)}.safetensors"
    save_tensors(left, path)
    commitment = made.commitment.model_copy(update={"residual": root_of(left)})
    return Done(replace(made, commitment=commitment), paths, path)


def numerics(net: TinyNet, assignment: Assignment) -> Json:
    """What this machine's job says of its numeric class for such a unit."""
    names = ("plan", "dtype", "threads", "kernels", "batch")
    asked = {name: getattr(assignment, name) for name in names}
    job = {"job": "numerics", "genesis": str(net.folder / "genesis.json"), **asked}
    return perform(job)["result"]  # type: ignore[no-any-return]


def audited(net: TinyNet, done: Done, **changes: Any) -> Json:
    """The replay job's answer; all states are opened, and all segments replayed."""
    assignment = done.unit.assignment
    places = range(len(done.states))
    job = {
        "job": "replay",
        "genesis": str(net.folder / "genesis.json"),
        "assignment": plain(assignment),
        "commitment": plain(done.unit.commitment),
        "numerics": numerics(net, assignment)["numerics"],
        "parent": str(net.head_file),
        "shards": [str(net.shard(assignment.expert, assignment.unit % 2))],
        "states": [[i, str(done.states[i])] for i in places if i],
        "segments": list(places)[:-1],
        "audit": plain(RULES),
        **changes,
    }
    answer = perform(job)
    assert "result" in answer, answer
    return answer["result"]  # type: ignore[no-any-return]
