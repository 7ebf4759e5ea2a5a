"""The demo's three clip worlds: small captioned videos, rendered from a seed, as real MP4 files.

*sprite*: a shaded object moves on a dark ground; *camera*: a camera pans or zooms over a texture;
*spin*: an object turns or grows on a light ground. Six colours × four motions × three shapes each,
216 captions. Position, size, speed, phase, angle and brightness vary from clip to clip::

    clips, captions = render(12, seed=100)
    assert clips.shape == (12, 3, 9, 24, 24) and CAPTIONS[captions[0]].startswith("a ")
    write_clips(Path("clips"), 9000, seed=100)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from paris_models.video import Geometry, encode_mp4

Array = npt.NDArray[np.float64]

LICENCE: Final = "CC0-1.0"
"""Nobody holds rights in what these functions draw."""
GEOMETRY: Final = Geometry(frames=9, height=24, width=24, fps=8)
COLOURS: Final = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.65, 0.20, 0.85),
    "cyan": (0.15, 0.80, 0.85),
}
WORLDS: Final = (
    (
        "sprite",
        "a {c} {s} {m}",
        ("ball", "square", "triangle"),
        ("moves left", "moves right", "moves up", "moves down"),
    ),
    (
        "camera",
        "{c} {s} camera {m}",
        ("stripes", "checkers", "dots"),
        ("pans left", "pans right", "zooms in", "zooms out"),
    ),
    (
        "spin",
        "a {c} {s} {m}",
        ("star", "bar", "cross"),
        ("turns clockwise", "turns counterclockwise", "grows", "shrinks"),
    ),
)
CAPTIONS: Final = tuple(
    template.format(c=colour, s=shape, m=motion)
    for _, template, shapes, motions in WORLDS
    for colour in COLOURS
    for motion in motions
    for shape in shapes
)


def factors(caption: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """World, colour, motion in its world and shape in its world of caption indices."""
    return caption // 72, caption // 12 % 6, caption // 3 % 4, caption % 3


def render(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` clips, uint8 (n, 3, 9, 24, 24), and their caption indices (n,); worlds in turn.

    A pure function of `n` and the seed (NumPy's PCG64); another `n` gives other clips.
    """
    rng = np.random.default_rng(seed)
    world = np.arange(n) % 3
    colour, motion, shape = (rng.integers(k, size=n) for k in (6, 4, 3))
    dice = rng.random((n, 12))
    tints = np.array(list(COLOURS.values()))
    clips = np.empty((n, 3, GEOMETRY.frames, GEOMETRY.height, GEOMETRY.width), np.uint8)
    for i in range(n):
        tint = tints[colour[i]] * (0.9 + 0.1 * dice[i, 0])
        mask, low, high = PAINTERS[world[i]](dice[i], int(motion[i]), int(shape[i]), tint)
        frames = low[:, None, None, None] * (1 - mask) + high[:, None, None, None] * mask
        clips[i] = np.round(frames.clip(0, 1) * 255)
    index = world * 72 + colour * 12 + motion * 3 + shape
    return torch.from_numpy(clips), torch.from_numpy(index.astype(np.int64))


Layers = tuple[Array, Array, Array]
"""How much of the second colour a pixel has (frames, height, width), first and second colour."""

_GRID: Final[Array] = (np.arange(24) + 0.5) / 12 - 1
_Y: Final[Array] = _GRID[:, None]
_X: Final[Array] = _GRID[None, :]
_TAU: Final[Array] = (np.arange(9) / 8)[:, None, None] - 0.5


def _inside(distance: Array) -> Array:
    """A soft mask from a signed distance: 1 inside, 0 outside."""
    mask: Array = 1 / (1 + np.exp(28 * distance))
    return mask


