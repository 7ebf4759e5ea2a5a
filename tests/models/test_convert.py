"""Converted weights mean what their source means, and come back as they were (F8, F9, F10)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor

from fluxfiles import DEEP, SMALL, Flux, train_like
from paris_models.checkpoint import load_tensors, read_metadata, save_tensors
from paris_models.config import LADDER, ExpertConfig
from paris_models.convert import table
from paris_models.convert.files import Place, WeightFiles
from paris_models.convert.layout import PREFIX, Source
from paris_models.convert.run import Kind, Plan, Target, convert
from paris_models.expert import build_expert, expert_from, parameter_shapes
from paris_models.latents import image_ids

PLAIN = replace(SMALL, in_channels=64)
IDS = image_ids(2, 4, 4, 2)


def tokens() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two samples: noisy tokens, a condition, and the network's other inputs."""
    g = torch.Generator().manual_seed(5)
    x, condition = torch.randn(2, 8, 64, generator=g), 9 * torch.randn(2, 8, 68, generator=g)
    rest = {
        "timestep": torch.tensor([0.3, 0.8]),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=g),
        "pooled_projections": torch.randn(2, 12, generator=g),
        "img_ids": IDS,
        "txt_ids": torch.zeros(5, 3),
    }
    return x, condition, rest


@torch.no_grad()
def output(model: Any, x: Tensor, rest: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(hidden_states=x, return_dict=False, **rest)[0]
    return out


def reference(model: Flux, condition: bool) -> Tensor:
    x, c, rest = tokens()
    text, pooled = rest["encoder_hidden_states"], rest["pooled_projections"]
    out: Tensor = model(x, rest["timestep"], text, pooled, IDS, c if condition else None)
    return out


def saved(model: Any, path: Path) -> Path:
    save_tensors(model.state_dict(), path)
    return path


def expert(seed: int = 0, config: ExpertConfig = SMALL) -> dict[str, Tensor]:
    """An expert of which no tensor is zero or one."""
    g = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)
    return {name: 1 + torch.randn(shape, generator=g) / 4 for name, shape in shapes.items()}


# ---------------------------------------------------------------- what the weights mean


@pytest.mark.parametrize("condition", [False, True], ids=["text", "condition"])
@pytest.mark.parametrize("half", [False, True], ids=["side-by-side", "half-split"])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_an_imported_expert_computes_what_the_file_means(
    tmp_path: Path, split: bool, half: bool, condition: bool
) -> None:
    model = train_like(Flux(SMALL, split=split, half=half, condition=condition))
    path = saved(model, tmp_path / "source.safetensors")
    facts = convert(
        path, tmp_path / "out.safetensors", Target("expert"), origin="open-sora-v2",
        order="half-split" if half else "interleaved",
    )  # fmt: skip
    found = expert_from(SMALL if condition else PLAIN, load_tensors(tmp_path / "out.safetensors"))
    x, c, rest = tokens()
    out = output(found, torch.cat([x, c], -1) if condition else x, rest)
    torch.testing.assert_close(out, reference(model, condition), atol=5e-6, rtol=1e-5)
    assert facts["source"]["layout"] == ("open-sora" if split else "bfl")


@pytest.mark.parametrize("tokens_in_clip", [(1, 2, 2), (2, 4, 4), (3, 8, 8)])
def test_a_conditioned_expert_equals_its_source_for_any_condition_bitwise(
    tmp_path: Path, tokens_in_clip: tuple[int, int, int]
) -> None:
    source = {name: w for name, w in expert(1, PLAIN).items()}
    save_tensors(source, tmp_path / "plain.safetensors")
    target = Target("expert", condition=True)
    convert(tmp_path / "plain.safetensors", tmp_path / "out.safetensors", target, origin="scratch")
    wide = expert_from(SMALL, load_tensors(tmp_path / "out.safetensors"))
    _, _, rest = tokens()
    rest["img_ids"] = image_ids(*tokens_in_clip, 2)
    g = torch.Generator().manual_seed(6)
    x = torch.randn(2, len(rest["img_ids"]), 64, generator=g)
    expected = output(expert_from(PLAIN, source), x, rest)
    for size in (0.0, 1.0, 1e4):
        condition = size * torch.randn(*x.shape[:2], 68, generator=g)
        assert torch.equal(output(wide, torch.cat([x, condition], -1), rest), expected)


