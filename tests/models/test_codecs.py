"""Codecs: what they lose is bounded, what they write is one thing, everything else is refused."""

from __future__ import annotations

import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.codec_cases import SHAPES, change, equal, factors
from paris_models import codecs_int8, codecs_topk
from paris_models.adapters import adapt
from paris_models.checkpoint import save_tensors
from paris_models.codecs import (
    CODECS,
    DENSE,
    LORA,
    Codec,
    Lazy,
    codec_of,
    decode,
    encode,
    left_out,
    lora_modules,
    open_update,
    per_weight,
    wire_bytes,
)
from paris_models.config import LADDER
from paris_models.expert import build_expert, parameter_shapes

LOSSY: tuple[Codec, ...] = ("int8", "topk-32", "topk-64", "topk-128", "topk-256")
TOPK = LOSSY[1:]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 3e38, -3e38, 2.0**-126, 2.0**-149, -(2.0**-149), 2.0**-100]
VALUES = st.one_of(
    st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Tensor]:
    """Up to three tensors, some without values, with ties and numbers of every size."""
    made = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        pool = draw(st.lists(VALUES, min_size=1, max_size=8))
        places = draw(st.lists(st.integers(0, len(pool) - 1), max_size=90))
        made[name] = torch.tensor([pool[place] for place in places], dtype=torch.float32)
    return made


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@settings(max_examples=80, deadline=None)
@given(changes(), st.sampled_from(LOSSY))
def test_what_was_decoded_is_encoded_to_the_same_bytes(
    delta: dict[str, Tensor], codec: Codec
) -> None:
    wire = encode(codec, delta)
    back = decode(wire, codec, shapes_of(delta))
    assert all(tensor.dtype == torch.float32 for tensor in back.values())
    assert shapes_of(back) == shapes_of(delta)
    assert equal(encode(codec, back), wire)
    rest = left_out(delta, wire, codec, shapes_of(delta))
    for name, tensor in delta.items():
        assert torch.equal(rest[name], tensor - back[name])
        untouched = back[name] == 0
        assert torch.equal(rest[name][untouched], tensor[untouched])


@settings(max_examples=80, deadline=None)
@given(changes())
def test_int8_is_within_half_a_step_of_each_block(delta: dict[str, Tensor]) -> None:
    back = decode(encode("int8", delta), "int8", shapes_of(delta))
    for name, tensor in delta.items():
        exact, got = tensor.double().numpy(), back[name].double().numpy()
        for begin in range(0, len(exact), 256):
            block, found = exact[begin : begin + 256], got[begin : begin + 256]
            most = np.abs(block).max()
            bound = most / 253.9 if most >= 2.0**-100 else most
            assert (np.abs(block - found) <= bound).all()
            assert most < 2.0**-100 or np.abs(found).max() == most


