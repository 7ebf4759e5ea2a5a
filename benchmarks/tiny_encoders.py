"""Encoders of the real classes with small random weights: what `prepare` is measured and tested on.

They are saved as their libraries save them and loaded by `from_pretrained`, as published weights
would be. Their outputs mean nothing::

    paths = save_all(Path("encoders"))            # {"codec": folder, "text": folder, …}
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = """
a red green blue yellow purple cyan ball square triangle stripes checkers dots star bar cross camera
moves left right up down pans zooms in out turns clockwise counterclockwise grows shrinks and then
one two three four five six seven eight nine zero
""".split()  # noqa: SIM905


def save_wan(folder: Path, seed: int = 1) -> Path:
    """AutoencoderKLWan, 4 channels, 4×8×8."""
    torch.manual_seed(seed)
    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_hunyuan(folder: Path) -> Path:
    """AutoencoderKLHunyuanVideo, 4 channels, 4×8×8."""
    torch.manual_seed(0)
    AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ).save_pretrained(folder)
    return folder


def save_text(folder: Path) -> Path:
    """T5 (dim 64) and CLIP (dim 48), laid out as FLUX is."""
    torch.manual_seed(2)
    T5EncoderModel(
        T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).save_pretrained(folder / "text_encoder_2")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, eos_token_id=1, pad_token_id=0,
            bos_token_id=2,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    for name, end in (("tokenizer", "<end>"), ("tokenizer_2", "</s>")):
        vocabulary = {word: i for i, word in enumerate(["<pad>", end, "<unk>", *WORDS])}
        plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=plain, pad_token="<pad>", eos_token=end, unk_token="<unk>"
        ).save_pretrained(folder / name)
    return folder


def save_dino(folder: Path) -> Path:
    """Dinov2Model (dim 32) with its image processor."""
    torch.manual_seed(3)
    Dinov2Model(_dino()).save_pretrained(folder)
    _processor().save_pretrained(folder)
    return folder


def save_classifier(folder: Path, labels: tuple[str, ...]) -> Path:
    """Dinov2ForImageClassification with these labels."""
    torch.manual_seed(4)
    config = _dino()
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    Dinov2ForImageClassification(config).save_pretrained(folder)
    _processor().save_pretrained(folder)
    return folder


def _dino() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )


def _processor() -> BitImageProcessor:
    size = {"height": 56, "width": 56}
    return BitImageProcessor(size={"shortest_edge": 56}, crop_size=size, do_convert_rgb=True)


def save_all(folder: Path) -> dict[str, Path]:
    """The Wan VAE, T5 with CLIP, and DINOv2."""
    return {
        "codec": save_wan(folder / "wan"),
        "text": save_text(folder / "text"),
        "features": save_dino(folder / "dino"),
    }


RECIPE = """
name = "tiny encoders"
[geometry]
frames = {frames}
height = {side}
width = {side}
fps = 8
[clips]
batch = {batch}
{clips}
[codec]
kind = "wan-vae"
source = "{codec}"
channels = 4
[text]
kind = "t5-clip"
source = "{text}"
length = {length}
dim = 64
pooled_dim = 48
{store}
[features]
kind = "dinov2"
source = "{features}"
[clusters]
count = 2
[shards]
per_cluster = 2
[held_out]
validation = 2
audit = 2
[expert]
patch = 2
in_channels = 16
out_channels = 16
double_blocks = 1
single_blocks = 1
heads = 2
head_dim = 8
rope_axes = [2, 2, 4]
text_dim = 64
pooled_dim = 48
[recipe]
batch = 4
[router]
width = 12
blocks = 1
heads = 2
batch = 4
steps = 2
lr = 0.001
[plan]
units = 1
steps = 2
rounds = 1
schedule = "slice"
{more}
"""


def recipe(
    sources: dict[str, Path], *, frames: int = 9, side: int = 32, batch: int = 16,
    length: int = 32, clips: str = "", store: str = "", more: str = "",
) -> str:  # fmt: skip
    """A recipe's text on these encoders."""
    return RECIPE.format(
        **sources, frames=frames, side=side, batch=batch, length=length, clips=clips,
        store=store, more=more,
    )  # fmt: skip
