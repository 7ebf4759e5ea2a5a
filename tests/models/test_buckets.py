"""Sizes of buckets, which one a clip goes to, and pictures read through real files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paris_models.buckets import ASPECTS, aspect_size, choose, fills
from paris_models.video import Geometry, VideoError, encode_mp4, read_bucketed, read_clips

OWN = Geometry(frames=9, height=24, width=24, fps=8)


def sizes(*shapes: tuple[int, int, int]) -> list[Geometry]:
    return [Geometry(*shape, fps=8) for shape in shapes]


def test_the_sizes_are_those_of_the_aspect_and_the_area() -> None:
    assert aspect_size(256, "1:1", 16) == (256, 256)
    assert aspect_size(256, "16:9", 16) == (192, 336)
    assert aspect_size(768, "9:16", 16) == (1024, 576)
    with pytest.raises(ValueError, match="7:5"):
        aspect_size(256, "7:5", 16)


@given(st.sampled_from(sorted(ASPECTS)), st.sampled_from([256, 768, 1024]))
def test_every_size_is_near_what_was_asked_for(aspect: str, side: int) -> None:
    height, width = aspect_size(side, aspect, 16)
    assert height % 16 == width % 16 == 0
    assert abs(width / height / ASPECTS[aspect] - 1) < 0.1
    assert abs(height * width / side**2 - 1) < 0.1
    upright = ":".join(reversed(aspect.split(":")))
    assert aspect_size(side, upright, 16) == (width, height)


def test_a_clip_goes_to_the_bucket_that_keeps_most_of_it() -> None:
    shapes = sizes((9, 24, 24), (33, 256, 256), (33, 192, 336), (1, 768, 768), (129, 256, 256))
    assert choose(shapes, 720, 1280, 40) == 2  # its aspect
    assert choose(shapes, 720, 1280, 200) == 4  # more frames
    assert choose(shapes, 1024, 1024, 1) == 3  # an image
    assert choose(shapes, 300, 300, 40) == 1
    assert choose(shapes, 100, 100, 40) == 0
    assert choose(shapes, 10, 10, 9) == 0  # the network's own is enlarged, no other
    assert choose(shapes, 10, 10, 1) is None
    images = sizes((9, 256, 256), (1, 64, 64), (1, 128, 128))
    assert choose(images, 200, 200, 12) == 0  # a video stays one, even enlarged
    assert choose(images, 200, 200, 5) == choose(images, 200, 200, 1) == 2
    assert choose(images[1:], 200, 200, 12) == 1  # unless all are images
    assert choose(shapes, 700, 700, 1) is None


@given(
    st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=6),
    st.tuples(*[st.integers(1, 50)] * 3),
)
def test_no_clip_is_enlarged_or_stretched_in_time(
    shapes: list[tuple[int, int, int]], clip: tuple[int, int, int]
) -> None:
    found = choose(sizes(*shapes), clip[1], clip[2], clip[0])
    if found is None:
        assert clip[0] < shapes[0][0]
    else:
        assert sizes(*shapes)[found].frames <= clip[0]
        assert found == 0 or fills(sizes(*shapes)[found], clip[1], clip[2])


def picture(kind: str, turned: bool = False) -> tuple[bytes, np.ndarray]:
    pixels = np.zeros((36, 48, 3), np.uint8)
    pixels[:18, :24] = 240
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    if turned:
        exif[0x112] = 6  # a quarter turn to the right
    image.save(file, kind, exif=exif, quality=95)
    return file.getvalue(), np.rot90(pixels, -1) if turned else pixels


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_a_clip_of_one_frame(kind: str) -> None:
    shapes = sizes((9, 24, 24), (1, 36, 48), (1, 48, 36))
    for turned in (False, True):
        data, pixels = picture(kind, turned)
        bucket, clips = read_bucketed(data, shapes, stride=4, most=3)
        assert (bucket, len(clips), len(clips[0])) == (1 + turned, 1, 1)
        assert np.abs(clips[0][0].astype(int) - pixels).mean() < 2
    for shape, source, code in (
        ([OWN], data, "clip.not-video"),
        (shapes, data[:70], "clip.truncated"),
        (shapes, picture(kind)[0][:4], "clip.not-video" if kind == "PNG" else "clip.truncated"),
        (sizes((9, 24, 24), (1, 400, 400)), data, "clip.too-short"),
    ):
        with pytest.raises(VideoError) as refused:
            read_bucketed(source, shape)
        assert refused.value.code == code


def test_a_video_is_cut_to_its_bucket() -> None:
    import torch

    video = torch.randint(0, 255, (3, 13, 24, 48), dtype=torch.uint8)
    file = encode_mp4(video, 8, lossless=True)
    bucket, clips = read_bucketed(file, [OWN, *sizes((5, 24, 48))], stride=4, most=9)
    assert bucket == 1 and [clip.shape for clip in clips] == [(5, 24, 48, 3)] * 3
    assert np.array_equal(clips[2], video[:, 8:13].permute(1, 2, 3, 0).numpy())
    assert len(read_clips(file, OWN)) == 1
