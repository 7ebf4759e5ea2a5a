"""Training is a function of (assignment, step): resume equals never having stopped (F15)."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models import lean
from paris_models.checkpoint import raw_items, save_tensors
from paris_models.config import RecipeConfig
from paris_models.expert import build_expert
from paris_models.optim import orthogonalise
from paris_models.plans import PLANS
from paris_models.shards import write_shard
from paris_models.train import (
    TrainState,
    batch_loss,
    load_state,
    load_state_tensors,
    make_batch,
    new_state,
    rate_multiplier,
    save_state,
    state_tensors,
    text_dropout,
    train_step,
    weights,
)
from paris_protocol import streams
from tiny_models import EXPERT, KEY, PAPER, RECIPE, UNIT, clips

WEIGHTS = dict(build_expert(EXPERT, seed=5).state_dict())
SAYING = {name: w + 0.05 for name, w in WEIGHTS.items()}
TABLE = clips()


def digest(state: TrainState) -> str:
    h = hashlib.sha256()
    for name, dtype, shape, data in raw_items(state_tensors(state)):
        h.update(f"{name} {dtype} {shape} ".encode() + bytes(data))
    return h.hexdigest()


def trained(recipe: RecipeConfig, steps: int) -> TrainState:
    state = new_state(EXPERT, recipe, WEIGHTS)
    for _ in range(steps):
        train_step(state, TABLE, UNIT)
    return state


@pytest.mark.parametrize("recipe", [RECIPE, PAPER], ids=["x0-muon", "velocity-adamw"])
@pytest.mark.parametrize("stop", range(7))
def test_stopping_anywhere_and_resuming_changes_no_bit(
    recipe: RecipeConfig, stop: int, tmp_path
) -> None:
    state = trained(recipe, stop)
    save_state(state, tmp_path / "state.safetensors")
    torch.manual_seed(stop)  # the global generator plays no part
    state = load_state(tmp_path / "state.safetensors", EXPERT, recipe)
    while state.step < UNIT.steps:
        train_step(state, TABLE, UNIT)
    assert digest(state) == digest(trained(recipe, UNIT.steps))


def test_two_processes_train_the_same_bits(tmp_path) -> None:
    save_tensors(WEIGHTS, tmp_path / "parent")
    write_shard(tmp_path / "shard", TABLE)
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import torch
torch.manual_seed(int(sys.argv[1]))
from paris_models.checkpoint import load_tensors
from paris_models.shards import read_shards
from paris_models.train import new_state, save_state, train_step
from tiny_models import EXPERT, RECIPE, UNIT
state = new_state(EXPERT, RECIPE, load_tensors(Path({str(tmp_path / "parent")!r})))
table = read_shards([Path({str(tmp_path / "shard")!r})])
while state.step < UNIT.steps:
    train_step(state, table, UNIT)
save_state(state, Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", script, "123", str(tmp_path / "state")]
    subprocess.run(command, check=True, timeout=300)
    there = load_state(tmp_path / "state", EXPERT, RECIPE)
    assert there.step == UNIT.steps
    assert digest(there) == digest(trained(RECIPE, UNIT.steps))


@pytest.mark.parametrize(
    "change",
    [{"key": b"x" * 16}, {"rate_start": 0.5}, {"warmup": 0}, {"batch": 3}, {"steps": 7}],
)
def test_every_field_of_the_unit_matters(change: dict[str, object]) -> None:
    state = new_state(EXPERT, RECIPE, WEIGHTS)
    for _ in range(2):
        train_step(state, TABLE, replace(UNIT, **change))  # type: ignore[arg-type]
    assert digest(state) != digest(trained(RECIPE, 2))


def test_a_fresh_state_can_be_made_by_anyone_and_owns_its_weights() -> None:
    first = new_state(EXPERT, RECIPE, WEIGHTS)
    kept = {name: w.clone() for name, w in WEIGHTS.items()}
    start = digest(first)
    train_step(first, TABLE, UNIT)
    assert digest(new_state(EXPERT, RECIPE, kept)) == start
    assert all(torch.equal(kept[name], w) for name, w in WEIGHTS.items())
    named = state_tensors(new_state(EXPERT, RECIPE, WEIGHTS))
    assert {n.split(".")[0] for n in named} == {"weights", "optimiser", "step"}
    assert all(not t.any() for n, t in named.items() if not n.startswith("weights."))
    for name in WEIGHTS:
        muon = "transformer_blocks." in name and WEIGHTS[name].ndim == 2
        kinds = ("momentum",) if muon else ("exp_avg", "exp_avg_sq")
        assert all(f"optimiser.{kind}.{name}" in named for kind in kinds)


def test_training_learns() -> None:
    state = new_state(EXPERT, RECIPE, WEIGHTS)
    unit = replace(UNIT, steps=60, batch=16)
    losses = [train_step(state, TABLE, unit) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_rate_is_warm_up_times_cosine() -> None:
    unit = replace(UNIT, steps=100, warmup=4, rate_start=0.8, rate_end=0.2)
    assert rate_multiplier(unit, 0) == pytest.approx(0.8 / 4, rel=1e-3)
    for i in (4, 50, 99):
        floor, mult = 0.25, 0.8  # the reference's form: a floor relative to the start
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * i / 100))
        assert rate_multiplier(unit, i) == pytest.approx(mult * cosine)
    assert rate_multiplier(replace(unit, rate_shape="constant"), 99) == 0.8
    assert rate_multiplier(replace(unit, warmup=0), 0) == 0.8


def test_text_dropout_follows_the_objectives_law() -> None:
    together = replace(RECIPE, null_text=0.1)
    seq, pooled = text_dropout(KEY, together, 0, 20000)
    assert torch.equal(seq, pooled)
    assert float(seq.float().mean()) == pytest.approx(0.1, abs=0.01)
    seq, pooled = text_dropout(KEY, replace(PAPER, null_text=0.1), 0, 20000)
    assert float(seq.float().mean()) == pytest.approx(math.sqrt(0.1), abs=0.015)
    assert float((seq & pooled).float().mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("objective", ["velocity", "x0"])
def test_dropped_slots_are_the_streams_one_by_one(objective: str) -> None:
    """Open-Sora drops T5 and CLIP independently with .31622777 each, both with .1."""
    recipe, n = replace(PAPER, objective=objective, null_text=0.1), 3000
    seq, pooled = text_dropout(KEY, recipe, 7, n)
    drawn = [streams.uniforms(KEY, streams.DROP, 7, slot, 2) for slot in range(n)]
    if objective == "velocity":
        assert seq.tolist() == [a < 0.31622776601683794 for a, _ in drawn]
        assert pooled.tolist() == [b < 0.31622776601683794 for _, b in drawn]
        expected = {"seq": 0.31622777, "pooled": 0.31622777, "both": 0.1}
    else:
        assert seq.tolist() == pooled.tolist() == [a < 0.1 for a, _ in drawn]
        expected = {"seq": 0.1, "pooled": 0.1, "both": 0.1}
    counts = {"seq": int(seq.sum()), "pooled": int(pooled.sum()), "both": int((seq & pooled).sum())}
    for name, share in expected.items():
        assert abs(counts[name] - n * share) < 4 * math.sqrt(n * share * (1 - share)), name


def test_times_are_the_shifted_logit_normal_of_the_stream() -> None:
    """t = sigmoid(n), then a t / (1 + (a − 1) t) with a of the latents' size; its moments."""
    recipe, unit = replace(PAPER, t_shift=0.0), replace(UNIT, batch=4000)
    shift = (1 + 2 * (2 * 2 / 4 - 256) / (4096 - 256)) * math.sqrt(2)  # latents 2 × 2 × 2
    t = make_batch(TABLE, unit, recipe, 1).t
    for slot in (0, 7, 3999):
        s = 1 / (1 + math.exp(-streams.normals(KEY, streams.TIME, 1, slot, 1)[0]))
        assert float(t[slot]) == pytest.approx(shift * s / (1 + (shift - 1) * s), rel=1e-5)
    quantiles = torch.special.ndtri((torch.arange(100_000).double() + 0.5) / 100_000)
    law = torch.sigmoid(quantiles)
    law = shift * law / (1 + (shift - 1) * law)
    assert float(t.mean()) == pytest.approx(float(law.mean()), abs=4 * float(law.std()) / 63)
    assert float(t.std()) == pytest.approx(float(law.std()), rel=0.05)
    assert float(t.median()) == pytest.approx(shift / (1 + shift), abs=0.02)


