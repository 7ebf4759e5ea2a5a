"""`benchmarks bytes` and `lineage`: their rows, and that they measure what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import bytes as measured
from benchmarks import lineage
from benchmarks.lineage_lab import END, Lab, copied, key, peak, piece, train
from benchmarks.table import as_json, as_text

from paris_models.codecs import decode, left_out, wire_bytes
from paris_models.config import DEMO_RECIPE, LADDER, ExpertConfig
from paris_models.expert import build_expert
from paris_models.shards import ClipTable
from paris_models.train import weights
from paris_models.updates import make_update

TINY = ExpertConfig(1, 4, 4, 1, 1, 2, 16, (4, 6, 6), 8, 8)


@pytest.fixture(scope="module")
def lab() -> Lab:
    """Random clips and a random start."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    clips = ClipTable(
        drawn(24, 4, 2, 2, 2), torch.arange(24) % 3, drawn(3, 2, 8), drawn(3, 8),
        torch.zeros(2, 8), torch.zeros(8),
    )  # fmt: skip
    # A fresh expert's gates are zero, and no factor inside the blocks would have a gradient.
    fresh = build_expert(TINY, seed=0).named_parameters()
    start = {n: p.detach() + 0.1 * drawn(*p.shape) for n, p in fresh}
    recipe = replace(DEMO_RECIPE, optimiser="adamw", lr=1e-2)
    return Lab(TINY, recipe, clips.rows(torch.arange(16)), clips.rows(torch.arange(16, 24)), start)


