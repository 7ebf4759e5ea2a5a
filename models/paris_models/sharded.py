"""One expert on several GPUs of one machine: FSDP2 through torchrun, on the same assignment.

Weights, gradients and moments are cut over the ranks, block by block; each rank takes its part of a
step's slots, and the gradients' mean is that of the whole batch. It is the step of `train.py` with
other sums' order: the same result within rounding (a test holds it within 1e-6 of one process).
Every rank calls everything. What cannot be cut (a recipe with Muon, whose matrices are
orthogonalised whole, or a batch that is no multiple of the ranks) is refused with `ValueError`; a
loss that is not finite on any rank raises `ArithmeticError` on all, changing nothing::

    torchrun --standalone --nproc-per-node 2 own_script.py       # in it:
    with group("cpu"):                                           # or "cuda"
        state = new_state(config, recipe, load_tensors(parent))
        while state.step < unit.steps:
            loss = train_step(state, clips, unit)
        whole = gathered(state)                                  # on rank 0; {} elsewhere
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from paris_models import train
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import expert_from
from paris_models.optim import Optimiser
from paris_models.shards import Clips
from paris_models.train import (
    Batch,
    TrainState,
    batch_loss,
    deterministic,
    make_batch,
    rate_multiplier,
    state_tensors,
)


@contextmanager
def group(kind: str) -> Iterator[None]:
    """The ranks that torchrun started, for "cuda" over NCCL with a device each, else over gloo."""
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def new_state(
    config: ExpertConfig, recipe: RecipeConfig, weights: Mapping[str, Tensor]
) -> TrainState:
    """A fresh state whose weights, copied from the given ones, are cut over the ranks."""
    if recipe.optimiser == "muon":
        raise ValueError("Muon orthogonalises whole matrices: such an expert is not cut over GPUs")
    kind = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(kind, (distributed.get_world_size(),))
    model = expert_from(config, {n: w.to(torch.float32, copy=True) for n, w in weights.items()})
    model.requires_grad_(True).train()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return TrainState(config, recipe, model, Optimiser(model, recipe))


def train_step(state: TrainState, clips: Clips, unit: UnitConfig) -> float:
    """Take one step together with the other ranks and return the loss of the whole batch."""
    if state.step >= unit.steps:
        raise ValueError(f"the unit has {unit.steps} steps and all are done")
    torch.set_num_threads(unit.threads)
    deterministic(unit.kernels)
    batch = make_batch(clips, unit, state.recipe, state.step, state.config)
    loss = batch_loss(state, _own(batch), unit.dtype)
    mean = loss.detach() / distributed.get_world_size()
    distributed.all_reduce(mean)
    value = float(mean)
    if not math.isfinite(value):
        raise ArithmeticError(f"the loss of step {state.step} is {value}")
    loss.backward()
    state.optimiser.step(rate_multiplier(unit, state.step))
    state.step += 1
    return value


def gathered(state: TrainState) -> dict[str, Tensor]:
    """The whole state as `train.state_tensors` has it, in host memory of rank 0; {} elsewhere."""
    first = distributed.get_rank() == 0
    whole: dict[str, Tensor] = {}
    for name, tensor in state_tensors(state).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole


def load_state_tensors(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Take over a whole state that every rank has read. `ValueError` if it cannot fit."""
    cut = {}
    for name, own in state_tensors(state).items():
        given = tensors.get(name)
        if isinstance(own, DTensor) and given is not None:
            given = distribute_tensor(given.to(own.device), own.device_mesh, own.placements)
        if given is not None:
            cut[name] = given
    if len(cut) != len(tensors):
        raise ValueError("the saved state is not that of this expert and recipe")
    train.load_state_tensors(state, cut)


def _own(batch: Batch) -> Batch:
    """This rank's slots of a batch."""
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    if len(batch.x0) % ranks:
        raise ValueError(f"a batch of {len(batch.x0)} clips is no multiple of {ranks} ranks")

    def cut(tensor: Tensor) -> Tensor:
        return tensor.chunk(ranks)[rank]

    return replace(
        batch, x0=cut(batch.x0), x1=cut(batch.x1), t=cut(batch.t), text_seq=cut(batch.text_seq),
        text_pooled=cut(batch.text_pooled),
        condition=None if batch.condition is None else cut(batch.condition),
    )  # fmt: skip
