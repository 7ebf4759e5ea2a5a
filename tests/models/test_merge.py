"""Updates and merges: statistics, and the same bits from the same public inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.merge import merge, merge_files, merge_tensor
from paris_models.updates import apply_update, block_of, cosine, make_update, statistics

FLOATS = st.floats(-10, 10, width=32)


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "proj_out.weight": (3, 4),
        "single_transformer_blocks.0.proj_out.weight": (5, 5),
        "transformer_blocks.1.ff.bias": (6,),
        "transformer_blocks.1.norm.weight": (2, 2),
    }
    return {name: scale * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def arrays(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in named.items()}


def test_an_update_is_the_difference() -> None:
    parent, result = tensors(0), tensors(1)
    update = make_update(parent, result, "dense-f32")
    assert all(torch.equal(update[n], result[n] - parent[n]) for n in parent)
    small = make_update(parent, result, "dense-bf16")
    assert {t.dtype for t in small.values()} == {torch.bfloat16}
    back = apply_update(parent, small)
    assert all(torch.allclose(back[n], result[n], atol=0.02) for n in parent)
    with pytest.raises(ValueError, match="differ"):
        make_update(parent, {"a": torch.zeros(1)}, "dense-f32")


def test_statistics_by_block() -> None:
    parent, update = tensors(0), tensors(1, 0.1)
    found = statistics(update, parent)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in update.values()))
    assert found.norm == pytest.approx(norm)
    base = math.sqrt(sum(float(t.double().square().sum()) for t in parent.values()))
    assert found.relative == pytest.approx(norm / base)
    assert set(found.blocks) == {"proj_out", "single_transformer_blocks.0", "transformer_blocks.1"}
    assert math.hypot(*found.blocks.values()) == pytest.approx(norm)
    assert found.max_abs == pytest.approx(max(float(t.abs().max()) for t in update.values()))
    assert found.finite
    update["proj_out.weight"][0, 0] = math.inf
    assert not statistics(update, parent).finite
    assert block_of("x_embedder.weight") == "x_embedder"


def test_cosine() -> None:
    a = tensors(1)
    assert cosine(a, a) == pytest.approx(1)
    assert cosine(a, {n: -3 * t for n, t in a.items()}) == pytest.approx(-1)
    assert cosine(a, {n: 0 * t for n, t in a.items()}) == 0
    assert abs(cosine(a, tensors(2))) < 0.5


@settings(max_examples=50, deadline=None)
@given(
    master=FLOATS,
    inputs=st.lists(st.tuples(FLOATS, st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
)
def test_a_merge_is_the_published_arithmetic(
    master: float, inputs: list[tuple[float, float, float]]
) -> None:
    f = np.float32
    total = None
    for value, weight, scale in inputs:
        term = f(f(weight * scale) * f(value))
        total = term if total is None else f(total + term)
    expected = f(f(master) + total)
    updates, weights, scales = zip(*inputs, strict=True)
    merged = merge(
        {"a": np.full((2, 3), master, f)},
        [{"a": np.full((2, 3), u, f)} for u in updates],
        weights,
        scales,
    )
    assert merged["a"].dtype == f
    assert (merged["a"] == expected).all()


def test_one_contribution_is_a_chain() -> None:
    parent, update = arrays(tensors(0)), arrays(tensors(1))
    head = merge(parent, [update], [1.0], [1.0])
    assert all(np.array_equal(head[n], parent[n] + update[n]) for n in parent)
    same = merge(parent, [], [], [])
    assert all(np.array_equal(same[n], parent[n]) for n in parent)


def test_files_merge_to_the_same_bits(tmp_path) -> None:
    parent, one, two = tensors(0), tensors(1), tensors(2)
    two = {n: t.to(torch.bfloat16) for n, t in two.items()}
    for name, content in (("parent", parent), ("one", one), ("two", two)):
        save_tensors(content, tmp_path / name)
    inputs = [(tmp_path / "one", 0.3, 0.9), (tmp_path / "two", 0.7, 1.0)]
    seen: list[tuple[int, int]] = []
    merge_files(tmp_path / "parent", inputs, tmp_path / "a", progress=lambda *p: seen.append(p))
    merge_files(tmp_path / "parent", inputs, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert seen[-1] == (4, 4)
    expected = merge(arrays(parent), [arrays(one), arrays(two)], [0.3, 0.7], [0.9, 1.0])
    got = load_tensors(tmp_path / "a")
    assert all(np.array_equal(got[n].numpy(), expected[n]) for n in parent)
    turned = merge(arrays(parent), [arrays(two), arrays(one)], [0.7, 0.3], [1.0, 0.9])
    assert turned.keys() == expected.keys()


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    master = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="shape"):
        merge_tensor(master, [np.zeros(4, np.float32)], [1], [1])
    with pytest.raises(ValueError, match="finite"):
        merge_tensor(master, [np.full((2, 2), np.nan, np.float32)], [1], [1])
    with pytest.raises(ValueError, match="argument"):
        merge_tensor(master, [master], [1, 2], [1])
    with pytest.raises(ValueError, match="master's tensors"):
        merge({"a": master}, [{"b": master}], [1], [1])
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a")
    save_tensors({"b": torch.zeros(2)}, tmp_path / "b")
    with pytest.raises(ValueError, match="master's tensors"):
        merge_files(tmp_path / "a", [(tmp_path / "b", 1.0, 1.0)], tmp_path / "out")
    save_tensors({"a": torch.full((2,), math.inf)}, tmp_path / "bad")
    with pytest.raises(ValueError, match="finite"):
        merge_files(tmp_path / "a", [(tmp_path / "bad", 1.0, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
