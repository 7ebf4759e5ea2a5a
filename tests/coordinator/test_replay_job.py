"""The replay jobs on real files: honest segments pass, each deviation has its code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paris_coordinator.worker import perform
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.config import UnitConfig
from paris_models.replay import committed_steps, model_class, replay
from paris_models.shards import read_shards
from paris_models.train import new_state, state_tensors, weights
from paris_models.updates import make_update
from paris_protocol.audit import chain_head
from paris_protocol.records import AuditRules, Segment, Tolerance
from paris_protocol.streams import unit_key
from tinynet import TinyNet, Unit, hexed, plain, root_of

Json = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """A contribution, and the files of its committed states."""

    unit: Unit
    states: list[Path]


def work(net: TinyNet, *, lie: bool = False, **changes: Any) -> Done:
    """Trains unit (0, 0), keeping its states; `changes` are what the node does otherwise.

    With `lie` the update is another than what the committed states end in.
    """
    assignment = net.assignment(0, 0)
    config = UnitConfig.from_record(assignment, unit_key(assignment.seed))
    config, clips = replace(config, **changes), read_shards([net.shard(0, 0)])
    parent = load_tensors(net.head_file)
    state, paths, roots = new_state(net.config, net.recipe, parent), [], []
    for step in committed_steps(config):
        replay(state, clips, config, step)
        roots.append(root_of(state_tensors(state)))
        paths.append(net.folder / f"state-{roots[-1]}.safetensors")
        save_tensors(state_tensors(state), paths[-1])
    update = make_update(parent, weights(state), "dense-f32")
    if lie:
        update["proj_out.bias"] = update["proj_out.bias"] + 0.01
    return Done(net.hand_in(assignment, update, roots), paths)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def honest(net: TinyNet) -> Done:
    return work(net)


@pytest.fixture(scope="module")
def own(net: TinyNet) -> str:
    """The numeric class of this machine, as a job says it."""
    job = {"job": "numerics", "genesis": str(net.folder / "genesis.json"), "dtype": "float32"}
    return str(perform({**job, "threads": 1, "kernels": "reference"})["result"]["numerics"])


def rules(net: TinyNet, steps: int = 5) -> AuditRules:
    tolerance = Tolerance(
        dtype="float32", model=model_class(net.config, net.recipe), steps=steps, rho="0.02",
        tensor="0.1", factor="5", pairs=1, source="test",
    )  # fmt: skip
    return AuditRules(
        chain=chain_head(b"start", 4), chain_length=4, segments=2, rate="10", floor="0.05",
        probation=5, probation_weight="0.25", vesting=3, answer_within=60, retry_within=60,
        auditors=0, canary="0", tolerances=(tolerance,),
    )  # fmt: skip


def audited(net: TinyNet, done: Done, numerics: str | None, **changes: Any) -> Json:
    """The job's whole answer; all states are opened unless `changes` say otherwise."""
    job = {
        "job": "replay",
        "genesis": str(net.folder / "genesis.json"),
        "assignment": plain(done.unit.assignment),
        "commitment": plain(done.unit.commitment),
        "numerics": numerics,
        "parent": str(net.head_file),
        "shards": [str(net.shard(0, 0))],
        "states": [[i, str(path)] for i, path in enumerate(done.states) if i],
        "segments": [0, 1, 2],
        "audit": plain(rules(net)),
        **changes,
    }
    return perform(job)


def code(net: TinyNet, done: Done, numerics: str | None, **changes: Any) -> str:
    answer = audited(net, done, numerics, **changes)["result"]
    assert answer["passed"] == (answer["code"] in ("", "audit.tolerance"))
    return str(answer["code"])


def test_equal_machines_compute_equal_bits(net: TinyNet, honest: Done, own: str) -> None:
    answer = audited(net, honest, own)["result"]
    assert (answer["passed"], answer["exact"], answer["numerics"]) == (True, True, own)
    found = [Segment.model_validate(segment) for segment in answer["segments"]]
    assert [(s.index, s.exact, s.rho, s.limit, s.passed) for s in found] == [
        (i, True, "0", "0", True) for i in range(3)
    ]
    assert answer["cost"]["trained"] == 12 * 16  # all twelve steps
    few = [[1, str(honest.states[1])], [3, str(honest.states[3])]]
    assert code(net, honest, own, segments=[0, 1], states=few) == ""


