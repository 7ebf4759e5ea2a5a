"""What experts are given in training: kinds by weight, frames encoded alone, dropout (F13)."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paris_models.checkpoint import raw_items
from paris_models.conditions import given_ends, step_condition
from paris_models.config import PAPER_CONDITIONS, ExpertConfig, RecipeConfig, SamplerConfig
from paris_models.expert import build_expert
from paris_models.latents import unpack
from paris_models.releases import INDEX, ReleaseSettings, load_release, write_index
from paris_models.shards import ClipTable
from paris_models.train import (
    TrainState,
    batch_loss,
    load_state_tensors,
    make_batch,
    new_state,
    state_tensors,
    train_step,
)
from paris_protocol import records, streams
from tiny_models import EXPERT, KEY, PAPER, UNIT, clips

GIVEN = replace(EXPERT, in_channels=EXPERT.out_channels + EXPERT.condition_size)
WEIGHTS = dict(build_expert(GIVEN, seed=5).state_dict())
RECIPE = replace(PAPER, conditions=PAPER_CONDITIONS, null_image=0.1)


def table(n: int = 10) -> ClipTable:
    """Clips with ends that are not slices of their latents."""
    plain = clips(n)
    ends = torch.randn(2, n, 8, 1, 2, 2, generator=torch.Generator().manual_seed(9))
    return replace(plain, first=ends[0], last=ends[1])


def only(kind: str, **changed: float) -> RecipeConfig:
    return replace(PAPER, conditions=((kind, 1),), **changed)


def test_the_papers_weights_are_open_soras() -> None:
    assert dict(PAPER_CONDITIONS) == {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}


def test_kinds_and_dropout_are_the_streams_in_every_slot() -> None:
    n, weights = 4000, [weight for _, weight in PAPER_CONDITIONS]
    head, tail = given_ends(KEY, RECIPE, 3, n)
    counts = {kind: 0 for kind, _ in PAPER_CONDITIONS} | {"dropped": 0}
    for slot in range(n):
        kind = PAPER_CONDITIONS[
            streams.pick(streams.words(KEY, streams.CONDITION, 3, slot, 1)[0], weights)
        ][0]
        dropped = streams.uniforms(KEY, streams.CONDITION, 3, slot, 2)[1] < RECIPE.null_image
        assert bool(head[slot]) == (kind in ("i2v_head", "i2v_loop") and not dropped)
        assert bool(tail[slot]) == (kind in ("i2v_tail", "i2v_loop") and not dropped)
        counts[kind] += 1
        counts["dropped"] += dropped
    for name, share in [*((k, w / 8) for k, w in PAPER_CONDITIONS), ("dropped", 0.1)]:
        assert abs(counts[name] - n * share) < 4 * math.sqrt(n * share * (1 - share)), name


@pytest.mark.parametrize(
    ("kind", "known"), [("t2v", ()), ("i2v_head", (0,)), ("i2v_tail", (1,)), ("i2v_loop", (0, 1))]
)
def test_a_kind_gives_its_frames_encoded_alone(kind: str, known: tuple[int, ...]) -> None:
    source, rows = table(), torch.tensor([3, 1, 4])
    tokens = step_condition(KEY, only(kind), 0, source, rows, 1)
    assert tokens is not None and tokens.shape == (3, 8, GIVEN.condition_size)
    found = unpack(tokens, (9, 2, 2, 2), 1)
    assert source.first is not None and source.last is not None
    for frame, end in ((0, source.first), (1, source.last)):
        there = found[:, :, frame]
        assert (there[:, 0] == (frame in known)).all()
        wanted = end[rows, :, 0] if frame in known else torch.zeros(3, 8, 2, 2)
        assert torch.equal(there[:, 1:], wanted)


def test_a_dropped_condition_is_text_alone() -> None:
    tokens = step_condition(
        KEY, only("i2v_head", null_image=0.5), 0, table(40), torch.arange(40), 1
    )
    assert tokens is not None
    given = tokens.flatten(1).any(1)
    assert torch.equal(given, given_ends(KEY, only("i2v_head", null_image=0.5), 0, 40)[0])
    assert 10 < int(given.sum()) < 30


def condition_gradient(recipe: RecipeConfig) -> Tensor:
    state = new_state(GIVEN, recipe, {n: w + 0.1 for n, w in WEIGHTS.items()})
    batch_loss(state, make_batch(table(), UNIT, recipe, 0, GIVEN)).backward()
    return state.model.x_embedder.weight.grad[:, GIVEN.out_channels :]


def test_an_expert_learns_from_what_it_is_given_and_only_then() -> None:
    assert condition_gradient(only("i2v_head")).abs().max() > 0
    assert condition_gradient(only("t2v")).abs().max() == 0
    assert condition_gradient(PAPER).abs().max() == 0


def digest(state: TrainState) -> str:
    found = hashlib.sha256()
    for *_, data in raw_items(state_tensors(state)):
        found.update(data)
    return found.hexdigest()


def trained(config: ExpertConfig, recipe: RecipeConfig, source: ClipTable) -> str:
    state = new_state(config, recipe, build_expert(config, seed=5).state_dict())
    for _ in range(2):
        train_step(state, source, UNIT)
    return digest(state)


def test_an_expert_that_takes_no_condition_trains_the_same_bits() -> None:
    assert trained(EXPERT, RECIPE, clips()) == trained(EXPERT, PAPER, clips())
    assert trained(GIVEN, PAPER, table()) == trained(GIVEN, PAPER, clips())
    assert trained(GIVEN, RECIPE, table()) != trained(GIVEN, PAPER, table())


def test_resuming_with_conditions_changes_no_bit() -> None:
    whole = new_state(GIVEN, RECIPE, WEIGHTS)
    for step in range(UNIT.steps):
        if step == 3:
            saved = {name: t.clone() for name, t in state_tensors(whole).items()}
        train_step(whole, table(), UNIT)
    again = new_state(GIVEN, RECIPE, WEIGHTS)
    load_state_tensors(again, saved)
    while again.step < UNIT.steps:
        train_step(again, table(), UNIT)
    assert digest(again) == digest(whole)


def test_images_are_given_nothing() -> None:
    images = replace(clips(), latents=clips().latents[:, :, :1].contiguous())
    assert make_batch(images, UNIT, RECIPE, 0, GIVEN).condition is None
    assert make_batch(table(), UNIT, RECIPE, 0, EXPERT).condition is None


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("i2v_head", "first"), ("i2v_tail", "last"), ("i2v_loop", "first"), ("i2v_loop", "last")],
)
def test_a_kind_without_its_tensor_is_refused_by_both_names(kind: str, missing: str) -> None:
    state = new_state(GIVEN, only(kind), WEIGHTS)
    before = digest(state)
    with pytest.raises(ValueError, match=f"{kind} needs `{missing}`"):
        train_step(state, replace(table(), **{missing: None}), UNIT)
    assert (digest(state), state.step) == (before, 0)


def test_a_release_keeps_the_recipe_and_says_nothing_that_old_readers_do_not_know(
    tmp_path: Path,
) -> None:
    later = records.Recipe.LATER
    for name, recipe in (("new", replace(RECIPE, time_path="float32")), ("old", PAPER)):
        settings = ReleaseSettings(GIVEN, recipe, SamplerConfig(), (8, 2, 2, 2), (5, 8, 8, 8))
        (tmp_path / name).mkdir()
        write_index(tmp_path / name, settings, 1)
        assert load_release(tmp_path / name).settings == settings
        stated = json.loads((tmp_path / name / INDEX).read_text())["_paris"]["recipe"]
        assert later & stated.keys() == ({*later} - {"ema"} if name == "new" else set())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"conditions": (("i2v_middle", 1),)}, "at most once"),
        ({"conditions": (("t2v", 1), ("t2v", 2))}, "at most once"),
        ({"conditions": (("t2v", 0),)}, "at least 1"),
        ({"null_image": 1.0}, "null_image"),
        ({"ema": 1.0}, "ema"),
        ({"ema": -0.1}, "ema"),
    ],
)
def test_impossible_recipes_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PAPER, **changed)  # type: ignore[arg-type]
