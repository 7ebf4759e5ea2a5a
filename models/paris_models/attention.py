"""Attention of an expert: diffusers' own mathematics with the rotary embedding in fewer passes.

Turning pairs of channels by an angle, (a, b) → (a cos − b sin, b cos + a sin), is written in
diffusers as a sum over a rotated copy, whose gradient is the same again. Here both directions
write into one result; products and sums are the same ones, so that float32 bits are (a test
compares them). At the demo's size this takes a twentieth off a training step::

    model.set_attn_processor(TurningAttention())
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor


class _Turn(torch.autograd.Function):
    """Pairs of the last axis turned by the angles of `cos` and `sin`; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out, across = x * cos, x * sin
        out[..., 0::2] -= across[..., 1::2]
        out[..., 1::2] += across[..., 0::2]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        out, across = gradients[0] * cos, gradients[0] * sin
        out[..., 0::2] += across[..., 1::2]
        out[..., 1::2] -= across[..., 0::2]
        return out, None, None


def turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of `x` (n, tokens, heads, channels), computed in float32.

    `angles` are cosine and sine, (tokens, channels) each, equal within a pair.
    """
    cos, sin = (angle.to(x.device)[None, :, None] for angle in angles)
    turned = cast(Tensor, _Turn.apply(x.float(), cos, sin))
    return turned.to(x.dtype)


class TurningAttention(FluxAttnProcessor):
    """Joint attention of text and video in a double block, of all tokens in a single block."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Tokens (n, N, width); with text (n, L, width) beside them, both results."""

        def by_head(x: Tensor) -> Tensor:
            heads: Tensor = x.unflatten(-1, (-1, attn.head_dim))
            return heads

        query = attn.norm_q(by_head(attn.to_q(hidden_states)))
        key = attn.norm_k(by_head(attn.to_k(hidden_states)))
        value = by_head(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            text_query = attn.norm_added_q(by_head(attn.add_q_proj(text)))
            text_key = attn.norm_added_k(by_head(attn.add_k_proj(text)))
            query = torch.cat([text_query, query], dim=1)
            key = torch.cat([text_key, key], dim=1)
            value = torch.cat([by_head(attn.add_v_proj(text)), value], dim=1)
        if image_rotary_emb is not None:
            query, key = turn(query, image_rotary_emb), turn(key, image_rotary_emb)
        mixed = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        mixed = mixed.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return mixed
        length = encoder_hidden_states.shape[1]
        video = attn.to_out[1](attn.to_out[0](mixed[:, length:].contiguous()))
        return video, attn.to_add_out(mixed[:, :length].contiguous())
