"""What `prepare` leaves out by looking: joined shots, stills, and what the operator's filter says.

A content filter is the operator's own function, or an image classifier of the transformers library
with the labels that it refuses. It sees the frames that would be encoded and answers with a reason
or None. A filter that fails stops `prepare` (`recipe.invalid`): to go on without it would let
through what it is there for::

    judge = Judge.load(recipe.filters)
    judge(frames)                                  # None, or ("clip.static", "no step above 0.03…")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from paris_coordinator.recipe_clips import Filters
from paris_coordinator.tools import device, refused
from paris_models.shots import cut_score, largest, steps
from paris_models.video import Frames

Check = Callable[[Frames], str | None]
"""Frames (F, H, W, 3) uint8 to the reason for which the clip is refused, if any."""


@dataclass(frozen=True, slots=True)
class Judge:
    """The filters of a recipe."""

    filters: Filters
    check: Check | None

    @classmethod
    def load(cls, filters: Filters) -> Judge:
        """With the content filter, if there is one; `recipe.invalid` when it cannot be loaded."""
        try:
            if filters.labels:
                return cls(filters, Classifier(filters))
            return cls(filters, filters.function() if filters.content else None)
        except (OSError, ValueError) as error:
            raise refused("filters.content", error) from error

    def __call__(self, frames: Frames) -> tuple[str, str] | None:
        """Code and facts of the first filter that refuses the clip."""
        if len(frames) > 1:
            found = steps(frames)
            score, most = cut_score(found), largest(found)
            if self.filters.cut and score > self.filters.cut:
                place = int(found.argmax()) + 1
                return "clip.cut", f"one step is {score:.1f} times the next, at frame {place}"
            if most < self.filters.still:
                return "clip.static", f"no step above {most:.2f} of 255 grey levels"
        if self.check is None:
            return None
        try:
            reason = self.check(frames)
        except Exception as error:  # the operator's code may raise anything
            raise refused("filters.content", error) from error
        return None if reason is None else ("clip.content", str(reason)[:100])


class Classifier:
    """An image classifier that refuses labels, on the first, the middle and the last frame."""

    def __init__(self, filters: Filters) -> None:
        from paris_models.encoders import ImageLabels  # loads transformers, which few need here

        self.judge = ImageLabels.from_pretrained(filters.content, device=device())
        self.filters = filters
        for label in filters.labels:
            if label not in self.judge.labels:
                known = ", ".join(self.judge.labels)[:100]
                raise ValueError(f"it has no label {label!r}, only {known}")

    def __call__(self, frames: Frames) -> str | None:
        """The label that is refused, with its probability."""
        chosen = frames[sorted({0, len(frames) // 2, len(frames) - 1})]
        likely = self.judge(torch.from_numpy(chosen).permute(0, 3, 1, 2))
        for label in self.filters.labels:
            if likely[label] >= self.filters.threshold:
                return f"{label} {likely[label]:.2f}"
        return None
