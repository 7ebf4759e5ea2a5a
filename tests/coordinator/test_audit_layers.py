"""L4 and L5 as layers of a verdict."""

import pytest

from coordinator import synthetic as made
from paris_coordinator import judging

SOME = "c" * 64
"""A contribution that no desk knows."""


def test_l4_says_what_the_reports_say():
    good, bad = made.report_for(SOME, (1, 3)), made.report_for(SOME, (1,), False)
    layer = judging.audit([good])
    assert layer.passed
    found = dict(layer.numbers)
    assert (found["segments"], found["exact"], found["rho"], found["limit"]) == ("2", "1", "0", "0")
    assert judging.audit([bad]).code == "audit.mismatch"
    assert judging.audit([]).code == "audit.unanswered"
    wrong_bytes = bad.model_copy(update={"segments": ()})
    assert judging.audit([wrong_bytes]).code == "audit.state"
    nothing = judging.audit([good.model_copy(update={"segments": ()})])
    assert (nothing.passed, dict(nothing.numbers)["segments"]) == (True, "0")


def test_l5_is_equal_bits_or_nothing():
    commitment = made.commitment_for(SOME, made.policy().plan)
    assert judging.canary(commitment, commitment.states, commitment.update_root).passed
    swapped = (*commitment.states[:-1], "0" * 64)
    assert judging.canary(commitment, swapped, commitment.update_root).code == "canary.mismatch"
    assert not judging.canary(commitment, commitment.states, "0" * 64).passed
    assert not judging.canary(commitment, commitment.states[:-1], commitment.update_root).passed


def test_an_audited_contribution_is_accepted_by_five_layers():
    policy, good = made.policy({}), judging.audit([made.report_for(SOME, (1,))])
    layers = (*made.layers(), good)
    assert judging.decide(layers, policy, 0, ("L4",)) == (True, "accepted")
    for missing in (made.layers(), layers[:3]):
        with pytest.raises(ValueError, match=r"accepted|belongs"):
            judging.decide(missing, policy, 0, ("L4",))
    with pytest.raises(ValueError, match="L4"):
        judging.decide(layers, policy, 0, ("L5",))
    bad = (*made.layers(), judging.audit([made.report_for(SOME, (1,), False)]))
    assert judging.decide(bad, policy, 0, ("L4", "L5")) == (False, "audit.mismatch")
