"""Which frames an expert is given in training: text alone, the first, the last, or both.

Open-Sora 2.0 draws one of `t2v`, `i2v_head`, `i2v_tail` and `i2v_loop` for every clip, by the
weights `config.PAPER_CONDITIONS`, and gives a frame as a latent that was encoded alone: a latent of
the whole clip knows the future. The kind of a slot is a function of (key, step, slot), and so is
whether its condition is dropped (`null_image`). Clips of one latent frame are images and get none.
A kind whose tensors the shards lack is refused with `ValueError` and both names::

    head, tail = given_ends(unit.key, recipe, step=7, batch=96)            # two (96,) of bool
    tokens = step_condition(unit.key, recipe, 7, clips, rows, patch=2)     # (96, N, (C+1)·p²)
"""

from __future__ import annotations

import torch
from torch import Tensor

from paris_models import noise
from paris_models.config import FRAMES_ALONE, RecipeConfig
from paris_models.latents import condition
from paris_models.shards import ClipTable


def given_ends(key: bytes, recipe: RecipeConfig, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Which slots are given their first frame and which their last, two (batch,) of bool.

    Word 0 of (CONDITION, step, slot) picks the kind, the uniform of word 1 drops the condition.
    """
    kinds, weights = zip(*recipe.conditions, strict=True)
    words = noise.words_batch(key, noise.CONDITION, step, range(batch), 2)
    dropped = noise.uniforms_batch(key, noise.CONDITION, step, range(batch), 2)[:, 1]
    kept = torch.from_numpy(dropped >= recipe.null_image)
    kind = torch.from_numpy(noise.picks(words[:, 0], weights))
    head, tail = (
        torch.tensor([name in FRAMES_ALONE[each] for each in kinds])[kind] & kept
        for name in ("first", "last")
    )
    return head, tail


def step_condition(
    key: bytes, recipe: RecipeConfig, step: int, clips: ClipTable, rows: Tensor, patch: int
) -> Tensor | None:
    """The packed condition of a step's clips, (n, N, (C+1)·p²); None where they are images.

    Mask and reference are zero but for the latent frames that are given.
    """
    channels, frames, height, width = clips.shape
    if frames == 1:
        return None
    refuse_missing(clips, recipe)
    head, tail = given_ends(key, recipe, step, len(rows))
    reference = clips.latents.new_zeros(len(rows), channels, frames, height, width)
    mask = clips.latents.new_zeros(len(rows), 1, frames, height, width)
    for given, table, place in ((head, clips.first, 0), (tail, clips.last, frames - 1)):
        if table is not None:
            reference[given, :, place] = table[rows[given], :, 0]
            mask[given, :, place] = 1
    return condition(mask, reference, patch)


def refuse_missing(clips: ClipTable, recipe: RecipeConfig) -> None:
    """Refuse clips that lack what a kind of condition of the recipe needs."""
    for kind, _ in recipe.conditions:
        for name in sorted(FRAMES_ALONE[kind]):
            if getattr(clips, name) is None:
                raise ValueError(f"the condition {kind} needs `{name}`, which the shards lack")
