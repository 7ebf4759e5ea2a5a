"""Dishonest contributions for `verify`, and which layer refuses each of them.

*Gross* damage must be caught by L0 to L3 alone; *quiet* cheating may pass these and must be caught
by L4 when it is audited. Each attack starts from an honest unit of its own seed::

    found = gross(lab, ["gross 0", "gross 1"])       # [{"kind": "flip", "refusal": "L2 …"}, …]
    found = quiet(lab, ["quiet 0"])                  # also "audit": "audit.mismatch"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.verify_lab import Lab, Weights, Work, hexed, root_of, trained, unit_of
from benchmarks.verify_learn import context, drop
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.expert import build_expert
from paris_models.shards import ClipTable
from paris_models.train import TrainState, state_tensors, weights
from paris_models.updates import apply_update, cosine
from paris_protocol.audit import choose
from paris_protocol.records import Assignment

Json = dict[str, Any]


def generator(*name: object) -> torch.Generator:
    """Random numbers that follow from a name."""
    return torch.Generator().manual_seed(int(hexed(name)[:12], 16))


def noise(update: Weights, factor: float, name: str) -> Weights:
    """Gaussian noise with `factor` times the update's norm."""
    source = generator("noise", name)
    drawn = {n: torch.randn(t.shape, generator=source) for n, t in update.items()}
    scale = factor * norm(update) / norm(drawn)
    return {n: scale * t for n, t in drawn.items()}


def norm(update: Weights) -> float:
    """Euclidean norm over all tensors."""
    return float(torch.cat([t.double().flatten() for t in update.values()]).norm())


def scaled(update: Weights, factor: float) -> Weights:
    """A multiple of an update."""
    return {name: factor * tensor for name, tensor in update.items()}


def shuffled(clips: ClipTable, name: str) -> ClipTable:
    """The same clips with each other's captions."""
    return replace(
        clips, caption=clips.caption[torch.randperm(len(clips), generator=generator(name))]
    )


def on_noise(clips: ClipTable, name: str) -> ClipTable:
    """Noise in the place of latents."""
    return replace(
        clips, latents=torch.randn(clips.latents.shape, generator=generator("latents", name))
    )


def few(clips: ClipTable, name: str) -> ClipTable:
    """Eight of the clips, over and over."""
    return clips.rows(torch.randperm(len(clips), generator=generator("few", name))[:8])


def random_weights(lab: Lab, name: str) -> Weights:
    """The update that replaces the head by a fresh expert."""
    seed = int(hexed(name)[:6], 16)
    fresh = dict(build_expert(lab.size.expert, seed=seed).named_parameters())
    return {n: fresh[n].detach() - tensor for n, tensor in lab.parent.items()}


def gross(lab: Lab, seeds: Sequence[str]) -> list[Json]:
    """Honest work, gross damage and copies of each seed, judged by L0 to L3."""
    found = []
    known = context(lab)
    for seed in seeds:
        honest = lab.work(lab.assignment(seed))
        others = [{"id": "first", "node": honest.assignment.node, "path": str(honest.update)}]
        for kind, make in {"honest": None, **gross_work(lab, honest, seed)}.items():
            work = make() if make else honest
            refusal, _ = lab.judge(work, others=others, **known)
            found.append({"kind": kind, "refusal": refusal, "alike": alike(lab, work, honest)})
            drop([work] if work is not honest else [])
        drop([honest])
    return found


def alike(lab: Lab, work: Work, honest: Work) -> bool:
    """Whether a test of whole weights takes it for honest: cosine above .9 (trust D9)."""
    claim, known = (apply_update(lab.parent, load_tensors(w.update)) for w in (work, honest))
    return cosine(claim, known) > 0.9


