"""A lineage of LoRA and dense units of the same rounds learns as one of dense units alone does."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.planned import lease, work
from paris_models.checkpoint import load_tensors
from paris_models.evaluate import held_out_losses
from paris_models.merge import merge_files
from paris_models.shards import read_shards
from tinynet import TinyNet, hexed

DENSE = ("float32", "dense-f32", 1.0)
ADAPTERS = ("lora-32-bf16", "lora-int16", 8.0)
ROUNDED = ("float32", "int8", 1.0)
ROUNDS = 3


def loss(net: TinyNet, head: Path) -> float:
    """Mean loss on the secret clips of the first cluster."""
    clips = read_shards([net.private(0)])
    return float(
        held_out_losses(load_tensors(head), net.config, net.recipe, clips, b"k" * 16).mean()
    )


def lineage(net: TinyNet, folder: Path, kinds: list[tuple[str, str, float]]) -> list[float]:
    """Held-out losses of the heads: each round merges a unit of every kind, on the same samples."""
    head, losses = net.head_file, [loss(net, net.head_file)]
    folder.mkdir()
    for turn in range(ROUNDS):
        inputs = []
        for number, kind in enumerate(kinds):
            seed = hexed(f"mixed {turn} {number}")
            assignment = lease(net, number, *kind, seed=seed, steps=60, commit_every=60)
            inputs.append((work(net, assignment, head).unit.update, 1 / len(kinds), 1.0))
        after = folder / f"head{turn}.safetensors"
        merge_files(head, inputs, after)
        head = after
        losses.append(loss(net, head))
    return losses


def share(net: TinyNet, folder: Path, kinds: list[tuple[str, str, float]]) -> float:
    """The gain of a lineage of these kinds over that of dense ones on the same samples."""
    dense = lineage(net, folder / "dense", [DENSE] * len(kinds))
    mixed = lineage(net, folder / "mixed", kinds)
    assert dense[0] - dense[-1] > 0.01, "nothing was learned"
    return (mixed[0] - mixed[-1]) / (dense[0] - dense[-1])


@pytest.mark.slow
def test_lora_and_dense_rounds_keep_nine_tenths_of_the_gain(tmp_path: Path) -> None:
    net = TinyNet(tmp_path / "net")
    assert share(net, tmp_path, [ADAPTERS, DENSE]) >= 0.9


@pytest.mark.slow
def test_compressed_dense_rounds_keep_nearly_all_of_it(tmp_path: Path) -> None:
    net = TinyNet(tmp_path / "net")
    assert share(net, tmp_path, [ROUNDED, DENSE]) >= 0.98
