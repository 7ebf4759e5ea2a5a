"""From a recipe with conditions to a trained step: prepare, shards, genesis record, training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from paris_coordinator.prepare import prepare
from paris_models.assets import asset
from paris_models.checkpoint import load_tensors
from paris_models.codec import PatchPCA
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.shards import ClipTable, read_shards
from paris_models.train import make_batch, new_state, train_step
from paris_models.worlds import render, write_clips
from paris_protocol.records import ExpertSpec, Recipe

CLIPS = 64
EXPERT = """[expert]
patch = 1
in_channels = 65
out_channels = 32
double_blocks = 1
single_blocks = 1
heads = 2
head_dim = 16
rope_axes = [4, 6, 6]
text_dim = 64
pooled_dim = 64
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe for a small expert that is given the first frame, the last, or nothing."""
    folder = tmp_path_factory.mktemp("given")
    text = asset("smoke.toml").read_text()
    text = text.replace("validation = 128", "validation = 3").replace("audit = 64", "audit = 3")
    text = re.sub(r"(?ms)^\[expert\]\n.*?(?=^\[)", EXPERT + "\n", text)
    text = re.sub(r"(?m)^file = \"initial.*\n", "", text)
    text = re.sub(r"(?ms)^\[\[plans\]\]\n.*?(?=^\[)", "", text)  # adapters need a trained expert
    given = "conditions = { t2v = 1, i2v_head = 2, i2v_tail = 2 }\n"
    text = text.replace("[recipe]\n", f"[recipe]\n{given}")
    text = text.replace("[codec]", "[clips]\nallow_unlicensed = true\n\n[codec]", 1)
    (folder / "recipe.toml").write_text(text)
    for name in ("codec", "text"):
        shutil.copy(asset(f"{name}.safetensors"), folder)
    write_clips(folder / "videos", CLIPS, seed=11)
    prepare(folder / "recipe.toml", folder / "videos", folder / "out")
    return folder / "out"


def tables(folder: Path) -> list[ClipTable]:
    return [read_shards([path]) for path in sorted(folder.rglob("*[0-9].safetensors"))]


def test_prepare_encodes_the_given_frames_alone(prepared: Path) -> None:
    codec = PatchPCA.from_tensors(load_tensors(prepared / "codec.safetensors"))
    clips, _ = render(CLIPS, 11)
    whole = codec.encode(clips)
    ends = codec.encode(clips[:, :, :1]), codec.encode(clips[:, :, -1:])
    found = 0
    for table in tables(prepared):
        assert table.first is not None and table.last is not None
        for row, clip in enumerate(table.latents):
            index = int((whole - clip).square().mean((1, 2, 3, 4)).argmin())
            torch.testing.assert_close(table.first[row], ends[0][index], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(table.last[row], ends[1][index], atol=1e-4, rtol=1e-4)
            found += 1
    assert found == CLIPS


def test_what_was_prepared_trains_with_what_was_signed(prepared: Path) -> None:
    described = json.loads((prepared / "prepared.json").read_text())
    signed = Recipe.model_validate_json(json.dumps(described["recipe"]))
    assert signed.conditions == (("t2v", 1), ("i2v_head", 2), ("i2v_tail", 2))
    recipe = RecipeConfig.from_record(signed)
    spec = ExpertSpec.model_validate_json(json.dumps(described["expert"]))
    config = ExpertConfig.from_record(spec)
    unit, table = UnitConfig(bytes(16), steps=2, batch=8), tables(prepared)[-1]
    known = make_batch(table, unit, recipe, 0, config).condition
    assert known is not None and known.shape == (8, 3 * 16, 33)
    assert len({tuple(row) for row in known[:, ::16, 0].tolist()}) > 1  # masks of several kinds
    state = new_state(config, recipe, load_tensors(prepared / "initial.safetensors"))
    assert train_step(state, table, unit) > 0
