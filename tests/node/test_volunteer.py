"""The volunteer's promises, for any events in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from paris_node.volunteer import (
    GIVE_UP,
    LONGEST_WAIT,
    PATIENCE,
    REST,
    Allowed,
    Assigned,
    Done,
    Event,
    Failed,
    Forbidden,
    Halt,
    Over,
    Pace,
    Phase,
    Progress,
    Quit,
    Snapshot,
    Start,
    Tick,
    Volunteer,
    Wake,
)

PACE = Pace(base=15.0, cap=60.0, salt="node")
LATEST = max(LONGEST_WAIT, REST, *PATIENCE.values())


def turns(volunteer: Volunteer) -> st.SearchStrategy[int]:
    """The present turn often, others too."""
    now = volunteer.turn
    return st.sampled_from([now, now, now, now - 1, now + 1, now - 2, 0])


@st.composite
def event_for(draw: Any, volunteer: Volunteer) -> Event:
    turn = draw(turns(volunteer))
    code = draw(st.sampled_from(["network.down", "unit.closed", "trainer.failed", "work.none"]))
    after = draw(st.sampled_from([None, None, 0.0, 3.0, 1e9, -5.0]))
    return draw(
        st.sampled_from(
            [
                Allowed(),
                Allowed(take=False),
                Forbidden("owner.paused"),
                Tick(),
                Assigned(turn, draw(st.sampled_from(["a", "b"]))),
                Done(turn),
                Progress(turn, draw(st.integers(0, 20))),
                Failed(turn, code, draw(st.booleans()), after),
                Over(),
            ]
        )
    )


memories = st.builds(
    lambda phase, unit, left, spoiled: (
        Snapshot()
        if phase is Phase.IDLE
        else Snapshot(phase, unit, left and phase is Phase.ACK, spoiled)
    ),
    st.sampled_from(list(Phase)),
    st.sampled_from(["a", "b"]),
    st.booleans(),
    st.integers(0, 3),
)
leaps = st.sampled_from([0.0, 0.0, 0.1, 1.0, 20.0, 70.0, 1000.0, 86400.0, -1.0, -86400.0])


class Outside:
    """Performs effects on paper, and checks the promises after each event."""

    def __init__(self, volunteer: Volunteer, now: float) -> None:
        self.volunteer, self.now = volunteer, now
        self.running: int | None = None
        self.turns: set[int] = set()
        self.leave: Allowed | Forbidden = Forbidden("node.starting")

    def tell(self, event: Event) -> list[Start]:
        before = self.volunteer.memory
        stale = getattr(event, "turn", self.running) != self.running
        effects = self.volunteer.handle(event, self.now)
        if isinstance(event, Allowed | Forbidden):
            self.leave = event
        elif not isinstance(event, Tick | Over) and not stale:
            self.answered(event)
        for effect in effects:
            if isinstance(effect, Halt):
                assert effect.turn in self.turns
                if self.running == effect.turn:
                    self.running = None
        wakes = [effect for effect in effects if isinstance(effect, Wake)]
        assert len(wakes) == 1, "exactly one alarm"
        assert self.now < wakes[0].at <= self.now + LATEST, "in the future, and not far"
        self.alarm = wakes[0].at
        starts = [effect for effect in effects if isinstance(effect, Start)]
        for start in starts:
            self.started(start)
        if stale and not isinstance(event, Tick | Allowed | Forbidden | Over) and not starts:
            changed = self.volunteer.memory != before
            assert not changed or any(isinstance(e, Halt) for e in effects), (
                "a stale answer counted"
            )
        if isinstance(self.leave, Forbidden):
            assert self.running is None, "something runs against the owner's will"
        elif not self.leave.take and self.volunteer.phase is Phase.IDLE:
            assert self.running is None, "it goes on asking for work without leave"
        return starts

    def answered(self, event: Event) -> None:
        ends = Assigned if self.volunteer.turn and isinstance(event, Assigned) else (Done, Failed)
        if isinstance(event, ends):
            self.running = None

    def started(self, start: Start) -> None:
        assert isinstance(self.leave, Allowed), "started against the owner's will"
        assert start.phase is not Phase.IDLE or self.leave.take, "asked for work without leave"
        assert start.turn not in self.turns, "a turn was used twice"
        assert self.running is None, "two jobs at once"
        assert (start.unit is None) == (start.phase is Phase.IDLE)
        self.turns.add(start.turn)
        self.running = start.turn


@settings(max_examples=150, deadline=None)
@given(st.data(), memories)
def test_the_three_promises_hold_for_any_events(data: st.DataObject, memory: Snapshot) -> None:
    volunteer = Volunteer(PACE, memory, until_over=data.draw(st.booleans()))
    outside = Outside(volunteer, data.draw(st.sampled_from([0.0, 1e6])))
    for _ in range(data.draw(st.integers(1, 40))):
        outside.now += data.draw(leaps)
        event = data.draw(event_for(volunteer))
        if isinstance(event, Assigned) and volunteer.phase is not Phase.IDLE:
            event = Done(event.turn)
        elif isinstance(event, Done) and volunteer.phase is Phase.IDLE:
            event = Assigned(event.turn, "a")
        outside.tell(event)
        assert volunteer.why


@settings(max_examples=80, deadline=None)
@given(st.data(), memories)
def test_it_is_never_stuck(data: st.DataObject, memory: Snapshot) -> None:
    """After any history, a world that answers well brings the unit home within some alarms."""
    volunteer = Volunteer(PACE, memory)
    outside = Outside(volunteer, 0.0)
    for _ in range(data.draw(st.integers(0, 25))):
        outside.now += data.draw(leaps)
        event = data.draw(event_for(volunteer))
        if not isinstance(event, Assigned | Done):
            outside.tell(event)
    starts, home = outside.tell(Allowed()), 0
    for _ in range(60):
        if not starts and outside.running is not None:
            turn, phase = outside.running, volunteer.phase
        elif starts:
            turn, phase = starts[-1].turn, starts[-1].phase
        else:
            outside.now = outside.alarm
            starts = outside.tell(Tick())
            continue
        if phase is Phase.ACK:
            home += 1
        starts = outside.tell(Assigned(turn, "new") if phase is Phase.IDLE else Done(turn))
    assert home >= 2


def allowed(memory: Snapshot | None = None, **more: bool) -> tuple[Volunteer, Start]:
    volunteer = Volunteer(PACE, memory, **more)
    [start, _] = volunteer.handle(Allowed(), 0.0)
    assert isinstance(start, Start)
    return volunteer, start


def test_the_life_of_a_unit() -> None:
    volunteer, start = allowed()
    phases = [start.phase]
    effects = volunteer.handle(Assigned(start.turn, "u"), 1.0)
    while isinstance(effects[0], Start) and effects[0].phase is not Phase.IDLE:
        phases.append(effects[0].phase)
        assert effects[0].unit == "u"
        effects = volunteer.handle(Done(effects[0].turn), 2.0)
    assert phases == list(Phase)
    assert volunteer.why == "node.working"


def test_waits_grow_to_the_cap_and_never_beyond_a_minute() -> None:
    volunteer, start = allowed()
    now, waits = 0.0, []
    for _ in range(6):
        [wake] = volunteer.handle(Failed(start.turn, "network.down"), now)
        assert isinstance(wake, Wake)
        waits.append(wake.at - now)
        now = wake.at
        [start, _] = volunteer.handle(Tick(), now)
        assert isinstance(start, Start)
        assert volunteer.why == "network.down"
    assert 12.0 <= waits[0] <= 15.0 < waits[1] <= 30.0 < waits[2]
    assert all(48.0 <= wait <= 60.0 for wait in waits[2:])


def test_retry_after_is_honoured() -> None:
    volunteer, start = allowed()
    [wake] = volunteer.handle(Failed(start.turn, "work.none", retry_after=7.0), 100.0)
    assert wake == Wake(107.0)
    assert volunteer.why == "work.none"


def test_a_unit_that_cannot_count_is_cleared_and_not_asked_for_in_a_circle() -> None:
    volunteer, start = allowed(Snapshot(Phase.OUTBOX, "u"))
    [clear, _] = volunteer.handle(Failed(start.turn, "unit.closed", final=True), 0.0)
    assert isinstance(clear, Start) and clear.phase is Phase.ACK
    assert volunteer.memory == Snapshot(Phase.ACK, "u", left=True, spoiled=1)
    effects = volunteer.handle(Done(clear.turn), 0.0)
    assert [type(effect) for effect in effects] == [Wake]
    assert volunteer.why == "unit.closed"
    [again, _] = volunteer.handle(Tick(), effects[0].at)
    assert isinstance(again, Start) and again.phase is Phase.IDLE


def test_a_trainer_that_always_dies_is_given_up_but_not_one_that_gets_on() -> None:
    volunteer, start = allowed(Snapshot(Phase.TRAINING, "u"))
    now = 0.0
    for step in range(GIVE_UP - 1):
        now = fail(volunteer, start, now)
        [start, _] = volunteer.handle(Tick(), now)
        assert isinstance(start, Start)
        if step == 1:
            volunteer.handle(Progress(start.turn, 3), now)
    assert volunteer.phase is Phase.TRAINING
    for _ in range(2):
        now = fail(volunteer, start, now)
        effects = volunteer.handle(Tick(), now)
        if isinstance(effects[0], Start):
            start = effects[0]
    fail(volunteer, start, now)
    assert volunteer.phase is Phase.ACK


def fail(volunteer: Volunteer, start: Start, now: float) -> float:
    effects = volunteer.handle(Failed(start.turn, "trainer.failed"), now)
    wake = effects[-1]
    assert isinstance(wake, Wake)
    return wake.at


def test_a_silent_job_is_begun_again() -> None:
    volunteer, start = allowed(Snapshot(Phase.FETCHING, "u"))
    [wake] = volunteer.handle(Progress(start.turn, 5), 10.0)
    assert wake == Wake(10.0 + PATIENCE[Phase.FETCHING])
    effects = volunteer.handle(Tick(), wake.at)
    assert effects[0] == Halt(start.turn)
    assert volunteer.why == "job.silent"
    assert volunteer.handle(Done(start.turn), wake.at)[0] == effects[-1], "its late answer counts"


def test_finish_ends_the_unit_in_hand_and_takes_no_more() -> None:
    volunteer, start = allowed(Snapshot(Phase.OUTBOX, "u"))
    assert [type(one) for one in volunteer.handle(Allowed(take=False), 0.0)] == [Wake]
    [clear, _] = volunteer.handle(Done(start.turn), 0.0)
    assert isinstance(clear, Start)
    assert [type(one) for one in volunteer.handle(Done(clear.turn), 0.0)] == [Wake]
    assert volunteer.why == "owner.finished"


def test_the_end_of_the_network_leaves_what_is_unsent_and_hands_in_the_rest() -> None:
    volunteer, start = allowed(Snapshot(Phase.TRAINING, "u"), until_over=True)
    halt, clear, _ = volunteer.handle(Over(), 0.0)
    assert halt == Halt(start.turn)
    assert isinstance(clear, Start) and clear.phase is Phase.ACK
    assert any(isinstance(one, Quit) for one in volunteer.handle(Done(clear.turn), 0.0))

    volunteer, start = allowed(Snapshot(Phase.OUTBOX, "u"), until_over=True)
    assert [type(one) for one in volunteer.handle(Over(), 0.0)] == [Wake]
    [clear, _] = volunteer.handle(Done(start.turn), 0.0)
    assert isinstance(clear, Start)
    assert any(isinstance(one, Quit) for one in volunteer.handle(Done(clear.turn), 0.0))


def test_without_until_over_it_asks_again_now_and_then() -> None:
    volunteer, _start = allowed()
    effects = volunteer.handle(Over(), 0.0)
    assert not any(isinstance(one, Quit) for one in effects)
    assert volunteer.why == "network.finished"
    [again, _] = volunteer.handle(Tick(), 61.0)
    assert isinstance(again, Start) and again.phase is Phase.IDLE
    volunteer.handle(Assigned(again.turn, "u"), 62.0)
    assert volunteer.why == "node.working"


def test_a_pause_goes_on_with_the_same_phase_at_once() -> None:
    volunteer, start = allowed(Snapshot(Phase.TRAINING, "u"))
    assert volunteer.handle(Forbidden("owner.paused"), 5.0)[0] == Halt(start.turn)
    assert volunteer.why == "owner.paused"
    [again, _] = volunteer.handle(Allowed(), 6.0)
    assert isinstance(again, Start) and (again.phase, again.unit) == (Phase.TRAINING, "u")
