"""Near-duplicates: re-encoded, resized, re-timed and cropped copies are found, other clips are not.

The figures of docs/prepare.md come from `measure`: `python tests/models/test_similar.py 400`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn.functional import interpolate

from paris_models.similar import LIMIT, WORDS, alike, fingerprint
from paris_models.video import read_clip
from paris_models.worlds import GEOMETRY, render

Frames = npt.NDArray[np.uint8]
SIDE = 96


def scaled(frames: Frames, side: int) -> Frames:
    """(F, H, W, 3) uint8 at another size."""
    x = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float()
    shrinks = side < frames.shape[1]
    x = interpolate(x, size=(side, side), mode="bicubic", antialias=shrinks)
    found: Frames = x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    return found


def encoded(frames: Frames, fps: int = 8, crf: int = 23) -> bytes:
    """An H.264 MP4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf)}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def cropped(frames: Frames, share: float) -> Frames:
    """Without this share of each side."""
    off = round(share * frames.shape[1])
    return frames[:, off:-off, off:-off]


def cornered(frames: Frames) -> Frames:
    """Without 4 % at the bottom and at the left."""
    off = round(0.04 * frames.shape[1])
    return frames[:, :-off, off:]


COPIES: dict[str, Callable[[Frames], bytes]] = {
    "other quality (CRF 35)": lambda f: encoded(f, crf=35),
    "smaller (64)": lambda f: encoded(scaled(f, 64)),
    "larger (160)": lambda f: encoded(scaled(f, 160), crf=28),
    "12 frames a second": lambda f: encoded(f[np.arange(15) * 8 // 12], fps=12),
    "24 frames a second": lambda f: encoded(np.repeat(f, 3, 0), fps=24),
    "3 % cropped on each side": lambda f: encoded(scaled(cropped(f, 0.03), SIDE)),
    "5 % cropped on each side": lambda f: encoded(scaled(cropped(f, 0.05), SIDE), crf=28),
    "4 % cropped at a corner": lambda f: encoded(scaled(cornered(f), SIDE)),
}


def source(clip: torch.Tensor) -> Frames:
    """A rendered clip as a video of 96×96, with a frame more so that other rates reach its end."""
    frames = scaled(clip.permute(1, 2, 3, 0).numpy(), SIDE)
    return np.concatenate([frames, frames[-1:]])


def seen(video: bytes) -> npt.NDArray[np.uint64]:
    """The fingerprint of a video's clip, as `prepare` reads it."""
    return fingerprint(read_clip(video, GEOMETRY).permute(1, 2, 3, 0).numpy())


def found_copies(clips: torch.Tensor) -> dict[str, float]:
    """The share of the copies that is found, by kind."""
    frames = [source(clip) for clip in clips]
    prints = [seen(encoded(part, crf=18)) for part in frames]
    return {
        name: float(
            np.mean([
                alike(seen(copy(part))[None], own[None])[0]
                for part, own in zip(frames, prints, strict=True)
            ])
        )
        for name, copy in COPIES.items()
    }  # fmt: skip


def prints_of(count: int, seed: int) -> npt.NDArray[np.uint64]:
    """Fingerprints of rendered clips, worlds in turn."""
    clips, _ = render(count, seed)
    return np.stack([fingerprint(clip.permute(1, 2, 3, 0).numpy()) for clip in clips])


def test_copies_are_found() -> None:
    found = found_copies(render(12, 41)[0])
    for name, share in found.items():
        assert share >= (0.9 if "cropped" in name else 1.0), (name, share)


def test_other_clips_of_the_same_world_are_not() -> None:
    """120 × 900 pairs, a third of them of one world."""
    prints, held = prints_of(900, 5), prints_of(120, 6)
    assert alike(prints, held).mean() < 0.005
    assert not alike(prints, held, 1.0).any()


def test_a_clip_is_like_itself_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = prints_of(60, 9)
    assert alike(prints, prints).all()
    assert not alike(prints, prints[:0]).any()
    assert alike(prints[:0], prints).shape == (0,)
    expected = alike(prints, prints[::7], 12.0)
    assert 9 <= expected.sum() < 60
    monkeypatch.setattr("paris_models.similar.BLOCK", 7)
    assert np.array_equal(alike(prints, prints[::7], 12.0), expected)


def test_colour_alone_makes_another_clip() -> None:
    clip = render(3, 1)[0][0].permute(1, 2, 3, 0).numpy()
    held = fingerprint(clip)[None]
    assert not alike(fingerprint(clip[..., ::-1])[None], held).any()
    assert not alike(fingerprint(clip[::-1])[None], held).any()  # it runs backwards


def test_any_size_and_a_single_frame_have_fingerprints() -> None:
    generator = np.random.default_rng(1)
    for shape in ((1, 8, 8, 3), (1, 7, 130, 3), (33, 64, 48, 3)):
        print_ = fingerprint(generator.integers(0, 256, shape, dtype=np.uint8))
        assert print_.shape == (WORDS,)
        assert print_.dtype == np.uint64


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)],
)
def test_what_is_no_picture_is_refused(frames: Any) -> None:
    with pytest.raises(ValueError, match="uint8 frames"):
        fingerprint(frames)


def measure(count: int) -> None:
    """Prints the table of docs/prepare.md."""
    print(f"{count} clips, limit {LIMIT}")
    for name, share in found_copies(render(count, 77)[0]).items():
        print(f"{name:28} {share:.4f}")
    prints, held = prints_of(9000, 5), prints_of(150, 6)
    print(f"{alike(prints, held).sum()} of 9000 other clips beside 150 held-out ones")


if __name__ == "__main__":
    measure(int(sys.argv[1]))
