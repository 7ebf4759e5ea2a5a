"""What the converter refuses, that nothing half-written stays, and how much memory it takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxfiles import SMALL, Flux, sizes, train_like
from paris_models.checkpoint import save_tensors
from paris_models.config import LADDER
from paris_models.convert import rope, run
from paris_models.convert.files import open_weights
from paris_models.convert.layout import Source
from paris_models.convert.origins import ORIGINS, check_origin
from paris_models.convert.run import Plan, Target, convert
from paris_models.expert import parameter_shapes

Tensors = dict[str, Tensor]


def bfl(*, split: bool = False, half: bool = False) -> Tensors:
    return dict(train_like(Flux(SMALL, split=split, half=half)).state_dict())


def refused(folder: Path, tensors: Tensors, words: str, **more: object) -> None:
    """The file is refused with these words, and there is no trace of an output."""
    path = folder / "source.safetensors"
    save_tensors(tensors, path)
    for target in (Target("expert"), Target("diffusers")):
        with pytest.raises(ValueError, match=words):
            convert(path, folder / "out", target, origin="scratch", **more)  # type: ignore[arg-type]
        assert [entry.name for entry in folder.iterdir()] == ["source.safetensors"]


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def with_(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("single_blocks.2.linear2.bias"), "single_blocks.2.linear2.bias: 1 tensors miss"),
        (without("img_in.weight"), "not weights of a FLUX transformer: double_blocks"),
        (without("txt_in.weight"), "txt_in.weight is missing"),
        (with_("vae.decoder.weight", 3), "vae.decoder.weight: 1 tensors unknown"),
        (with_("guidance_in.in_layer.bias", 64), "guidance_in.in_layer.bias: 1 tensors unknown"),
        (with_("double_blocks.7.img_mod.lin.bias", 384), "missing from a bfl file"),
        (with_("txt_in.bias", 63), r"txt_in.bias has the shape \[63\], expected \[64\]"),
        (with_("img_in.weight", 64), r"img_in.weight has the shape \[64\], expected 2 axes"),
        (with_("img_in.weight", 64, 77), "in_channels must be out_channels"),
        (with_("double_blocks.0.img_attn.norm.query_norm.scale", 5), "width 64 is no multiple"),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, change: Callable[[Tensors], object], words: str
) -> None:
    tensors = bfl()
    change(tensors)
    refused(tmp_path, tensors, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_and_leave_nothing(
    tmp_path: Path, value: float
) -> None:
    tensors = bfl()
    tensors["vector_in.out_layer.weight"][3, 4] = value
    refused(tmp_path, tensors, "vector_in.out_layer.weight holds values that are not finite")


def test_other_networks_and_quantised_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, {"model.layers.0.weight": torch.zeros(2)}, "not weights of a FLUX")
    tensors = bfl()
    tensors["txt_in.bias"] = tensors["txt_in.bias"].to(torch.int8)
    refused(tmp_path, tensors, "txt_in.bias is I8: only F32, BF16, F16")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 0.9999))
def test_truncated_files_are_refused(tmp_path: Path, cut: float) -> None:
    path = tmp_path / "whole.safetensors"
    if not path.exists():
        save_tensors(bfl(), path)
    data = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match=r"cut.safetensors is not a whole safetensors file"):
        open_weights(tmp_path / "cut.safetensors")


def test_numbers_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    tensors = bfl()
    tensors["txt_in.bias"][0] = 1e6
    save_tensors(tensors, tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match=r"context_embedder.bias are too large for F16"):
        convert(tmp_path / "source.safetensors", tmp_path / "out.safetensors",
                Target("expert", dtype="F16"), origin="scratch")  # fmt: skip
    assert not (tmp_path / "out.safetensors").exists()


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    save_tensors(bfl(), tmp_path / "source.safetensors")
    folder = tmp_path / "cut"
    convert(tmp_path / "source.safetensors", folder, Target("diffusers", shard=100_000),
            origin="scratch")  # fmt: skip
    shard = next(folder.glob("*-00002-of-*.safetensors"))
    shard.rename(folder / "aside")
    with pytest.raises(ValueError, match=f"the shard {shard.name} is missing"):
        open_weights(folder)
    (folder / "aside").rename(shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    listing = json.loads(index.read_text())
    listing["weight_map"].pop("proj_out.bias")
    index.write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"disagree about proj_out.bias"):
        open_weights(folder)
    listing["weight_map"]["proj_out.bias"] = "../source.safetensors"
    index.write_text(json.dumps(listing))
    with pytest.raises(ValueError, match="is not an index of shards"):
        open_weights(folder)
    with pytest.raises(ValueError, match=r"neither a tensor file nor a folder with a config.json"):
        open_weights(tmp_path)


def test_what_a_killed_run_left_behind_is_replaced(tmp_path: Path) -> None:
    save_tensors(bfl(), tmp_path / "source.safetensors")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "half.safetensors").write_bytes(b"half")
    convert(
        tmp_path / "source.safetensors", tmp_path / "out", Target("diffusers"), origin="scratch"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert not (tmp_path / "out.part").exists()


# ---------------------------------------------------------------- the order of rotary pairs


@pytest.mark.parametrize("split", [False, True], ids=["bfl", "open-sora"])
def test_a_file_with_the_other_order_of_pairs_is_noticed(tmp_path: Path, split: bool) -> None:
    usual, other = ("half-split", "interleaved") if split else ("interleaved", "half-split")
    words = f"source.safetensors are {other} by their weights .* would be read as {usual}"
    refused(tmp_path, bfl(split=split, half=not split), words)
    convert(tmp_path / "source.safetensors", tmp_path / "out", Target("diffusers"),
            origin="scratch", order=other)  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
def test_a_wrongly_stated_order_is_noticed(tmp_path: Path, half: bool) -> None:
    other = "interleaved" if half else "half-split"
    refused(tmp_path, bfl(split=half, half=half), f"would be read as {other}", order=other)


def test_a_diffusers_folder_that_was_never_unpermuted_is_noticed(tmp_path: Path) -> None:
    save_tensors(bfl(split=True, half=True), tmp_path / "source.safetensors")
    plan = Plan(Source.of(open_weights(tmp_path / "source.safetensors")), Target("diffusers"))
    wrong = {name: plan.source.stored(name).clone() for name in plan.schema}
    (tmp_path / "source.safetensors").unlink()
    refused(tmp_path, wrong, "are half-split by their weights")


def test_the_order_that_a_converted_file_states_is_believed(tmp_path: Path) -> None:
    fresh = dict(Flux(SMALL, split=True).state_dict())  # untrained: only its metadata can say
    save_tensors(fresh, tmp_path / "source.safetensors", {"paris.rope": "interleaved"})
    source = Source.of(open_weights(tmp_path / "source.safetensors"))
    assert source.order == "interleaved" and rope.measure(source).order is None
    save_tensors(fresh, tmp_path / "source.safetensors", {"paris.rope": "sideways"})
    with pytest.raises(ValueError, match=r"paris.rope is 'sideways'"):
        Source.of(open_weights(tmp_path / "source.safetensors"))


def verdict(rows: Tensor) -> str | None:
    return rope.reading(rope.log_ratios(rows)).order


def scales(half: bool, alike: float, spread: float, g: torch.Generator) -> Tensor:
    """152 scales of 128 numbers, as many as a full file has."""
    config = LADDER["paper"]
    rows = [sizes(config, half, g, alike=alike, spread=spread) for _ in range(152)]
    return torch.stack(rows)


@pytest.mark.parametrize(("alike", "spread"), [(0.02, 0.1), (0.2, 0.1), (0.1, 0.05), (0.4, 0.4)])
def test_verdicts_are_right_where_pairs_are_a_little_alike(alike: float, spread: float) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert verdict(scales(False, alike, spread, g)) == "interleaved"
        assert verdict(scales(True, alike, spread, g)) == "half-split"


@settings(max_examples=60)
@given(half=st.booleans(), alike=st.floats(0, 0.6), spread=st.floats(0, 0.6), seed=st.integers(0))
def test_a_verdict_may_be_missing_but_is_not_wrong(
    half: bool, alike: float, spread: float, seed: int
) -> None:
    """Whatever is noisier: pairs that turn fast, pairs that turn slowly, or neither."""
    g = torch.Generator().manual_seed(seed % 2**32)
    right = "half-split" if half else "interleaved"
    assert verdict(scales(half, alike, spread, g)) in (right, None)


def test_sizes_without_structure_get_no_verdict() -> None:
    g = torch.Generator().manual_seed(0)
    for spread in (0.0, 1e-6, 0.3):
        for _ in range(100):
            assert verdict((spread * torch.randn(152, 128, generator=g)).exp()) is None
    assert rope.reading(rope.log_ratios(torch.ones(152, 128))).heads == 0


# ---------------------------------------------------------------- where weights come from


def test_origins_are_told_from_the_parts_and_contradictions_refused() -> None:
    assert check_origin(None, guidance=True, condition=False).name == "flux.1-dev"
    assert check_origin(None, guidance=False, condition=True).name == "open-sora-v2"
    assert check_origin("flux.1-schnell", guidance=False, condition=False).name == "flux.1-schnell"
    with pytest.raises(ValueError, match="say where the weights come from"):
        check_origin(None, guidance=False, condition=False)
    with pytest.raises(ValueError, match=r"embedder says that its origin is flux.1-dev, not flux"):
        check_origin("flux.1-schnell", guidance=True, condition=False)
    with pytest.raises(ValueError, match=r"metadata say that its origin is flux.1-dev, not scr"):
        check_origin("scratch", "flux.1-dev", guidance=False, condition=False)
    with pytest.raises(ValueError, match=r"'mine' is none of"):
        check_origin(None, "mine", guidance=False, condition=False)
    assert check_origin(None, "scratch", guidance=False, condition=True).name == "scratch"
    with pytest.raises(ValueError, match=r"'flux.2' is none of"):
        check_origin("flux.2", guidance=False, condition=False)
    names = [terms.name for terms in ORIGINS["open-sora-v2"].terms]
    assert any("Non-Commercial" in name for name in names) and any("Hunyuan" in n for n in names)


# ---------------------------------------------------------------- memory


FACTOR = 6
"""Peak memory ÷ largest tensor: mapped pages, their copy, the parts put together, the cast."""


def resident(field: str) -> int:
    """Bytes of this process' memory: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark of memory")
@pytest.mark.parametrize("kind", ["bfl", "diffusers"])
def test_memory_is_a_few_times_the_largest_tensor(tmp_path: Path, kind: run.Kind) -> None:
    wide = replace(SMALL, heads=16, double_blocks=2, single_blocks=6)
    for config, name in ((SMALL, "small"), (wide, "wide")):
        weights = {part: torch.zeros(shape) for part, shape in parameter_shapes(config).items()}
        save_tensors(weights, tmp_path / f"{name}.safetensors")
    del weights
    target = Target(kind, shard=20 << 20)
    convert(tmp_path / "small.safetensors", tmp_path / "warm", target, origin="scratch")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is used now
    before = resident("VmRSS")
    facts = convert(tmp_path / "wide.safetensors", tmp_path / "out", target, origin="scratch")
    more = resident("VmHWM") - before
    assert facts["bytes"] > 9 * facts["largest"]
    assert more < FACTOR * facts["largest"]
    # The same at full size, in float32: the largest tensor is the first of a fused single block.
    assert FACTOR * 4 * (7 * 3072 * 3072) < 4e9
