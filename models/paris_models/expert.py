"""Experts: diffusers' `FluxTransformer2DModel` by configuration, from 0.3 M to 11.89 B parameters.

The network is used as it is; ours are packing, ids, the condition, and how pairs are turned
(`attention`).
Weights that do not fit the configuration are refused with `ValueError`::

    model = build_expert(LADDER["demo"], seed=0)
    model = expert_from(LADDER["demo"], load_tensors(path))        # no copy, no random numbers
    out = predict(model, LADDER["demo"], x, t, text_seq, text_pooled)   # like x: (n, C, T, H, W)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from paris_models import flow
from paris_models.attention import TurningAttention
from paris_models.config import ExpertConfig, RecipeConfig
from paris_models.latents import image_ids, pack, unpack


def _construct(config: ExpertConfig) -> Any:
    model: Any = FluxTransformer2DModel(
        patch_size=1,  # packing is done outside (latents.pack)
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=False,
        axes_dims_rope=tuple(config.rope_axes),
    )
    model.set_attn_processor(TurningAttention())
    return model


def build_expert(
    config: ExpertConfig, *, seed: int | None = None, device: str = "cpu"
) -> FluxTransformer2DModel:
    """A fresh expert; with a `seed` its weights are a function of it (on one torch version).

    Modulation, condition columns and output start at zero: every block is the identity, and a
    conditioned expert equals the unconditioned one whatever the condition.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        with torch.device(device):
            model = _construct(config)
        for name, parameter in model.named_parameters():
            if name.startswith("proj_out.") or ("norm" in name and ".linear." in name):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            model.x_embedder.weight[:, config.out_channels :] = 0
    return model


def expert_from(config: ExpertConfig, weights: Mapping[str, Tensor]) -> FluxTransformer2DModel:
    """An expert that uses the given tensors as its parameters (they are not copied).

    Raises `ValueError` when names or shapes are not those of the configuration.
    """
    with torch.device("meta"):
        model = _construct(config)
    try:
        model.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the expert: {error}") from error
    return model


def parameter_shapes(config: ExpertConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an expert's parameters, without allocating them."""
    with torch.device("meta"):
        model = _construct(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def parameter_count(config: ExpertConfig) -> int:
    """Number of parameters, counted on the meta device (F8)."""
    with torch.device("meta"):
        model = _construct(config)
    return sum(p.numel() for p in model.parameters())


def predict(
    model: FluxTransformer2DModel,
    config: ExpertConfig,
    x: Tensor,
    t: Tensor,
    text_seq: Tensor,
    text_pooled: Tensor,
    condition: Tensor | None = None,
    *,
    time_path: str = "hidden",
) -> Tensor:
    """The network's output for noisy latents `x` (n, C, T, H, W) at times `t` (n,), like `x`.

    `text_seq` (n, L, D), `text_pooled` (n, P); `condition` packed as by `latents.condition`
    (n, N, (C+1)·p²), zero when a conditioned expert gets none (text-to-video). `time_path` is the
    recipe's: "float32" keeps times exact where the network computes in bfloat16.
    """
    _, channels, frames, height, width = x.shape
    tokens = pack(x, config.patch)
    if config.conditioned:
        if condition is None:
            condition = tokens.new_zeros(*tokens.shape[:2], config.condition_size)
        tokens = torch.cat([tokens, condition], dim=-1)
    elif condition is not None:
        raise ValueError("this expert takes no condition")
    with _exact_times(model, t) if time_path == "float32" else nullcontext():
        out = model(
            hidden_states=tokens,
            timestep=t,
            encoder_hidden_states=text_seq,
            pooled_projections=text_pooled,
            img_ids=image_ids(frames, height, width, config.patch).to(x.device, non_blocking=True),
            txt_ids=torch.zeros(text_seq.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
    return unpack(out, (channels, frames, height, width), config.patch)


@contextmanager
def _exact_times(model: FluxTransformer2DModel, t: Tensor) -> Iterator[None]:
    """Give the time embedding 1000 t in float32, whatever the network made of `t` (n,) before.

    diffusers rounds t to the hidden dtype and multiplies there: in bfloat16 times near 1, where a
    high shift puts most sampling steps, become equal. The embedding's sines are float32 anyway.
    """
    exact = t.float() * 1000
    hook = model.time_text_embed.register_forward_pre_hook(
        lambda _, inputs: (exact, *inputs[1:])  # the times are its first argument
    )
    try:
        yield
    finally:
        hook.remove()


def as_velocity(recipe: RecipeConfig, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """The velocity at `x` that an expert's `output` means under the recipe's objective."""
    if recipe.objective == "velocity":
        return output
    return flow.velocity_from_x0(x, output, t, recipe.sigma_min)
