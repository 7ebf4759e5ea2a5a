"""Which states are kept: within the budget, evenly, and always the last."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from paris_node.kept import MB, kept_states, room_for, start_of

counts = st.integers(0, 400)


@given(counts, counts)
def test_never_above_the_budget_always_the_last_and_evenly(segments: int, room: int) -> None:
    kept = kept_states(segments, room)
    assert len(kept) <= room
    assert all(0 < place <= segments for place in kept) and list(kept) == sorted(set(kept))
    if room and segments:
        assert kept[-1] == segments
        gaps = {b - a for a, b in pairwise(kept)}
        assert len(gaps) <= 1 and kept[0] <= -(-segments // room)
    if room >= segments:
        assert kept == tuple(range(1, segments + 1))


@given(counts, st.integers(0, 1 << 40), st.integers(1, 1 << 33))
def test_room_is_what_others_leave_of_the_budget(budget: int, used: int, size: int) -> None:
    room = room_for(budget, used, size)
    assert room * size + used <= budget * MB or room == 0
    assert (room + 1) * size + used > budget * MB


@given(st.integers(0, 400), st.sets(st.integers(1, 400)))
def test_a_state_is_made_again_from_the_nearest_earlier_one(wanted: int, kept: set[int]) -> None:
    start = start_of(wanted, kept)
    assert 0 <= start <= wanted and (start in kept or start == 0)
    assert not any(start < place <= wanted for place in kept)
