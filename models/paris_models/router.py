"""The router: a small DiT that tells from a noisy latent which expert should denoise it.

It reads the noisy tokens x_t, the time, the pooled text and, where the data set has one, an image
feature of the first frame: AdaLN-Single modulation, sine positions for any grid,
a class token. It is trained from cached latents alone, at the clusters' natural frequencies, so its
softmax is a posterior under the data's priors. Its config carries those priors, a temperature per
bin of t and the held-out figures. Labels and shapes that do not fit raise `ValueError`::

    router, report = train_router(config, recipe, clips, labels, key, patch=1, held=(held, truth))
    router.save_pretrained(folder); router = Router.from_pretrained(folder)
    p = router.probabilities(x, t, pooled)                             # (n, K), calibrated
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from paris_models import flow, noise
from paris_models.config import RecipeConfig, RouterConfig
from paris_models.latents import image_ids, pack
from paris_models.shards import ClipTable

TIME_DIM: Final = 256
NULL_TEXT: Final = 0.1
"""Share of samples without text, so that one router serves unconditional generation too."""
NO_FEATURE: Final = 0.5
"""Share of samples without image feature, so that one router serves text-to-video too."""
WARMUP: Final = 10
FLOOR: Final = 0.02


def waves(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines of positions (n,) at dim/2 frequencies from 1 to 10⁻⁴, (n, dim)."""
    half = dim // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angle = positions.float()[:, None] * torch.exp(-math.log(10000) * steps)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def grid_positions(ids: Tensor, width: int) -> Tensor:
    """Position codes of tokens from their ids (N, 3): a third of the width per axis, (N, width)."""
    part = width // 6 * 2
    code = torch.cat([waves(ids[:, axis], part) for axis in range(3)], dim=1)
    return F.pad(code, (0, width - 3 * part))


class Block(nn.Module):
    """Attention and feed-forward, modulated by a shared vector plus the block's own table."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """`h` (n, N, width), `modulation` (n, 6, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table)[:, :, None].unbind(
            1
        )
        u = F.layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = (
            a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in self.qkv(u).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + (1 + gate1) * self.out(mixed)
        u = F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2
        out: Tensor = h + (1 + gate2) * self.down(F.gelu(self.up(u), approximate="tanh"))
        return out


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


class Router(ModelMixin, ConfigMixin):
    """A DiT classifier over `experts` clusters; loads and saves as any diffusers model.

    `channels` are the latents', packed by `patch`. `edges` bound the bins of t that have one
    temperature each; `calibration` keeps the held-out figures that training measured.
    """

    @register_to_config
    def __init__(
        self,
        experts: int,
        channels: int,
        patch: int,
        width: int,
        blocks: int,
        heads: int,
        pooled_dim: int,
        feature_dim: int = 0,
        priors: Sequence[float] | None = None,
        edges: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
        temperatures: Sequence[float] = (1.0, 1.0, 1.0, 1.0, 1.0),
        calibration: Sequence[dict[str, float]] = (),
    ) -> None:
        super().__init__()
        self.token = nn.Linear(channels * patch**2, width)
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.time = _mlp(TIME_DIM, width)
        self.text = _mlp(pooled_dim, width)
        self.image = _mlp(feature_dim, width) if feature_dim else None
        self.absent = nn.Parameter(0.02 * torch.randn(width)) if feature_dim else None
        self.modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.last = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, experts)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        pooled: Tensor,
        feature: Tensor | None = None,
        *,
        ids: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        """Logits (n, K) of noisy `tokens` (n, N, C·p²) with positions `ids` (N, 3).

        `t` (n,), `pooled` (n, P), `feature` (n, F) or None; `present` (n,) bool says which rows
        have their feature (all, by default).
        """
        c = self.time(waves(1000 * t, TIME_DIM)) + self.text(pooled)
        if self.image is not None and self.absent is not None:
            c = c + self._image_part(len(tokens), feature, present)
        elif feature is not None:
            raise ValueError("this router takes no image feature")
        c = F.silu(c)
        h = self.token(tokens) + grid_positions(ids, self.cls.numel())
        h = torch.cat([self.cls.expand(len(h), 1, -1), h], dim=1)
        modulation = self.modulation(c).unflatten(-1, (6, -1))
        for block in self.layers:
            h = block(h, modulation)
        shift, scale = self.last(c).chunk(2, -1)
        u = F.layer_norm(h[:, 0], h.shape[-1:])
        logits: Tensor = self.head(u * (1 + scale) + shift)
        return logits

    def _image_part(self, n: int, feature: Tensor | None, present: Tensor | None) -> Tensor:
        assert self.image is not None
        assert self.absent is not None
        absent = self.absent.expand(n, -1)
        if feature is None:
            return absent
        known: Tensor = self.image(feature)
        return known if present is None else torch.where(present[:, None], known, absent)

    @torch.no_grad()
    def probabilities(
        self, x: Tensor, t: Tensor, pooled: Tensor, feature: Tensor | None = None
    ) -> Tensor:
        """Calibrated cluster probabilities (n, K) of noisy latents `x` (n, C, T, H, W) at `t`."""
        settings: Any = self.config
        tokens = pack(x, settings.patch)
        ids = image_ids(x.shape[2], x.shape[3], x.shape[4], settings.patch).to(x.device)
        logits = self(tokens, t, pooled, feature, ids=ids).float()
        temperatures = torch.tensor(settings.temperatures, device=x.device)
        bins = torch.bucketize(
            t.float().contiguous(), torch.tensor(settings.edges, device=x.device), right=True
        )
        return torch.softmax(logits / temperatures[bins][:, None], dim=1)


