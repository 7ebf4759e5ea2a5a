"""The verify job on real files: honest units pass, each attack is refused by its layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from paris_coordinator.jobs import verify as verify_module
from paris_coordinator.judging import decide
from paris_coordinator.worker import perform
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.expert import parameter_shapes
from paris_models.updates import block_of
from paris_protocol.records import Layer
from tinynet import TinyNet, Unit, hexed, plain

Update = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def honest(net: TinyNet) -> Unit:
    return net.unit(0, 0)


@pytest.fixture(scope="module")
def update(honest: Unit) -> Update:
    return load_tensors(honest.update)


def judged(net: TinyNet, unit: Unit, **changes: Any) -> tuple[str, str]:
    """(layer, code) of the refusal, or ("", "accepted")."""
    answer = perform(net.verify_job(unit, **changes))
    assert "result" in answer, answer
    layers = [Layer.model_validate_json(json.dumps(layer)) for layer in answer["result"]["layers"]]
    accepted, code = decide(layers, net.policy.record, unit.assignment.round)
    return ("" if accepted else layers[-1].layer, code)


def attack(net: TinyNet, honest: Unit, update: Update) -> Unit:
    """A dishonest result that is committed to consistently."""
    return net.hand_in(honest.assignment, update, list(honest.commitment.states))


def noise(update: Update, seed: int = 5) -> Update:
    """Gaussian noise of the same norm in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(t.shape, generator=generator) for n, t in update.items()}
    return {n: d * (update[n].norm() / d.norm()) for n, d in drawn.items()}


def test_honest_units_pass_all_layers_with_numbers(net: TinyNet, honest: Unit) -> None:
    answer = perform(net.verify_job(honest))["result"]
    assert [layer["layer"] for layer in answer["layers"]] == ["L0", "L1", "L2", "L3"]
    assert float(answer["relative"]) > 0
    found = dict(answer["layers"][-1]["numbers"])
    assert found.keys() == {"n", "margin", "bucket"}
    assert answer["private"].keys() == {"delta", "se", "n", "before", "after"}
    blocks = [name for name, _ in answer["layers"][2]["numbers"] if name.startswith("block.")]
    assert len(blocks) == len({block_of(name) for name in parameter_shapes(net.config)})
    for unit in (honest, net.unit(0, 1), net.unit(1, 0)):
        assert judged(net, unit) == ("", "accepted")


def test_verdict_is_reproducible(net: TinyNet, honest: Unit) -> None:
    first = perform(net.verify_job(honest))["result"]
    verify_module._kept.clear()
    again = perform(net.verify_job(honest))["result"]
    assert {**again, "cost": None} == {**first, "cost": None}


def test_the_cost_is_counted_and_the_parent_measured_once(net: TinyNet, honest: Unit) -> None:
    verify_module._kept.clear()
    clips = net.policy.record.margins.clips
    first = perform(net.verify_job(honest))["result"]["cost"]
    assert (first["forward"], first["trained"]) == (2 * clips, clips)  # all clips fit one gradient
    assert first["equivalents"] == 5 * clips
    second = perform(net.verify_job(net.unit(0, 1)))["result"]["cost"]
    assert (second["forward"], second["trained"]) == (clips, 0)
    assert second["share"] == pytest.approx(clips / (3 * 12 * 16))


def with_margins(net: TinyNet, **changes: Any) -> dict[str, Any]:
    """The network's policy with other margins, as the job carries it."""
    policy = net.policy.record
    margins = policy.margins.model_copy(update=changes)
    return plain(policy.model_copy(update={"margins": margins}))  # type: ignore[no-any-return]


def test_clear_cases_stop_at_the_first_look(net: TinyNet, honest: Unit, update: Update) -> None:
    policy = with_margins(net, looks=(16, 32), damage=("0.2",))
    bad = {n: t.clone() for n, t in update.items()}
    bad["proj_out.bias"] = bad["proj_out.bias"] + 0.9
    for unit, bucket in ((honest, {"-1", "0"}), (attack(net, honest, bad), {"1"})):
        verify_module._kept.clear()
        answer = perform(net.verify_job(unit, policy=policy))["result"]
        found = dict(answer["layers"][-1]["numbers"])
        assert found["n"] == "16"
        assert found["bucket"] in bucket
        assert answer["cost"]["forward"] == 32


def test_a_block_far_outside_the_lineages_own_is_refused(
    net: TinyNet, honest: Unit, update: Update
) -> None:
    numbers = dict(perform(net.verify_job(honest))["result"]["layers"][2]["numbers"])
    blocks = {
        name.removeprefix("block."): [float(value) * (1 + 0.01 * i) for i in range(-4, 5)]
        for name, value in numbers.items()
        if name.startswith("block.")
    }
    policy = with_margins(net, block_z="6")
    assert judged(net, honest, policy=policy, blocks=blocks) == ("", "accepted")
    bad = {n: t * (2.5 if n.startswith("proj_out") else 1) for n, t in update.items()}
    lopsided = attack(net, honest, bad)
    assert judged(net, lopsided, policy=policy, blocks=blocks) == ("L2", "statistics.block")
    assert judged(net, lopsided, blocks=blocks)[1] != "statistics.block"  # "0" switches it off


def test_a_fake_of_low_rank_is_refused(net: TinyNet, honest: Unit, update: Update) -> None:
    fake = {
        name: tensor.mean(1, keepdim=True).expand_as(tensor).contiguous()
        if tensor.ndim == 2 and "transformer_blocks" in name
        else tensor
        for name, tensor in update.items()
    }
    assert judged(net, attack(net, honest, fake)) == ("L2", "statistics.rank")


