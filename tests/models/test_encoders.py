"""The large encoders on tiny models of the very same classes, saved to disk and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from paris_models.codec import pixels
from paris_models.encoders import Dino, HunyuanVAE, T5Clip, WanVAE

SCALE = 0.476986


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hunyuan")
    AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    ).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("wan")
    AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    ).save_pretrained(folder)
    return folder


def tokenizer(folder: Path, end: str) -> None:
    words = ["<pad>", end, "<unk>", "a", "red", "ball", "moves", "left"]
    vocabulary = {word: i for i, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token=end, unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("flux")
    T5EncoderModel(
        T5Config(
            vocab_size=16, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).save_pretrained(folder / "text_encoder_2")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=16, hidden_size=12, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=10, eos_token_id=1, pad_token_id=0,
            bos_token_id=2,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    tokenizer(folder / "tokenizer", "<end>")
    tokenizer(folder / "tokenizer_2", "</s>")
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        )
    ).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True
    ).save_pretrained(folder)
    return folder


def clips(n: int = 2, frames: int = 9, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    shape = (n, 3, frames, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_hunyuan_applies_its_scale_exactly_once(hunyuan: Path) -> None:
    vae = HunyuanVAE.from_pretrained(str(hunyuan))
    x = clips()
    latents = vae.encode(x)
    assert latents.shape == (2, 4, *vae.latent_grid(9, 32, 32)) == (2, 4, 3, 4, 4)
    with torch.no_grad():
        bare = vae.model.encode(pixels(x)).latent_dist.mode()
        assert torch.allclose(latents, bare * SCALE, atol=1e-5)
        frames = vae.model.decode(bare).sample
    decoded = vae.decode(latents)
    expected = ((frames.clamp(-1, 1) + 1) * 127.5).round()
    assert decoded.dtype == torch.uint8 and decoded.shape == x.shape
    assert (decoded.float() - expected).abs().max() <= 1


def test_wan_standardises_each_channel_exactly_once(wan: Path) -> None:
    vae = WanVAE.from_pretrained(str(wan))
    x = clips()
    latents = vae.encode(x)
    assert latents.shape == (2, 4, *vae.latent_grid(9, 32, 32)) == (2, 4, 3, 4, 4)
    with torch.no_grad():
        bare = vae.model.encode(pixels(x)).latent_dist.mode()
    mean = torch.tensor([0.1, -0.2, 0.3, 0.0])[:, None, None, None]
    spread = torch.tensor([1.5, 2.0, 0.5, 1.0])[:, None, None, None]
    assert torch.allclose(latents, (bare - mean) / spread, atol=1e-5)
    assert vae.decode(latents).shape == x.shape


def test_wan_s_quicker_norm_is_diffusers_own(wan: Path) -> None:
    ours, plain = WanVAE.from_pretrained(str(wan)).model, AutoencoderKLWan.from_pretrained(wan)
    x = pixels(clips()).requires_grad_(False)
    with torch.no_grad():
        z, expected = (model.encode(x).latent_dist.mode() for model in (ours, plain))
        assert torch.allclose(z, expected, atol=1e-5)
        frames, expected = (model.decode(z).sample for model in (ours, plain))
        assert torch.allclose(frames, expected, atol=1e-5)
        half = torch.randn(1, 4, 2, 8, 8).bfloat16()
        norms = [next(n for n in m.modules() if hasattr(n, "gamma")) for m in (ours, plain)]
        assert torch.equal(norms[0](half), norms[1](half))


@pytest.mark.parametrize("kind", ["hunyuan", "wan"])
def test_the_first_frame_is_encoded_alone(kind: str, request: pytest.FixtureRequest) -> None:
    source = str(request.getfixturevalue(kind))
    vae = (HunyuanVAE if kind == "hunyuan" else WanVAE).from_pretrained(source)
    x = clips()
    first = vae.encode_first(x)
    assert first.shape == (2, 4, 1, 4, 4)
    assert torch.equal(first, vae.encode(x[:, :, :1]))
    other = x.clone()
    other[:, :, 1:] = 255 - other[:, :, 1:]
    assert torch.equal(first, vae.encode_first(other))
    if kind == "wan":  # strictly causal: the first latent of the clip is the same
        assert torch.allclose(first, vae.encode(x)[:, :, :1], atol=1e-4)


def test_fingerprints_do_not_depend_on_the_folder_but_on_the_weights(
    wan: Path, tmp_path: Path
) -> None:
    shutil.copytree(wan, tmp_path / "copy" / "vae")
    vae = WanVAE.from_pretrained(str(wan))
    copy = WanVAE.from_pretrained(str(tmp_path / "copy"))
    assert vae.fingerprint == copy.fingerprint and len(vae.fingerprint) == 64
    with torch.no_grad():
        next(iter(copy.model.parameters())).add_(1e-3)
    assert copy.fingerprint != vae.fingerprint
    config = json.loads((wan / "config.json").read_text())
    config["latents_std"] = [1.0] * 4
    (tmp_path / "copy" / "vae" / "config.json").write_text(json.dumps(config))
    assert WanVAE.from_pretrained(str(tmp_path / "copy")).fingerprint != vae.fingerprint


def test_sizes_that_do_not_fit_are_refused(hunyuan: Path) -> None:
    vae = HunyuanVAE.from_pretrained(str(hunyuan))
    for shape in ((8, 32, 32), (9, 30, 32)):
        with pytest.raises(ValueError, match="does not fit"):
            vae.encode(torch.zeros(1, 3, *shape, dtype=torch.uint8))


def test_t5_and_clip(flux: Path) -> None:
    text = T5Clip.from_pretrained(str(flux), length=6)
    captions = ["a red ball", "a ball moves left", ""]
    sequence, pooled = text.encode(captions)
    assert sequence.shape == (3, 6, 16) and pooled.shape == (3, 12)
    assert (text.dim, text.pooled_dim) == (16, 12)
    one = text.encode(captions[:1])
    assert torch.allclose(one[0], sequence[:1], atol=1e-5)
    assert torch.allclose(one[1], pooled[:1], atol=1e-5)
    assert not torch.allclose(sequence[0], sequence[1]) and sequence.dtype == torch.float32
    with pytest.raises(ValueError, match="7 tokens, at most 6"):
        text.encode(["a red ball moves left a ball"])
    assert text.fingerprint == T5Clip.from_pretrained(str(flux), length=6).fingerprint
    assert text.fingerprint != T5Clip.from_pretrained(str(flux), length=8).fingerprint


def test_padding_is_attended_as_in_the_paper(flux: Path) -> None:
    short, long = (T5Clip.from_pretrained(str(flux), length=n) for n in (4, 6))
    difference = short.encode(["a red"])[0][0, :2] - long.encode(["a red"])[0][0, :2]
    assert difference.abs().max() > 1e-4


def test_dino_sees_the_first_frame_only(dino: Path) -> None:
    features = Dino.from_pretrained(str(dino))
    x = clips(3)
    found = features(x)
    assert found.shape == (3, 16)
    assert torch.allclose(found, features(x[:, :, :1]), atol=1e-6)
    assert len(features.fingerprint) == 64


def test_a_folder_without_the_model_is_refused(tmp_path: Path) -> None:
    for load in (HunyuanVAE, WanVAE, T5Clip, Dino):
        with pytest.raises((OSError, ValueError)):
            load.from_pretrained(str(tmp_path))
