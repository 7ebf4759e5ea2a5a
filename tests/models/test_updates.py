"""What is handed in for a unit, and files of every codec merged into one float32 master."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.codec_cases import SHAPES, change, equal, factors
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codecs import CODECS, LORA, Codec, decode, encode, left_out
from paris_models.merge import merge_files, revert_files
from paris_models.updates import apply_update, make_update
from paris_protocol.gate import check_header, header_length
from paris_protocol.net.folder import file_root

FULL = [codec for codec in CODECS if codec not in LORA]
MIXED: list[tuple[Codec, int, float, float]] = [
    ("lora-int16", 16, 0.2, 1.0), ("topk-32", 0, 0.3, 0.7), ("lora-int8", 64, 0.1, 1.0),
    ("dense-f32", 0, 0.2, 0.9), ("dense-bf16", 0, 0.1, 1.0), ("int8", 0, 0.1, 0.5),
]  # fmt: skip
"""Codec, rank, weight and scale of the inputs of one merge."""


@pytest.mark.parametrize("codec", FULL)
def test_an_update_is_the_encoded_difference(codec: Codec) -> None:
    parent, result = change(0), change(1)
    delta = {name: result[name] - parent[name] for name in SHAPES}
    assert equal(make_update(parent, result, codec), encode(codec, delta))


def test_what_a_unit_leaves_out_comes_with_the_next_ones() -> None:
    """Two hundred units of one change, each begun with what the one before left out."""
    head, step, rest = change(4), change(5), {n: torch.zeros(s) for n, s in SHAPES.items()}
    arrived = head
    for _ in range(200):
        result = {name: arrived[name] + rest[name] + step[name] for name in SHAPES}
        wire = make_update(arrived, result, "topk-32")
        delta = {name: result[name] - arrived[name] for name in SHAPES}
        rest = left_out(delta, wire, "topk-32", SHAPES)
        arrived = apply_update(arrived, decode(wire, "topk-32", SHAPES))
    sent = {name: arrived[name] - head[name] for name in SHAPES}
    for name, tensor in step.items():
        assert torch.allclose(sent[name] + rest[name], 200 * tensor, rtol=1e-2, atol=1e-2)
    squares = [sum(float(t.square().sum()) for t in x.values()) for x in (sent, step)]
    assert squares[0] > 0.8 * 200**2 * squares[1]


@pytest.mark.parametrize("codec", LORA)
def test_factors_are_handed_in_as_they_were_trained(codec: Codec) -> None:
    parent, trained = change(0), factors(1, 4)
    assert equal(make_update(parent, trained, codec), encode(codec, trained))
    name = "transformer_blocks.1.attn.to_q"
    missing = {n: t for n, t in trained.items() if not n.startswith(name)}
    half = {n: t for n, t in trained.items() if n != f"{name}.b"}
    spoiled: list[dict[str, Tensor]] = [
        missing, half, trained | {f"{name}.c": torch.zeros(4, 20)}, dict(parent),
        trained | {f"{name}.a": torch.zeros(4, 21)}, trained | {f"{name}.b": torch.zeros(9, 5)},
        trained | {f"{name}.b": torch.zeros(8, 4)}, trained | {f"{name}.a": torch.zeros(80)},
    ]  # fmt: skip
    for result in spoiled:
        with pytest.raises(ValueError, match="factor"):
            make_update(parent, result, codec)
    for rank in (0, 257):
        with pytest.raises(ValueError, match="rank"):
            make_update(parent, factors(1, rank), codec)


def test_other_experts_are_refused() -> None:
    parent = change(0)
    for codec in FULL:
        for wrong in ({"a": torch.zeros(1)}, parent | {"proj_out.bias": torch.zeros(4)}):
            with pytest.raises(ValueError, match="differ"):
                make_update(parent, wrong, codec)


class Round:
    """A master and updates of every kind as files, and the same updates dense."""

    def __init__(self, folder: Path) -> None:
        self.master, self.folder = folder / "master", folder
        save_tensors(change(99), self.master)
        self.mixed, self.dense = [], []
        for number, (codec, rank, weight, scale) in enumerate(MIXED):
            wire = encode(codec, factors(number, rank) if rank else change(number))
            sent, plain = folder / f"sent{number}", folder / f"dense{number}"
            save_tensors(wire, sent)
            save_tensors(decode(wire, codec, SHAPES), plain)
            self.mixed.append((sent, weight, scale))
            self.dense.append((plain, weight, scale))


@pytest.fixture(scope="module")
def turn(tmp_path_factory: pytest.TempPathFactory) -> Round:
    return Round(tmp_path_factory.mktemp("round"))


def test_updates_of_every_codec_merge_as_their_dense_ones_do(turn: Round) -> None:
    for run in (merge_files, revert_files):
        run(turn.master, turn.mixed, turn.folder / "one")
        run(turn.master, turn.dense, turn.folder / "other")
        assert (turn.folder / "one").read_bytes() == (turn.folder / "other").read_bytes()
    merge_files(turn.master, turn.mixed, turn.folder / "merged")
    expected = {n: t.numpy() for n, t in change(99).items()}
    total = {n: np.zeros_like(array) for n, array in expected.items()}
    for path, weight, scale in turn.dense:
        for name, tensor in load_tensors(path).items():
            total[name] += np.float32(weight * scale) * tensor.numpy()
    for name, tensor in load_tensors(turn.folder / "merged").items():
        assert np.array_equal(tensor.numpy(), expected[name] + total[name])


PROGRAM = """
import json, sys
from pathlib import Path
from paris_models.merge import merge_files
order = json.loads(sys.argv[1])
merge_files(Path(order["master"]), [(Path(p), w, s) for p, w, s in order["inputs"]],
            Path(order["out"]))
"""


def test_any_number_of_threads_gives_the_same_bits(turn: Round) -> None:
    roots = set()
    for number, threads in enumerate(("1", "4")):
        out = turn.folder / f"threads{number}"
        inputs = [[str(path), weight, scale] for path, weight, scale in turn.mixed]
        order = {"master": str(turn.master), "inputs": inputs, "out": str(out)}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "OPENBLAS_CORETYPE": "Prescott" if number else "",
        }
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(order)],
            env=environment, check=True,
        )  # fmt: skip
        roots.add(file_root([out]))
    merge_files(turn.master, turn.dense, turn.folder / "here")
    assert roots == {file_root([turn.folder / "here"])}


def test_every_file_passes_the_gate_and_has_a_root(turn: Round) -> None:
    for path, _, _ in turn.mixed:
        raw = path.read_bytes()
        check_header(raw[: 8 + header_length(raw[:8], len(raw))], len(raw))
        assert len(file_root([path])) == 64


def test_a_damaged_input_leaves_no_head(turn: Round) -> None:
    """Found while the merge is written: whatever stands there already stays."""
    name = "topk-32.high"
    wire = load_tensors(turn.mixed[1][0])
    wire[name] = wire[name].roll(1)
    save_tensors(wire, turn.folder / "damaged")
    out = turn.folder / "head"
    out.write_bytes(b"the old head")
    inputs = [turn.mixed[0], (turn.folder / "damaged", 0.3, 0.7)]
    with pytest.raises(ValueError, match=r"kept|places"):
        merge_files(turn.master, inputs, out)
    assert out.read_bytes() == b"the old head"
    assert not list(turn.folder.glob("*.part"))