def gross_work(lab: Lab, honest: Work, seed: str) -> dict[str, Callable[[], Work]]:
    """Gross damage and copies that begin with one honest unit."""
    assignment, roots = honest.assignment, honest.commitment.states
    clips, update = lab.own_clips(assignment), load_tensors(honest.update)
    thief = lab.assignment(f"thief of {seed}")  # another node hands in nearly the same
    copied = apply_update(update, noise(update, 0.1, seed))
    return {
        "random weights": lambda: lab.hand_in(assignment, random_weights(lab, seed), roots),
        "noise": lambda: lab.hand_in(assignment, noise(update, 1.0, seed), roots),
        "loud noise": lambda: lab.hand_in(assignment, noise(update, 10.0, seed), roots),
        "flip": lambda: lab.hand_in(assignment, scaled(update, -1.0), roots),
        "x3": lambda: lab.hand_in(assignment, scaled(update, 3.0), roots),
        "noise latents": lambda: lab.work(assignment, clips=on_noise(clips, seed)),
        "8 clips": lambda: lab.work(assignment, clips=few(clips, seed)),
        "unchanged": lambda: lab.hand_in(assignment, scaled(update, 0.0), roots),
        "copy": lambda: lab.hand_in(thief, copied, roots),
    }


def quiet(lab: Lab, seeds: Sequence[str]) -> list[Json]:
    """Quiet cheating of each seed, judged by L0 to L3 and audited whatever they say."""
    found = []
    known = context(lab)
    for seed in seeds:
        assignment = lab.assignment(seed)
        for kind, make in quiet_work(lab, assignment, seed).items():
            work = make()
            refusal, _ = lab.judge(work, **known)
            audit = lab.audit(work, drawn(lab, assignment))
            found.append({"kind": kind, "refusal": refusal, "audit": audit["code"]})
            drop([work])
    return found


def quiet_work(lab: Lab, assignment: Assignment, seed: str) -> dict[str, Callable[[], Work]]:
    """The quiet attacks on one unit, each with states that were committed to."""
    clips, keep = lab.own_clips(assignment), range(places(lab))
    elsewhere = lab.clips(1, [assignment.unit])
    return {
        "lazy": lambda: lazy(lab, assignment),
        "tenth of noise": lambda: tenth(lab, assignment, seed),
        "wrong cluster": lambda: lab.work(assignment, clips=elsewhere, keep=keep),
        "shuffled captions": lambda: lab.work(assignment, clips=shuffled(clips, seed), keep=keep),
    }


def places(lab: Lab) -> int:
    """How many states a unit commits to."""
    return lab.size.steps // lab.size.every + 1


def drawn(lab: Lab, assignment: Assignment) -> tuple[int, ...]:
    """The two segments that an audit of this unit draws."""
    seed = bytes.fromhex(hexed("audit", assignment.seed))
    return tuple(sorted(choose(seed, b"segment", 2, places(lab) - 1)))


def lazy(lab: Lab, assignment: Assignment) -> Work:
    """A tenth of the steps with a decay of their own, the rest made up."""
    unit = replace(unit_of(assignment), steps=max(1, assignment.steps // 10), commit_every=0)
    state = lab.fresh()
    trained(state, lab.own_clips(assignment), unit)
    return pretend(lab, assignment, state)


def tenth(lab: Lab, assignment: Assignment, seed: str) -> Work:
    """No training at all: a tenth of a unit's norm in noise."""
    drift = noise(lab.parent, 1.0, seed)
    factor = 0.1 * float(context(lab)["history"][0])  # relative to the parent's norm
    state = lab.fresh()
    tensors = {n: t + factor * drift[n] for n, t in lab.parent.items()}
    with torch.no_grad():
        for name, tensor in weights(state).items():
            tensor.copy_(tensors[name])
    return pretend(lab, assignment, state)


def pretend(lab: Lab, assignment: Assignment, state: TrainState) -> Work:
    """Hand in a state as if it had come from all the steps; every committed state repeats it."""
    result: dict[str, Tensor] = {n: t.clone() for n, t in weights(state).items()}
    begin = state_tensors(lab.fresh())
    roots, states = [root_of(begin)], {}
    for place in range(1, places(lab)):
        claimed = state_tensors(state) | {"step": torch.tensor([place * lab.size.every])}
        root = root_of(claimed)
        roots.append(root)
        states[place] = lab.folder / f"state-{root[:24]}.safetensors"
        save_tensors(claimed, states[place])
    update = {n: result[n] - lab.parent[n] for n in lab.parent}
    work = lab.hand_in(assignment, update, roots)
    work.states = states
    return work