def test_the_direction_of_the_last_merge_is_reported(
    net: TinyNet, honest: Unit, update: Update, tmp_path: Path
) -> None:
    head = load_tensors(net.head_file)
    path = tmp_path / "previous.safetensors"
    save_tensors({name: tensor - update[name] for name, tensor in head.items()}, path)
    answer = perform(net.verify_job(honest, previous=str(path)))["result"]
    assert float(dict(answer["layers"][2]["numbers"])["lineage"]) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- L0


def test_tampered_bytes_are_refused(net: TinyNet, honest: Unit, tmp_path: Path) -> None:
    data = bytearray(honest.update.read_bytes())
    data[-3] ^= 1
    path = tmp_path / "tampered.safetensors"
    path.write_bytes(data)
    assert judged(net, honest, update=str(path)) == ("L0", "structure.digest")


@pytest.mark.parametrize("length", [0, 7, 200, -1])
def test_cut_off_files_are_refused(net: TinyNet, honest: Unit, tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(honest.update.read_bytes()[:length])
    assert judged(net, honest, update=str(path)) == ("L0", "structure.schema")


@pytest.mark.parametrize("change", ["extra", "missing", "dtype", "shape"])
def test_other_tensors_are_refused(net: TinyNet, honest: Unit, update: Update, change: str) -> None:
    name = "proj_out.weight"
    changed = dict(update)
    if change == "extra":
        changed["more"] = torch.zeros(1)
    elif change == "missing":
        del changed[name]
    elif change == "dtype":
        changed[name] = changed[name].double()
    else:
        changed[name] = changed[name].T.contiguous()
        changed[name] = torch.cat([changed[name], changed[name]])
    assert judged(net, attack(net, honest, changed)) == ("L0", "structure.schema")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_no_number_is_refused(
    net: TinyNet, honest: Unit, update: Update, bad: float
) -> None:
    changed = {name: tensor.clone() for name, tensor in update.items()}
    changed["proj_out.bias"][1] = bad
    assert judged(net, attack(net, honest, changed)) == ("L0", "structure.values")


def test_claimed_work_must_be_the_assigned_work(net: TinyNet, honest: Unit) -> None:
    for changes in ({"steps": 3}, {"samples": 1}):
        claim = plain(honest.contribution.model_copy(update=changes))
        assert judged(net, honest, contribution=claim) == ("L0", "structure.steps")


# ---------------------------------------------------------------- L1


def test_commitment_must_exist_and_agree(net: TinyNet, honest: Unit) -> None:
    commitment = honest.commitment
    assert judged(net, honest, commitment=None) == ("L1", "commitment.missing")
    for changes in (
        {"update_root": hexed("another")},
        {"states": commitment.states[:-1]},
        {"states_root": hexed("another")},
        {"assignment": hexed("another")},
        {"steps": 1},
    ):
        other = plain(commitment.model_copy(update=changes))
        assert judged(net, honest, commitment=other) == ("L1", "commitment.mismatch")


def test_committed_start_must_be_the_parent(net: TinyNet, honest: Unit, update: Update) -> None:
    roots = [hexed("elsewhere"), *honest.commitment.states[1:]]
    unit = net.hand_in(honest.assignment, update, roots)
    assert judged(net, unit) == ("L1", "commitment.start")


# ---------------------------------------------------------------- L2 and L3


def test_gross_attacks_are_refused(net: TinyNet, honest: Unit, update: Update) -> None:
    tests = {
        "zero": ({n: torch.zeros_like(t) for n, t in update.items()}, "statistics.zero"),
        "nearly zero": ({n: t / 100 for n, t in update.items()}, "statistics.zero"),
        "inflated": ({n: 10 * t for n, t in update.items()}, "statistics.norm"),
        "flipped": ({n: -t for n, t in update.items()}, "statistics.direction"),
        "noise": (noise(update), "statistics.noise"),
    }
    for name, (bad, code) in tests.items():
        assert judged(net, attack(net, honest, bad)) == ("L2", code), name


def test_disguised_copy_of_an_earlier_update_is_refused(
    net: TinyNet, honest: Unit, update: Update
) -> None:
    disguise = noise(update, 6)
    copy = attack(net, honest, {n: t + 0.1 * disguise[n] for n, t in update.items()})
    mine = copy.assignment.model_copy(update={"node": net.assignment(0, 2).node})
    thief = Unit(mine, copy.commitment, copy.contribution, copy.update)
    others = [{"id": "first", "node": honest.assignment.node, "path": str(honest.update)}]
    assert judged(net, thief, others=others) == ("L2", "statistics.copy")
    assert judged(net, net.unit(0, 1), others=others) == ("", "accepted")
    # One's own earlier work is no copy: a unit that was lost is done again.
    assert judged(net, honest, others=others) == ("", "accepted")


def test_damage_within_the_norms_is_refused_by_loss(
    net: TinyNet, honest: Unit, update: Update
) -> None:
    """Honest but for four values of the output's bias: no statistic of L2 sees it."""
    bad = {n: t.clone() for n, t in update.items()}
    bad["proj_out.bias"] = bad["proj_out.bias"] + 0.6
    assert judged(net, attack(net, honest, bad)) == ("L3", "loss.damage")


def test_a_damaged_head_is_our_own_fault(net: TinyNet, honest: Unit, tmp_path: Path) -> None:
    head = load_tensors(net.head_file)
    head["proj_out.bias"] = head["proj_out.bias"] + 1
    path = tmp_path / "head.safetensors"
    save_tensors(head, path)
    verify_module._kept.clear()
    answer = perform(net.verify_job(honest, parent=str(path)))
    assert answer["error"]["code"] == "state.corrupt"
