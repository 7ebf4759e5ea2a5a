"""One expert over two processes: the same training as in one, within rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paris_models.checkpoint import load_tensors
from paris_models.expert import build_expert
from paris_models.train import new_state, state_tensors, train_step
from tiny_models import EXPERT, PAPER, UNIT, clips

pytestmark = pytest.mark.slow
WITHIN = 1e-6
SAMPLES = replace(UNIT, batch=4)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks over gloo on loopback have trained four steps, and two of them again."""
    out = tmp_path_factory.mktemp("sharded")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(here), *sys.path])
    subprocess.run(
        [*command, str(here / "sharded_target.py"), str(out)], check=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return out


def test_two_processes_train_what_one_does(done: Path) -> None:
    state = new_state(EXPERT, PAPER, dict(build_expert(EXPERT, seed=5).state_dict()))
    begin = {name: t.clone() for name, t in state_tensors(state).items()}
    table = clips()
    losses = [train_step(state, table, SAMPLES) for _ in range(4)]
    found = load_tensors(done / "end")
    assert found.pop("losses").tolist() == pytest.approx(losses, rel=WITHIN)
    whole = state_tensors(state)
    assert found.keys() == whole.keys() and int(found["step"]) == 4
    names = [name for name in whole if name.startswith("weights.")]
    off = torch.cat([(found[n] - whole[n]).flatten() for n in names]).double().norm()
    size = torch.cat([whole[n].flatten() for n in names]).double().norm()
    moved = torch.cat([(whole[n] - begin[n]).flatten() for n in names]).double().norm()
    print(f"off by {float(off / size):.2e} of the weights, {float(off / moved):.2e} of the update")
    assert moved > 0 and off / size < WITHIN


def test_resuming_from_a_gathered_state_changes_no_bit(done: Path) -> None:
    end, resumed = load_tensors(done / "end"), load_tensors(done / "resumed")
    assert all(torch.equal(end[name], tensor) for name, tensor in resumed.items())
    assert end.keys() == resumed.keys() | {"losses"}


def test_each_process_holds_half(done: Path) -> None:
    total = sum(p.numel() for p in build_expert(EXPERT).parameters())
    held = [int((done / f"held-{rank}").read_text()) for rank in (0, 1)]
    assert sum(held) == total and max(held) < 0.6 * total
