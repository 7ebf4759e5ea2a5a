"""Dishonest training: each cheat commits consistently to what it did, and opens it when asked.

A cheat is a function of player, assignment and parent that gives the `Work` to hand in. None is
visible in statements or structure; what finds each is measured by the tests beside::

    work = await eve.unit(cheat=CHEATS["half batch"])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from adversary.players import Player, Tensors, Work, snapshot
from paris_models.config import UnitConfig
from paris_models.shards import ClipTable
from paris_models.train import new_state, train_step
from paris_protocol.envelope import Sealed
from paris_protocol.lineage import committed_steps
from paris_protocol.records import Assignment
from paris_protocol.streams import unit_key

Cheat = Callable[[Player, Sealed[Assignment], Tensors], Work]


def skipping(share: float) -> Cheat:
    """Takes only the first steps of every segment, `share` of them, and counts them all."""

    def cheat(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
        record = assignment.record
        done: set[int] = set()
        steps = committed_steps(record.steps, record.commit_every)
        for begin, end in pairwise(steps):
            done |= set(range(begin, begin + max(1, round(share * (end - begin)))))
        return player.train(assignment, parent, skip=lambda step: step not in done)

    return cheat


def with_clips(change: Callable[[ClipTable], ClipTable]) -> Cheat:
    """Trains on other clips than those of the assignment."""

    def cheat(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
        return player.train(assignment, parent, clips=change(player.clips(assignment.record)))

    return cheat


def with_unit(**changes: Any) -> Cheat:
    """Trains with other numbers than the assigned ones."""

    def cheat(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
        return player.train(assignment, parent, **changes)

    return cheat


def rate(factor: float) -> Cheat:
    """Trains at a multiple of the assigned rate."""

    def cheat(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
        unit = UnitConfig.from_record(assignment.record, unit_key(assignment.record.seed))
        changes = {"rate_start": factor * unit.rate_start, "rate_end": factor * unit.rate_end}
        return player.train(assignment, parent, **changes)

    return cheat


def permuted(table: ClipTable) -> ClipTable:
    """The same clips in another order."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(3))
    return table.rows(order)


def one_foreign(table: ClipTable) -> ClipTable:
    """One clip in sixteen is the attacker's own."""
    latents = table.latents.clone()
    latents[::16] = latents[::16].flip(-1) + 0.5
    return replace(table, latents=latents)


def own_data(table: ClipTable) -> ClipTable:
    """All clips are the attacker's own."""
    return replace(table, latents=table.latents.flip(-1, -2))


def other_captions(table: ClipTable) -> ClipTable:
    """The clips with each other's captions."""
    return replace(table, caption=table.caption.roll(7))


def extrapolated(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
    """A third of the steps; the states behind them are made up along the way so far."""
    record = assignment.record
    honest = player.train(assignment, parent, skip=lambda step: step >= record.steps // 3)
    first, last = honest.states[0], honest.states[-1]
    steps = committed_steps(record.steps, record.commit_every)
    states = [first]
    for step in steps[1:]:
        part = 2.0 * step / record.steps
        made = {
            name: (tensor + part * (last[name] - tensor)) if tensor.is_floating_point() else tensor
            for name, tensor in first.items()
        }
        states.append(made | {"step": torch.tensor([step], dtype=torch.int64)})
    return player.work_of(assignment, parent, states)


def infinitesimal(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
    """Proof-of-learning spoof: tiny steps from the parent to a result made elsewhere.

    The result is an honest training on other data; the states are points on the straight line, so
    that every segment looks like a small and smooth piece of training.
    """
    record = assignment.record
    elsewhere = player.train(assignment, parent, clips=permuted(player.clips(record)))
    target, first = elsewhere.states[-1], elsewhere.states[0]
    steps = committed_steps(record.steps, record.commit_every)
    states = [
        {
            name: first[name] + step / record.steps * (target[name] - first[name])
            if first[name].is_floating_point()
            else torch.tensor([step], dtype=torch.int64)
            for name in first
        }
        for step in steps
    ]
    return player.work_of(assignment, parent, states)


def frozen_layers(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
    """Trains the layers around the blocks and leaves the blocks as they were."""
    record = assignment.record
    unit = UnitConfig.from_record(record, unit_key(record.seed))
    clips = player.clips(record)
    state = new_state(player.config, player.recipe, parent)
    states = [snapshot(state)]
    while state.step < record.steps:
        before = snapshot(state)
        train_step(state, clips, unit)
        with torch.no_grad():
            for name, parameter in state.model.named_parameters():
                if "transformer_blocks" in name:
                    parameter.copy_(before[f"weights.{name}"])
        if state.step in committed_steps(record.steps, record.commit_every):
            states.append(snapshot(state))
    return player.work_of(assignment, parent, states)


def other_result(player: Player, assignment: Sealed[Assignment], parent: Tensors) -> Work:
    """Honest states beside another result: only the last state shows that they do not belong."""
    honest = player.train(assignment, parent)
    lazy = player.train(assignment, parent, skip=lambda step: step % 2 == 1)
    return honest.with_update(lazy.update)


CHEATS: dict[str, Cheat] = {
    "half of the steps": skipping(0.5),
    "one step in five skipped": skipping(0.8),
    "one step of each segment": skipping(0.01),
    "extrapolated": extrapolated,
    "wrong order": with_clips(permuted),
    "other noise": with_unit(key=b"another key 1234"),
    "own data": with_clips(own_data),
    "a sixteenth foreign": with_clips(one_foreign),
    "shuffled captions": with_clips(other_captions),
    "half batch": with_unit(batch=8),
    "rate x 0.8": rate(0.8),
    "rate x 1.25": rate(1.25),
    "lower precision": with_unit(dtype="bfloat16"),
    "missing layers": frozen_layers,
    "infinitesimal steps": infinitesimal,
    "another result": other_result,
}
