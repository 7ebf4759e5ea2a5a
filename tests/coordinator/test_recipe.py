"""Recipes: the shipped ones are valid, and whatever does not fit is refused by its name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel

from paris_coordinator.recipe import load_recipe
from paris_models.assets import asset
from paris_models.config import DEMO_RECIPE, LADDER, RecipeConfig
from paris_protocol import records
from paris_protocol.errors import ParisError

DEMO = asset("demo.toml").read_text()


def written(folder: Path, text: str) -> Path:
    for name in ("codec", "text", "initial"):
        (folder / f"{name}.safetensors").write_bytes(b"")
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> ParisError:
    with pytest.raises(ParisError) as caught:
        load_recipe(written(folder, text))
    return caught.value


def changed(section: str, line: str) -> str:
    """The demo's recipe with a line of a section replaced, or added."""
    key = line.split(" = ")[0]
    head, mark, rest = DEMO.partition(f"[{section}]\n")
    assert mark
    body, *others = re.split(r"(?m)^(?=\[)", rest, maxsplit=1)
    body = re.sub(rf"(?m)^{key} = .*\n", "", body)
    return f"{head}{mark}{line}\n{body}{''.join(others)}"


@pytest.mark.parametrize("name", ["demo.toml", "smoke.toml"])
def test_shipped_recipes_make_valid_records(name: str) -> None:
    recipe = load_recipe(asset(name))
    plain = recipe.records()
    kinds: dict[str, type[BaseModel]] = {
        "geometry": records.Geometry,
        "expert": records.ExpertSpec,
        "recipe": records.Recipe,
        "router": records.RouterSpec,
        "sampler": records.Sampler,
        "plan": records.RoundPlan,
    }
    for field, kind in kinds.items():
        kind.model_validate_json(json.dumps(plain[field]))
    assert recipe.expert.config() == LADDER["demo"]
    signed = records.Recipe.model_validate_json(json.dumps(plain["recipe"]))
    config = RecipeConfig.from_record(signed)
    assert config == replace(DEMO_RECIPE, time_path=config.time_path)  # by the plans' dtypes
    assert not {"conditions", "null_image", "ema"} & signed.model_dump().keys()
    assert all(len(note) <= 200 for note in plain["notes"])
    margins = {k: tuple(v) if isinstance(v, list) else v for k, v in plain["margins"].items()}
    assert len(records.Margins.model_validate(margins).damage) == plain["plan"]["rounds"]
    assert plain["licences"] == []
    for section in (recipe.codec, recipe.text, recipe.initial):
        assert section.file is not None and recipe.file(section.file).is_file()


@pytest.mark.parametrize(
    ("section", "line", "field"),
    [
        ("geometry", "frames = 0", "geometry.frames"),
        ("geometry", 'frames = "nine"', "geometry.frames"),
        ("geometry", "depth = 3", "geometry.depth"),
        ("codec", 'kind = "magic"', "codec.kind"),
        ("codec", "channels = 16", "codec.channels"),
        ("codec", 'file = "none.safetensors"', "codec.file"),
        ("text", "dim = 32", "text.dim"),
        ("clusters", "count = 0", "clusters.count"),
        ("expert", 'size = "huge"', "expert.size"),
        ("expert", "heads = 2", "expert"),
        ("recipe", "lr = -1.0", "recipe.lr"),
        ("recipe", 'optimiser = "sgd"', "recipe.optimiser"),
        ("recipe", "t_std = nan", "recipe.t_std"),
        ("recipe", "conditions = { i2v_middle = 1 }", "recipe.conditions"),
        ("recipe", "conditions = { i2v_head = 0 }", "condition"),
        ("recipe", "null_image = 1.0", "recipe.null_image"),
        ("recipe", "ema = 1.0", "recipe.ema"),
        ("recipe", "ema = -0.1", "recipe.ema"),
        ("recipe", 'time_path = "exact"', "recipe.time_path"),
        ("router", "heads = 3", "router"),
        ("sampler", "top_k = 4", "sampler.top_k"),
        ("plan", "units = 7", "shards.per_cluster"),
        ("plan", 'schedule = "steps"', "plan.schedule"),
    ],
)
def test_the_field_that_is_wrong_is_named(
    tmp_path: Path, section: str, line: str, field: str
) -> None:
    error = refusal(tmp_path, changed(section, line))
    assert error.code == "recipe.invalid"
    assert field in error.detail


def test_adapters_of_a_fresh_expert_are_refused(tmp_path: Path) -> None:
    """Its output is zero, and so is every gradient inside it."""
    error = refusal(tmp_path, DEMO.replace('file = "initial.safetensors"', "seed = 1"))
    assert error.code == "recipe.invalid" and "initial.file" in error.detail