def train_router(
    config: RouterConfig,
    recipe: RecipeConfig,
    clips: ClipTable,
    labels: Tensor,
    key: bytes,
    *,
    patch: int,
    experts: int | None = None,
    held: tuple[ClipTable, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Router, dict[str, Any]]:
    """Train a router on `clips` with cluster `labels` (n,) int64; a function of its arguments.

    Returns the router in evaluation mode and a report of plain numbers: samples, loss, priors, and
    with `held` clips and labels (in no training shard) accuracy, ece and `bins` of t.
    """
    count = experts if experts is not None else int(labels.max()) + 1
    if labels.shape != (len(clips),) or int(labels.min()) < 0 or int(labels.max()) >= count:
        raise ValueError("labels must be one cluster per clip")
    priors = (torch.bincount(labels, minlength=count) / len(labels)).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(key[:7], "little"))
        router = Router(
            experts=count,
            channels=clips.shape[0],
            patch=patch,
            width=config.width,
            blocks=config.blocks,
            heads=config.heads,
            pooled_dim=clips.text_pooled.shape[1],
            feature_dim=0 if clips.features is None else clips.features.shape[1],
            priors=priors,
        )
    optimiser = torch.optim.AdamW(router.parameters(), config.lr, weight_decay=0.01, fused=True)
    loss = math.nan
    for step in range(config.steps):
        loss = _step(router, optimiser, config, recipe, clips, labels, key, step)
        if progress:
            progress(step + 1, config.steps)
    router.eval()
    report: dict[str, Any] = {
        "samples": config.steps * config.batch,
        "parameters": sum(p.numel() for p in router.parameters()),
        "loss": loss,
        "priors": priors,
    }
    if held is not None:
        report |= calibrate(router, *held, key)
    return router, report