def check_topk(delta: dict[str, Tensor], codec: Codec) -> None:
    """Against the definition: a sort, and means as fractions."""
    names, keep = sorted(delta), -(-sum(t.numel() for t in delta.values()) // int(codec[5:]))
    sizes = {(n, i): abs(x) for n in names for i, x in enumerate(delta[n].flatten().tolist())}
    ordered = sorted((p for p in sizes if sizes[p]), key=lambda p: -sizes[p])  # stable: ties
    kept = set(ordered[:keep])
    back = decode(encode(codec, delta), codec, shapes_of(delta))
    for name in names:
        mine = {i: Fraction(sizes[n, i]) for n, i in kept if n == name}
        mean = sum(mine.values()) / max(1, len(mine))
        levels = [
            floor32([x for x in mine.values() if (x > mean) == high]) for high in (False, True)
        ]
        found = back[name].flatten().tolist()
        assert {i for i, value in enumerate(found) if value} == set(mine)
        for i, size in mine.items():
            assert abs(found[i]) == levels[size > mean]
            assert (found[i] < 0) == (float(delta[name].flatten()[i]) < 0)


def floor32(numbers: list[Fraction]) -> float:
    """The largest float32 that is not above the mean of some numbers."""
    if not numbers:
        return 0.0
    mean = sum(numbers) / len(numbers)
    near = np.float32(float(mean))
    return float(near if Fraction(float(near)) <= mean else np.nextafter(near, np.float32(0)))


@settings(max_examples=80, deadline=None)
@given(changes(), st.sampled_from(TOPK))
def test_topk_keeps_the_largest_of_all_and_their_exact_means(
    delta: dict[str, Tensor], codec: Codec
) -> None:
    check_topk(delta, codec)


@pytest.mark.parametrize("codec", TOPK)
def test_topk_of_many_values_is_the_definition_too(codec: Codec) -> None:
    delta = change(8, {"a": (90, 41), "b": (20, 70), "c": (3000,)})
    delta["c"][::3] *= 1e-20
    check_topk(delta, codec)


@pytest.mark.parametrize("codec", TOPK)
def test_topk_keeps_exactly_one_of_n(codec: Codec) -> None:
    delta = change(3)
    total = sum(t.numel() for t in delta.values())
    back = decode(encode(codec, delta), codec, SHAPES)
    assert sum(int(t.count_nonzero()) for t in back.values()) == -(-total // int(codec[5:]))
    nothing = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert equal(decode(encode(codec, nothing), codec, SHAPES), nothing)
    few = {name: tensor.clone() for name, tensor in nothing.items()}
    few["proj_out.bias"][1] = -(2.0**-149)
    assert equal(decode(encode(codec, few), codec, SHAPES), few)


def test_more_kept_values_than_the_codec_keeps_are_refused() -> None:
    """Three of 64 values, although the bits of a third one would just fit into the last bytes."""
    wire = {
        "topk-32.counts": torch.tensor([3], dtype=torch.int32),
        "topk-32.high": torch.tensor([0b11100000], dtype=torch.uint8),
        "topk-32.levels": torch.tensor([[1.0, 0.0]]),
        "topk-32.low": torch.tensor([0b00001000, 0b10000110], dtype=torch.uint8),
        "topk-32.marks": torch.zeros(1, dtype=torch.uint8),
    }
    with pytest.raises(ValueError, match="at most 2"):
        decode(wire, "topk-32", {"a": (64,)})
    wire["topk-32.counts"][0] = 2
    wire["topk-32.high"][0] = 0b11000000
    wire["topk-32.low"][1] = 0b10000000
    assert decode(wire, "topk-32", {"a": (64,)})["a"].nonzero().tolist() == [[1], [2]]


def test_places_ascend_inside_their_tensor() -> None:
    wire = encode("topk-32", {"a": torch.eye(1, 64)[0] + torch.eye(2, 64)[1], "b": torch.zeros(3)})
    shapes = {"a": (64,), "b": (3,)}
    decode(wire, "topk-32", shapes)
    for first, second in ((1, 0), (1, 1)):
        wire["topk-32.low"][:2] = torch.tensor([first << 3, second << 6], dtype=torch.uint8)
        with pytest.raises(ValueError, match="ascending"):
            decode(wire, "topk-32", shapes)
    # The last kept value stands in the tensor behind the one that counts it.
    wire = encode("topk-32", {"a": torch.zeros(64), "b": torch.ones(3)})
    for part in ("counts", "levels"):
        wire[f"topk-32.{part}"] = wire[f"topk-32.{part}"].flip(0)
    with pytest.raises(ValueError, match=r"ascending|count"):
        decode(wire, "topk-32", shapes)


@pytest.mark.parametrize("part", ["low", "high", "marks"])
def test_bytes_that_nothing_uses_are_zero(part: str) -> None:
    nothing = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for place in (0, -1):
        wire = encode("topk-32", nothing)
        wire[f"topk-32.{part}"][place] = 1
        with pytest.raises(ValueError, match="kept"):
            decode(wire, "topk-32", SHAPES)


def test_the_first_of_equal_values_are_kept() -> None:
    delta = {"a": torch.full((40,), 2.0), "b": torch.full((60,), -2.0)}
    back = decode(encode("topk-32", delta), "topk-32", shapes_of(delta))
    assert back["a"].tolist() == [2.0] * 4 + [0.0] * 36
    assert not back["b"].any()


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_do_not_depend_on_threads_pieces_or_dtypes(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = factors(1, 5) if codec in LORA else change(1)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in delta.items()}
    wire, coarse = encode(codec, delta), encode(codec, half)
    threads = torch.get_num_threads()
    monkeypatch.setattr(codecs_topk, "PIECE", 16)
    monkeypatch.setattr(codecs_int8, "PIECE", 1)
    try:
        torch.set_num_threads(4)
        turned = dict(reversed(delta.items()))
        transposed = {n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in turned.items()}
        assert equal(encode(codec, transposed), wire)
    finally:
        torch.set_num_threads(threads)
    assert equal(decode(wire, codec, SHAPES), decode(wire, codec, SHAPES))
    assert equal(encode(codec, {n: t.float() for n, t in half.items()}), coarse)
    small = decode(wire, codec, SHAPES)
    monkeypatch.undo()
    assert equal(decode(wire, codec, SHAPES), small)


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_is_as_long_as_was_said_and_opens_tensor_by_tensor(
    codec: Codec, tmp_path: Path
) -> None:
    wire = encode(codec, factors(2, 7) if codec in LORA else change(2))
    path = tmp_path / "update.safetensors"
    save_tensors(wire, path)
    assert path.stat().st_size == wire_bytes(codec, SHAPES, 7)
    assert codec_of(wire) == ("dense" if codec in DENSE else codec)
    back = decode(wire, codec, SHAPES)
    for named in (codec, None):
        opened = open_update(path, named, SHAPES)
        assert opened.keys() == back.keys()
        for name in SHAPES:
            array = opened[name]
            assert array.shape == SHAPES[name]
            if codec == "dense-bf16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            assert array.dtype == np.float32
            assert array.tobytes() == back[name].numpy().tobytes()
    with pytest.raises(KeyError):
        open_update(path, None, SHAPES)["nothing"]
    with pytest.raises(ValueError, match=r"fit|factors"):
        open_update(path, "topk-32" if codec != "topk-32" else "int8", SHAPES)


def test_other_experts_and_other_files_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "update.safetensors", {"a": (5, 5), "b": (70,)}
    for codec in CODECS:
        wire = encode(codec, factors(2, 7) if codec in LORA else change(2))
        save_tensors(wire, path)
        with pytest.raises(ValueError, match=r"fit|factors|tensors"):
            open_update(path, None, other)
        with pytest.raises(ValueError, match=r"fit|factors"):
            decode(wire, codec, other)
        name = max(wire, key=lambda name: wire[name].numel())
        for wrong in (
            {name: wire[name].to(torch.float64)},
            {name: wire[name].reshape(-1)[:-1]},
            {"more": torch.zeros(1)},
        ):
            with pytest.raises(ValueError, match=r"fit|factors|float64"):
                decode(wire | wrong, codec, SHAPES)
        del wire[name]
        with pytest.raises(ValueError, match=r"fit|factors"):
            decode(wire, codec, SHAPES)
    save_tensors({"proj_out.bias": torch.zeros(3, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match="U8"):
        open_update(path, None, {"proj_out.bias": (3,)})
    save_tensors({"proj_out.bias": torch.zeros(3, dtype=torch.float64)}, path)
    with pytest.raises(ValueError, match="F64"):
        open_update(path, None, {"proj_out.bias": (3,)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_not_encoded(bad: float) -> None:
    delta, parts = change(4), factors(4, 3)
    delta["proj_out.weight"][3, 4] = bad
    for codec in LOSSY:
        with pytest.raises(ValueError, match="finite"):
            encode(codec, delta)
    for part in ("a", "b"):
        broken = dict(parts)
        name = f"single_transformer_blocks.0.proj_mlp.{part}"
        broken[name] = parts[name].clone()
        broken[name][0, 0] = bad
        for codec in LORA:
            with pytest.raises(ValueError, match="finite"):
                encode(codec, broken)
    with pytest.raises(ValueError, match="no codec"):
        encode("zip", delta)
    with pytest.raises(ValueError, match="no codec"):
        decode(delta, "zip", SHAPES)
    with pytest.raises(ValueError, match="differ"):
        left_out(parts, encode("int8", change(4)), "int8", SHAPES)


def test_bytes_at_every_size_are_counted_exactly() -> None:
    paper = parameter_shapes(LADDER["paper"])
    checkpoint = wire_bytes("dense-bf16", paper)
    weights = LADDER["paper"].parameters
    assert checkpoint == pytest.approx(2 * weights, rel=1e-4)
    assert 100 * wire_bytes("lora-int8", paper, 32) <= checkpoint
    assert 100 * wire_bytes("lora-int16", paper, 32) > checkpoint
    assert {rank: wire_bytes("lora-int8", paper, rank) for rank in (16, 32, 64)} == {
        16: 69_458_104, 32: 134_830_264, 64: 265_574_584,
    }  # fmt: skip
    for codec, share in (("topk-32", 56), ("topk-64", 102), ("topk-128", 186), ("topk-256", 341)):
        assert checkpoint // wire_bytes(codec, paper) == share
        assert wire_bytes(codec, paper) == pytest.approx(
            per_weight(codec) * weights,
            rel=1e-3,
        )
    small = parameter_shapes(LADDER["5M"])
    assert 50 * wire_bytes("topk-32", small) <= wire_bytes("dense-bf16", small)
    assert [per_weight(codec) for codec in ("dense-f32", "dense-bf16", "int8")] == [4, 2, 1.015625]
    with pytest.raises(ValueError, match="rank"):
        per_weight("lora-int8")
    for rank in (0, 257):
        with pytest.raises(ValueError, match="rank"):
            wire_bytes("lora-int8", paper, rank)


def test_modules_are_those_that_get_factors() -> None:
    config = LADDER["demo"]
    model: nn.Module = build_expert(config, seed=0)
    given = adapt(model, "bfloat16", rank=2, key=bytes(16))
    modules = lora_modules(parameter_shapes(config))
    assert {name[:-2] for name in given} == set(modules)
    for module, (out, into) in modules.items():
        assert given[f"{module}.a"].shape == (2, into)
        assert given[f"{module}.b"].shape == (out, 2)


@pytest.mark.parametrize("codec", LOSSY)
def test_five_million_values_take_less_than_a_second(codec: Codec) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {name: (1000, 1000) for name in "abcde"}
    delta = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    begun = time.process_time()
    wire = encode(codec, delta)
    middle = time.process_time()
    decode(wire, codec, shapes)
    assert middle - begun < 1
    assert time.process_time() - middle < 1


@pytest.mark.parametrize("codec", TOPK[:2])
def test_encoding_holds_a_tensor_at_a_time(codec: Codec) -> None:
    """Sixteen tensors of 4 MB that are made when they are asked for, and 0.3 MB of a file."""
    shapes = {f"t{number:02}": (1 << 20,) for number in range(16)}

    def made(name: str) -> Tensor:
        g = np.random.default_rng(int(name[1:]))
        return torch.from_numpy(g.standard_normal(1 << 20, np.float32))

    tracemalloc.start()
    try:
        wire = encode(codec, Lazy(shapes, made))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(t.nbytes for t in wire.values()) < per_weight(codec) * (1 << 24) + 1000
    assert peak < 40 << 20
