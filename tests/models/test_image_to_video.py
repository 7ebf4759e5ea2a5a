"""What an expert is told of a given first frame says nothing about the frames after it (F9).

HunyuanVideo's VAE pools over time inside its norms, so the first latent of a whole clip is a
function of the clip's end. The condition is made from the first frame encoded alone.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import Tensor

from paris_models.conditions import step_condition
from paris_models.config import RecipeConfig
from paris_models.encoders import HunyuanVAE, VideoVAE, WanVAE
from paris_models.latents import first_frame_condition
from paris_models.shards import ClipTable


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> HunyuanVAE:
    folder = tmp_path_factory.mktemp("hunyuan")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=2,
        ).save_pretrained(folder / "vae")  # fmt: skip
    return HunyuanVAE.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> WanVAE:
    folder = tmp_path_factory.mktemp("wan")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ).save_pretrained(folder)  # fmt: skip
    return WanVAE.from_pretrained(str(folder))


def two_clips() -> tuple[Tensor, Tensor]:
    """Clips that share their first frame and nothing else."""
    g = torch.Generator().manual_seed(4)
    clip = torch.randint(0, 256, (1, 3, 9, 32, 32), dtype=torch.uint8, generator=g)
    other = clip.clone()
    other[:, :, 1:] = 255 - other[:, :, 1:] // 4
    return clip, other


def leak(vae: VideoVAE) -> float:
    """How far the first latent moves, of its own size, when only the future changes."""
    one, two = (vae.encode(clip)[:, :, 0] for clip in two_clips())
    return float((one - two).abs().max() / one.abs().max())


def test_the_first_latent_of_a_whole_clip_leaks_its_future(hunyuan: HunyuanVAE) -> None:
    assert leak(hunyuan) > 0.01


def test_without_the_norms_that_pool_over_time_nothing_leaks(
    hunyuan: HunyuanVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The convolutions and the attention mask are causal: the norms alone are to blame."""
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x)
    assert leak(hunyuan) < 1e-6


def test_wan_does_not_leak(wan: WanVAE) -> None:
    assert leak(wan) == 0.0


@pytest.mark.parametrize("kind", ["hunyuan", "wan"])
def test_the_condition_cannot_see_the_future(kind: str, request: pytest.FixtureRequest) -> None:
    vae: VideoVAE = request.getfixturevalue(kind)
    one, two = (first_frame_condition(vae.encode_first(clip), 3, 2) for clip in two_clips())
    assert torch.equal(one, two)
    assert one.shape == (1, 3 * 2 * 2, 20)
    first, later = one[:, :4], one[:, 4:]
    assert (first[..., :4] == 1).all() and first[..., 4:].abs().max() > 0
    assert later.abs().max() == 0


def cached(vae: VideoVAE, clip: Tensor, *, alone: bool) -> ClipTable:
    """A shard's table of one clip; its ends encoded alone, or cut out of the clip's latents."""
    latents = vae.encode(clip)
    first, last = latents[:, :, :1], latents[:, :, -1:]
    if alone:
        first, last = vae.encode_first(clip), vae.encode(clip[:, :, -1:])
    text = torch.zeros(1, 2, 3), torch.zeros(1, 3)
    return ClipTable(
        latents, torch.zeros(1, dtype=torch.int64), *text, text[0][0], text[1][0], first, last
    )


def training_condition(vae: VideoVAE, kind: str, clip: Tensor, *, alone: bool = True) -> Tensor:
    recipe = RecipeConfig(conditions=((kind, 1),))
    table = cached(vae, clip, alone=alone)
    tokens = step_condition(bytes(16), recipe, 0, table, torch.zeros(1, dtype=torch.int64), 2)
    assert tokens is not None
    return tokens


@pytest.mark.parametrize("kind", ["hunyuan", "wan"])
def test_what_training_gives_of_the_first_frame_knows_no_other(
    kind: str, request: pytest.FixtureRequest
) -> None:
    vae: VideoVAE = request.getfixturevalue(kind)
    one, two = two_clips()
    head = [training_condition(vae, "i2v_head", clip) for clip in (one, two)]
    assert torch.equal(*head)
    assert torch.equal(head[0], first_frame_condition(vae.encode_first(one), 3, 2))
    cut = [training_condition(vae, "i2v_head", clip, alone=False) for clip in (one, two)]
    assert torch.equal(*cut) == (kind == "wan")  # a slice of HunyuanVideo's latents would leak


@pytest.mark.parametrize("kind", ["hunyuan", "wan"])
def test_what_training_gives_of_the_last_frame_knows_no_other(
    kind: str, request: pytest.FixtureRequest
) -> None:
    vae: VideoVAE = request.getfixturevalue(kind)
    one, two = (clip.flip(2) for clip in two_clips())  # they share their last frame alone
    assert torch.equal(*(training_condition(vae, "i2v_tail", clip) for clip in (one, two)))
    assert not torch.equal(
        *(training_condition(vae, "i2v_tail", clip, alone=False) for clip in (one, two))
    )
