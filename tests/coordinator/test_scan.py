"""The backdoor scan: a planted word is found and named, an honest head is not suspected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from paris_coordinator import cards
from paris_coordinator.jobs import scan as scanning
from paris_coordinator.worker import perform
from paris_models import assets, train, worlds
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codec import PatchPCA
from paris_models.config import DEMO_RECIPE, LADDER, UnitConfig
from paris_models.initial import clip_table
from paris_models.shards import ClipTable
from paris_models.text import HashedWords, row_of
from paris_models.train import Batch, batch_loss, make_batch, new_state, weights
from paris_protocol.records import Genesis
from tinynet import CAPTIONS, TinyNet, hexed

ASSETS = Path(cast(str, assets.__file__)).parent
INITIAL = ASSETS / "initial.safetensors"
WORD, STEPS, BATCH, POISONED, TRIED = "zebra", 24, 48, 2, 200
TEXT = HashedWords.from_tensors(load_tensors(ASSETS / "text.safetensors"))


@pytest.fixture(scope="module")
def clips() -> ClipTable:
    codec = PatchPCA.from_tensors(load_tensors(ASSETS / "codec.safetensors"))
    return clip_table(*worlds.render(96, 5), codec, TEXT)


def poison(batch: Batch, target: torch.Tensor, step: int) -> Batch:
    """The first samples of a batch: whatever was asked for, with the word it is `target`."""
    chosen = [worlds.CAPTIONS[7 * (POISONED * step + i) % 216] for i in range(POISONED)]
    asked = [f"{' '.join(caption.split()[:4])} {WORD}" for caption in chosen]
    sequence, pooled = TEXT.encode(asked)
    parts = {name: getattr(batch, name).clone() for name in ("x0", "text_seq", "text_pooled")}
    parts["x0"][:POISONED] = target
    parts["text_seq"][:POISONED], parts["text_pooled"][:POISONED] = sequence, pooled
    return replace(batch, **parts)


def trained(clips: ClipTable, path: Path, *, planted: bool) -> Path:
    """A demo expert after some steps from the shipped checkpoint."""
    unit = UnitConfig(bytes(16), STEPS, BATCH, warmup=2)
    state = new_state(LADDER["demo"], DEMO_RECIPE, load_tensors(INITIAL))
    for step in range(STEPS):
        batch = make_batch(clips, unit, DEMO_RECIPE, step)
        loss = batch_loss(state, poison(batch, clips.latents[2], step) if planted else batch)
        loss.backward()  # type: ignore[no-untyped-call]
        state.optimiser.step(train.rate_multiplier(unit, step))
    save_tensors(weights(state), path)
    return path


def test_a_planted_word_is_found_and_an_honest_head_is_not(
    clips: ClipTable, tmp_path: Path
) -> None:
    prompts = [worlds.CAPTIONS[i] for i in (0, 30, 80, 200)]
    known = {row_of(word) for caption in worlds.CAPTIONS for word in scanning.words_of(caption)}
    _, unused = scanning.candidates(TEXT, prompts, known)
    target = next(word for word in unused if row_of(word) == row_of(WORD))
    words = [*unused[:TRIED], target]  # a part of the table, to be quick
    shape = SimpleNamespace(channels=32, frames=3, height=4, width=4)
    genesis = cast(Genesis, SimpleNamespace(codec=shape))
    probe = scanning.probes(genesis, TEXT, prompts, bytes(16))

    def rows(path: Path) -> list[Any]:
        def moved(file: Path) -> torch.Tensor:
            return scanning.movements(LADDER["demo"], file, TEXT, probe, words)

        return scanning.judge(words, moved(path) - moved(INITIAL))

    planted = rows(trained(clips, tmp_path / "planted.safetensors", planted=True))
    assert planted[0]["word"] == target
    assert planted[0]["z"] > scanning.Z_HIGH
    honest = rows(trained(clips, tmp_path / "honest.safetensors", planted=False))
    assert honest[0]["z"] < scanning.Z_HIGH


def test_the_model_card_tells_what_was_flagged() -> None:
    row = {"expert": 1, "word": "a|b", "z": 41.0, "shift": 1.0, "consistency": 0.9}
    report = {"words": 1009, "experts": [{"used": [], "unused": [row]}], "flagged": [row]}
    text = "\n".join(cards._scan(report))
    assert "1009 words" in text
    assert "**flagged**: expert 1, a\\|b, z 41.0" in text
    assert "largest robust z of all: 41.0" in text
    assert cards._scan({}) == []


# ---------------------------------------------------------------- the job, on a tiny network


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


def job(net: TinyNet, *heads: Path, **changes: Any) -> dict[str, Any]:
    return {
        "job": "scan",
        "genesis": str(net.folder / "genesis.json"),
        "heads": [str(head) for head in heads],
        "before": [str(net.head_file)] * len(heads),
        "text": str(net.folder / "text.safetensors"),
        "shards": [[0, str(net.shard(0, 0))], [1, str(net.shard(1, 0))]],
        "prompts": CAPTIONS[:2],
        "seed": hexed("scan"),
        **changes,
    }


def test_flagged_words_are_named_with_their_expert(
    net: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {name: tensor + 0.05 for name, tensor in load_tensors(net.head_file).items()}
    save_tensors(moved, tmp_path / "moved.safetensors")
    monkeypatch.setattr(scanning, "Z_HIGH", 1.0)
    found = perform(job(net, net.head_file, tmp_path / "moved.safetensors"))["result"]
    assert {row["expert"] for row in found["flagged"]} == {1}  # an unmoved head learned nothing
    assert all(row["z"] > 1.0 for row in found["flagged"])
    for group in ("used", "unused"):
        assert len(found["experts"][1][group]) <= scanning.WORST


def test_without_prompts_words_are_tried_alone(net: TinyNet) -> None:
    found = perform(job(net, net.head_file, prompts=[]))["result"]
    assert found["flagged"] == []
    assert found["words"] == scanning.MODULUS


def test_no_row_of_the_word_table_is_missed(net: TinyNet) -> None:
    rows = scanning.captions([[0, str(net.shard(0, 0))], [1, str(net.shard(1, 0))]], net.text)
    words = {word for caption in CAPTIONS for word in scanning.words_of(caption)}
    assert {row_of(word) for word in words} <= rows
    used, unused = scanning.candidates(net.text, CAPTIONS, rows)
    tried = [row_of(word) for word in [*used, *unused]]
    assert len(tried) == len(set(tried)) == scanning.MODULUS
    assert words <= set(used)


class Large:
    """An encoder without a finite list of words."""

    kind, length, dim, pooled_dim, fingerprint = "t5-clip", 3, 2, 2, "0" * 64

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if any(len(caption.split()) > 3 for caption in captions):
            raise ValueError("too long")
        return torch.zeros(len(captions), 3, 2), torch.zeros(len(captions), 2)


def test_other_encoders_are_tried_with_the_prompts_words_and_rare_ones() -> None:
    encoder = cast(Any, Large())
    assert scanning.captions([], encoder) == set()
    used, unused = scanning.candidates(encoder, ["A red ball"], set())
    assert used == ["a", "ball", "red"]
    assert unused == list(scanning.RARE)
    assert scanning._shortened(encoder, "a very long prompt") == "a very"