def test_the_guidance_embedder_of_dev_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        dev = FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=32,
            num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12,
            guidance_embeds=True, axes_dims_rope=(4, 14, 14),
        )  # fmt: skip
    dev.save_pretrained(tmp_path / "FLUX.1-dev" / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "FLUX.1-dev" / "transformer").glob("*.safetensors"))) > 2
    facts = convert(tmp_path / "FLUX.1-dev", tmp_path / "out.safetensors", Target("expert"))
    assert facts["origin"] == "flux.1-dev" and facts["source"]["guidance_dropped"]
    kept = {n: w for n, w in dev.state_dict().items() if "guidance_embedder" not in n}
    found = load_tensors(tmp_path / "out.safetensors")
    assert found.keys() == kept.keys() and len(dev.state_dict()) == len(kept) + 4
    assert all(torch.equal(found[name], w) for name, w in kept.items())


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bfl", "open-sora", "comfyui", "diffusers"])
def test_an_exported_expert_comes_back_bit_for_bit(
    tmp_path: Path, kind: Kind, dtype: torch.dtype
) -> None:
    weights = {name: w.to(dtype) for name, w in expert().items()}
    save_tensors(weights, tmp_path / "expert.safetensors", {"paris.origin": "scratch"})
    there = tmp_path / ("there" if kind == "diffusers" else "there.safetensors")
    convert(tmp_path / "expert.safetensors", there, Target(kind))
    dtypes: Any = {torch.float32: "F32", torch.bfloat16: "BF16"}
    target = Target("expert", dtype=dtypes[dtype])
    assert convert(there, tmp_path / "back.safetensors", target)["origin"] == "scratch"
    back = load_tensors(tmp_path / "back.safetensors")
    if kind == "comfyui":
        weights["x_embedder.weight"] = weights["x_embedder.weight"][:, :64]
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("split", [False, True], ids=["bfl", "open-sora"])
def test_a_file_of_the_full_depth_comes_back_as_it_was(tmp_path: Path, split: bool) -> None:
    model = train_like(Flux(DEEP, split=split, half=split, condition=split))
    if split:  # the sum of two biases cannot be taken apart again: Open-Sora starts it at zero
        torch.nn.init.zeros_(model.cond_in.bias)
    path = saved(model, tmp_path / "source.safetensors")
    origin = "open-sora-v2" if split else "flux.1-schnell"
    convert(path, tmp_path / "expert.safetensors", Target("expert"), origin=origin)
    there = Target("open-sora" if split else "bfl")
    convert(tmp_path / "expert.safetensors", tmp_path / "back.safetensors", there)
    back, source = load_tensors(tmp_path / "back.safetensors"), model.state_dict()
    assert back.keys() == source.keys() and len(back) == (1082 if split else 776)
    assert all(torch.equal(back[name], w) for name, w in source.items())
    assert read_metadata(tmp_path / "back.safetensors")["paris.origin"] == origin


def test_the_map_agrees_with_diffusers_own_converter() -> None:
    """Theirs knows one width only: rows as in the paper, and one column."""
    config = replace(LADDER["paper-64"], double_blocks=2, single_blocks=2)
    g = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(config)
    ours = {
        name: torch.randn((s[0], *[1] * (len(s) - 1)), generator=g) for name, s in shapes.items()
    }
    theirs = {}
    for row in table.rows(config, fused=True):
        parts = [table.swap_halves(ours[p]) if table.is_swapped(p) else ours[p] for p in row.parts]
        theirs[PREFIX + row.name] = torch.cat(parts)
    found = convert_flux_transformer_checkpoint_to_diffusers(theirs)
    assert found.keys() == ours.keys() and not theirs
    assert all(torch.equal(found[name], w) for name, w in ours.items())


def test_pair_orders_are_inverse_and_as_described() -> None:
    rows = torch.arange(12.0)  # two heads of six
    mixed = table.to_interleaved(rows, 6)
    assert mixed.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(table.to_half_split(mixed, 6), rows)


# ---------------------------------------------------------------- the paper's size, without a byte


