"""Units of every plan and codec through the real jobs: judged, replayed, merged, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.planned import Done, audited, lease, numerics, work
from paris_coordinator.jobs.common import check_update, update_of
from paris_coordinator.jobs.measure import direction, downhill, farthest
from paris_coordinator.judging import decide
from paris_coordinator.worker import perform
from paris_models import lean
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codecs import encode
from paris_models.config import UnitConfig
from paris_models.merge import merge
from paris_models.plans import PLANS
from paris_models.replay import model_class
from paris_models.shards import read_shards
from paris_models.updates import cosine
from paris_protocol.errors import ParisError
from paris_protocol.records import Assignment, Layer
from paris_protocol.streams import unit_key
from tinynet import NODES, SECRET, TinyNet, Unit, plain, root_of

Json = dict[str, Any]
Update = dict[str, torch.Tensor]

KINDS = {
    "lora 16": ("lora-16-bf16", "lora-int16", 2.0),
    "lora 64": ("lora-64-nf4", "lora-int8", 1.0),
    "dense": ("float32", "dense-f32", 1.0),
    "topk": ("float32", "topk-32", 1.0),
    "int8": ("float32", "int8", 1.0),
    "adafactor": ("adafactor", "int8", 1.0),
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(net: TinyNet) -> dict[str, Done]:
    """An honest unit of each kind."""
    return {name: work(net, lease(net, 0, *how)) for name, how in KINDS.items()}


def judged(net: TinyNet, unit: Unit, **changes: Any) -> tuple[str, str]:
    """(layer, code) of the refusal, or ("", "accepted")."""
    answer = perform(net.verify_job(unit, **changes))
    assert "result" in answer, answer
    layers = [Layer.model_validate_json(json.dumps(layer)) for layer in answer["result"]["layers"]]
    accepted, code = decide(layers, net.policy.record, unit.assignment.round)
    return ("" if accepted else layers[-1].layer, code)


def dense(net: TinyNet, unit: Unit) -> Update:
    return update_of(unit.update, unit.assignment.update_codec, net.config)


def factors(done: Done) -> Update:
    """The factors that a LoRA unit ended with."""
    last = load_tensors(done.states[-1])
    return {n.removeprefix("weights."): t for n, t in last.items() if n.startswith("weights.")}


def hand_in(net: TinyNet, honest: Done, wire: Update, roots: list[str] | None = None) -> Unit:
    """Another update with the commitments of honest states."""
    states = list(honest.unit.commitment.states) if roots is None else roots
    return net.hand_in(honest.unit.assignment, wire, states)


# ---------------------------------------------------------------- honest work


@pytest.mark.parametrize("kind", KINDS)
def test_honest_units_are_accepted_and_audited_by_equal_bits(
    net: TinyNet, done: dict[str, Done], kind: str
) -> None:
    honest = done[kind]
    assert judged(net, honest.unit) == ("", "accepted")
    found = audited(net, honest)
    assert (found["passed"], found["code"], found["exact"]) == (True, "", True)
    assert [one["rho"] for one in found["segments"]] == ["0"] * (len(honest.states) - 1)


def test_adapters_are_judged_without_their_expert_being_made(
    net: TinyNet, done: dict[str, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean, "adapt", None)
    assert judged(net, done["lora 64"].unit) == ("", "accepted")


def test_sub_rounds_open_nothing_but_their_result(done: dict[str, Done]) -> None:
    assert [len(done[kind].states) for kind in ("adafactor", "lora 16")] == [2, 4]


def test_a_round_of_several_kinds_merges_as_its_dense_updates_do(
    net: TinyNet, done: dict[str, Done], tmp_path: Path
) -> None:
    kinds = ["lora 16", "lora 64", "topk", "dense"]
    units = [done[kind].unit for kind in kinds]
    job = {
        "job": "merge", "genesis": str(net.folder / "genesis.json"), "parent": str(net.head_file),
        "inputs": [
            {"path": str(unit.update), "weight": (0.25).hex(), "scale": (1.0).hex()}
            for unit in units
        ],
        "out": str(tmp_path / "head.safetensors"), "private": str(net.private(0)),
        "policy": plain(net.policy.record), "secret": SECRET,
    }  # fmt: skip
    answer = perform(job)["result"]
    assert not answer["worse"], answer
    parent = {n: t.numpy() for n, t in load_tensors(net.head_file).items()}
    plainly = [{n: t.numpy() for n, t in dense(net, unit).items()} for unit in units]
    wanted = merge(parent, plainly, [0.25] * 4, [1.0] * 4)
    assert answer["root"] == root_of({n: torch.from_numpy(a) for n, a in wanted.items()})


@pytest.mark.parametrize("kind", ["lora 16", "topk"])
def test_the_known_answer_of_a_unit_is_its_own(
    net: TinyNet, done: dict[str, Done], kind: str
) -> None:
    unit = done[kind].unit
    job = {
        "job": "answer", "genesis": str(net.folder / "genesis.json"),
        "assignment": plain(unit.assignment), "parent": str(net.head_file),
        "shards": [str(net.shard(0, 0))], "update": str(unit.update),
    }  # fmt: skip
    answer = perform(job)["result"]
    assert tuple(answer["states"]) == unit.commitment.states
    assert (answer["update_root"], answer["rho"]) == (unit.commitment.update_root, "0")


def test_numeric_classes_and_model_classes_are_of_a_plan(net: TinyNet) -> None:
    found = [numerics(net, lease(net, 0, *KINDS[kind])) for kind in ("lora 16", "lora 64", "dense")]
    assert len({one["numerics"] for one in found}) == 3
    plans = [PLANS[name] for name in ("lora-16-bf16", "lora-64-nf4", "float32")]
    assert [one["model"] for one in found] == [
        model_class(net.config, net.recipe, plan) for plan in plans
    ]


def test_another_class_of_machine_without_a_tolerance_proves_nothing(
    net: TinyNet, done: dict[str, Done]
) -> None:
    found = audited(net, done["lora 16"], numerics="0" * 64)
    assert (found["passed"], found["code"], found["segments"]) == (True, "audit.tolerance", [])


def test_updates_stay_within_reach(net: TinyNet, done: dict[str, Done]) -> None:
    """No plan moves a tensor farther than the bound of its optimiser."""
    for name, one in done.items():
        assignment = one.unit.assignment
        unit = UnitConfig.from_record(assignment, unit_key(assignment.seed))
        plan, parent = PLANS[assignment.plan], load_tensors(net.head_file)
        ways = farthest(lean.new_state(plan, net.config, net.recipe, parent, key=unit.key), unit)
        for tensor, change in dense(net, one.unit).items():
            assert float(change.norm()) <= 1.01 * ways.get(tensor, 0.0) + 1e-9, (name, tensor)


def test_adapters_are_compared_with_their_own_first_step(
    net: TinyNet, done: dict[str, Done]
) -> None:
    assignment = done["lora 16"].unit.assignment
    parent, key = load_tensors(net.head_file), unit_key(assignment.seed)
    clips = read_shards([net.private(0)])
    slope = downhill(parent, net.config, net.recipe, clips, b"k" * 16)

    def step(plan: str) -> Update:
        state = lean.new_state(PLANS[plan], net.config, net.recipe, parent, key=key)
        return direction(slope, state)

    update, own = dense(net, done["lora 16"].unit), step(assignment.plan)
    assert {n for n, t in own.items() if t.any()} == {n for n, t in update.items() if t.any()}
    assert cosine(update, own) > 1.1 * cosine(update, slope.step) > 0
    assert step("float32") is slope.step
    assert all(float(t.abs().max()) == 1.0 for t in step("adamw").values())


# ---------------------------------------------------------------- cheats, each by its layer


def test_factors_that_are_noise_flipped_or_inflated_are_refused(
    net: TinyNet, done: dict[str, Done]
) -> None:
    honest = done["lora 16"]
    mine, generator = factors(honest), torch.Generator().manual_seed(5)
    codec = honest.unit.assignment.update_codec

    def with_b(change: Any) -> Unit:
        changed = {n: change(t) if n.endswith(".b") else t for n, t in mine.items()}
        return hand_in(net, honest, encode(codec, changed))

    def drawn(b: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(b.shape, generator=generator)
        return noise * (b.norm() / noise.norm())

    for change, code in (
        (drawn, "statistics.noise"),
        (torch.neg, "statistics.direction"),
        (lambda b: 20 * b, "statistics.norm"),
        (lambda b: b / 1000, "statistics.zero"),
        (torch.zeros_like, "statistics.zero"),
    ):
        layer, found = judged(net, with_b(change))
        same = {code, "statistics.noise", "statistics.direction"} if change is drawn else {code}
        assert layer == "L2" and found in same, code


def test_sparse_updates_that_are_noise_or_flipped_are_refused(
    net: TinyNet, done: dict[str, Done]
) -> None:
    honest = done["topk"]
    sent, generator = dense(net, honest.unit), torch.Generator().manual_seed(2)
    flipped = encode("topk-32", {n: -t for n, t in sent.items()})
    assert judged(net, hand_in(net, honest, flipped)) == ("L2", "statistics.direction")
    drawn = {n: torch.randn(t.shape, generator=generator) for n, t in sent.items()}
    size = sum(float(t.square().sum()) for t in sent.values()) ** 0.5
    for scale in (30.0, 0.001):
        wire = encode("topk-32", {n: t * scale * size / 70 for n, t in drawn.items()})
        assert judged(net, hand_in(net, honest, wire))[0] == "L2"


def test_a_sparse_update_may_have_nothing_inside_the_blocks(
    net: TinyNet, done: dict[str, Done]
) -> None:
    """Near a fresh expert the largest values all stand in its first and last layers."""
    change = dense(net, done["dense"].unit)
    sent = {n: t * ("transformer_blocks." not in n) for n, t in change.items()}
    assert judged(net, hand_in(net, done["topk"], encode("topk-32", sent))) == ("", "accepted")


def test_a_copy_is_seen_through_every_codec(net: TinyNet, done: dict[str, Done]) -> None:
    first = done["dense"].unit
    others = [{"id": "first", "node": first.assignment.node, "path": str(first.update)}]
    for kind in ("topk", "int8"):
        copy = encode(KINDS[kind][1], dense(net, first))  # type: ignore[arg-type]
        asked = done[kind].unit.assignment.model_copy(update={"node": NODES[2].id})
        thief = net.hand_in(asked, copy, list(done[kind].unit.commitment.states))
        assert judged(net, thief, others=others) == ("L2", "statistics.copy"), kind
    adapters = done["lora 16"]
    others = [{"id": "first", "node": first.assignment.node, "path": str(adapters.unit.update)}]
    asked = done["dense"].unit.assignment.model_copy(update={"node": NODES[2].id})
    thief = net.hand_in(asked, dense(net, adapters.unit), list(first.commitment.states))
    assert judged(net, thief, others=others)[1] in ("statistics.copy", "statistics.rank")


def test_honest_units_of_other_nodes_are_no_copies(net: TinyNet, done: dict[str, Done]) -> None:
    files = [
        {"id": name, "node": NODES[2].id, "path": str(one.unit.update)}
        for name, one in done.items()
    ]
    for kind in ("lora 16", "topk", "dense"):
        mine = work(net, lease(net, 1, *KINDS[kind])).unit
        assert judged(net, mine, others=files) == ("", "accepted"), kind


def test_a_start_from_another_units_key_is_refused(net: TinyNet) -> None:
    assignment = lease(net, 0, *KINDS["lora 16"])
    other = work(net, assignment, key=b"another unit key")
    assert judged(net, other.unit) == ("L1", "commitment.start")
    first = work(net, assignment).unit.commitment.states[0]
    roots = [first, *other.unit.commitment.states[1:]]
    update = load_tensors(other.unit.update)
    hidden = Done(net.hand_in(assignment, update, roots), other.states)
    assert audited(net, hidden)["code"] == "audit.mismatch"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("lora 16", {"skip": 2}),
        ("lora 16", {"rate_start": 1.8}),
        ("topk", {"skip": 2}),
        ("adafactor", {"rate_start": 0.9}),
    ],
)
def test_skipped_steps_and_other_rates_are_found_by_the_replay(
    net: TinyNet, kind: str, change: dict[str, Any]
) -> None:
    assignment = lease(net, 0, *KINDS[kind])
    assert audited(net, work(net, assignment, **change))["code"] == "audit.mismatch"


@pytest.mark.parametrize("kind", ["lora 16", "topk"])
def test_another_update_than_the_committed_states_make_is_found(
    net: TinyNet, done: dict[str, Done], kind: str
) -> None:
    honest = done[kind]
    wire = load_tensors(honest.unit.update)
    made = hand_in(net, honest, _louder(wire))
    commitment = made.commitment.model_copy(update={"residual": honest.unit.commitment.residual})
    lie = Done(Unit(made.assignment, commitment, made.contribution, made.update), honest.states)
    assert audited(net, lie, segments=[0])["code"] == "audit.mismatch"


# ---------------------------------------------------------------- what topk updates leave out


def second(net: TinyNet, first: Done, begun: Path | None = None, **other: Any) -> Done:
    """A unit that makes up for what the first one left out, or begins with something else."""
    assert first.rest is not None
    asked = lease(net, 1, *KINDS["topk"], residual=root_of(load_tensors(first.rest)))
    return work(net, asked, begun=begun or first.rest, **other)


def opened(net: TinyNet, done: Done, rest: Path, **changes: Any) -> Json:
    count = len(done.states)
    states = [[i, str(done.states[i])] for i in range(1, count)]
    return audited(net, done, states=[*states, [count, str(rest)]], **changes)


def test_a_unit_that_makes_up_for_a_residual_is_accepted_and_audited(
    net: TinyNet, done: dict[str, Done]
) -> None:
    first = done["topk"]
    assert first.rest is not None
    next_one = second(net, first)
    assert judged(net, next_one.unit) == ("", "accepted")
    found = opened(net, next_one, first.rest)
    assert (found["passed"], found["code"], found["exact"]) == (True, "", True)
    unknown = audited(net, next_one)
    assert (unknown["code"], unknown["segments"]) == ("audit.tolerance", [])
    plain_one = work(net, lease(net, 1, *KINDS["topk"])).unit
    assert plain_one.commitment.update_root != next_one.unit.commitment.update_root


def test_a_residual_that_is_another_is_found(
    net: TinyNet, done: dict[str, Done], tmp_path: Path
) -> None:
    first = done["topk"]
    assert first.rest is not None
    rest = load_tensors(first.rest)
    other, damaged = tmp_path / "other.safetensors", tmp_path / "damaged.safetensors"
    save_tensors({n: 2 * t for n, t in rest.items()}, other)
    damaged.write_bytes(first.rest.read_bytes()[:-1])
    begun_elsewhere = second(net, first, begun=other)
    honest = second(net, first)
    # L1 cannot tell what it began with; the audit can, whichever residual is laid open.
    assert judged(net, begun_elsewhere.unit)[0] != "L1"
    for lie, opening in (
        (begun_elsewhere, first.rest),
        (begun_elsewhere, other),
        (honest, other),
        (honest, damaged),
    ):
        assert opened(net, lie, opening)["code"] == "audit.state"
    unit = honest.unit
    false = unit.commitment.model_copy(update={"residual": root_of(rest)})
    lie = Done(Unit(unit.assignment, false, unit.contribution, unit.update), honest.states)
    assert opened(net, lie, first.rest, segments=[0])["code"] == "audit.mismatch"


def _louder(wire: Update) -> Update:
    """The same update by another scale: a bit of an exponent, or every level by a power of two."""
    changed = {n: t.clone() for n, t in wire.items()}
    for name, tensor in changed.items():
        if name.endswith((".exponents", ".largest", ".levels")):
            changed[name] = tensor + 1 if tensor.dtype == torch.int8 else 2 * tensor
    return changed


# ---------------------------------------------------------------- files that cannot be


def with_assignment(unit: Unit, **changes: Any) -> Unit:
    changed: Assignment = unit.assignment.model_copy(update=changes)
    return Unit(changed, unit.commitment, unit.contribution, unit.update)


def test_another_codec_or_rank_than_the_assigned_one_is_refused(
    net: TinyNet, done: dict[str, Done]
) -> None:
    for kind, changes in (
        ("lora 16", {"update_codec": "lora-int8"}),
        ("lora 64", {"plan": "lora-16-nf4"}),
        ("lora 16", {"plan": "lora-64-bf16"}),
        ("topk", {"update_codec": "topk-64"}),
        ("topk", {"update_codec": "dense-f32"}),
        ("dense", {"update_codec": "topk-32"}),
        ("dense", {"update_codec": "dense-bf16"}),
        ("int8", {"plan": "lora-16-bf16", "update_codec": "lora-int16", "dtype": "bfloat16"}),
    ):
        unit = with_assignment(done[kind].unit, **changes)
        assert judged(net, unit) == ("L0", "structure.schema"), (kind, changes)


@pytest.mark.parametrize("kind", ["lora 16", "topk", "int8"])
def test_mutated_files_are_refused_without_an_error(
    net: TinyNet, done: dict[str, Done], kind: str, tmp_path: Path
) -> None:
    honest = done[kind]
    data = honest.unit.update.read_bytes()
    for place in range(len(data) - 1, 8, -(len(data) // 12)):
        changed = bytearray(data)
        changed[place] ^= 0x81
        path = tmp_path / "mutated.safetensors"
        path.write_bytes(changed)
        layer, code = judged(net, honest.unit, update=str(path))
        assert layer == "L0" and code.startswith("structure."), (place, code)


def test_a_signed_file_that_no_encoder_writes_is_refused(
    net: TinyNet, done: dict[str, Done]
) -> None:
    honest, wire = done["topk"], load_tensors(done["topk"].unit.update)
    for name, change in (
        ("topk-32.counts", lambda t: t + 1),
        ("topk-32.high", torch.zeros_like),
        ("topk-32.levels", lambda t: t * float("nan")),
        ("topk-32.levels", lambda t: -t),
    ):
        bad = hand_in(net, honest, wire | {name: change(wire[name])})
        layer, code = judged(net, bad)
        assert layer == "L0" and code in ("structure.schema", "structure.values"), name
    mine = load_tensors(done["lora 16"].unit.update)
    name = "lora-int16.values"
    bad = hand_in(net, done["lora 16"], mine | {name: torch.full_like(mine[name], -(1 << 15))})
    assert judged(net, bad)[0] == "L0"


def test_update_of_refuses_with_one_code(net: TinyNet, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_tensors({"w": torch.zeros(3)}, path)
    for call in (
        lambda: update_of(path, "topk-64", net.config),
        lambda: update_of(path, "lora-int16", net.config),
        lambda: check_update(path, net.config),
    ):
        with pytest.raises(ParisError) as refusal:
            call()
        assert refusal.value.code == "tensor.header"
