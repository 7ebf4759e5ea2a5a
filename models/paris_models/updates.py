"""Updates: what training changed, as tensors that cross the network, and their statistics.

An update is result − parent per tensor in float32, as a codec sends it (`codecs`); under a LoRA
codec it is the trained factors. Everything but `make_update` takes dense updates, as `decode` gives
them. Updates and parents whose tensors differ in name or shape are refused with `ValueError`::

    wire = make_update(parent, result, "dense-bf16")
    update = decode(wire, "dense-bf16", shapes)      # paris_models.codecs
    s = statistics(update, parent)                   # s.relative = ‖update‖ / ‖parent‖
    candidate = apply_update(parent, update)         # float32
    cosine(update, other)                            # 1.0 for a copy
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from paris_models.codecs import LORA, Codec, Lazy, encode, lora_modules

POWER_STEPS: Final = 30


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Size of an update: Euclidean norms (float64), in all and by block, and its largest value."""

    norm: float
    relative: float
    blocks: dict[str, float]
    max_abs: float
    finite: bool


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise ValueError("the tensors differ in names or shapes")


def make_update(
    parent: Mapping[str, Tensor], result: Mapping[str, Tensor], codec: Codec
) -> dict[str, Tensor]:
    """What is sent for a unit: result − parent in float32, as the codec says.

    Differences are made a tensor at a time. Under a LoRA codec `result` holds the factors of all
    modules (`lean.weights`), and the parent is there for names and shapes.
    """
    if codec in LORA:
        modules = lora_modules({name: tuple(tensor.shape) for name, tensor in parent.items()})
        if {name[:-2] for name in result} != set(modules):
            raise ValueError("the result is not the factors of this expert's modules")
        _check_factors(result, modules)
        return encode(codec, result)
    _same(parent, result)
    return encode(codec, Lazy(parent, lambda name: result[name].float() - parent[name].float()))


def _check_factors(factors: Mapping[str, Tensor], modules: Mapping[str, tuple[int, int]]) -> None:
    """Outer sizes are those of the module; ranks are compared when they are encoded."""
    for name, factor in factors.items():
        out, into = modules[name[:-2]]
        sizes = {"a": (1, into), "b": (0, out)}
        axis, size = sizes.get(name[-1], (0, -1))
        if factor.ndim != 2 or factor.shape[axis] != size:
            raise ValueError(f"the factor {name} does not have its module's shape")


def apply_update(parent: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """parent + update in float32: the expert that a contribution proposes."""
    _same(parent, update)
    return {name: parent[name].float() + update[name].float() for name in parent}


def block_of(name: str) -> str:
    """The block that a parameter belongs to: `transformer_blocks.3`, or the module outside them."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first.endswith("transformer_blocks") and rest else first


def statistics(update: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> UpdateStats:
    """Norms of an update, alone and relative to its parent; finite is false if any value is not."""
    _same(parent, update)
    squares: dict[str, float] = {}
    largest, base = 0.0, 0.0
    for name in sorted(update):
        tensor = update[name].double()
        block = block_of(name)
        squares[block] = squares.get(block, 0.0) + float(tensor.square().sum())
        largest = max(largest, float(tensor.abs().max())) if tensor.numel() else largest
        base += float(parent[name].double().square().sum())
    norm = math.sqrt(sum(squares.values()))
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in update.values())
    relative = norm / math.sqrt(base) if base > 0 else math.inf
    blocks = {block: math.sqrt(square) for block, square in squares.items()}
    return UpdateStats(norm, relative, blocks, largest, finite)


def spectrum(update: Mapping[str, Tensor]) -> tuple[float, float]:
    """How concentrated the matrices inside the blocks are: (spectral, rank), both in (0, 1].

    `spectral` is the largest singular value over the Frobenius norm (power iteration), `rank` the
    effective rank (Σσ²)² / Σσ⁴ over the number of singular values; means weighted by squared norms.
    Training with Muon makes small and large values; a low-rank fake makes 1 and nearly 0. Both are
    0 where no such matrix moved.
    """
    total = spectral = rank = 0.0
    for name in sorted(update):
        if update[name].ndim != 2 or "transformer_blocks." not in name:
            continue
        matrix = update[name].float()
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        gram = wide @ wide.mT  # σ² are its eigenvalues
        square = float(gram.trace().double())
        if square <= 0:
            continue
        fourth = float(gram.double().square().sum())
        total += square
        rank += square * (square**2 / fourth) / len(gram)
        spectral += square * math.sqrt(_largest_eigenvalue(gram) / square)
    return (spectral / total, rank / total) if total else (0.0, 0.0)


def _largest_eigenvalue(gram: Tensor, steps: int = POWER_STEPS) -> float:
    """Of a positive matrix, by power iteration from its own row sums of squares."""
    vector = gram.square().sum(1)
    for _ in range(steps):
        vector = gram @ (vector / vector.norm())
    return float(vector.norm())


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Cosine of the angle between two updates over all tensors (float64); 0 if either is zero."""
    _same(a, b)
    dot = first = second = 0.0
    for name in sorted(a):
        x, y = a[name].double().flatten(), b[name].double().flatten()
        dot, first, second = dot + float(x @ y), first + float(x @ x), second + float(y @ y)
    return dot / math.sqrt(first * second) if first > 0 and second > 0 else 0.0
