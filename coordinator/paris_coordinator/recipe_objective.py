"""The recipe's section `[recipe]`: objective, conditions and optimiser of every unit.

It is a part of `paris_coordinator.recipe`, which reads the file and says what is refused. What the
section leaves open follows from the rest of the file::

    Objective(batch=8).resolved(paper=True, half=True)
    # RecipeConfig(…, conditions=(("t2v", 1), ("i2v_head", 5), …), time_path="float32")
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from paris_coordinator.recipe_audit import Section
from paris_models.config import PAPER_CONDITIONS, Kind, RecipeConfig


class Objective(Section):
    """Objective and optimiser; the defaults are the paper's (`paris_models.config`)."""

    objective: Literal["velocity", "x0"] = "velocity"
    sigma_min: float = Field(default=1e-5, ge=0, lt=1)
    t_mean: float = 0.0
    t_std: float = Field(default=1.0, gt=0)
    t_shift: float = Field(default=0.0, ge=0)
    null_text: float = Field(default=0.1, ge=0, lt=1)
    batch: int = Field(ge=1)
    optimiser: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=5e-5, gt=0)
    matrix_lr: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-15, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    conditions: dict[Kind, int] | None = None
    null_image: float = Field(default=0.0, ge=0, lt=1)
    time_path: Literal["hidden", "float32"] | None = None
    ema: float = Field(default=0.0, ge=0, lt=1)

    def resolved(self, *, paper: bool, half: bool) -> RecipeConfig:
        """The recipe as it is signed; raises `ValueError` for what cannot work.

        `paper`: the paper's preset with an expert that takes conditions, which then are Open-Sora's
        unless the section has others. `half`: some unit computes in bfloat16, where only exact
        times tell the last sampling steps apart.
        """
        given = self.model_dump(exclude={"conditions", "time_path"})
        conditions = PAPER_CONDITIONS if paper else ()
        if self.conditions is not None:
            conditions = tuple(self.conditions.items())
        path = self.time_path or ("float32" if half else "hidden")
        return RecipeConfig(**given, conditions=conditions, time_path=path)
