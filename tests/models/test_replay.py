"""A replay finds every deviation in an audited segment, and passes honest work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.lean import new_state as lean_state
from paris_models.lean import state_tensors as lean_tensors
from paris_models.numerics import numeric_class
from paris_models.plans import PLANS, Plan
from paris_models.replay import (
    FAR,
    SegmentFound,
    audit_segments,
    committed_steps,
    distance,
    model_class,
    replay,
    train_whole,
)
from paris_models.shards import ClipTable, read_shards
from paris_models.train import deterministic, new_state, state_tensors, train_step
from paris_models.updates import spectrum
from tinynet import TinyNet, root_of

State = dict[str, Tensor]
LIMITS = (0.02, 0.1)


@dataclass(frozen=True)
class Trained:
    """An honest unit with all its committed states."""

    config: ExpertConfig
    recipe: RecipeConfig
    unit: UnitConfig
    clips: ClipTable
    parent: State
    roots: list[str]
    states: dict[int, State]

    def audit(self, *segments: int, **changes: Any) -> list[SegmentFound]:
        """Audits segments of what `changes` claims; the auditor uses the honest assignment."""
        asked: dict[str, Any] = {"roots": self.roots, "opened": self.states, "exact": True}
        asked |= {"limits": LIMITS, **changes}
        return audit_segments(
            self.config, self.recipe, self.unit, self.clips, self.parent, segments=segments,
            root_of=root_of, **asked,
        )  # fmt: skip


def trained(net: TinyNet, unit: UnitConfig, clips: ClipTable, steps: int | None = None) -> Trained:
    """Trains and keeps the states; with `steps` only so many of each segment are really taken."""
    from paris_models.checkpoint import load_tensors

    parent = load_tensors(net.head_file)
    state = new_state(net.config, net.recipe, parent)
    states: dict[int, State] = {}
    for place, last in enumerate(committed_steps(unit)):
        replay(state, clips, unit, last if steps is None else min(last, state.step + steps))
        state.step = last
        states[place] = {name: t.clone() for name, t in state_tensors(state).items()}
    roots = [root_of(states[i]) for i in range(len(states))]
    return Trained(net.config, net.recipe, unit, clips, parent, roots, states)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def clips(net: TinyNet) -> ClipTable:
    return read_shards([net.shard(0, 0)])


@pytest.fixture(scope="module")
def honest(net: TinyNet, clips: ClipTable) -> Trained:
    unit = UnitConfig(key=b"k" * 16, steps=13, batch=16, warmup=2, commit_every=5)
    return trained(net, unit, clips)


def claims(other: Trained) -> dict[str, Any]:
    return {"roots": other.roots, "opened": other.states}


def test_honest_work_has_equal_bits(honest: Trained) -> None:
    for found in honest.audit(0, 1, 2):
        assert (found.passed, found.rho, found.tensor, found.limit) == (True, 0.0, 0.0, 0.0)
    opened = {1: honest.states[1]}  # the ends are known by their roots
    assert all(found.passed for found in honest.audit(0, 1, opened=opened))
    for exact in (True, False):
        assert all(found.passed for found in honest.audit(0, 1, 2, exact=exact))


def test_the_whole_unit_is_what_its_segments_are(honest: Trained) -> None:
    state, roots = train_whole(
        honest.config, honest.recipe, honest.unit, honest.clips, honest.parent, root_of
    )
    assert roots == honest.roots
    assert state.step == honest.unit.steps


CHEATS: Mapping[str, Mapping[str, Any]] = {
    "wrong order": {"key": b"o" * 16},
    "half batch": {"batch": 8},
    "rate x 0.8": {"rate_start": 0.8, "rate_end": 0.016},
    "rate x 1.25": {"rate_start": 1.25, "rate_end": 0.025},
    "lower precision": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_deviations_are_found_in_any_segment(net: TinyNet, honest: Trained, cheat: str) -> None:
    liar = trained(net, replace(honest.unit, **CHEATS[cheat]), honest.clips)
    for exact in (True, False):
        for found in honest.audit(0, 1, 2, exact=exact, **claims(liar)):
            assert not found.passed, found


def test_skipped_steps_and_foreign_data_are_found(net: TinyNet, honest: Trained) -> None:
    lazy = trained(net, honest.unit, honest.clips, steps=2)
    foreign = trained(net, honest.unit, read_shards([net.shard(0, 1)]))
    for liar in (lazy, foreign):
        for exact in (True, False):
            assert not any(f.passed for f in honest.audit(0, 1, 2, exact=exact, **claims(liar)))


def test_infinitesimal_steps_are_found(net: TinyNet, honest: Trained) -> None:
    """Whole weights would hardly differ from the parent's; the update does."""
    still = trained(net, replace(honest.unit, rate_start=1e-6, rate_end=1e-6), honest.clips)
    for found in honest.audit(0, 1, 2, exact=False, **claims(still)):
        assert not found.passed
        assert found.rho == pytest.approx(1, abs=0.01)


