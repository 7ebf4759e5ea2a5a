"""The large encoders, as diffusers and transformers have them: video VAEs, T5 with CLIP, DINOv2.

Only `prepare` and the making of videos load them; training never does. Each is loaded by
`from_pretrained` from a local folder or a hub id; its fingerprint is taken over its tensors and
settings, so it does not depend on where it was found. Latents are the mean of the posterior
and carry the scale exactly once: applied after encoding, removed before decoding. A folder that
holds something else is refused with `OSError` or `ValueError`::

    vae = HunyuanVAE.from_pretrained("hunyuanvideo-community/HunyuanVideo")
    latents, first = vae.encode(clips), vae.encode_first(clips)      # the first frame alone
    text = T5Clip.from_pretrained("black-forest-labs/FLUX.1-schnell", length=512)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPTextModel,
    Dinov2Model,
    T5EncoderModel,
)

from paris_models.codec import fingerprint, pixels, to_bytes

CLIP_LENGTH: Final = 77
PIXELS: Final = 1 << 18
"""Pixels that a VAE encodes at once: one clip of the published sizes, several small ones."""
TOKENS: Final = 1 << 12
"""Tokens that T5 reads at once."""
IMAGES: Final = 32
"""First frames that DINOv2 sees at once."""


def _print_of(model: Any, settings: Mapping[str, object]) -> str:
    return fingerprint(model.state_dict(), json.dumps(settings, sort_keys=True, default=str))


def _subfolder(source: str, name: str) -> str | None:
    """`name` where the source is a pipeline with parts, None where it is the model's own folder."""
    folder = Path(source)
    if folder.is_dir():
        return name if (folder / name).is_dir() else None
    return name


class VideoVAE:
    """What the two VAEs share: pixels in [−1, 1], posterior mean, scale and shift per channel."""

    kind: str

    def __init__(self, model: Any, shift: Tensor, scale: Tensor) -> None:
        self.model = model.eval().requires_grad_(False)
        self.shift, self.scale = shift, scale
        self.channels = len(shift)

    @property
    def ratios(self) -> tuple[int, int]:
        """Pixels per latent in time and in space."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, scale and shift."""
        settings = {"kind": self.kind, "shift": self.shift.tolist(), "scale": self.scale.tolist()}
        return _print_of(self.model, settings)

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (T, H, W): T = (frames − 1) / 4 + 1 and H, W / 8 for the published weights."""
        time, space = self.ratios
        if (frames - 1) % time or height % space or width % space:
            raise ValueError(f"{frames}×{height}×{width} does not fit {time}×{space}×{space}")
        return 1 + (frames - 1) // time, height // space, width // space

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """uint8 clips (n, 3, F, H, W) as latents (n, C, T, H', W'): (mean − shift) × scale."""
        self.latent_grid(*clips.shape[2:])
        parts = []
        for part in clips.split(max(1, PIXELS // clips[0, 0].numel())):
            x = pixels(part).to(self.model.device, self.model.dtype)
            mean = self.model.encode(x).latent_dist.mode().float().cpu()
            parts.append((mean - _channel(self.shift)) * _channel(self.scale))
        return torch.cat(parts)

    def encode_first(self, clips: Tensor) -> Tensor:
        """Latents (n, C, 1, H', W') of the first frame, encoded alone (F3)."""
        return self.encode(clips[:, :, :1])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as uint8 clips."""
        parts = []
        for part in latents.split(1):
            z = part / _channel(self.scale) + _channel(self.shift)
            frames = self.model.decode(z.to(self.model.device, self.model.dtype)).sample
            parts.append(to_bytes(frames.float().cpu()))
        return torch.cat(parts)


def _channel(values: Tensor) -> Tensor:
    return values[:, None, None, None]


