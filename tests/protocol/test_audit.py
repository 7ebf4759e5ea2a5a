"""The audit draw: one possible outcome, checkable by anybody, and audit rates that are kept."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_protocol import audit
from paris_protocol.errors import ParisError
from paris_protocol.records import AuditRules, Draw

START = hashlib.sha256(b"start").digest()
LENGTH = 200
ROOT = "ab" * 32


def rules(**changes: object) -> AuditRules:
    value: dict[str, object] = {
        "chain": audit.chain_head(START, LENGTH),
        "chain_length": LENGTH,
        "segments": 2,
        "rate": "10",
        "floor": "0.05",
        "probation": 10,
        "probation_weight": "0.25",
        "vesting": 20,
        "answer_within": 600,
        "retry_within": 3600,
        "auditors": 0,
        "canary": "0",
    }
    return AuditRules.model_validate({**value, **changes})


def drawn(number: int = 3, standing: int = 0, root: str = ROOT) -> Draw:
    secret = audit.chain_value(START, LENGTH, number)
    return audit.make_draw(
        rules(), 100, number=number, size=8, root=root, secret=secret, standing=standing
    )


def test_values_of_the_chain_prove_themselves_against_its_head() -> None:
    head = rules().chain
    for number in (0, 1, 17, LENGTH - 1):
        value = audit.chain_value(START, LENGTH, number)
        assert audit.in_chain(head, LENGTH, number, value)
        assert not audit.in_chain(head, LENGTH, number + 1, value)
        assert not audit.in_chain(head, LENGTH, number, ROOT)
    for number in (-1, LENGTH):
        with pytest.raises(ParisError, match="chain"):
            audit.chain_value(START, LENGTH, number)


@given(st.integers(0, LENGTH - 1), st.integers(0, 300))
def test_an_honest_draw_is_the_only_one(number: int, standing: int) -> None:
    draw = drawn(number, standing)
    audit.check_draw(draw, rules(), 100, root=ROOT, standing=standing)
    assert draw.audited == bool(draw.segments)
    assert all(0 <= segment < 100 for segment in draw.segments)
    assert len(set(draw.segments)) == len(draw.segments)


@pytest.mark.parametrize(
    "change",
    [
        {"audited": False, "segments": ()},
        {"segments": (0, 1)},
        {"standing": 9},
        {"rate": "0.05"},
        {"number": 4},
        {"secret": ROOT},
        {"root": "cd" * 32},
    ],
)
def test_every_other_draw_is_noticed(change: dict[str, object]) -> None:
    false = Draw.model_validate(drawn().model_dump() | change)
    with pytest.raises(ParisError) as refusal:
        audit.check_draw(false, rules(), 100, root=ROOT, standing=0)
    assert refusal.value.code == "audit.draw"


def test_the_rate_falls_with_standing_and_has_a_floor() -> None:
    assert audit.audit_rate(rules(), 0) == 1
    assert audit.audit_rate(rules(), 9) == 1
    assert audit.audit_rate(rules(), 19) == Fraction(1, 2)
    assert audit.audit_rate(rules(), 10_000) == Fraction(1, 20)


def test_drawn_shares_are_the_rates() -> None:
    roots = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(2000)]
    share = sum(drawn(5, 19, root).audited for root in roots) / len(roots)
    assert abs(share - 0.5) < 4 * (0.25 / len(roots)) ** 0.5
    hits = [0] * 100
    for root in roots:
        for segment in drawn(5, 0, root).segments:
            hits[segment] += 1
    assert min(hits) > 10  # no step of a unit is safe; the mean is 40


def test_which_states_an_audit_needs() -> None:
    assert audit.states_to_open((0, 4), exact=True) == (4,)
    assert audit.states_to_open((0, 4), exact=False) == (1, 4, 5)
    assert audit.states_to_open((3, 4), exact=False) == (3, 4, 5)
    assert audit.states_to_open((0,), exact=True) == ()


def test_auditors_are_drawn_by_the_same_seed() -> None:
    nodes = [f"ed25519:{i:064x}" for i in range(9)]
    chosen = audit.draw_auditors(drawn(), nodes, 3)
    assert len(set(chosen)) == 3
    assert chosen == audit.draw_auditors(drawn(), reversed(nodes), 3)
    assert len({audit.draw_auditors(drawn(n), nodes, 3) for n in range(30)}) > 5
