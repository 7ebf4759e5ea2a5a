"""`paris import-weights` and `paris export`: output, exit codes, and what stands beside them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fluxfiles import SMALL, Flux, train_like
from paris_models.checkpoint import load_tensors, read_metadata, save_tensors, schema_of
from paris_models.commands.cli import app
from paris_models.config import LADDER
from paris_models.convert.origins import ORIGINS, recipe_fragment
from paris_models.expert import build_expert, parameter_shapes
from paris_models.releases import write_expert


def paris(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An Open-Sora file."""
    model = train_like(Flux(SMALL, split=True, half=True, condition=True))
    save_tensors(model.state_dict(), tmp_path / "Open_Sora_v2.safetensors")
    return tmp_path / "Open_Sora_v2.safetensors"


def test_an_imported_checkpoint_is_what_a_recipe_takes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "initial.safetensors"
    done = paris("import-weights", source, "-o", out, "--json")
    facts = json.loads(done.stdout)
    assert done.exit_code == 0 and facts["origin"] == "open-sora-v2"
    assert facts["source"] == {
        "layout": "open-sora", "guidance_dropped": False, "rope": "half-split",
        "rope_measured": "half-split", "rope_score": facts["source"]["rope_score"],
    }  # fmt: skip
    wanted = {name: ("F32", shape) for name, shape in parameter_shapes(SMALL).items()}
    assert schema_of(load_tensors(out)) == wanted
    fragment = tomllib.loads((tmp_path / "initial.toml").read_text(encoding="utf-8"))
    assert fragment["initial"] == {"file": "initial.safetensors", "origin": "open-sora-v2"}
    assert [entry["name"] for entry in fragment["licences"]] == facts["licences"]
    assert fragment["licences"][2]["regions_excluded"][0] == "European Union"
    tags = read_metadata(out)
    assert tags["paris.source"] == "Open_Sora_v2.safetensors"
    assert "Non-Commercial" in tags["paris.licence"]


def test_a_released_expert_is_exported_with_its_origin(tmp_path: Path) -> None:
    weights = {n: p.detach() for n, p in build_expert(LADDER["demo"], seed=1).named_parameters()}
    write_expert(tmp_path / "expert_0", LADDER["demo"], weights)
    out = tmp_path / "expert.safetensors"
    refused = paris("export", tmp_path / "expert_0", "-o", out)
    assert refused.exit_code == 20 and "say where the weights come from" in refused.stderr
    done = paris("export", tmp_path / "expert_0", "-o", out, "--as", "comfyui",
                 "--origin", "flux.1-schnell", "--dtype", "bfloat16")  # fmt: skip
    assert done.exit_code == 0 and "from flux.1-schnell (Apache-2.0)" in done.stdout
    assert read_metadata(out)["paris.licence"] == "Apache-2.0"
    assert {dtype for dtype, _ in schema_of(load_tensors(out)).values()} == {"BF16"}
    again = paris("export", tmp_path / "expert_0", "-o", out, "--origin", "scratch")
    assert again.exit_code == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["import-weights", "none", "-o", "out"], 2, "there is no none"),
        (["import-weights", "{source}", "-o", "a/b/out"], 2, "there is no folder"),
        (["import-weights", "{source}", "-o", "{out}", "--rope", "odd"], 2, "--rope is one of"),
        (["import-weights", "{source}", "-o", "{out}", "--dtype", "int8"], 2, "--dtype is one of"),
        (["export", "{source}", "-o", "{out}", "--as", "gguf"], 2, "--as is one of"),
        (["export", "{source}", "-o", "{out}"], 2, "ends in .safetensors"),
        (["import-weights", "{source}", "-o", "{out}", "--origin", "scratch"], 20, "cond_in layer"),
        (["import-weights", "{source}", "-o", "{out}", "--rope", "interleaved"], 20, "half-split"),
        (["import-weights", "{folder}", "-o", "{out}"], 20, "neither a tensor file nor"),
    ],
)
def test_refusals_say_one_sentence_and_make_nothing(
    source: Path, tmp_path: Path, words: list[str], code: int, told: str
) -> None:
    names = {"source": source, "out": tmp_path / "out", "folder": tmp_path}
    done = paris(*(word.format(**names) for word in words))
    assert (done.exit_code, told in done.stderr) == (code, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_the_statistic_can_be_overruled(source: Path, tmp_path: Path) -> None:
    done = paris("import-weights", source, "-o", tmp_path / "out", "--json",
                 "--rope", "interleaved", "--trust-rope")  # fmt: skip
    told = json.loads(done.stdout)["source"]
    assert (told["rope"], told["rope_measured"]) == ("interleaved", "half-split")


def test_headers_pass_the_strict_gate_first(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes()
    source.write_bytes(data[:-4])
    done = paris("import-weights", source, "-o", tmp_path / "out")
    assert done.exit_code == 20 and "tensor.header" in done.stderr and source.name in done.stderr


@pytest.mark.parametrize("origin", ORIGINS)
def test_fragments_are_toml_whatever_the_file_is_called(origin: str) -> None:
    table = tomllib.loads(recipe_fragment(ORIGINS[origin], 'a "b"\\c.safetensors'))
    assert table["initial"] == {"file": 'a "b"\\c.safetensors', "origin": origin}
    assert len(table.get("licences", [])) == len(ORIGINS[origin].terms)
