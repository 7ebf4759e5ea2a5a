"""The average of a lineage's heads: closed form, equal bits everywhere, refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.ema import average_files, average_tensor
from paris_models.expert import build_expert
from paris_protocol.averages import kept_share
from tiny_models import EXPERT

DECAY = 0.9999
SHAPES = {"a": (3, 5), "b": (7,), "c.d": (2, 2, 2), "empty": (0, 3)}


def head(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def test_steps_of_one_merge_are_as_many_merges_of_one_step() -> None:
    """Over a head that stays the same: only the number of steps counts."""
    one, other = torch.zeros(4).numpy(), torch.ones(4).numpy()
    at_once = average_tensor(one, other, kept_share(0.9, 8))
    for _ in range(8):
        one = average_tensor(one, other, kept_share(0.9, 1))
    np.testing.assert_allclose(at_once, one, rtol=1e-6)
    np.testing.assert_allclose(at_once, 1 - 0.9**8, rtol=1e-6)


def test_a_chain_of_merges_is_its_closed_form(tmp_path: Path) -> None:
    heads, steps = [head(i) for i in range(5)], [120, 30, 7, 400]
    save_tensors(heads[0], tmp_path / "e0")
    for i, s in enumerate(steps, 1):
        save_tensors(heads[i], tmp_path / f"h{i}")
        share = kept_share(DECAY, s)
        average_files(tmp_path / f"e{i - 1}", tmp_path / f"h{i}", share, tmp_path / f"e{i}")
    found = load_tensors(tmp_path / "e4")
    left = [DECAY ** sum(steps[i:]) for i in range(5)]  # of head i after all merges that follow it
    for name in SHAPES:
        wanted = left[0] * heads[0][name].double()
        for i, s in enumerate(steps, 1):
            wanted = wanted + left[i] * (1 - DECAY**s) * heads[i][name].double()
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_each_operation_is_rounded_by_itself(tmp_path: Path) -> None:
    """Recomputed number by number, with float32 after every operation."""
    before, after, share = head(1), head(2), kept_share(DECAY, 120)
    save_tensors(before, tmp_path / "e")
    save_tensors(after, tmp_path / "h")
    average_files(tmp_path / "e", tmp_path / "h", share, tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    c, d = np.float32(share), np.float32(1 - share)
    for name in SHAPES:
        pairs = zip(before[name].flatten().numpy(), after[name].flatten().numpy(), strict=True)
        wanted = [np.float32(np.float32(c * e) + np.float32(d * h)) for e, h in pairs]
        assert found[name].flatten().numpy().tobytes() == np.array(wanted, np.float32).tobytes()


def test_threads_and_instruction_sets_change_no_bit(tmp_path: Path) -> None:
    for seed, name in enumerate(("e", "h")):
        save_tensors(dict(build_expert(EXPERT, seed=seed).state_dict()), tmp_path / name)
    script = (
        "import sys; from pathlib import Path; from paris_models.ema import average_files; "
        "a, b, out = map(Path, sys.argv[1:]); average_files(a, b, 0.988, out)"
    )
    settings_of = (
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "4", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"},
    )
    files = []
    for number, extra in enumerate(settings_of):
        out = tmp_path / f"out{number}"
        command = [
            sys.executable,
            "-c",
            script,
            *(str(p) for p in (tmp_path / "e", tmp_path / "h", out)),
        ]
        subprocess.run(command, check=True, env=os.environ | extra, timeout=300)
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_what_does_not_fit_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    save_tensors(head(1), tmp_path / "e")
    bad = {
        "shapes": head(2) | {"b": torch.zeros(8)},
        "names": {n: t for n, t in head(2).items() if n != "b"},
        "dtype": head(2) | {"b": torch.zeros(7, dtype=torch.bfloat16)},
        "nan": head(2) | {"b": torch.full((7,), math.nan)},
    }
    for name, tensors in bad.items():
        save_tensors(tensors, tmp_path / name)
        with pytest.raises(ValueError, match=r"same tensors|float32|not finite"):
            average_files(tmp_path / "e", tmp_path / name, DECAY, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    for share in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="share"):
            average_files(tmp_path / "e", tmp_path / "e", share, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match="same shapes"):
        average_tensor(np.zeros(2, np.float32), np.zeros(3, np.float32), 0.5)
