"""Audits with real training, replay, merges and reverts: a cheat's merged work leaves the head."""

import asyncio

import numpy as np
import torch

from adversary.arena import Arena
from paris_coordinator.replay import replay
from paris_models.checkpoint import load_tensors
from paris_protocol.errors import ParisError

AUDIT = {"segments": 1, "rate": "10", "canary": "0", "vesting": 3}
PLAN = {"units": 2, "rounds": 2, "steps": 6}


def test_skipped_steps_end_the_key_and_what_it_merged_before_is_taken_back(tmp_path):
    async def life():
        arena = Arena(tmp_path, shards=2, audit=AUDIT, plan=PLAN, commit_every=2)
        async with arena:
            return await story(arena)

    asyncio.run(life())


async def story(arena):
    honest, cheat = await arena.player("honest"), await arena.player("cheat")
    desk = arena.office.desk
    earlier = []
    while any(expert.round < 1 for expert in desk.experts):
        for player in (honest, cheat):
            done = await unit(arena, player)
            earlier += [done.id] if done is not None and player is cheat else []
    assert all(desk.work_of(id).state == "merged" for id in earlier)
    heads = {expert.index: expert.head for expert in desk.experts}

    lie = await cheat.unit(cheat=skipped)
    verdict = await arena.judge(lie)
    assert (verdict.accepted, verdict.code) == (False, "audit.mismatch")
    assert verdict.layers[4].layer == "L4"
    await arena.work()
    [revocation] = desk.revocations.values()
    assert (revocation.key, set(revocation.contributions)) == (cheat.id, set(earlier))

    reverted = {revert.expert: revert for revert in desk.reverts.values()}
    assert set(reverted) == {desk.work_of(id).record.expert for id in earlier}
    for index, revert in reverted.items():
        assert (revert.parent, desk.experts[index].round) == (heads[index], 1)
        check_revert(arena, revert)
    try:
        await cheat.lease()
    except ParisError as error:
        assert error.code == "node.revoked"
    else:
        raise AssertionError("a revoked key got work")
    done = await unit(arena, honest)
    assert arena.verdict(done.id).accepted
    assert dict(arena.verdict(done.id).layers[4].numbers)["exact"] == "1"
    again, _ = replay(arena.office.ledger, arena.state)
    assert again.roots == desk.roots


def check_revert(arena, revert):
    """The head without what was removed: parent − Σ weight · scale · update, in float32."""
    result = load_tensors(arena.office.store.path(revert.result.blob))
    parent = load_tensors(arena.office.head_file(revert.parent))
    updates = [load_tensors(arena.office.store.path(p.update.blob)) for p in revert.removed]
    for name, tensor in parent.items():
        wanted = tensor.numpy().copy()
        for part, update in zip(revert.removed, updates, strict=True):
            weight = np.float32(float.fromhex(part.weight))
            scale = np.float32(float.fromhex(part.scale))
            wanted -= weight * (scale * update[name].numpy())
        assert torch.allclose(result[name], torch.from_numpy(wanted), rtol=0, atol=1e-6)


async def unit(arena, player):
    """A unit up to its verdict, if there is one to do."""
    try:
        done = await player.unit()
    except ParisError as error:
        assert error.code == "work.none"
        return None
    assert (await arena.judge(done)).accepted
    await arena.work()
    return done


def skipped(player, assignment, parent):
    """Every second step is only counted."""
    return player.train(assignment, parent, skip=lambda step: step % 2 == 1)