def _step(
    router: Router,
    optimiser: torch.optim.Optimizer,
    config: RouterConfig,
    recipe: RecipeConfig,
    clips: ClipTable,
    labels: Tensor,
    key: bytes,
    step: int,
) -> float:
    """One step on cross-entropy; a function of (key, step)."""
    slots = range(config.batch)
    rows = torch.from_numpy(noise.batch_rows(key, len(clips), step, config.batch))
    t = _times(recipe, clips, key, step, config.batch)
    x0 = clips.latents[rows]
    drawn = noise.normals_batch(key, noise.NOISE, step, slots, x0[0].numel())
    x = flow.interpolate(x0, torch.from_numpy(drawn).reshape(x0.shape), t, recipe.sigma_min)
    drop = torch.from_numpy(noise.uniforms_batch(key, noise.DROP, step, slots, 2))
    _, pooled = clips.text(rows)
    pooled = torch.where((drop[:, 0] < NULL_TEXT)[:, None], clips.null_pooled, pooled)
    feature = None if clips.features is None else clips.features[rows]
    patch = int(router.config["patch"])
    ids = image_ids(*clips.shape[1:], patch)
    logits = router(pack(x, patch), t, pooled, feature, ids=ids, present=drop[:, 1] >= NO_FEATURE)
    loss = F.cross_entropy(logits, labels[rows])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    for group in optimiser.param_groups:
        group["lr"] = config.lr * min(1.0, (step + 1) / WARMUP) * cosine
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def _times(recipe: RecipeConfig, clips: ClipTable, key: bytes, step: int, batch: int) -> Tensor:
    """Half from the experts' law (word 0 of the slot), half uniform (words 1 and 2)."""
    normal = noise.normals_batch(key, noise.TIME, step, range(batch), 1)[:, 0].copy()
    u = torch.from_numpy(noise.uniforms_batch(key, noise.TIME, step, range(batch), 3)).float()
    shift = flow.shift_for(recipe.t_shift, *clips.shape[1:])
    law = flow.times_from_normals(torch.from_numpy(normal), recipe.t_mean, recipe.t_std, shift)
    return torch.where(u[:, 1] < 0.5, law, u[:, 2])


@torch.no_grad()
def held_logits(router: Router, clips: ClipTable, key: bytes, low: float, high: float) -> Tensor:
    """Logits (n, K) of held-out clips at fixed times spread evenly over [low, high)."""
    settings: Any = router.config
    out = []
    ids = image_ids(*clips.shape[1:], settings.patch)
    for start in range(0, len(clips), 256):
        rows = torch.arange(start, min(start + 256, len(clips)))
        x0 = clips.latents[rows]
        step = round(1000 * low)  # each bin its own noise
        drawn = noise.normals_batch(key, noise.HELD, step, rows.tolist(), x0[0].numel())
        # The golden ratio spreads the times evenly whatever part of the clips is looked at.
        t = low + (high - low) * ((rows.double() * 0.6180339887498949) % 1).float()
        x = flow.interpolate(x0, torch.from_numpy(drawn).reshape(x0.shape), t, 0.0)
        _, pooled = clips.text(rows)
        feature = None if clips.features is None else clips.features[rows]
        out.append(router(pack(x, settings.patch), t, pooled, feature, ids=ids).float())
    return torch.cat(out)


def calibrate(router: Router, clips: ClipTable, labels: Tensor, key: bytes) -> dict[str, Any]:
    """Fit and store a temperature per bin of t; measure on clips that it was not fitted on."""
    settings: Any = router.config
    if labels.shape != (len(clips),) or len(clips) < 4:
        raise ValueError("calibration needs four or more held-out clips with their labels")
    bounds = [0.0, *settings.edges, 1.0]
    bins, temperatures = [], []
    for low, high in pairwise(bounds):
        logits = held_logits(router, clips, key, low, high)
        temperature = fit_temperature(logits[0::2], labels[0::2])
        p = torch.softmax(logits[1::2] / temperature, dim=1)
        hit = (p.argmax(1) == labels[1::2]).float()
        temperatures.append(temperature)
        bins.append({
            "t_low": low,
            "t_high": high,
            "n": len(p),
            "accuracy": round(float(hit.mean()), 6),
            "ece": round(calibration_error(p, labels[1::2]), 6),
            "temperature": temperature,
        })  # fmt: skip
    router.register_to_config(temperatures=temperatures, calibration=bins)
    mean = {k: round(sum(b[k] for b in bins) / len(bins), 6) for k in ("accuracy", "ece")}
    return {**mean, "bins": bins}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [1/8, 8] with the least cross-entropy (grid of 97 in the logarithm)."""
    grid = torch.logspace(-3, 3, 97, base=2.0, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(logits.double() / t, labels) for t in grid])
    return round(float(grid[int(losses.argmin())]), 6)


def calibration_error(p: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of the top class: mean |confidence − accuracy| over bins."""
    top, guess = p.max(1)
    hit = (guess == labels).double()
    place = (top * bins).long().clamp(max=bins - 1)
    error = 0.0
    for b in range(bins):
        inside = place == b
        if bool(inside.any()):
            gap = (top[inside].double().mean() - hit[inside].mean()).abs()
            error += float(gap) * int(inside.sum()) / len(p)
    return error