def described(config: ExpertConfig, kind: str) -> WeightFiles:
    """Headers of a file of this size, as if it were there."""
    shapes = parameter_shapes(config)
    if kind == "diffusers":
        return WeightFiles({n: Place(Path(), "BF16", s) for n, s in shapes.items()}, {}, {})
    places = {}
    for row in table.rows(config, fused=kind == "bfl"):
        size = sum(shapes[part][0] for part in row.parts), *shapes[row.parts[0]][1:]
        places[row.name] = Place(Path(), "BF16", size)
    return WeightFiles(places, {}, {})


@pytest.mark.parametrize("kind", ["diffusers", "bfl", "open-sora"])
def test_full_shapes_are_recognised_and_planned(kind: str) -> None:
    files = described(LADDER["paper-64"], kind)
    for module in table.GUIDANCE.values() if kind == "diffusers" else table.GUIDANCE:
        columns = 256 if module.endswith(("linear_1", "in_layer")) else 3072
        files.places[f"{module}.weight"] = Place(Path(), "BF16", (3072, columns))
        files.places[f"{module}.bias"] = Place(Path(), "BF16", (3072,))
    source = Source.of(files)
    assert source.guidance and source.config == LADDER["paper-64"]
    assert sum(torch.Size(p.shape).numel() for p in files.places.values()) == 11_901_408_320
    for condition, count in ((True, 11_891_387_456), (False, 11_891_178_560)):
        plan = Plan(source, Target("expert", condition=condition))
        assert plan.config == LADDER["paper" if condition else "paper-64"]
        assert {n: s for n, (_, s) in plan.schema.items()} == parameter_shapes(plan.config)
        assert sum(torch.Size(s).numel() for _, s in plan.schema.values()) == count
        assert len(plan.schema) == 1156


def test_what_comfyui_looks_for_in_an_exported_file() -> None:
    """Its loader strips one prefix, and takes channels and guidance from names and shapes."""
    plan = Plan(Source.of(described(LADDER["paper"], "diffusers")), Target("comfyui"))
    shapes = {name.removeprefix(PREFIX): shape for name, (_, shape) in plan.schema.items()}
    assert all(name.startswith("model.diffusion_model.") for name in plan.schema)
    assert shapes["img_in.weight"] == (3072, 64)
    assert "double_blocks.0.img_attn.norm.key_norm.scale" in shapes
    assert not any(name.startswith("guidance_in") for name in shapes)
    assert {int(n.split(".")[1]) for n in shapes if n.startswith("double_blocks.")} == {*range(19)}
    assert {int(n.split(".")[1]) for n in shapes if n.startswith("single_blocks.")} == {*range(38)}


def test_a_folder_is_what_plain_diffusers_loads(tmp_path: Path) -> None:
    path = tmp_path / "expert.safetensors"
    save_tensors(expert(), path, {"paris.origin": "scratch"})
    convert(path, tmp_path / "whole", Target("diffusers"))
    convert(path, tmp_path / "cut", Target("diffusers", dtype="BF16", shard=150_000))
    assert len(list((tmp_path / "cut").glob("*-of-*.safetensors"))) > 3
    for folder, dtype in (("whole", torch.float32), ("cut", torch.bfloat16)):
        model = FluxTransformer2DModel.from_pretrained(tmp_path / folder, torch_dtype=dtype)
        assert all(torch.equal(model.state_dict()[n], w.to(dtype)) for n, w in expert().items())
    again = convert(tmp_path / "cut", tmp_path / "b.safetensors", Target("bfl"))
    assert again["expert"]["rope_axes"] == (4, 14, 14)


def test_the_demos_expert_goes_out_and_comes_back(tmp_path: Path) -> None:
    weights = {n: p.detach() for n, p in build_expert(LADDER["demo"], seed=1).named_parameters()}
    save_tensors(weights, tmp_path / "expert.safetensors")
    facts = convert(tmp_path / "expert.safetensors", tmp_path / "bfl.safetensors", Target("bfl"),
                    origin="scratch")  # fmt: skip
    assert facts["source"]["rope_measured"] is None  # untrained: the weights do not say
    convert(tmp_path / "bfl.safetensors", tmp_path / "back.safetensors", Target("expert"))
    back = load_tensors(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], w) for name, w in weights.items())