def _sprite(dice: Array, motion: int, shape: int, tint: Array) -> Layers:
    step = (0.8 + 0.2 * dice[1]) * _TAU
    size = 0.40 + 0.10 * dice[2]
    x = _X - (dice[3] - 0.5) * 0.6 - step * (-1, 1, 0, 0)[motion]
    y = _Y - (dice[4] - 0.5) * 0.6 - step * (0, 0, -1, 1)[motion]
    ground = np.full(3, 0.05 + 0.08 * dice[5])
    if shape == 0:  # shaded, so that it differs from the square at this size
        square = x * x + y * y
        light = (1.05 - 0.75 * square / (size * size)).clip(0.25, 1)
        return _inside(np.sqrt(square) - size) * light, ground, tint
    if shape == 1:
        return _inside(np.maximum(abs(x), abs(y)) - 0.95 * size), ground, tint
    return _inside(np.maximum(abs(0.866 * x) - 0.5 * y, y) - 0.62 * size), ground, tint


def _camera(dice: Array, motion: int, shape: int, tint: Array) -> Layers:
    speed = (0.8 + 0.2 * dice[1]) * _TAU
    zoom = np.exp(speed * (0, 0, -1, 1)[motion])
    x = (_X + speed * (-1, 1, 0, 0)[motion]) * zoom
    y = (_Y + 0 * _TAU) * zoom
    pitch, a, b = 5.5 + dice[2], 2 * np.pi * dice[3], 2 * np.pi * dice[4]
    if shape == 0:
        angle = dice[5] - 0.5
        along = x * np.cos(angle) + y * np.sin(angle)
        wave = 2.5 * np.sin(1.2 * pitch * along + a)
    elif shape == 1:
        wave = 4 * np.sin(pitch * x + a) * np.sin(pitch * y + b)
    else:
        wave = 2.5 * (np.cos(pitch * x + a) + np.cos(pitch * y + b) - 0.7)
    return 0.5 + 0.5 * np.tanh(wave), 0.22 * tint, tint


def _spin(dice: Array, motion: int, shape: int, tint: Array) -> Layers:
    angle = 2 * np.pi * dice[1] + (1.3 + 0.2 * dice[2]) * _TAU * (1, -1, 0, 0)[motion]
    size = (0.46 + 0.08 * dice[3]) * np.exp((0.8 + 0.2 * dice[2]) * _TAU * (0, 0, 1, -1)[motion])
    x, y = _X - (dice[4] - 0.5) * 0.3, _Y - (dice[5] - 0.5) * 0.3
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def bar(u: Array, v: Array) -> Array:
        distance: Array = np.maximum(abs(u) - 1.35 * size, abs(v) - 0.36 * size)
        return distance

    if shape == 0:
        distance = np.sqrt(x * x + y * y) - size * (0.85 + 0.4 * np.cos(5 * np.arctan2(y, x)))
    elif shape == 1:
        distance = bar(x, y)
    else:
        distance = np.minimum(bar(x, y), bar(y, x))
    return _inside(distance), np.full(3, 0.80 + 0.1 * dice[6]), 0.85 * tint


PAINTERS: Final = (_sprite, _camera, _spin)


def write_clips(
    folder: Path,
    n: int,
    seed: int,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `n` lossless MP4 files `00000.mp4` … with their captions beside them as `.txt`.

    `captions.jsonl` names their source and licence.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips, captions = render(n, seed)
    source = f"paris_models.worlds, seed {seed}"
    lines = (
        json.dumps({"video": f"{i:05d}.mp4", "source": source, "licence": LICENCE})
        for i in range(n)
    )
    (folder / "captions.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")

    def write(i: int) -> None:
        name = folder / f"{i:05d}.mp4"
        name.write_bytes(encode_mp4(clips[i], GEOMETRY.fps, lossless=True))
        name.with_suffix(".txt").write_text(CAPTIONS[int(captions[i])] + "\n", encoding="utf-8")

    with ThreadPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(write, range(n)), 1):
            if progress is not None and (done % 100 == 0 or done == n):
                progress(done, n)


def main() -> None:
    """`python -m paris_models.worlds FOLDER COUNT --seed N`: write captioned clips."""
    parser = argparse.ArgumentParser(description="Render the demo's clips as MP4 files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args()
    write_clips(options.folder, options.count, options.seed)


if __name__ == "__main__":
    main()