def test_a_doctored_optimiser_is_found_where_the_weights_are_right(honest: Trained) -> None:
    """The optimiser's state steers the next segment: it is compared as well."""
    states = {i: dict(state) for i, state in honest.states.items()}
    name = next(name for name in states[1] if name.startswith("optimiser.momentum"))
    states[1][name] = 1.5 * states[1][name]
    roots = [root_of(states[i]) for i in range(len(states))]
    found = honest.audit(0, exact=False, roots=roots, opened=states)[0]
    assert found.rho < LIMITS[0]
    assert not found.passed


def test_an_opened_state_must_be_the_committed_one(honest: Trained) -> None:
    other = {**honest.states[1], "step": honest.states[1]["step"].clone()}
    name = "weights.proj_out.bias"
    other[name] = other[name] + 1e-6
    for exact in (True, False):
        found = honest.audit(1, opened={**honest.states, 1: other}, exact=exact)[0]
        assert (found.passed, found.rho) == (False, FAR)


@pytest.mark.parametrize("exact", [True, False])
def test_a_state_must_stand_at_its_own_step(honest: Trained, exact: bool) -> None:
    """A node cannot shift its training by committing to a state that says another step."""
    late = {**honest.states[1], "step": torch.tensor([3])}
    roots = [*honest.roots]
    roots[1] = root_of(late)
    opened = {**honest.states, 1: late}
    for segment in (0, 1):
        assert not honest.audit(segment, roots=roots, opened=opened, exact=exact)[0].passed


def test_values_that_are_no_numbers_fail_and_raise_nothing(honest: Trained) -> None:
    bad = {name: tensor.clone() for name, tensor in honest.states[1].items()}
    bad["weights.proj_out.bias"][0] = float("nan")
    roots = [*honest.roots]
    roots[1] = root_of(bad)
    for segment in (0, 1):
        found = honest.audit(segment, roots=roots, opened={**honest.states, 1: bad}, exact=False)[0]
        assert (found.passed, found.tensor) == (False, FAR)


def test_the_callers_mistakes_are_refused(honest: Trained) -> None:
    with pytest.raises(ValueError, match="segment 3 of 3"):
        honest.audit(3)
    with pytest.raises(ValueError, match="not opened"):
        honest.audit(1, opened={})
    with pytest.raises(ValueError, match="not opened"):
        honest.audit(0, opened={}, exact=False)
    with pytest.raises(ValueError, match="limits"):
        honest.audit(0, exact=False, limits=None)
    with pytest.raises(ValueError, match="roots"):
        honest.audit(0, roots=honest.roots[:-1])


def test_other_threads_stay_within_a_small_tolerance(net: TinyNet, honest: Trained) -> None:
    other = trained(net, replace(honest.unit, threads=2), honest.clips)
    for segment in range(3):
        begin, end = honest.states[segment], honest.states[segment + 1]
        rho, tensor = distance(begin, end, other.states[segment + 1])
        assert rho < 0.02 and tensor < 0.1


def test_a_machine_of_equal_bits_has_one_class(net: TinyNet) -> None:
    asked: dict[str, Any] = {"batch": 8, "dtype": "float32", "threads": 1, "kernels": "reference"}
    first = numeric_class(net.config, net.recipe, **asked)
    numeric_class.cache_clear()
    assert numeric_class(net.config, net.recipe, **asked) == first
    for change in ({"dtype": "bfloat16"}, {"threads": 2}, {"kernels": "fast"}):
        assert numeric_class(net.config, net.recipe, **{**asked, **change}) != first
    assert model_class(net.config, net.recipe) == f"flux-{net.config.parameters}-muon-x0"


