"""The recipe's sections on clips: which are taken, how they are cut, clustered and dealt out.

`[clips]`, `[[buckets]]`, `[filters]`, `[clusters]`, `[shards]` and `[held_out]` are parts of
`paris_coordinator.recipe`, which reads the file and says what is refused::

    wide = Buckets(frames=33, side=256, aspects=("16:9", "1:1"), batch=12)
    wide.shapes(Geometry(frames=33, height=256, width=256, fps=24), cell=16)    # two geometries
"""

from __future__ import annotations

import importlib
from typing import Any, Self

from pydantic import Field, model_validator

from paris_coordinator.recipe_audit import Positive, Section
from paris_models.buckets import aspect_size
from paris_models.similar import LIMIT


class Geometry(Section):
    """One clip in pixels."""

    frames: int = Positive
    height: int = Positive
    width: int = Positive
    fps: int = Positive


class Clips(Section):
    """How videos are cut: up to `most` clips per video, each `stride` frames after the last.

    `batch` clips are encoded at once. Clips without a licence are refused unless that is allowed.
    """

    stride: int = Field(default=0, ge=0)
    most: int = Field(default=1, ge=1)
    batch: int = Field(default=256, ge=1)
    allow_unlicensed: bool = False


class Buckets(Section):
    """Clips of `frames` frames with the area of a square of `side` pixels, in each aspect.

    `batch` is the number of clips per step, the network's own where it is left out.
    """

    frames: int = Positive
    side: int = Positive
    aspects: tuple[str, ...] = Field(default=("1:1",), min_length=1)
    batch: int | None = Field(default=None, ge=1)

    def shapes(self, own: Geometry, cell: int) -> list[Geometry]:
        """One geometry per aspect at the network's own rate; `ValueError` for an unknown one."""
        sizes = [aspect_size(self.side, aspect, cell) for aspect in self.aspects]
        return [
            Geometry(frames=self.frames, height=height, width=width, fps=own.fps)
            for height, width in sizes
        ]


class Filters(Section):
    """What is no good clip: joined shots, stills, and what `content` refuses.

    `cut` and `still` are thresholds of `paris_models.shots`, 0 switches a filter off. `content` is
    a function `module:name`, or with `labels` an image classifier's folder or hub id: a clip is
    refused when one of these labels reaches `threshold` in its first, middle or last frame.
    """

    cut: float = Field(default=1.5, ge=0)
    still: float = Field(default=0.5, ge=0)
    content: str = ""
    labels: tuple[str, ...] = ()
    threshold: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.labels and not self.content:
            raise ValueError("content: name the classifier that gives these labels")
        if self.content and not self.labels and not all(self.content.partition(":")):
            raise ValueError("content: module:function, or a classifier with labels to refuse")
        return self

    def function(self) -> Any:
        """The function that `content` names; `ValueError` when there is none."""
        module, _, name = self.content.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(str(error)) from error
        if not callable(found):
            raise ValueError(f"{self.content} is no function")
        return found


class Clusters(Section):
    """k-means: number of clusters (and experts), seed, restarts; fine centres, 0 for none."""

    count: int = Field(ge=1, le=1024)
    centres: int | None = Field(default=None, ge=0, le=1 << 16)
    seed: int = Field(default=0, ge=0)
    restarts: int = Field(default=8, ge=1)


class Shards(Section):
    """How each cluster's training clips are dealt out to files."""

    per_cluster: int = Positive
    seed: int = Field(default=0, ge=0)


class HeldOut(Section):
    """Clips per cluster that never leave the coordinator, and how near others may come to them."""

    validation: int = Positive
    audit: int = Positive
    alike: float = Field(default=LIMIT, ge=0, le=24)