@pytest.fixture()
def quick(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Both benchmarks on the tiny lab, with units of a few steps."""
    monkeypatch.setattr(measured, "middle_lab", lambda _folder: lab)
    monkeypatch.setattr(lineage, "demo_lab", lambda: lab)
    for name in ("STEPS", "BATCH", "ROUND_STEPS"):
        monkeypatch.setattr(measured, name, 2)
    return lab


def test_nothing_that_topk_leaves_out_is_lost(lab: Lab, tmp_path: Path) -> None:
    result = {name: tensor + 0.1 * (tensor + 1) for name, tensor in lab.initial.items()}
    head, left, size = measured.send(lab.initial, result, "topk-32", tmp_path)
    assert left is not None
    for name in result:
        torch.testing.assert_close(head[name] + left[name], result[name])
    assert size == wire_bytes("topk-32", measured.shapes_of(result))
    assert any(not torch.equal(head[n], result[n]) for n in result)


@pytest.mark.parametrize("arm", ["dense-f32", "dense-f16", "int8", "topk-32 alone"])
def test_other_arms_carry_nothing(arm: measured.Arm, lab: Lab, tmp_path: Path) -> None:
    result = {name: tensor + 0.01 for name, tensor in lab.initial.items()}
    head, left, _ = measured.send(lab.initial, result, arm, tmp_path)
    assert left is None
    close = all(torch.allclose(head[n], result[n], atol=1e-4) for n in result)
    assert close == (arm != "topk-32 alone")


def test_a_lineage_goes_by_its_files_and_carries_what_was_left_out(
    quick: Lab, tmp_path: Path
) -> None:
    """Two units by hand: the second begins at the head plus the residual."""
    shapes = measured.shapes_of(quick.initial)
    head, left = quick.initial, {n: torch.zeros_like(t) for n, t in quick.initial.items()}
    for turn in range(2):
        unit = piece(("bytes", 0), turn, 2, steps=2, batch=2)
        result = weights(train(quick, {n: head[n] + left[n] for n in head}, unit))
        wire = make_update(head, result, "topk-32")
        left = left_out({n: result[n] - head[n] for n in head}, wire, "topk-32", shapes)
        sent = decode(wire, "topk-32", shapes)
        head = {n: head[n] + sent[n] for n in head}
    found = measured.lineage(tmp_path, "topk-32", 0, 2)
    assert found.end == quick.loss(head)
    assert found.start == quick.loss(quick.initial)
    assert measured.lineage(tmp_path, "topk-32 alone", 0, 2).end != found.end


def test_mixed_rounds_merge_every_node(quick: Lab, tmp_path: Path) -> None:
    dense = measured.mixed(tmp_path, measured.DENSE_ROUND, 1)
    both = measured.mixed(tmp_path, measured.MIXED_ROUNDS[""], 1)
    factors = measured.mixed(tmp_path, ("lora-16-bf16",) * 4, 1)
    assert len({dense, both, factors, 0.0}) == 4
    gains = {measured.DENSE_ROUND: 0.5} | dict.fromkeys(measured.MIXED_ROUNDS.values(), 0.45)
    first = measured.mixed_rows(gains)[0]
    assert (first.id, first.ours) == ("bytes.mixed", pytest.approx(0.9))


def test_rows_of_bytes(lab: Lab) -> None:
    found = {
        ("dense-f32", 0): measured.Found(1.0, 0.5, 1000),
        ("dense-f32", 1): measured.Found(1.0, 0.6, 1000),
        ("topk-32", 0): measured.Found(1.0, 0.52, 100),
        ("topk-32", 1): measured.Found(1.0, 0.6, 100),
        ("int8", 0): measured.Found(1.0, 0.5, 400),
    }
    rows = {row.id: row for row in measured._rows(lab, found, units=7, seeds=2)}
    assert rows["bytes.gain_kept"].ours == pytest.approx(0.98)
    assert rows["bytes.gain_kept"].spread == pytest.approx(0.02)
    assert rows["bytes.gain_kept.int8"].ours == 1.0
    checkpoint = wire_bytes("dense-bf16", measured.shapes_of(lab.initial))
    assert rows["bytes.update"].ratio == pytest.approx(100 / checkpoint)
    assert rows["bytes.head_follow"].ours == 700
    assert rows["bytes.lora"].ratio is not None and 0.005 < rows["bytes.lora"].ratio <= 0.01
    assert as_text("bytes", {}, list(rows.values())) and as_json("bytes", {}, list(rows.values()))


def test_every_arm_sees_the_same_samples() -> None:
    arms = (*lineage.MAIN, *lineage.OTHERS)
    assert {arm.samples for arm in arms} == {lineage.ALONE.samples}
    assert len({arm.id for arm in arms}) == len(arms)


def test_one_node_is_one_uninterrupted_training(quick: Lab) -> None:
    """Carrying the state of one node over a border changes nothing but the random streams."""
    arm = lineage.Arm("node", 1, steps=3, batch=2, rounds=2, carried=True)
    first = lineage.unit_of(arm, 0, 0, 0)
    state = train(quick, quick.initial, first)
    carried = copied(state.optimiser.state()), 3
    second = lineage.unit_of(arm, 0, 0, 1)
    assert second.warmup == 0 and second.rate_start == first.rate_end
    after = weights(train(quick, weights(state), second, carried))
    fresh = weights(train(quick, weights(state), second))
    assert quick.loss(fresh) != quick.loss(after)
    gain = quick.loss(quick.initial) - quick.loss(after)
    assert lineage.lineage(arm, 0).gain == pytest.approx(gain, rel=1e-5)
    forgotten = lineage.lineage(replace(arm, carried=False), 0)
    assert abs(forgotten.gain - gain) > 1e-4


def test_volunteers_train_disjoint_clips_and_their_mean_is_the_head(quick: Lab) -> None:
    arm = lineage.Arm("pair", 2, steps=2, batch=2, rounds=1)
    ends = []
    for node in range(2):
        own = replace(quick, clips=quick.clips.rows(torch.arange(node, 16, 2)))
        unit = lineage.unit_of(arm, 0, node, 0)
        ends.append(copied(weights(train(own, quick.initial, unit))))
    head = lineage.mean(ends)
    found = lineage.lineage(arm, 0)
    assert found.gain == pytest.approx(quick.loss(quick.initial) - quick.loss(head), rel=1e-6)
    assert len(found.units) == 1


def test_schedules() -> None:
    assert peak(0, 4) == 1.0 and peak(4, 4) == pytest.approx(END)
    inside = lineage.unit_of(lineage.Arm("x", 2, 10, 2, schedule="inside"), 0, 0, 3)
    assert (inside.rate_start, inside.rate_end) == (1.0, END)
    assert key("a") != key("b") and len(key("a")) == 16


def test_rows_of_lineage() -> None:
    found = {
        (lineage.ALONE.id, 0): lineage.Found(1.0, (0.1, -0.2)),
        (lineage.ALONE.id, 1): lineage.Found(2.0, (0.0, -0.2)),
        ("2.fresh", 0): lineage.Found(0.9, (0.3, -0.2)),
        ("2.fresh", 1): lineage.Found(1.6, (0.2, -0.2)),
    }
    share, unit = lineage.rows(found)
    assert share.id == "lineage.share.2.fresh" and share.ours == pytest.approx(0.85)
    assert share.spread == pytest.approx(0.05) and share.n == 2
    assert unit.ours == 0.3 and unit.alternative == 0.1


def test_the_chosen_codec_fits_a_fiftieth() -> None:
    shapes = {"weight": (LADDER["5M"].parameters,)}
    assert wire_bytes(measured.CHOSEN, shapes) <= wire_bytes("dense-bf16", shapes) / 50