def test_the_self_test_leaves_torch_as_it_was(net: TinyNet) -> None:
    numeric_class.cache_clear()
    deterministic("fast")
    before = torch.get_num_threads()
    numeric_class(
        net.config, net.recipe, batch=8, dtype="float32", threads=before + 1, kernels="reference"
    )
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["lora-16-nf4", "adafactor"])
def test_a_unit_under_another_plan_is_replayed_under_it(
    net: TinyNet, clips: ClipTable, name: str
) -> None:
    from paris_models.checkpoint import load_tensors

    plan, parent = PLANS[name], load_tensors(net.head_file)
    unit = UnitConfig(key=b"k" * 16, steps=6, batch=8, commit_every=3, dtype="bfloat16")

    def audited(by: UnitConfig, under: Plan = plan) -> list[bool]:
        state, roots = train_whole(net.config, net.recipe, by, clips, parent, root_of, plan=plan)
        start = lean_state(under, net.config, net.recipe, parent, key=unit.key)
        replay(start, clips, unit, 3)
        opened = {1: lean_tensors(start)}
        found = audit_segments(
            net.config, net.recipe, unit, clips, parent, roots, opened, [0, 1], exact=True,
            limits=None, root_of=root_of, plan=under,
        )  # fmt: skip
        assert state.step == by.steps
        return [one.passed for one in found]

    assert audited(unit) == [True, True]
    assert not any(audited(replace(unit, key=b"o" * 16)))
    assert not any(audited(unit, PLANS["lora-32-nf4"]))
    assert model_class(net.config, net.recipe, plan) == f"flux-{net.config.parameters}-{name}"


def test_swapping_blocks_changes_no_numeric_class(net: TinyNet) -> None:
    asked: dict[str, Any] = {"batch": 4, "dtype": "bfloat16", "threads": 1, "kernels": "reference"}
    plan = PLANS["adafactor"]
    classes = {
        numeric_class(net.config, net.recipe, plan=one, **asked)
        for one in (plan, replace(plan, swap=2))
    }
    assert len(classes) == 1
    renamed = numeric_class(net.config, net.recipe, plan=replace(plan, name="x"), **asked)
    assert renamed not in classes, "the class does not name the plan"
    assert numeric_class(net.config, net.recipe, **asked) not in classes


def test_kernels_of_the_unit_are_used(honest: Trained) -> None:
    for kernels, wanted in (("fast", False), ("reference", True)):
        state = new_state(honest.config, honest.recipe, honest.parent)
        train_step(state, honest.clips, replace(honest.unit, kernels=kernels))
        assert torch.are_deterministic_algorithms_enabled() == wanted


def test_a_low_rank_fake_shows_in_the_spectrum(honest: Trained) -> None:
    prefix = "weights."
    update = {
        name.removeprefix(prefix): tensor - honest.parent[name.removeprefix(prefix)]
        for name, tensor in honest.states[3].items()
        if name.startswith(prefix)
    }
    spectral, rank = spectrum(update)
    assert 0.1 < spectral < 0.8 and rank > 0.1
    fake = {
        n: t.mean(1, keepdim=True).expand_as(t) if t.ndim == 2 else t for n, t in update.items()
    }
    assert spectrum(fake)[0] == pytest.approx(1, abs=1e-3)
    assert spectrum(fake)[1] < rank / 2
    name = next(n for n in update if n.startswith("transformer_blocks") and update[n].ndim == 2)
    one = {name: update[name]}
    exact = float(torch.linalg.matrix_norm(update[name], 2) / update[name].norm())
    assert spectrum(one)[0] == pytest.approx(exact, rel=0.02)
    assert spectrum({name: torch.zeros(3, 3)}) == (0.0, 0.0)


def test_the_last_state_is_always_committed() -> None:
    assert committed_steps(UnitConfig(key=b"k" * 16, steps=7, batch=1)) == (0, 7)
    assert committed_steps(UnitConfig(key=b"k" * 16, steps=6, batch=1, commit_every=3)) == (0, 3, 6)
