"""Rows about what an update looks like: empty, noise, flipped, inflated, copied, colluding, fitted.

L2 and L3 see these; where they let something through, the residual damage to the merged head is
measured and bounded here, and docs/threat-model.md says the number.
"""

from __future__ import annotations

import math

import pytest
import torch

from adversary.lab import Lab
from adversary.players import Tensors, added, flat, noise, scaled
from paris_models.evaluate import held_out_losses, paired
from paris_models.shards import read_shards
from paris_models.updates import apply_update, cosine
from tinynet import NODES


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def damage(lab: Lab, updates: list[Tensors], clip: bool = True) -> float:
    """The merged head's loss relative to the clean run's."""
    return lab.loss(lab.merge(updates, clip=clip)) / lab.loss(lab.merge(lab.updates)) - 1


def test_honest_twins_pass_and_help(lab: Lab) -> None:
    for update in lab.updates:
        assert lab.judge(update) == ("", "accepted")
    assert lab.loss(lab.merge(lab.updates)) < lab.loss(lab.parent)


# ---------------------------------------------------------------- zero update / parent copy


@pytest.mark.parametrize("factor", [0.0, 1e-8, 1e-4, 1e-2])
def test_empty_and_nearly_empty_updates_are_refused(lab: Lab, factor: float) -> None:
    assert lab.judge(scaled(lab.updates[0], factor)) == ("L2", "statistics.zero")


def test_a_cosine_of_whole_weights_would_see_nothing(lab: Lab) -> None:
    """What other networks test: parent copies, noise and flipped signs all look honest to it."""
    honest = apply_update(lab.parent, lab.updates[0])
    lies = {
        "the parent itself": lab.parent,
        "noise": apply_update(lab.parent, noise(lab.updates[0])),
        "sign flipped": apply_update(lab.parent, scaled(lab.updates[0], -1.0)),
    }
    for name, weights in lies.items():
        assert cosine(weights, honest) > 0.97, name
    for update in (scaled(lab.updates[0], 0.0), noise(lab.updates[0]), scaled(lab.updates[0], -1)):
        assert lab.judge(update)[0] == "L2"


# ---------------------------------------------------------------- noise, sign flip, inflation


def vandalism(update: Tensors) -> dict[str, Tensors]:
    """BTARD's attacks and their kin."""
    one = {name: torch.ones_like(tensor) for name, tensor in update.items()}
    size = flat(update).norm() / flat(one).norm()
    return {
        "noise of its norm": noise(update),
        "noise tenfold": scaled(noise(update), 10),
        "sign flip": scaled(update, -1),
        "sign flip, fivefold": scaled(update, -5),
        "tenfold": scaled(update, 10),
        "constant direction": scaled(one, float(size)),
        "random weights": {n: torch.randn_like(t) for n, t in update.items()},
    }


def test_vandals_are_refused(lab: Lab) -> None:
    for name, lie in vandalism(lab.updates[1]).items():
        layer, code = lab.judge(lie)
        assert layer in ("L2", "L3"), (name, code)


def test_noise_on_honest_work_is_bounded_where_it_is_not_seen(lab: Lab) -> None:
    """Said openly: a mixture that still helps passes L2 and L3. The replay audit finds it."""
    lie = added(scaled(lab.updates[1], 0.5), noise(lab.updates[1]))
    assert lab.judge(lie) == ("", "accepted")
    assert damage(lab, [lab.updates[0], lie, *lab.updates[2:]]) < RESIDUAL
    assert lab.judge(added(lie, noise(lie), 3.0))[0] in ("L2", "L3")


@pytest.mark.parametrize("name", ["noise tenfold", "sign flip, fivefold"])
def test_clipping_alone_bounds_a_vandal_among_four(lab: Lab, name: str) -> None:
    """L2 to L4 switched off: the clip and the weights are all that stands."""
    lie = vandalism(lab.updates[3])[name]
    clipped = damage(lab, [*lab.updates[:3], lie])
    free = damage(lab, [*lab.updates[:3], lie], clip=False)
    assert clipped < free / 3
    assert clipped < 0.2, "a tiny expert in its first round; docs/threat-model.md has the demo's"


# ---------------------------------------------------------------- copies


