"""Which averages a lineage names: the share that follows, anew behind a revert, in the release."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol.averages import kept_share, released
from paris_protocol.errors import ParisError
from paris_protocol.lineage import Lineage
from paris_protocol.records import Head, Merge, ReleasedExpert, Revert
from protocol.world import COORDINATOR, STEPS, World, check, hexed, tensor_file

EMA = "0.99"


@settings(max_examples=200, deadline=None)
@given(decay=st.floats(0, 0.99999), steps=st.integers(1, 10**6))
def test_the_share_is_a_power_made_of_exact_products(decay: float, steps: int) -> None:
    assert kept_share(decay, steps) == pytest.approx(decay**steps, rel=1e-9, abs=1e-300)
    bits = [i for i in range(steps.bit_length()) if steps >> i & 1]
    powers = [decay]
    for _ in range(bits[-1]):
        powers.append(float(Fraction(powers[-1]) ** 2))  # correctly rounded: what IEEE demands
    share = 1.0
    for i in bits:
        share = float(Fraction(share) * Fraction(powers[i]))
    assert kept_share(decay, steps) == share


@pytest.mark.parametrize(("decay", "steps"), [(1.0, 1), (-0.1, 1), (math.nan, 1), (0.5, 0)])
def test_what_is_no_decay_is_refused(decay: float, steps: int) -> None:
    with pytest.raises(ParisError, match=r"decay|without steps"):
        kept_share(decay, steps)


def code_of(ema: str, **changes: Any) -> str:
    """How the lineage answers to a merge of two units in a network with this ema."""
    world = World(ema)
    units = [world.judge(0, unit)[0] for unit in range(2)]
    merge = world.put(world.merge_record(0, units, **changes), COORDINATOR)
    lineage = Lineage(world.genesis.record)
    try:
        lineage.apply(merge, world.accepted())
    except ParisError as error:
        assert lineage.heads[0] == world.heads[0], "a refusal changes nothing"
        assert not lineage.merged
        return error.code
    return ""


@pytest.mark.parametrize(
    ("ema", "changes", "code"),
    [
        (EMA, {}, ""),
        (EMA, {"published": False}, ""),
        (EMA, {"average": None}, "merge.lineage"),
        (EMA, {"decay": None}, "merge.lineage"),
        (EMA, {"average": None, "decay": None}, "merge.lineage"),
        (EMA, {"decay": kept_share(0.99, STEPS).hex()}, "merge.lineage"),
        (EMA, {"decay": math.nextafter(kept_share(0.99, 2 * STEPS), 1).hex()}, "merge.lineage"),
        (EMA, {"published": False, "average": tensor_file("average")}, "merge.lineage"),
        ("0", {}, ""),
        ("0", {"average": tensor_file("average")}, "merge.lineage"),
        ("0", {"decay": (0.5).hex()}, "merge.lineage"),
    ],
)
def test_a_merge_names_its_average_exactly_when_it_has_to(
    ema: str, changes: dict[str, Any], code: str
) -> None:
    assert code_of(ema, **changes) == code


def test_a_genesis_that_no_recipe_makes_has_no_lineage() -> None:
    world = World(EMA)
    merge = world.merge(0)
    with pytest.raises(ParisError, match="decay"):
        Lineage(World("1.5").genesis.record).apply(merge, world.accepted())


def test_networks_without_averages_write_what_they_always_wrote() -> None:
    world = World()
    record = world.merge(0).record
    assert not {"average", "decay"} & record.model_dump(mode="json").keys()
    assert "ema" not in world.genesis.record.recipe.model_dump(mode="json")


def test_a_release_holds_the_averages_of_the_last_heads() -> None:
    world = World(EMA).lived()
    files = world.release()
    assert check(files).merges == 3
    merges = {each.id: each.record for each in world.log if isinstance(each.record, Merge)}
    earlier = [m.average for m in merges.values() if m.expert == 0 and m.average is not None]
    last = released(world.heads[0], merges)
    assert last == earlier[-1] != world.heads[0].weights
    for root in (world.heads[0].weights.root, earlier[0].root):
        experts = tuple(
            ReleasedExpert(
                expert=i, merge=head.merge,
                root=root if i == 0 else released(head, merges).root,
            )
            for i, head in enumerate(world.heads)
        )  # fmt: skip
        with pytest.raises(ParisError, match="expert 0 is not the last head"):
            check(world.release(experts=experts))


def test_behind_a_revert_and_at_the_beginning_the_head_itself_is_released() -> None:
    initial = Head(round=0, weights=tensor_file("initial"))
    assert released(initial, {}) == initial.weights
    revert = Revert(
        expert=0, revocation=hexed("revocation"), parent=initial, removed=(),
        result=tensor_file("reverted"), numbers=(), policy=1, at=1,
    )  # fmt: skip
    head = Head(round=1, weights=revert.result, merge=hexed("revert"))
    assert released(head, {hexed("revert"): revert}) == revert.result
