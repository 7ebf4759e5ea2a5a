"""What each rank of a sharded training does; a test starts it through torchrun."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from paris_models import sharded
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.expert import build_expert
from tiny_models import EXPERT, PAPER, RECIPE, UNIT, clips

SAMPLES = replace(UNIT, batch=4)


def main(out: Path) -> None:
    weights = dict(build_expert(EXPERT, seed=5).state_dict())
    table = clips()
    with sharded.group("cpu"):
        _refusals(weights, table)
        state = sharded.new_state(EXPERT, PAPER, weights)
        losses = [sharded.train_step(state, table, SAMPLES) for _ in range(2)]
        middle = sharded.gathered(state)
        if middle:
            save_tensors(middle, out / "middle")
        torch.distributed.barrier()
        losses += [sharded.train_step(state, table, SAMPLES) for _ in range(2)]
        end = sharded.gathered(state)
        again = sharded.new_state(EXPERT, PAPER, weights)
        sharded.load_state_tensors(again, load_tensors(out / "middle"))
        while again.step < 4:
            sharded.train_step(again, table, SAMPLES)
        resumed = sharded.gathered(again)
        if end:
            losses_named = {"losses": torch.tensor(losses, dtype=torch.float64)}
            save_tensors(end | losses_named, out / "end")
            save_tensors(resumed, out / "resumed")
        local = sum(p.to_local().numel() for p in state.model.parameters())
        (out / f"held-{torch.distributed.get_rank()}").write_text(str(local))


def _refusals(weights, table) -> None:
    """What cannot be cut is refused on every rank, and changes nothing."""
    try:
        sharded.new_state(EXPERT, RECIPE, weights)
        raise SystemExit("Muon was not refused")
    except ValueError as error:
        assert "Muon" in str(error)
    state = sharded.new_state(EXPERT, PAPER, weights)
    before = sharded.gathered(state)
    odd = replace(UNIT, batch=3)
    for wrong, what in ((odd, "multiple"), (replace(UNIT, batch=4, steps=1), "all are done")):
        try:
            state.step = 1 if wrong.steps == 1 else 0
            sharded.train_step(state, table, wrong)
            raise SystemExit(f"{what} was not refused")
        except ValueError as error:
            assert what in str(error)
    state.step = 0
    broken = replace(table, latents=table.latents * float("inf"))
    try:
        sharded.train_step(state, broken, SAMPLES)
        raise SystemExit("an infinite loss was not refused")
    except ArithmeticError:
        pass
    try:
        sharded.load_state_tensors(state, {"step": torch.zeros(1, dtype=torch.int64)})
        raise SystemExit("a state that does not fit was not refused")
    except ValueError:
        pass
    after = sharded.gathered(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