def test_the_later_of_two_alike_is_the_copy_however_disguised(lab: Lab) -> None:
    first, thief = NODES[1].id, NODES[0].id
    others = [lab.rival(lab.updates[2], "first", first)]
    names = sorted(lab.updates[2])
    disguises = {
        "as it is": lab.updates[2],
        "a little noise": added(lab.updates[2], noise(lab.updates[2]), 0.2),
        "scaled": scaled(lab.updates[2], 0.8),
        "some tensors of his own": {
            n: lab.updates[2][n] if i % 8 else lab.updates[0][n] for i, n in enumerate(names)
        },
        "rounded": {n: t.bfloat16().float() for n, t in lab.updates[2].items()},
        "mixed with his own": added(scaled(lab.updates[2], 0.85), lab.updates[0], 0.15),
    }
    for name, lie in disguises.items():
        assert lab.judge(lie, others=others) == ("L2", "statistics.copy"), name
        # Who was first is not asked again: against his own earlier work nobody is a copier.
        own = [lab.rival(lab.updates[2], "own", thief)]
        assert lab.judge(lie, others=own)[1] != "statistics.copy", name
    assert lab.judge(lab.updates[0], others=others) == ("", "accepted")


def test_half_a_copy_is_not_seen_by_the_copy_test(lab: Lab) -> None:
    """Said openly: below the cosine of the policy it counts as own work; the replay finds it."""
    others = [lab.rival(lab.updates[2], "first", NODES[1].id)]
    half = added(scaled(lab.updates[2], 0.5), lab.updates[0], 0.5)
    assert lab.judge(half, others=others) == ("", "accepted")


# ---------------------------------------------------------------- colluders: ALIE and IPM


def alie(updates: list[Tensors], z: float) -> Tensors:
    """A little is enough: the colluders' mean less z standard deviations, number by number."""
    mean = {n: torch.stack([u[n] for u in updates]).mean(0) for n in updates[0]}
    spread = {n: torch.stack([u[n] for u in updates]).std(0) for n in updates[0]}
    return added(mean, spread, -z)


def ipm(updates: list[Tensors], epsilon: float) -> Tensors:
    """Inner product manipulation: a negative multiple of the mean."""
    mean = {n: torch.stack([u[n] for u in updates]).mean(0) for n in updates[0]}
    return scaled(mean, -epsilon)


RESIDUAL = 0.06
"""Largest relative loss that two colluders of four get past L2 and L3 here, in a single round."""


def test_colluders_are_refused_or_bounded(lab: Lab, record_property: object) -> None:
    worst, passed = 0.0, []
    for name, lie in {
        **{f"ALIE z={z}": alie(lab.updates, z) for z in (0.2, 0.5, 1.0, 1.5, 3.0)},
        **{f"IPM e={e}": ipm(lab.updates, e) for e in (0.1, 0.5, 1.0, 2.0)},
    }.items():
        layer, _ = lab.judge(lie)
        if layer:
            continue
        residual = damage(lab, [*lab.updates[:2], lie, lie])
        passed.append((name, round(residual, 4)))
        worst = max(worst, residual)
    assert callable(record_property)
    record_property("residual", passed)
    print("colluders past L2 and L3:", passed)
    assert worst < RESIDUAL, passed
    assert all(not name.startswith("IPM e=2") for name, _ in passed)


# ---------------------------------------------------------------- hill-climbing on feedback


def test_feedback_teaches_the_noise_of_the_secret_set_to_nobody(lab: Lab) -> None:
    """A node that keeps whatever the verdict calls better gains as much on clips nobody judges."""
    best, kept = scaled(lab.updates[0], 0.5), 0
    start = best
    secret = lab.net.private(0)
    for query in range(16):
        attempt = added(best, noise(lab.updates[0], seed=100 + query), 0.15)
        layers = lab.layers(attempt, private=str(secret))
        if layers[-1].layer != "L3":
            continue
        told = dict(layers[-1].numbers)
        assert set(told) == {"n", "margin", "bucket"}, "no number to climb on"
        if float(told["bucket"]) < 0:
            best, kept = attempt, kept + 1
    assert kept > 0
    table = read_shards([secret])
    config, recipe = lab.net.config, lab.net.recipe
    gains = {}
    for where, clips in (("secret", table), ("disjoint", lab.fresh)):
        losses = [
            held_out_losses(apply_update(lab.parent, u), config, recipe, clips, b"another noise 12")
            for u in (start, best)
        ]
        gains[where] = paired(*losses)
    apart = gains["secret"].delta - gains["disjoint"].delta
    error = math.hypot(gains["secret"].se, gains["disjoint"].se)
    assert abs(apart) < 3 * error, (gains, kept)