@pytest.mark.parametrize("numerics", [None, "ab" * 32])
def test_other_machines_are_held_to_the_tolerance(
    net: TinyNet, honest: Done, numerics: str | None
) -> None:
    answer = audited(net, honest, numerics)["result"]
    assert (answer["passed"], answer["exact"]) == (True, False)
    assert {segment["limit"] for segment in answer["segments"]} == {"0.02"}


def test_fast_kernels_are_never_asked_for_equal_bits(net: TinyNet, honest: Done) -> None:
    assignment = plain(honest.unit.assignment.model_copy(update={"kernels": "fast"}))
    own = audited(net, honest, None, assignment=assignment)["result"]["numerics"]
    assert audited(net, honest, own, assignment=assignment)["result"]["exact"] is False


def test_nothing_calibrated_proves_nothing(net: TinyNet, honest: Done) -> None:
    answer = audited(net, honest, None, audit=plain(rules(net, steps=4)))["result"]
    assert (answer["code"], answer["segments"]) == ("audit.tolerance", [])


@pytest.mark.parametrize(
    "cheat", [{"key": b"o" * 16}, {"batch": 8}, {"rate_start": 1.3}, {"dtype": "bfloat16"}]
)
def test_deviations_are_mismatches(net: TinyNet, own: str, cheat: Json) -> None:
    liar = work(net, **cheat)
    for numerics in (own, None):
        assert code(net, liar, numerics, segments=[1]) == "audit.mismatch"


def test_honest_states_beside_another_update_are_a_mismatch(net: TinyNet, own: str) -> None:
    liar = work(net, lie=True)
    for numerics in (own, None):
        answer = audited(net, liar, numerics)["result"]
        assert all(segment["passed"] for segment in answer["segments"])
        assert answer["code"] == "audit.mismatch"


def test_opened_bytes_must_be_the_committed_state(
    net: TinyNet, honest: Done, own: str, tmp_path: Path
) -> None:
    tensors, path = load_tensors(honest.states[1]), tmp_path / "state.safetensors"
    name = "weights.proj_out.bias"
    cases = {
        "value": {**tensors, name: tensors[name] + 1e-7},
        "dtype": {**tensors, name: tensors[name].double()},
        "shape": {**tensors, name: torch.cat([tensors[name]] * 2)},
        "names": {"weights.other": tensors[name]},
    }
    for case, changed in cases.items():
        save_tensors(changed, path)
        states = [[1, str(path)], [2, str(honest.states[2])]]
        assert code(net, honest, own, states=states, segments=[1]) == "audit.state", case
    path.write_bytes(honest.states[1].read_bytes()[:-8])
    assert code(net, honest, own, states=[[1, str(path)]], segments=[1]) == "audit.state"


def test_our_own_mistakes_blame_nobody(net: TinyNet, honest: Done, own: str) -> None:
    shard = str(net.shard(0, 0))
    assert audited(net, honest, own, parent=shard)["error"]["code"] == "tensor.header"
    assert audited(net, honest, own, states=[])["error"]["code"] == "internal"
    other = honest.unit.assignment.parent.weights.model_copy(update={"root": hexed("other")})
    head = honest.unit.assignment.parent.model_copy(update={"weights": other})
    assignment = honest.unit.assignment.model_copy(update={"parent": head})
    answer = audited(net, honest, own, assignment=plain(assignment))
    assert answer["error"]["code"] == "state.corrupt"


def test_the_answer_is_known_from_the_assignment_alone(
    net: TinyNet, honest: Done, own: str
) -> None:
    answer = perform(
        {
            "job": "answer",
            "genesis": str(net.folder / "genesis.json"),
            "assignment": plain(honest.unit.assignment),
            "parent": str(net.head_file),
            "shards": [str(net.shard(0, 0))],
        }
    )["result"]
    assert tuple(answer["states"]) == honest.unit.commitment.states
    assert answer["update_root"] == honest.unit.commitment.update_root
    assert answer["numerics"] == own