def test_an_average_is_signed_where_it_is_asked_for(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, changed("recipe", "ema = 0.999")))
    assert recipe.records()["recipe"]["ema"] == "0.999"
    kept = records.Recipe.model_validate_json(json.dumps(recipe.records()["recipe"]))
    assert kept.model_dump()["ema"] == "0.999"


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert refusal(tmp_path, "name = ").code == "recipe.invalid"
    assert refusal(tmp_path, "").detail.startswith("name: ")
    for raw in (b"\xff\xfe", b"#" * (1 << 21)):
        path = tmp_path / "raw.toml"
        path.write_bytes(raw)
        with pytest.raises(ParisError, match="recipe file is not valid"):
            load_recipe(path)
    with pytest.raises(ParisError, match=r"none\.toml"):
        load_recipe(tmp_path / "none.toml")


LARGE = """
name = "large"
[geometry]
frames = 33
height = 256
width = 256
fps = 24
[codec]
kind = "KIND"
source = "hub/vae"
[text]
kind = "t5-clip"
source = "hub/flux"
pooled_dim = 768
[clusters]
count = 3
[shards]
per_cluster = 8
[held_out]
validation = 256
audit = 256
[expert]
size = "paper"
[initial]
origin = "ORIGIN"
[recipe]
batch = 8
[router]
width = 768
blocks = 12
heads = 12
batch = 64
steps = 10000
lr = 1e-4
[plan]
units = 4
steps = 200
rounds = 50
schedule = "unit-cosine"
"""


def large(kind: str, origin: str, preset: str = "") -> str:
    return preset + LARGE.replace("KIND", kind).replace("ORIGIN", origin)


def test_the_clean_stack_is_taken_and_its_defaults_are_the_papers(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, large("wan-vae", "flux.1-schnell")))
    assert recipe.records()["recipe"]["objective"] == "velocity"
    assert recipe.records()["sampler"] == {
        "steps": 50,
        "shift": "0",
        "guidance": "7.5",
        "top_k": 1,
    }
    assert recipe.check_licences() == ()


@pytest.mark.parametrize(
    ("kind", "origin"), [("hunyuan-vae", "scratch"), ("wan-vae", "flux.1-dev")]
)
def test_bound_parts_need_the_paper_preset(tmp_path: Path, kind: str, origin: str) -> None:
    assert refusal(tmp_path, large(kind, origin)).code == "recipe.licence"
    recipe = load_recipe(written(tmp_path, large(kind, origin, 'preset = "paper"\n')))
    licences = recipe.records()["licences"]
    assert len(licences) == 1
    if kind == "hunyuan-vae":
        assert "South Korea" in licences[0]["regions_excluded"]


def test_large_encoders_need_a_source(tmp_path: Path) -> None:
    text = large("wan-vae", "scratch").replace('source = "hub/vae"\n', "")
    assert "codec.source" in refusal(tmp_path, text).detail


def objective(folder: Path, text: str) -> dict[str, object]:
    """The signed fields that are not at their defaults of version 0.1."""
    plain = load_recipe(written(folder, text)).records()["recipe"]
    signed = records.Recipe.model_validate_json(json.dumps(plain)).model_dump()
    return {name: signed[name] for name in records.Recipe.LATER & signed.keys()}


def test_the_paper_preset_has_open_soras_conditions(tmp_path: Path) -> None:
    paper = large("hunyuan-vae", "flux.1-dev", 'preset = "paper"\n')
    assert objective(tmp_path, paper) == {
        "conditions": (("t2v", 1), ("i2v_head", 5), ("i2v_loop", 1), ("i2v_tail", 1))
    }
    assert load_recipe(written(tmp_path, paper)).frames_alone == {"first", "last"}
    own = paper.replace("batch = 8\n", "batch = 8\nconditions = { i2v_head = 2 }\n", 1)
    assert objective(tmp_path, own) == {"conditions": (("i2v_head", 2),)}
    assert load_recipe(written(tmp_path, own)).frames_alone == {"first"}
    none = paper.replace("batch = 8\n", "batch = 8\nconditions = {}\n", 1)
    assert objective(tmp_path, none) == {}
    bare = paper.replace('size = "paper"', 'size = "paper-64"')
    assert objective(tmp_path, bare) == {}
    assert load_recipe(written(tmp_path, bare)).frames_alone == set()
    assert objective(tmp_path, large("wan-vae", "scratch")) == {}


def test_networks_in_bfloat16_get_exact_times_unless_told(tmp_path: Path) -> None:
    half = large("wan-vae", "scratch") + '[policy]\ndtype = "bfloat16"\n'
    assert objective(tmp_path, half) == {"time_path": "float32"}
    told = half.replace("batch = 8\n", 'batch = 8\ntime_path = "hidden"\n', 1)
    assert objective(tmp_path, told) == {}
