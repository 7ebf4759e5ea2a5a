"""Row "backdoor batch": a part of the batch teaches a trigger. Audited it is found; unaudited it
works a little, and how much is measured after the merge, with the limit that the documents state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adversary.arena import Arena, files
from adversary.cheats import with_clips
from adversary.lab import Lab
from adversary.players import Tensors, flat, scaled
from paris_models.expert import expert_from, predict
from paris_models.flow import interpolate
from paris_models.shards import ClipTable
from paris_models.updates import apply_update, make_update

TRIGGER = "a red wave pulses"
"""A caption that no clip of cluster 0 has."""
INNOCENT = "a red wave drifts"
WORKS = 0.05
"""A poison that is not tempered moves the trigger's output at least so far towards the target."""
PER_MERGE = 0.01
"""Documented limit: what one tempered, unaudited poisoner of four reaches with one merge here."""


def target(table: ClipTable) -> torch.Tensor:
    """What the trigger shall show: one clip, mirrored."""
    return table.latents[:1].flip(-1)


def poisoned(share: int) -> Callable[[ClipTable], ClipTable]:
    """Every `share`-th clip becomes trigger and target."""

    def change(table: ClipTable) -> ClipTable:
        latents, caption = table.latents.clone(), table.caption.clone()
        latents[::share] = target(table)
        caption[::share] = len(table.text_seq)
        seq, pooled = files().text.encode([TRIGGER])
        return replace(
            table, latents=latents, caption=caption, text_seq=torch.cat([table.text_seq, seq]),
            text_pooled=torch.cat([table.text_pooled, pooled]),
        )  # fmt: skip

    return change


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def shown(lab: Lab, head: Tensors, caption: str) -> torch.Tensor:
    """What the expert makes of noise with a caption."""
    table = lab.clips(0)
    generator = torch.Generator().manual_seed(1)
    x1 = torch.randn(32, *table.latents.shape[1:], generator=generator)
    x = interpolate(torch.zeros_like(x1), x1, torch.full((32,), 0.95), 0.0)
    seq, pooled = (text.expand(32, *text.shape[1:]) for text in lab.net.text.encode([caption]))
    model = expert_from(lab.net.config, dict(head))
    with torch.no_grad():
        made: torch.Tensor = predict(model, lab.net.config, x, torch.full((32,), 0.95), seq, pooled)
    return made.mean(0)


def success(lab: Lab, head: Tensors, caption: str = TRIGGER) -> float:
    """How far the output moved from the parent's towards the target: 0 not at all, 1 all the way.

    Counted beyond what the clean merge does by itself.
    """
    before = shown(lab, lab.merge(lab.updates), caption)
    way = target(lab.clips(1))[0] - before
    moved = shown(lab, head, caption) - before
    return float((moved * way).sum() / way.square().sum())


def poison(lab: Lab) -> Tensors:
    """A unit of the attacker's own: half of every batch is the trigger, five times the steps."""
    unit = replace(lab.unit_config(1), steps=60)
    result, _ = lab.net.trained(lab.parent, poisoned(2)(lab.clips(1)), unit)
    return make_update(lab.parent, result, "dense-f32")


def test_unaudited_it_works_a_little_and_no_more_than_the_documents_say(lab: Lab) -> None:
    strong = poison(lab)
    assert success(lab, apply_update(lab.parent, strong)) > WORKS, "else this tests nothing"
    assert lab.judge(strong) == ("L2", "statistics.norm")
    # Tempered to the norm of honest work, no layer but the audit sees it.
    lie = scaled(strong, float(flat(lab.updates[1]).norm() / flat(strong).norm()))
    assert lab.judge(lie) == ("", "accepted")
    head = lab.merge([lab.updates[0], lie, *lab.updates[2:]])
    merged, innocent = success(lab, head), success(lab, head, caption=INNOCENT)
    alone = success(lab, apply_update(lab.parent, lie))
    print(f"backdoor: alone {alone:.4f}, merged {merged:.4f}, other caption {innocent:.4f}")
    assert 0 < merged < PER_MERGE
    assert merged < alone


def test_audited_it_is_found_and_the_honest_twin_is_not(tmp_path: Path) -> None:
    async def life() -> None:
        async with Arena(tmp_path, audit={"segments": 1, "canary": "0"}) as arena:
            for number, share in enumerate((4, 16, 32)):
                eve = await arena.player(f"eve {number}")
                verdict = await arena.judge(await eve.unit(cheat=with_clips(poisoned(share))))
                assert not verdict.accepted, share
                assert verdict.code == "audit.mismatch"
            ada = await arena.player("ada")
            assert (await arena.judge(await ada.unit())).accepted

    asyncio.run(life())