def test_the_loss_is_the_mean_squared_distance_to_the_papers_velocity() -> None:
    """An expert that says nothing is off by the target itself: mean ((1 − σ) x1 − x0)²."""
    state = new_state(EXPERT, replace(PAPER, sigma_min=0.25), WEIGHTS)
    batch = make_batch(TABLE, UNIT, state.recipe, 0)
    wanted = ((1 - 0.25) * batch.x1.double() - batch.x0.double()).square().mean()
    for dtype in ("float32", "bfloat16"):
        loss = batch_loss(state, batch, dtype)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-6)
    noise = [streams.normals(KEY, streams.NOISE, 0, slot, 64) for slot in range(UNIT.batch)]
    torch.testing.assert_close(batch.x1.reshape(4, 64), torch.tensor(noise), rtol=1e-6, atol=0)


def test_the_network_reads_the_path_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """x_t = (1 − t) x0 + (1 − (1 − σ)(1 − t)) x1, and the very t."""
    seen = {}

    def spy(model, config, x, t, *rest, **more):
        seen.update(x=x, t=t)
        return torch.zeros_like(x, requires_grad=True)

    monkeypatch.setattr("paris_models.train.predict", spy)
    state = new_state(EXPERT, PAPER, WEIGHTS)
    batch = make_batch(TABLE, UNIT, PAPER, 0)
    batch_loss(state, batch)
    t, s = batch.t.double().reshape(-1, 1, 1, 1, 1), 1e-5
    wanted = (1 - t) * batch.x0.double() + (1 - (1 - s) * (1 - t)) * batch.x1.double()
    torch.testing.assert_close(seen["x"].double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(seen["t"], batch.t)


def test_dropped_text_is_the_null_text() -> None:
    recipe = replace(RECIPE, null_text=0.5)
    unit = replace(UNIT, batch=64)
    batch = make_batch(replace(TABLE, null_seq=TABLE.null_seq + 7), unit, recipe, 0)
    dropped, _ = text_dropout(KEY, recipe, 0, 64)
    assert (batch.text_seq[dropped] == 7).all()
    assert (batch.text_seq[~dropped] != 7).any(dim=(1, 2)).all()


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_orthogonalised_matrices_have_singular_values_near_one(rows: int, columns: int) -> None:
    g = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(rows * 13 + columns))
    out = orthogonalise(g)
    values = torch.linalg.svdvals(out)
    assert out.shape == g.shape
    assert float(values.max()) < 1.4
    assert float(values[:, 0].min()) > 0.5
    again = orthogonalise(g * 1000)
    torch.testing.assert_close(again, out, atol=1e-3, rtol=1e-2)  # the size of g does not matter


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    state = trained(RECIPE, 6)
    before = digest(state)
    with pytest.raises(ValueError, match="all are done"):
        train_step(state, TABLE, UNIT)
    other = state_tensors(new_state(EXPERT, PAPER, WEIGHTS))
    with pytest.raises(ValueError, match="not that of this"):
        load_state_tensors(state, other)
    bad = replace(TABLE, latents=TABLE.latents * math.nan)
    fresh = new_state(EXPERT, RECIPE, WEIGHTS)
    start = digest(fresh)
    with pytest.raises(ArithmeticError, match="step 0"):
        train_step(fresh, bad, UNIT)
    assert (digest(state), digest(fresh)) == (before, start)


def test_weights_are_the_diffusers_names() -> None:
    assert weights(trained(RECIPE, 1)).keys() == WEIGHTS.keys()


def test_bfloat16_trains_with_float32_masters() -> None:
    state = new_state(EXPERT, RECIPE, WEIGHTS)
    loss = train_step(state, TABLE, replace(UNIT, dtype="bfloat16"))
    assert math.isfinite(loss)
    assert {t.dtype for n, t in state_tensors(state).items() if n != "step"} == {torch.float32}


@pytest.mark.parametrize("plan", ["float32", "adafactor"])
def test_exact_times_reach_training_in_bfloat16_and_change_no_bit_in_float32(plan: str) -> None:
    def bits(path: str, dtype: str) -> str:
        recipe, unit = replace(PAPER, time_path=path), replace(UNIT, dtype=dtype)
        state = lean.new_state(PLANS[plan], EXPERT, recipe, SAYING, key=KEY)
        for _ in range(2):
            lean.train_step(state, TABLE, unit)
        return "".join(f"{t.float().sum():.9e} " for t in lean.weights(state).values())

    assert bits("hidden", "bfloat16") != bits("float32", "bfloat16")
    if plan == "float32":
        assert bits("hidden", "float32") == bits("float32", "float32")
