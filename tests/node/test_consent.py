"""The owner's wishes: one reason, the last word counts, a stop is final."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paris_node.consent import Consent, Said, Wish
from paris_node.volunteer import Allowed, Forbidden
from paris_protocol.errors import REASONS

wishes = st.sampled_from(list(Wish))


@given(wishes, st.lists(wishes, max_size=12))
def test_the_answers_are_always_the_decision_of_the_last_wish(
    first: Wish, said: list[Wish]
) -> None:
    consent = Consent(first)
    told: Allowed | Forbidden = consent.decision
    for wish in said:
        answers = consent.handle(Said(wish))
        assert len(answers) <= 1
        told = answers[0] if answers else told
        assert told == consent.decision
        if isinstance(told, Forbidden):
            assert told.reason in REASONS


@given(st.lists(wishes, max_size=12))
def test_after_a_stop_nothing_is_allowed_again(said: list[Wish]) -> None:
    consent = Consent()
    consent.handle(Said(Wish.STOP))
    for wish in said:
        assert consent.handle(Said(wish)) == []
    assert consent.decision == Forbidden("owner.stopped")


def test_what_each_wish_means() -> None:
    assert Consent(Wish.RUN).decision == Allowed(take=True)
    assert Consent(Wish.FINISH).decision == Allowed(take=False)
    assert Consent(Wish.PAUSE).decision == Forbidden("owner.paused")
