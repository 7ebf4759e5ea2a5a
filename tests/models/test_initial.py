"""The shipped initial checkpoint and the script that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paris_models.assets import asset
from paris_models.checkpoint import load_tensors
from paris_models.codec import PatchPCA
from paris_models.config import LADDER, SamplerConfig
from paris_models.ensemble import Ensemble
from paris_models.expert import expert_from, parameter_shapes
from paris_models.initial import (
    HELD_OUT,
    INITIAL_RECIPE,
    clip_table,
    main,
    make_encoders,
    train_initial,
)
from paris_models.judge import Judge
from paris_models.text import HashedWords
from paris_models.worlds import CAPTIONS, render


def test_shipped_files_are_small_and_fit_the_demo_expert() -> None:
    names = ("codec", "text", "initial", "judge")
    files = [asset(f"{name}.safetensors") for name in names]
    assert sum(file.stat().st_size for file in files) < 4 << 20
    weights = load_tensors(asset("initial.safetensors"))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == parameter_shapes(LADDER["demo"])
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights.values())
    with pytest.raises(FileNotFoundError):
        asset("none.safetensors")


def test_training_is_a_function_of_the_seed() -> None:
    clips, captions = render(192, 100)
    table = clip_table(clips, captions, *make_encoders(clips))
    seen: list[int] = []
    one = train_initial(table, 192, progress=lambda part, done, total: seen.append(done))
    two = train_initial(table, 192)
    assert seen == [1, 2] and all(torch.equal(one[name], two[name]) for name in one)
    other = train_initial(table, 192, seed=1)
    assert not torch.equal(one["x_embedder.weight"], other["x_embedder.weight"])


def sampled(n: int) -> dict[str, float]:
    """Scores of `n` held-out prompts, sampled from the shipped checkpoint."""
    codec = PatchPCA.from_tensors(load_tensors(asset("codec.safetensors")))
    words = HashedWords.from_tensors(load_tensors(asset("text.safetensors")))
    model = expert_from(LADDER["demo"], load_tensors(asset("initial.safetensors")))
    captions = render(*HELD_OUT)[1][768 : 768 + n]
    sequence, pooled = words.encode([CAPTIONS[i] for i in captions])
    null_sequence, null_pooled = words.encode([""])
    ensemble = Ensemble(
        [model.eval()], None, LADDER["demo"], INITIAL_RECIPE, null_sequence[0], null_pooled[0]
    )
    sampler = SamplerConfig(steps=20, shift=2.0, guidance=2.0, top_k=1)
    latents = ensemble.sample(sequence, pooled, (32, 3, 4, 4), bytes(16), sampler)
    return Judge.load(asset("judge.safetensors")).score(codec.decode(latents), captions)


def test_the_checkpoint_draws_what_the_prompt_says() -> None:
    score = sampled(96)
    assert score["world"] > 0.95 and score["colour"] > 0.95
    assert score["motion"] > 0.8 and score["all_right"] > 0.6


@pytest.mark.slow
def test_quality_of_the_checkpoint_on_256_prompts() -> None:
    score = sampled(256)
    assert score["motion"] > 0.88 and score["all_right"] > 0.68


@pytest.mark.slow
def test_the_script_makes_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--parts", "initial", "--samples", "960"]) == 0
    assert "core_seconds" in capsys.readouterr().out
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["codec.safetensors", "initial.safetensors", "text.safetensors"]
