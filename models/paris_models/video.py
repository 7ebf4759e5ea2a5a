"""Video files in and out: decode, turn, resample by timestamps, resize and crop; write MP4.

Images (PNG and JPEG) are clips of one frame, where a bucket of one frame is asked for.

Reading refuses what is no video, damaged, without frames, sound only, or too short (`VideoError`
with the catalogue code). Only known container formats are opened, and only from the file that was
named: playlists and other formats that refer to further files or addresses are no videos here::

    clip = read_clip(Path("cat.mp4"), Geometry(frames=33, height=256, width=256, fps=24))
    assert clip.shape == (3, 33, 256, 256)
    write_mp4(Path("copy.mp4"), clip, fps=24)
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import av
import numpy as np
import numpy.typing as npt
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from paris_models.buckets import choose, fills

Frames = npt.NDArray[np.uint8]
"""RGB frames, (frames, height, width, 3)."""

IMAGES: Final = ((b"\x89PNG\r\n\x1a\n", "png_pipe"), (b"\xff\xd8\xff", "jpeg_pipe"))
"""First bytes of an image and the demuxer that reads one picture from a stream of bytes."""
FORMATS: Final = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,h264,hevc"
MAGIC: Final = (
    (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x1aE\xdf\xa3"), (0, b"RIFF"), (0, b"OggS"),
    (0, b"FLV"), (0, b"\x00\x00\x01\xba"), (0, b"DKIF"), (0, b"\x30\x26\xb2\x75"),
)  # fmt: skip
"""Offset and bytes by which a damaged video is told from a file that never was one."""

av.logging.set_level(av.logging.PANIC)


class VideoError(Exception):
    """A video that cannot be used: catalogue code such as `clip.too-short`, and the facts."""

    def __init__(self, code: str, detail: str = "") -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code} ({detail})" if detail else code)


class ClipShape(Protocol):
    """What a clip must look like: frames × height × width at fps."""

    @property
    def frames(self) -> int:
        """Frames in a clip."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def width(self) -> int:
        """Pixels."""

    @property
    def fps(self) -> int:
        """Frames per second."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A plain `ClipShape`."""

    frames: int
    height: int
    width: int
    fps: int


def read_clip(source: Path | bytes, geometry: ClipShape) -> torch.Tensor:
    """The video's first clip: uint8 (3, frames, height, width). Raises `VideoError`."""
    return torch.from_numpy(read_clips(source, geometry)[0]).permute(3, 0, 1, 2).contiguous()


def read_clips(
    source: Path | bytes, geometry: ClipShape, stride: int = 0, most: int = 1
) -> list[Frames]:
    """Up to `most` clips of a video, each `stride` frames after the one before, as RGB frames.

    Time runs at `geometry.fps`: at each tick the frame that a player would show is taken, so a
    variable frame rate is resampled. A display matrix is obeyed, the picture is scaled to cover
    the clip and its centre is cut out. Raises `VideoError` with code clip.not-video,
    clip.truncated, clip.no-frames, clip.audio-only or clip.too-short.
    """
    return read_bucketed(source, [geometry], stride, most)[1]


def read_bucketed(
    source: Path | bytes, shapes: Sequence[ClipShape], stride: int = 0, most: int = 1
) -> tuple[int, list[Frames]]:
    """`read_clips` in the shape that keeps most of the video (`buckets.choose`), and its index.

    All shapes have the rate of the first.
    """
    with _open(source, any(shape.frames == 1 for shape in shapes)) as container:
        if not container.streams.video:
            _refuse_unseen(source, container)
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        image = container.format.name.endswith("_pipe")
        ticks: list[Any] = []
        rows = columns = limit = 0
        counter = _Counter()
        try:
            for frame in _ticks(counter.count(container.decode(stream)), stream, shapes[0].fps):
                if not ticks:
                    rows, columns = _shown(frame, float(stream.sample_aspect_ratio or 1))
                    fit = [s.frames for s in shapes if s is shapes[0] or fills(s, rows, columns)]
                    limit = 1 if image else max(fit) + (most - 1) * stride
                ticks.append(frame)
                if len(ticks) == limit:
                    break
        except (av.error.FFmpegError, EOFError) as error:
            raise VideoError("clip.truncated", _words(error)) from error
        index = choose(shapes, rows, columns, len(ticks)) if ticks else None
        if index is None:
            _refuse_short(len(ticks), counter.frames, stream.frames, shapes[0])
        fit_to = _Fit(shapes[index], float(stream.sample_aspect_ratio or 1))
    return index, _cut([fit_to(frame) for frame in ticks], shapes[index].frames, stride, most)


def _shown(frame: Any, aspect: float) -> tuple[int, int]:
    """Height and width of the picture that a player shows."""
    rows, columns = frame.height, round(frame.width * aspect)
    return (columns, rows) if round(frame.rotation / 90) % 2 else (rows, columns)


def _cut(pictures: Sequence[Frames], frames: int, stride: int, most: int) -> list[Frames]:
    last = min(len(pictures) - frames, (most - 1) * stride)
    starts = range(0, last + 1, stride) if stride else range(1)
    return [np.stack(pictures[start : start + frames]) for start in starts]


def _refuse_unseen(source: Path | bytes, container: Any) -> NoReturn:
    if container.streams.audio:
        raise VideoError("clip.audio-only")
    if _is_known(source) and not len(container.streams):
        code = "clip.no-frames" if _is_whole(source) else "clip.truncated"
        raise VideoError(code, "it lists no streams")
    raise VideoError("clip.not-video", "no picture stream")


