"""The ensemble: router and experts together generate latents.

At every Euler step the router weighs the experts for each clip; the `top_k` best are kept and
renormalised; each kept expert gives its velocity with text guidance inside it; the weighted sum
moves the clip. Noise comes from the stream SAMPLE at the clip's own slot, so a clip does not depend
on the batch it is in. Only experts that have weight for some clip are evaluated. Text, experts and
router that do not fit together raise `ValueError`::

    ensemble = Ensemble(experts, router, config, recipe, null_seq, null_pooled)
    x = ensemble.sample(text_seq, text_pooled, (32, 3, 4, 4), key, SamplerConfig(20, 2.0, 1.5, 1))
    x, weights = ensemble.sample_with_weights(...)                # weights (steps, n, K)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from paris_models import flow, noise
from paris_models.config import ExpertConfig, RecipeConfig, SamplerConfig
from paris_models.expert import as_velocity, predict
from paris_models.latents import Shape


class Routes(Protocol):
    """What the ensemble needs of a router."""

    def probabilities(
        self, x: Tensor, t: Tensor, pooled: Tensor, feature: Tensor | None = None
    ) -> Tensor:
        """Cluster probabilities (n, K) of noisy latents `x` (n, C, T, H, W) at times `t` (n,)."""


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Experts, their router (None for a single expert) and the empty caption's encodings.

    `experts` may be any sequence; one that loads its items on demand works.
    """

    experts: Sequence[Any]
    router: Routes | None
    config: ExpertConfig
    recipe: RecipeConfig
    null_seq: Tensor
    null_pooled: Tensor

    def __post_init__(self) -> None:
        if not self.experts or (self.router is None and len(self.experts) > 1):
            raise ValueError("several experts need a router, and there must be one expert at least")

    def route(
        self, x: Tensor, t: Tensor, pooled: Tensor, top_k: int, feature: Tensor | None = None
    ) -> Tensor:
        """Weights of the experts, (n, K): the `top_k` most probable, renormalised to sum 1."""
        if self.router is None:
            return x.new_ones(len(x), 1)
        probabilities = self.router.probabilities(x, t, pooled, feature)
        if probabilities.shape[1] != len(self.experts):
            raise ValueError("the router knows another number of experts")
        best = probabilities.topk(min(top_k, len(self.experts)), dim=1)
        kept = torch.zeros_like(probabilities).scatter(1, best.indices, best.values)
        return kept / kept.sum(1, keepdim=True)

    @torch.no_grad()
    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        text_seq: Tensor,
        text_pooled: Tensor,
        weights: Tensor,
        guidance: float,
    ) -> Tensor:
        """Weighted sum of the experts' guided velocities at `x` (n, C, T, H, W), `t` (n,)."""
        total = torch.zeros_like(x)
        for k in range(len(self.experts)):
            rows = weights[:, k].nonzero()[:, 0]
            if len(rows):
                share = weights[rows, k].reshape(-1, 1, 1, 1, 1)
                v = self._guided(
                    self.experts[k], x[rows], t[rows], text_seq[rows], text_pooled[rows], guidance
                )
                total[rows] += share * v
        return total

    def _guided(
        self, expert: Any, x: Tensor, t: Tensor, seq: Tensor, pooled: Tensor, guidance: float
    ) -> Tensor:
        """uncond + g (cond − uncond) inside one expert; at g = 1 the text alone is evaluated."""
        path = self.recipe.time_path
        conditional = predict(expert, self.config, x, t, seq, pooled, time_path=path)
        if guidance != 1:
            null_seq = self.null_seq.to(seq.device).expand_as(seq)
            null_pooled = self.null_pooled.to(seq.device).expand_as(pooled)
            empty = predict(expert, self.config, x, t, null_seq, null_pooled, time_path=path)
            conditional = empty + guidance * (conditional - empty)
        return as_velocity(self.recipe, x, t, conditional)

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """Latents (n, *shape) alone; arguments as in `sample_with_weights`."""
        return self.sample_with_weights(*args, **kwargs)[0]

    @torch.no_grad()
    def sample_with_weights(
        self,
        text_seq: Tensor,
        text_pooled: Tensor,
        shape: Shape,
        key: bytes,
        sampler: SamplerConfig,
        *,
        first_slot: int = 0,
        batch: int = 192,
        feature: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Generate a clip per caption, `text_seq` (n, L, D), `text_pooled` (n, P).

        Returns latents (n, *shape) and the weights of every step (steps, n, K). Clip i starts from
        the key's noise at slot `first_slot` + i. `callback(done, steps)` counts over all batches.
        """
        n, parts, traces = len(text_seq), [], []
        if len(text_pooled) != n or n == 0:
            raise ValueError("sequence and pooled text must be one per clip, for one clip at least")
        batches = list(range(0, n, batch))
        for index, start in enumerate(batches):
            rows = slice(start, min(start + batch, n))
            x = initial_noise(key, range(first_slot + rows.start, first_slot + rows.stop), shape)
            trace = []
            times = flow.sampling_times(sampler.steps, flow.shift_for(sampler.shift, *shape[1:]))
            x = x.to(text_seq.device)
            for step, (now, then) in enumerate(pairwise(times)):
                t = now.to(x.device).expand(len(x))
                part = None if feature is None else feature[rows]
                weights = self.route(x, t, text_pooled[rows], sampler.top_k, part)
                v = self.velocity(
                    x, t, text_seq[rows], text_pooled[rows], weights, sampler.guidance
                )
                x = x + (then - now) * v
                trace.append(weights)
                if callback:
                    callback(index * sampler.steps + step + 1, len(batches) * sampler.steps)
            parts.append(x)
            traces.append(torch.stack(trace))
        return torch.cat(parts), torch.cat(traces, dim=1)


def initial_noise(key: bytes, slots: range, shape: Shape) -> Tensor:
    """The noise that clips at `slots` start from, (n, *shape) float32."""
    size = shape[0] * shape[1] * shape[2] * shape[3]
    drawn = noise.normals_batch(key, noise.SAMPLE, 0, slots, size)
    return torch.from_numpy(drawn).reshape(-1, *shape)
