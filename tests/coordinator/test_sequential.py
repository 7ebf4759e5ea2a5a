"""The test in looks refuses no more honest updates than the fixed one, and stops early."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_coordinator.sequential import BETTER, NO_EVIDENCE, WORSE, Look, conclude, plan

MARGIN, ERRORS = 0.01, 3.0


def run(losses: np.ndarray, looks: tuple[int, ...], errors: float = ERRORS) -> tuple[int, int]:
    """(bucket, clips used) for the differences of one update."""
    for look in plan(looks, len(losses), errors):
        seen = losses[: look.clips]
        se = float(seen.std(ddof=1)) / math.sqrt(len(seen))
        found = conclude(float(seen.mean()), se, look, margin=MARGIN, errors=errors)
        if found is not None:
            return found, look.clips
    raise AssertionError("the last look concludes")


def test_without_early_looks_it_is_the_fixed_test() -> None:
    assert plan((), 256, 3.0) == (Look(256, 3.0, last=True),)
    assert plan((256, 300, 1), 256, 3.0) == (Look(256, 3.0, last=True),)


@given(st.lists(st.integers(0, 400), max_size=6), st.floats(1, 4))
def test_what_all_looks_spend_is_the_fixed_tests_error(looks: list[int], errors: float) -> None:
    steps = plan(looks, 256, errors)
    assert [step.clips for step in steps] == sorted({step.clips for step in steps})
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    tails = [math.erfc(step.errors / math.sqrt(2)) / 2 for step in steps]
    # Student's quantiles of the early looks are beyond the normal ones: their tails are smaller.
    assert sum(tails) <= math.erfc(errors / math.sqrt(2)) / 2 * (1 + 1e-9)


def test_students_quantile_is_close() -> None:
    """Against tabulated upper quantiles of Student's t with 63 and 30 degrees of freedom."""
    early = plan((64,), 256, 1.0)[0]  # α = .158655, a twentieth of it: .00793
    assert early.errors == pytest.approx(2.4792, abs=2e-3)


def test_false_refusals_stay_below_the_fixed_tests() -> None:
    """At the margin itself, where an update may just be accepted; 2 standard errors for speed."""
    drawn = np.random.default_rng(0).normal(MARGIN, 0.02, (20_000, 256))
    fixed = np.mean([run(row, (), 2.0)[0] == WORSE for row in drawn])
    looks = np.mean([run(row, (64, 128), 2.0)[0] == WORSE for row in drawn])
    assert looks <= fixed
    assert looks > 0.5 * fixed  # and it has not lost its edge


@pytest.mark.parametrize(("mean", "bucket"), [(-0.02, BETTER), (0.0, NO_EVIDENCE), (0.05, WORSE)])
def test_clear_cases_stop_at_the_first_look(mean: float, bucket: int) -> None:
    rows = np.random.default_rng(1).normal(mean, 0.01, (200, 256))
    found = [run(row, (64, 128)) for row in rows]
    assert {clips for _, clips in found} == {64}
    assert np.mean([b == bucket for b, _ in found]) > 0.98


def test_damage_that_the_fixed_test_sees_is_not_let_off_early() -> None:
    rows = np.random.default_rng(2).normal(MARGIN + 0.006, 0.01, (300, 256))
    fixed = np.mean([run(row, ())[0] == WORSE for row in rows])
    assert fixed > 0.99
    assert np.mean([run(row, (64, 128))[0] == WORSE for row in rows]) > 0.98


def test_an_open_question_is_not_answered_early() -> None:
    """Slightly worse than the margin: a look that happens to fall below it decides nothing."""
    rows = np.random.default_rng(3).normal(MARGIN + 0.003, 0.03, (500, 256))
    found = [run(row, (64, 128)) for row in rows]
    assert np.mean([clips < 256 and bucket != WORSE for bucket, clips in found]) < 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_worse(bad: float) -> None:
    look = plan((64,), 256, 3.0)[0]
    assert conclude(bad, 0.1, look, margin=MARGIN, errors=3.0) == WORSE
    assert conclude(0.0, bad, look, margin=MARGIN, errors=3.0) == WORSE