def _refuse_short(ticks: int, decoded: int, declared: int, geometry: ClipShape) -> NoReturn:
    if decoded < declared:
        raise VideoError("clip.truncated", f"{decoded} of {declared} frames can be read")
    if not decoded:
        raise VideoError("clip.no-frames")
    raise VideoError(
        "clip.too-short", f"{ticks} of {geometry.frames} frames at {geometry.fps} per second"
    )


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)[:100]


def _open(source: Path | bytes, images: bool) -> Any:
    """An open container, or `VideoError` for what no demuxer of `FORMATS` understands.

    An image's demuxer is named, never guessed: FFmpeg's guess would take the file's name for a
    pattern of names.
    """
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    head = _head(source)
    kind = next((kind for magic, kind in IMAGES if images and head.startswith(magic)), None)
    if kind is not None:
        options["format_whitelist"] = kind
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source.resolve()}"
        return av.open(file, format=kind, options=options)
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, OSError) and not isinstance(error, ValueError):
            raise
        code = "clip.truncated" if kind or _is_known(source) else "clip.not-video"
        raise VideoError(code, _words(error)) from error


def _head(source: Path | bytes) -> bytes:
    """The first bytes."""
    if isinstance(source, bytes):
        return source[:16]
    with source.open("rb") as file:
        return file.read(16)


def _is_known(source: Path | bytes) -> bool:
    """Whether the first bytes are those of a video container."""
    head = _head(source)
    return any(head[at:].startswith(magic) for at, magic in MAGIC)


def _is_whole(source: Path | bytes) -> bool:
    """Whether the top-level boxes of an MP4 or QuickTime file end where the file does."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at + 8 <= end:
            file.seek(at)
            size = int.from_bytes(file.read(4), "big")
            if size == 1:
                file.seek(at + 8)
                size = int.from_bytes(file.read(8), "big")
            if size < 8:
                return False
            at += size
        return at == end


class _Counter:
    """Counts decoded frames as they pass, and refuses those that the decoder calls corrupt."""

    def __init__(self) -> None:
        self.frames = 0

    def count(self, frames: Iterator[Any]) -> Iterator[Any]:
        for frame in frames:
            if frame.is_corrupt:
                raise VideoError("clip.truncated", f"frame {self.frames} is damaged")
            self.frames += 1
            yield frame


def _ticks(frames: Iterator[Any], stream: Any, fps: int) -> Iterator[Any]:
    """The frame shown at start, start + 1/fps, …; a tick half a millisecond early counts."""
    usual = Fraction(1, 1) / (stream.average_rate or stream.guessed_rate or fps)
    slack = Fraction(1, 2000)
    shown: Any = None
    begin = end = Fraction(0)
    tick = 0
    for number, frame in enumerate(frames):
        time = number * usual if frame.pts is None else frame.pts * Fraction(frame.time_base)
        if shown is None:
            begin = time
        while shown is not None and begin + Fraction(tick, fps) < time - slack:
            yield shown
            tick += 1
        shown = frame
        lasts = frame.duration * Fraction(frame.time_base) if frame.duration else usual
        end = time + lasts
    while shown is not None and begin + Fraction(tick, fps) < end - slack:
        yield shown
        tick += 1


class _Fit:
    """Turns a decoded frame into RGB of the clip's size: scale to cover, turn, cut the centre."""

    def __init__(self, geometry: ClipShape, aspect: float) -> None:
        self.geometry, self.aspect = geometry, aspect
        self.reformatter = VideoReformatter()
        self.last: tuple[Any, Frames] | None = None

    def __call__(self, frame: Any) -> Frames:
        if self.last is not None and self.last[0] is frame:
            return self.last[1]
        height, width = self.geometry.height, self.geometry.width
        turns = round(frame.rotation / 90) % 4
        rows, columns = (width, height) if turns % 2 else (height, width)
        aspect = self.aspect
        scale = max(rows / frame.height, columns / (frame.width * aspect))
        size = (
            max(rows, round(frame.height * scale)),
            max(columns, round(frame.width * aspect * scale)),
        )
        picture = np.rot90(self._rgb(frame, *size), turns)
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        cut = np.ascontiguousarray(picture[top : top + height, left : left + width])
        self.last = (frame, cut)
        return cut

    def _rgb(self, frame: Any, height: int, width: int) -> Frames:
        same = (frame.height, frame.width) == (height, width)
        if not (same and frame.format.name in ("gbrp", "rgb24")):
            shrinks = height * width < frame.height * frame.width
            way = Interpolation.AREA if shrinks else Interpolation.BICUBIC
            frame = self.reformatter.reformat(
                frame, width=width, height=height, format="rgb24", interpolation=way
            )
        picture: Frames = frame.to_ndarray()
        return picture


def encode_mp4(clip: torch.Tensor, fps: int, *, scale: int = 1, lossless: bool = False) -> bytes:
    """The bytes of an H.264 MP4 of a uint8 clip (3, frames, height, width).

    `scale` enlarges every pixel to a square of that many pixels. `lossless` keeps every RGB value
    (H.264 High 4:4:4 Predictive; desktop players play it, most browsers do not); otherwise 4:2:0
    at visually transparent quality, which everything plays (sizes are rounded up to even).
    """
    frames = clip.permute(1, 2, 3, 0).contiguous().numpy()
    if scale > 1:
        frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    if not lossless:
        odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
        frames = np.pad(frames, odd, mode="edge")
    options = {"preset": "ultrafast", "crf": "0", "x264-params": "threads=1:rc-lookahead=0"}
    if not lossless:
        options = {"preset": "medium", "crf": "12", "x264-params": "threads=1"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "libx264rgb" if lossless else "libx264", rate=fps, options=options
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def write_mp4(
    path: Path, clip: torch.Tensor, fps: int, *, scale: int = 1, lossless: bool = False
) -> None:
    """Writes `encode_mp4` to `path`, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(encode_mp4(clip, fps, scale=scale, lossless=lossless))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
