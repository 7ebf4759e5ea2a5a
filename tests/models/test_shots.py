"""Cuts and stills: what the thresholds find in the demo's rendered worlds, and what they leave."""

from __future__ import annotations

import numpy as np
import pytest

from paris_models.shots import cut_score, largest, steps
from paris_models.video import encode_mp4, read_clips
from paris_models.worlds import GEOMETRY, render

CUT, STILL = 1.5, 0.5
CLIPS = 300


@pytest.fixture(scope="module")
def worlds() -> np.ndarray:
    clips, _ = render(CLIPS, 21)
    frames: np.ndarray = clips.permute(0, 2, 3, 4, 1).numpy()
    return frames


def test_no_rendered_clip_is_refused(worlds: np.ndarray) -> None:
    found = [steps(clip) for clip in worlds]
    assert max(cut_score(one) for one in found) < CUT
    assert min(largest(one) for one in found) > 2 * STILL


def test_joined_clips_are_found(worlds: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for cuts in (1, 2):
        for _ in range(CLIPS):
            parts = rng.choice(CLIPS, cuts + 1, replace=False)
            ends = [0, *sorted(rng.choice(np.arange(1, 9), cuts, replace=False)), 9]
            joined = np.concatenate(
                [worlds[p][a:b] for p, a, b in zip(parts, ends, ends[1:], strict=False)]
            )
            missed += cut_score(steps(joined)) <= CUT
    assert missed / (2 * CLIPS) < 0.03  # 1.0 % of 6000 in docs/prepare.md


def test_stills_are_found_through_lossy_video(worlds: np.ndarray) -> None:
    import torch

    for clip in worlds[:9]:
        still = torch.from_numpy(np.repeat(clip[:1], 9, 0)).permute(3, 0, 1, 2).contiguous()
        read = read_clips(encode_mp4(still, 8), GEOMETRY)[0]
        assert largest(steps(read)) < STILL


def test_short_clips_and_images() -> None:
    image = np.zeros((1, 4, 4, 3), np.uint8)
    assert largest(steps(image)) == float("inf") and cut_score(steps(image)) == 0
    two = np.stack([image[0], image[0] + 255])
    assert cut_score(steps(two)) == 0 and largest(steps(two)) == pytest.approx(255, abs=0.1)


def test_more_cuts_are_looked_for_in_longer_clips() -> None:
    levels = np.repeat(np.arange(8) * 30, 5)  # seven cuts in forty frames
    clip = np.broadcast_to(levels[:, None, None, None], (40, 4, 4, 3)).astype(np.uint8)
    assert cut_score(steps(clip)) < CUT  # so many that they are the clip's own way
    assert cut_score(steps(clip[:25])) < CUT < cut_score(steps(clip[:15]))
    assert cut_score(steps(np.repeat(clip[:25], 2, 0))) > CUT
