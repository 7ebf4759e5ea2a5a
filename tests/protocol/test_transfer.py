"""Decisions of a transfer: every piece once, peers first, bad sources put aside."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.transfer import IN_FLIGHT, Ask, Transfer

HOME = "coordinator"


def manifest(pieces: int) -> Manifest:
    return Manifest(pieces * PIECE, PIECE, tuple("00" * 32 for _ in range(pieces)))


def transfer(pieces: int = 6, have: tuple[int, ...] = (), first: int = 0) -> Transfer:
    return Transfer(manifest(pieces), have, fallback=HOME, stall=5, first=first)


def drain(t: Transfer, peers: list[str], now: float) -> list[Ask]:
    asks = []
    while (ask := t.next(peers, now)) is not None:
        asks.append(ask)
    return asks


def test_nothing_to_do() -> None:
    assert transfer(0).done
    t = transfer(2, have=(0, 1))
    assert t.done
    assert t.next(["a"], 0) is None


def test_peers_share_the_pieces_and_the_coordinator_is_spared() -> None:
    t = transfer(6)
    asks = drain(t, ["a", "b"], 0)
    assert sorted(ask.source for ask in asks) == ["a"] * IN_FLIGHT + ["b"] * IN_FLIGHT
    assert len({ask.piece for ask in asks}) == 4
    assert t.missing == list(range(6))
    assert not t.done


def test_coordinator_among_the_peers_is_still_the_last_resort() -> None:
    assert {ask.source for ask in drain(transfer(), [HOME, "a"], 0)} == {"a"}


def test_without_peers_the_coordinator_is_asked() -> None:
    assert {ask.source for ask in drain(transfer(), [], 0)} == {HOME}


def test_what_is_there_already_is_not_asked_for_and_the_first_piece_may_differ() -> None:
    assert [ask.piece for ask in drain(transfer(6, have=(2, 3), first=8), ["a"], 0)] == [4, 5]


def test_failed_peer_is_replaced_by_the_coordinator_and_comes_back() -> None:
    t = transfer(4)
    first, second = drain(t, ["a"], 0)
    t.failed(first, 0.1)
    t.failed(second, 0.1)
    # Two failures: it rests for two seconds.
    assert {ask.source for ask in drain(t, ["a"], 0.2)} == {HOME}
    assert t.next(["a"], 1.9) is None
    assert {ask.source for ask in drain(t, ["a"], 2.2)} == {"a"}


def test_stalled_requests_are_named_and_get_more_time() -> None:
    t = transfer(1)
    ask = t.next(["a"], 10)
    assert ask is not None
    assert (t.stalled(14.9), t.stalled(15.0), t.wake(["a"], 11)) == ([], [ask], 15.0)
    t.failed(ask, 15)
    again = t.next(["a"], 15)
    assert again is not None
    assert (again.source, again.deadline) == (HOME, 25.0)


def test_liar_is_never_asked_again() -> None:
    t = Transfer(manifest(2))
    ask = t.next(["a"], 0)
    assert ask is not None
    t.failed(ask, 0, corrupt=True)
    assert t.next(["a"], 1e9) is None
    assert t.hopeless(["a"])
    assert not t.hopeless(["a", "b"])
    assert t.wake(["a"], 0) is None


def test_fast_peer_is_preferred() -> None:
    t = transfer(10)
    for peer, seconds in (("slow", 4.0), ("fast", 1.0)):
        ask = t.next([peer], 0)
        assert ask is not None
        t.arrived(ask, seconds)
    ask = t.next(["slow", "fast"], 5)
    assert ask is not None
    assert ask.source == "fast"


def test_the_fallback_gets_what_dripping_peers_failed_at() -> None:
    t, peers = transfer(24), [f"sybil{i}" for i in range(32)]
    first = [t.next(peers, 0) for _ in range(12)]
    for ask in first:
        assert ask is not None
        t.failed(ask, 37)
    again = t.next(peers, 37)
    assert again is not None
    assert again.source == "coordinator"


def test_answers_that_come_late_are_ignored() -> None:
    t = transfer(1)
    ask = t.next(["a"], 0)
    assert ask is not None
    t.failed(ask, 5)
    t.arrived(ask, 6)
    assert t.missing == [0]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), max_size=80))
def test_no_piece_is_lost_or_asked_for_twice(pieces: int, steps: list[tuple[int, int]]) -> None:
    t, now, flying, arrived = transfer(pieces), 0.0, [], set()
    for action, pick in steps:
        now += 0.3
        if action <= 2:
            ask = t.next(["a", "b"], now)
            if ask is not None:
                assert ask.piece not in arrived
                assert ask.piece not in {each.piece for each in flying}
                flying.append(ask)
        elif flying:
            ask = flying.pop(pick % len(flying))
            if action == 3:
                t.failed(ask, now, corrupt=pick % 5 == 0)
            else:
                t.arrived(ask, now)
                arrived.add(ask.piece)
        assert set(t.missing) == set(range(pieces)) - arrived
    # Whatever happened, an honest coordinator finishes it.
    for ask in flying:
        t.failed(ask, now)
    for _ in range(2 * pieces):
        now += 100
        for ask in drain(t, ["fresh"], now):
            t.arrived(ask, now)
    assert t.done
