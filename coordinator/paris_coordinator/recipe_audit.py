"""The recipe's section `[audit]`: rules of the replay audit, and its calibrated tolerances.

It is a part of `paris_coordinator.recipe`, which reads the file and says what is refused::

    Audit(segments=1, answer_within=120).model_dump(exclude_none=True)
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Field(ge=1)


class Section(BaseModel):
    """A table of the file: frozen, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Tolerance(Section):
    """How far an honest replay on other kernels may be off (records.Tolerance), as calibrated."""

    dtype: Literal["float32", "bfloat16"]
    model: str = Field(max_length=200)
    steps: int = Positive
    rho: float = Field(gt=0)
    tensor: float = Field(gt=0)
    factor: float = Field(ge=1)
    pairs: int = Positive
    source: str = Field(max_length=200)


class Audit(Section):
    """Rules of the replay audit (records.AuditRules); what is not set has the default."""

    segments: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, ge=0)
    floor: float | None = Field(default=None, ge=0, le=1)
    probation: int | None = Field(default=None, ge=0)
    probation_weight: float | None = Field(default=None, gt=0, le=1)
    vesting: int | None = Field(default=None, ge=0)
    answer_within: int | None = Field(default=None, ge=1)
    retry_within: int | None = Field(default=None, ge=1)
    auditors: Literal[0, 3] | None = None
    canary: float | None = Field(default=None, ge=0, le=1)
    tolerances: tuple[Tolerance, ...] = ()
