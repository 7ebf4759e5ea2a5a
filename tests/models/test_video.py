"""Real files, made here with PyAV: what is read from them, and what each bad one is called."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from paris_models.video import Geometry, VideoError, encode_mp4, read_clip, read_clips, write_mp4

SHAPE = Geometry(frames=9, height=24, width=24, fps=8)


def ramp(frames: int, height: int = 24, width: int = 24) -> np.ndarray:
    """Frame k is grey 8·k, with its top left quarter white."""
    picture = np.zeros((frames, height, width, 3), np.uint8)
    picture += (8 * np.arange(frames)).astype(np.uint8)[:, None, None, None]
    picture[:, : height // 2, : width // 2] = 255
    return picture


def make(
    path: Path,
    frames: np.ndarray,
    *,
    fps: int = 8,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    codec: str = "libx264rgb",
    aspect: Fraction | None = None,
) -> Path:
    """A lossless RGB file; `times` are timestamps in 1/1000 s instead of a steady rate."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(clip: np.ndarray) -> list[int]:
    return [int(frame[-1, -1, 0]) // 8 for frame in clip]


def refused(path: Path | bytes, shape: Geometry = SHAPE) -> str:
    with pytest.raises(VideoError) as caught:
        read_clip(path, shape)
    return caught.value.code


def test_lossless_file_gives_the_very_pixels_back(tmp_path: Path) -> None:
    clip = torch.randint(0, 256, (3, 9, 24, 24), dtype=torch.uint8)
    write_mp4(tmp_path / "a.mp4", clip, 8, lossless=True)
    assert torch.equal(read_clip(tmp_path / "a.mp4", SHAPE), clip)
    assert torch.equal(read_clip((tmp_path / "a.mp4").read_bytes(), SHAPE), clip)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_preview_is_enlarged_and_close_to_the_clip(tmp_path: Path) -> None:
    clip = torch.from_numpy(ramp(9)).permute(3, 0, 1, 2)
    write_mp4(tmp_path / "a.mp4", clip, 8, scale=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.pix_fmt) == (192, 192, "yuv420p")
        assert stream.codec_context.name == "h264"
    error = read_clip(tmp_path / "a.mp4", SHAPE).float() - clip.float()
    assert error.square().mean().sqrt() < 4


def test_odd_sizes_can_be_written_for_people() -> None:
    assert encode_mp4(torch.zeros(3, 2, 25, 31, dtype=torch.uint8), 8)


def test_variable_frame_rate_is_resampled_by_timestamps(tmp_path: Path) -> None:
    times = [0, 100, 500, 520, 540, 900, 1000, 1250]
    path = make(tmp_path / "v.mp4", ramp(8), times=times)
    shape = Geometry(frames=9, height=24, width=24, fps=8)
    expected = [max(i for i, t in enumerate(times) if t <= tick) for tick in range(0, 1125, 125)]
    assert greys(read_clips(path, shape)[0]) == expected == [0, 1, 1, 1, 2, 4, 4, 4, 6]


def test_higher_rate_is_thinned_out(tmp_path: Path) -> None:
    path = make(tmp_path / "v.mp4", ramp(27), fps=24)
    assert greys(read_clips(path, SHAPE)[0]) == list(range(0, 27, 3))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_display_matrix_turns_the_picture(tmp_path: Path, rotation: int) -> None:
    frames = ramp(9, 24, 36)
    path = make(tmp_path / "r.mp4", frames, rotation=rotation)
    turned = np.rot90(frames, rotation // 90, axes=(1, 2))
    rows, columns = turned.shape[1:3]
    shape = Geometry(frames=9, height=rows, width=columns, fps=8)
    assert np.array_equal(read_clips(path, shape)[0], turned)


def test_the_picture_is_scaled_to_cover_and_its_centre_is_cut(tmp_path: Path) -> None:
    frames = np.zeros((9, 48, 96, 3), np.uint8)
    frames[:, :, 24:72] = 200
    clip = read_clips(make(tmp_path / "w.mp4", frames), SHAPE)[0]
    assert clip.shape == (9, 24, 24, 3)
    assert np.abs(clip.astype(int) - 200).max() <= 2


def test_pixels_that_are_not_square_are_shown_as_players_show_them(tmp_path: Path) -> None:
    path = make(tmp_path / "s.mp4", ramp(9, 24, 12), aspect=Fraction(2, 1))
    clip = read_clips(path, SHAPE)[0]
    assert clip[0, 2, 2, 0] > 250 and clip[0, 2, 21, 0] < 5 and clip[0, 21, 2, 0] < 5


def test_long_videos_give_several_clips(tmp_path: Path) -> None:
    path = make(tmp_path / "l.mp4", ramp(25))
    clips = read_clips(path, SHAPE, stride=8, most=5)
    assert [greys(clip) for clip in clips] == [list(range(s, s + 9)) for s in (0, 8, 16)]
    assert len(read_clips(path, SHAPE, stride=8, most=2)) == 2


def test_what_is_no_video(tmp_path: Path) -> None:
    for name, data in {"a.mp4": b"", "b.mp4": b"no video at all\n" * 99, "c.txt": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        assert refused(tmp_path / name) == "clip.not-video"
    picture = tmp_path / "d.png"
    with av.open(str(picture), "w", format="image2") as container:
        stream: Any = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 24, 24, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(ramp(1)[0], format="rgb24")))
    assert refused(picture) == "clip.not-video"


def test_a_playlist_that_names_other_files_is_no_video(tmp_path: Path) -> None:
    make(tmp_path / "secret.mp4", ramp(9))
    lists = {
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "b.mp4": "ffconcat version 1.0\nfile secret.mp4\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        assert refused(tmp_path / name) == "clip.not-video"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_cut_off_files(tmp_path: Path, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 24, 24, 3)).astype(np.uint8)
    whole = make(tmp_path / "a.mp4", noise).read_bytes()
    assert refused(whole[: int(len(whole) * share)]) == "clip.truncated"
    early = io.BytesIO()
    with (
        av.open(str(tmp_path / "a.mp4")) as source,
        av.open(str(tmp_path / "f.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    early.write((tmp_path / "f.mp4").read_bytes())
    head = early.getvalue()
    assert refused(head[: int(len(head) * share)]) == "clip.truncated"


def test_damaged_inside(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 24, 24, 3)).astype(np.uint8)
    data = bytearray(make(tmp_path / "a.mp4", noise, codec="png").read_bytes())
    start = data.index(b"mdat") + 4
    data[start + 3000 : start + 5000] = bytes(2000)
    assert refused(bytes(data)) == "clip.truncated"


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000, layout="mono")
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 8000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refused(path) == "clip.audio-only"


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mov"])
def test_no_frames(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 24, 24, "yuv420p"
        container.start_encoding()
    assert refused(path) == "clip.no-frames"


def test_too_short(tmp_path: Path) -> None:
    assert refused(make(tmp_path / "a.mp4", ramp(8))) == "clip.too-short"
    assert refused(make(tmp_path / "b.mp4", ramp(1))) == "clip.too-short"
    assert len(read_clips(make(tmp_path / "c.mp4", ramp(9)), SHAPE)) == 1


def test_a_folder_or_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises((OSError, VideoError)):
        read_clip(tmp_path / "none.mp4", SHAPE)
