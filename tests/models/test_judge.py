"""The shipped judge: it reads real clips, and cannot be fooled by frozen or reversed ones."""

from __future__ import annotations

import pytest
import torch

from paris_models.assets import asset
from paris_models.checkpoint import load_tensors
from paris_models.codec import PatchPCA
from paris_models.judge import NAME, Judge
from paris_models.worlds import render


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(asset("judge.safetensors"))


def test_floors_are_in_the_right_order(judge: Judge) -> None:
    clips, captions = render(300, 200)
    codec = PatchPCA.from_tensors(load_tensors(asset("codec.safetensors")))
    floors = judge.floors(clips, captions, codec)
    real, coded, frozen = (floors[k] for k in ("real", "codec", "frozen_frame"))
    assert real["all_right"] > 0.97 and coded["all_right"] > 0.95
    assert frozen["motion"] < 0.45 and frozen["all_right"] < 0.45
    assert real["fvd"] < coded["fvd"] < frozen["fvd"]
    assert real["n"] == 300 and {"fvd_0", "all_right_2"} <= real.keys()


def test_time_reversed_clips_move_wrongly(judge: Judge) -> None:
    clips, captions = render(150, 201)
    backwards = judge.score(clips.flip(2), captions)
    assert backwards["motion"] < 0.1 and backwards["colour"] > 0.95


def test_right_counts_what_score_reports(judge: Judge) -> None:
    clips, captions = render(60, 202)
    right = judge.right(clips, captions.roll(1))
    assert right.shape == (4, 60)
    assert judge.score(clips, captions.roll(1))["all_right"] == float(right.all(0).double().mean())


def test_the_distance_of_a_set_to_itself_is_nothing(judge: Judge) -> None:
    features, _ = judge.perceive(render(200, 400)[0])
    itself = Judge(judge.net, features.double().mean(0)[None], torch.cov(features.double().T)[None])
    assert abs(itself.distance(features)) < 1e-3
    assert itself.distance(features + 1) == pytest.approx(64, rel=1e-3)


def test_a_short_training_learns_and_is_repeatable() -> None:
    clips, reference = render(120, 300), render(90, 301)
    one = Judge.train(clips, reference, steps=3)
    two = Judge.train(clips, reference, steps=3)
    assert one.fingerprint == two.fingerprint and "stand-in" in NAME
    again = Judge.from_tensors(one.tensors())
    assert again.score(*reference) == one.score(*reference)
    with pytest.raises(ValueError, match="judge"):
        Judge.from_tensors({"mean": one.mean})
