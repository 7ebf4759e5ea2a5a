"""A FLUX transformer written from its description, with the public files' names, for tests.

Slow, plain and independent of the key map: its state dict is what a file of Black Forest Labs
(`split=False`) or of Open-Sora (`split`, `half`, `condition`) holds, and its `forward` is what the
weights mean. `train_like` gives rotary rows the sizes that training should leave behind::

    model = Flux(SMALL, split=True, half=True, condition=True)
    save_tensors(model.state_dict(), path)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from paris_models.config import ExpertConfig

SMALL = ExpertConfig(2, 132, 64, 2, 3, 2, 32, (4, 14, 14), 24, 12)
"""Two heads of 32: the paper's shape but for width and depth."""
DEEP = ExpertConfig(2, 132, 64, 19, 38, 1, 32, (4, 14, 14), 24, 12)
"""The paper's depth, so its full set of names."""


def turned(x: Tensor, ids: Tensor, axes: tuple[int, ...], half: bool) -> Tensor:
    """Rotate the pairs of x (n, heads, tokens, d) by the tokens' positions."""
    angles = torch.cat(
        [
            ids[:, a, None].double() / 10000 ** (torch.arange(0, d, 2).double() / d)
            for a, d in enumerate(axes)
        ],
        dim=1,
    )
    cos, sin = angles.cos().float(), angles.sin().float()
    d = x.shape[-1]
    first = torch.arange(d // 2) if half else torch.arange(0, d, 2)
    second = first + (d // 2 if half else 1)
    a, b = x[..., first], x[..., second]
    out = torch.empty_like(x)
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def waves(t: Tensor) -> Tensor:
    """256 numbers for a time in [0, 1]."""
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embed(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(size, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(silu(self.in_layer(x)))


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Norms(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = Scale(size), Scale(size)


class Lin(nn.Module):
    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, parts * width)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, split: bool) -> None:
        super().__init__()
        self.heads, self.split = heads, split
        if split:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.norm, self.proj = Norms(width // heads), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.split:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.norm.query_norm(q), self.norm.key_norm(k), v


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Double(nn.Module):
    def __init__(self, width: int, heads: int, split: bool) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Lin(width, 6))
            self.add_module(f"{stream}_attn", Attention(width, heads, split))
            layers = nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
            self.add_module(f"{stream}_mlp", nn.Sequential(*layers))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, attend) -> tuple[Tensor, Tensor]:
        mods = {s: getattr(self, f"{s}_mod").lin(silu(vec))[:, None].chunk(6, -1) for s in STREAMS}
        streams = {"txt": txt, "img": img}
        qkv = [getattr(self, f"{s}_attn")(modulated(x, *mods[s][:2])) for s, x in streams.items()]
        both = attend(*(torch.cat(part, dim=2) for part in zip(*qkv, strict=True)))
        cut = {"txt": both[:, : txt.shape[1]], "img": both[:, txt.shape[1] :]}
        for s in STREAMS:
            x = streams[s] + mods[s][2] * getattr(self, f"{s}_attn").proj(cut[s])
            x = x + mods[s][5] * getattr(self, f"{s}_mlp")(modulated(x, *mods[s][3:5]))
            streams[s] = x
        return streams["img"], streams["txt"]


STREAMS = ("txt", "img")


class Single(nn.Module):
    def __init__(self, width: int, heads: int, split: bool) -> None:
        super().__init__()
        self.width, self.heads, self.split = width, heads, split
        if split:
            self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.v_mlp = nn.Linear(width, 5 * width)
        else:
            self.linear1 = nn.Linear(width, 7 * width)
        self.linear2, self.norm = nn.Linear(5 * width, width), Norms(width // heads)
        self.modulation = Lin(width, 3)

    def forward(self, x: Tensor, vec: Tensor, attend) -> Tensor:
        shift, scale, gate = self.modulation.lin(silu(vec))[:, None].chunk(3, -1)
        y = modulated(x, shift, scale)
        if self.split:
            y = torch.cat([self.q_proj(y), self.k_proj(y), self.v_mlp(y)], dim=-1)
        else:
            y = self.linear1(y)
        q, k, v, mlp = y.split([self.width] * 3 + [4 * self.width], -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        seen = attend(self.norm.query_norm(q), self.norm.key_norm(k), v)
        mlp = nn.functional.gelu(mlp, approximate="tanh")
        return x + gate * self.linear2(torch.cat([seen, mlp], dim=-1))


class Final(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(vec)[:, None].chunk(2, -1)))


class Flux(nn.Module):
    """FLUX as BFL or Open-Sora store it; `condition` adds Open-Sora's layer for it."""

    def __init__(
        self, config: ExpertConfig, *, split: bool = False, half: bool = False,
        condition: bool = False, guidance: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.half = config, half
        width = config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.img_in = nn.Linear(config.out_channels, width)
            if condition:
                self.cond_in = nn.Linear(config.condition_size, width)
            self.time_in, self.vector_in = Embed(256, width), Embed(config.pooled_dim, width)
            if guidance:
                self.guidance_in = Embed(256, width)
            self.txt_in = nn.Linear(config.text_dim, width)
            args = (width, config.heads, split)
            self.double_blocks = nn.ModuleList(Double(*args) for _ in range(config.double_blocks))
            self.single_blocks = nn.ModuleList(Single(*args) for _ in range(config.single_blocks))
            self.final_layer = Final(width, config.out_channels)

    @torch.no_grad()
    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, ids: Tensor,
        condition: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Tokens (n, N, out) at times t (n,), text (n, L, D), pooled (n, P), ids (N, 3)."""
        img, txt = self.img_in(x), self.txt_in(text)
        if condition is not None:
            img = img + self.cond_in(condition)
        vec = self.time_in(waves(t)) + self.vector_in(pooled)
        where = torch.cat([torch.zeros(text.shape[1], 3), ids])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (turned(part, where, self.config.rope_axes, self.half) for part in (q, k))
            return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, attend)
        both = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            both = block(both, vec, attend)
        return self.final_layer(both[:, txt.shape[1] :], vec)


# ---------------------------------------------------------------- what training leaves behind


def sizes(
    config: ExpertConfig, half: bool, generator: torch.Generator,
    *, alike: float = 0.1, spread: float = 0.4,
) -> Tensor:  # fmt: skip
    """One head's worth of sizes: a slope over each axis' frequencies, noise of each frequency.

    The two rows of a fast pair differ by `alike` (standard deviation of the log), those of a slow
    pair as much as any two rows. `spread` is the noise between frequencies.
    """
    levels, own = [], []
    for axis in config.rope_axes:
        count = axis // 2
        levels += [0.5 * i / count for i in range(count)]
        own += [alike if i < count / 2 else spread for i in range(count)]
    pairs = len(levels)
    level = torch.tensor(levels) + spread * torch.randn(pairs, generator=generator)
    rows = level[:, None] + torch.tensor(own)[:, None] * torch.randn(pairs, 2, generator=generator)
    return (rows.T if half else rows).exp().flatten()


def train_like(model: Flux, seed: int = 0, *, alike: float = 0.1, spread: float = 0.4) -> Flux:
    """Give QK-norm scales and the rows of q and k such sizes."""
    g = torch.Generator().manual_seed(seed)
    config = model.config

    def fresh() -> Tensor:
        return sizes(config, model.half, g, alike=alike, spread=spread)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_norm.scale"):
                parameter.copy_(fresh())
        for rows in _query_and_key_rows(model):
            rows.mul_(torch.cat([fresh() for _ in range(config.heads)])[:, None])
    return model


def _query_and_key_rows(model: Flux) -> Iterator[Tensor]:
    width = model.config.width
    for name, parameter in model.named_parameters():
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            yield parameter
        elif name.endswith((".qkv.weight", ".linear1.weight")):
            yield parameter[:width]
            yield parameter[width : 2 * width]