class HunyuanVAE(VideoVAE):
    """HunyuanVideo's causal VAE: one scale (0.476986 in the published weights), no shift."""

    kind = "hunyuan-vae"

    @classmethod
    def from_pretrained(
        cls, source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load from a folder or hub id, from its part `vae` if it has one; without tiling."""
        model = AutoencoderKLHunyuanVideo.from_pretrained(
            source, subfolder=_subfolder(source, "vae"), torch_dtype=dtype
        ).to(device)
        channels = model.config.latent_channels
        scale = torch.full((channels,), float(model.config.scaling_factor))
        return cls(model, torch.zeros(channels), scale)

    @property
    def ratios(self) -> tuple[int, int]:
        """Pixels per latent in time and in space."""
        config = self.model.config
        return config.temporal_compression_ratio, config.spatial_compression_ratio


class WanVAE(VideoVAE):
    """Wan's strictly causal VAE: mean and standard deviation of each channel are in its config."""

    kind = "wan-vae"

    @classmethod
    def from_pretrained(
        cls, source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load from a folder or hub id, from its part `vae` if it has one; without tiling."""
        model = AutoencoderKLWan.from_pretrained(
            source, subfolder=_subfolder(source, "vae"), torch_dtype=dtype
        ).to(device)
        mean, deviation = (
            torch.tensor([float(v) for v in values])
            for values in (model.config.latents_mean, model.config.latents_std)
        )
        if device == "cpu":
            for part in model.modules():
                if isinstance(part, WanRMS_norm) and part.channel_first:
                    part.forward = partial(_unit_channels, part)
        if len(mean) != model.config.z_dim or len(deviation) != model.config.z_dim:
            raise ValueError("the VAE's latents_mean and latents_std do not fit its channels")
        return cls(model, mean, 1 / deviation)

    @property
    def ratios(self) -> tuple[int, int]:
        """Pixels per latent in time and in space."""
        stages = self.model.config.temperal_downsample  # diffusers spells it so
        return 2 ** sum(bool(stage) for stage in stages), 2 ** len(stages)


def _unit_channels(norm: Any, x: Tensor) -> Tensor:
    """`WanRMS_norm` of (n, C, …): PyTorch's own norm over channels that are not innermost takes
    3 to 13 times as long on a CPU, 44 % of encoding small clips."""  # fmt: skip
    wide = x.float()
    length = wide.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    unit: Tensor = (wide / length).to(x.dtype) * norm.scale * norm.gamma + norm.bias
    return unit


class T5Clip:
    """T5's sequence, padded and without mask, and CLIP's pooled vector (F2).

    The source is laid out as FLUX is: `text_encoder` and `tokenizer` are CLIP, `text_encoder_2` and
    `tokenizer_2` are T5.
    """

    kind = "t5-clip"

    def __init__(self, t5: Any, t5_tokens: Any, clip: Any, clip_tokens: Any, length: int) -> None:
        self.t5, self.clip = (m.eval().requires_grad_(False) for m in (t5, clip))
        self.t5_tokens, self.clip_tokens, self.length = t5_tokens, clip_tokens, length
        self.dim: int = t5.config.d_model
        self.pooled_dim: int = clip.config.hidden_size

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        length: int = 512,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load both encoders with their tokenizers; sequences are `length` tokens long."""
        t5 = T5EncoderModel.from_pretrained(source, subfolder="text_encoder_2", dtype=dtype)
        clip = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype)
        return cls(
            t5.to(device),
            AutoTokenizer.from_pretrained(source, subfolder="tokenizer_2"),
            clip.to(device),
            AutoTokenizer.from_pretrained(source, subfolder="tokenizer"),
            length,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both encoders, both vocabularies and the length."""
        vocabularies = [sorted(t.get_vocab().items()) for t in (self.t5_tokens, self.clip_tokens)]
        tensors = {f"t5.{name}": tensor for name, tensor in self.t5.state_dict().items()}
        tensors |= {f"clip.{name}": tensor for name, tensor in self.clip.state_dict().items()}
        return fingerprint(tensors, json.dumps([self.kind, self.length, vocabularies]))

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions as (n, length, dim) and (n, pooled_dim) float32.

        Raises `ValueError` for a caption with more tokens than T5's sequence holds. CLIP reads
        the first 77 tokens, as in FLUX.
        """
        words = self.t5_tokens(list(captions), padding="max_length", max_length=self.length)
        longest = max(len(ids) for ids in words["input_ids"])
        if longest > self.length:
            raise ValueError(f"{longest} tokens, at most {self.length} fit")
        ids = torch.tensor(words["input_ids"], device=self.t5.device)
        sequence = torch.cat(
            [
                self.t5(input_ids=part, attention_mask=None).last_hidden_state.float().cpu()
                for part in ids.split(max(1, TOKENS // self.length))
            ]
        )
        limit = min(CLIP_LENGTH, self.clip.config.max_position_embeddings)
        words = self.clip_tokens(
            list(captions), padding="max_length", max_length=limit, truncation=True
        )
        ids = torch.tensor(words["input_ids"], device=self.clip.device)
        pooled = self.clip(input_ids=ids).pooler_output
        return sequence, pooled.float().cpu()


class Dino:
    """DINOv2's class token of the first frame, as a source of cluster features (F3, F6)."""

    kind = "dinov2"

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor

    @classmethod
    def from_pretrained(
        cls, source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load model and image processor from a folder or hub id."""
        model = Dinov2Model.from_pretrained(source, dtype=dtype).to(device)
        return cls(model, AutoImageProcessor.from_pretrained(source))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights and the processor's settings."""
        return _print_of(self.model, {"kind": self.kind, "processor": self.processor.to_dict()})

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """uint8 clips (n, 3, F, H, W) as features (n, D) of their first frames."""
        features = []
        for part in clips.split(IMAGES):
            images = [clip[:, 0] for clip in part]
            inputs = self.processor(images=images, return_tensors="pt")["pixel_values"]
            found = self.model(pixel_values=inputs.to(self.model.device, self.model.dtype))
            features.append(found.last_hidden_state[:, 0].float().cpu())
        return torch.cat(features)


class ImageLabels:
    """An image classifier: how likely each label is in the likeliest of some pictures."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.labels: dict[str, int] = model.config.label2id

    @classmethod
    def from_pretrained(cls, source: str, *, device: str = "cpu") -> Self:
        """Load model and image processor from a folder or hub id."""
        model = AutoModelForImageClassification.from_pretrained(source).to(device)
        return cls(model, AutoImageProcessor.from_pretrained(source))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, float]:
        """uint8 pictures (n, 3, H, W): the highest probability of each label."""
        inputs = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        found = self.model(pixel_values=inputs.to(self.model.device, self.model.dtype))
        likely = found.logits.float().softmax(-1).amax(0).tolist()
        return {label: likely[index] for label, index in self.labels.items()}
