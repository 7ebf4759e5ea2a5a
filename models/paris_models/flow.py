"""Flow matching in closed form: path, target, time law, shift and sampling times.

Time 1 is noise, time 0 is data (as in Open-Sora 2.0's training loop)::

    x_t = (1 - t) x0 + (1 - (1 - s)(1 - t)) x1,   v = (1 - s) x1 - x0,   s = sigma_min
    t = sigmoid(mean + std n);  t <- a t / (1 + (a - 1) t)
    a = lin(H W / 4) sqrt(T),   lin through (256, 1) and (4096, 3), on latent sizes

An expert with objective "x0" returns an estimate of x0; `velocity_from_x0` is exact for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paris_models.config import Objective


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor, sigma_min: float) -> Tensor:
    """The point x_t of the path from data `x0` to noise `x1` (n, …) at times `t` (n,)."""
    t = _column(t, x0)
    return (1 - t) * x0 + (1 - (1 - sigma_min) * (1 - t)) * x1


def velocity(x0: Tensor, x1: Tensor, sigma_min: float) -> Tensor:
    """The derivative of x_t in t: the paper's training target."""
    return (1 - sigma_min) * x1 - x0


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor, sigma_min: float) -> Tensor:
    """The velocity of the path through `x_t` at times `t` (n,) > 0 that ends in `x0`.

    x1 is eliminated from the two formulas above: v = ((1 - s) x_t - x0) / (s + t (1 - s)).
    """
    t = _column(t, x_t)
    return ((1 - sigma_min) * x_t - x0) / (sigma_min + t * (1 - sigma_min))


def target(objective: Objective, x0: Tensor, x1: Tensor, sigma_min: float) -> Tensor:
    """What the network's output is compared with."""
    return x0 if objective == "x0" else velocity(x0, x1, sigma_min)


def size_shift(frames: int, height: int, width: int) -> float:
    """The shift a of T × H × W latents: larger clips need more noise to be destroyed."""
    return (1 + 2 * (height * width / 4 - 256) / (4096 - 256)) * math.sqrt(frames)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """a t / (1 + (a - 1) t): keeps 0 and 1, moves the rest towards noise for a > 1."""
    return shift * t / (1 + (shift - 1) * t)


def times_from_normals(normals: Tensor, mean: float, std: float, shift: float) -> Tensor:
    """Training times (n,) from standard normals (n,): shifted logit-normal."""
    return shift_time(torch.sigmoid(mean + std * normals), shift)


def stratified_times(order: Tensor, offset: float, mean: float = 0.0) -> Tensor:
    """Times (n,) at n equal quantiles of the logit-normal, dealt out by `order` (n,) int.

    The quantiles share one `offset` in [0, 1), so means over clips vary less.
    """
    u = ((order.double() + offset) / len(order)).clamp(1e-4, 1 - 1e-4)
    return torch.sigmoid(mean + torch.special.ndtri(u)).float()


def sampling_times(steps: int, shift: float) -> Tensor:
    """The steps + 1 times of Euler sampling from 1 to 0, (steps + 1,) float32."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def shift_for(shift: float, frames: int, height: int, width: int) -> float:
    """A recipe's or sampler's shift for latents of this size: 0 stands for `size_shift`."""
    return shift if shift > 0 else size_shift(frames, height, width)
