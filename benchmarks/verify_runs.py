"""Whole runs of a lineage with one hostile node of four, beside the clean run of the same seeds.

A round is four units of one expert on disjoint shards; its merge is `merging.merge_shares` and the
reproducible sum, as in the coordinator; the rate falls along one cosine over all rounds. "all
layers": every unit is judged by L0 to L3; what passes of the hostile node is replayed (it is in
probation, where everything is), and what is refused an honest node trains again with another seed.
"noise x10" and "flip x5": nothing is judged, only clipped and weighed. "average": not even that.

How much a run loses depends on how much there is to gain. *Late* runs start from a head that knows
its cluster, at a tenth of the rate, where a unit gains some tenths of a per cent of the loss (as in
the trust reference §2.4); *early* ones from the common start at the full rate::

    losses = Runs(lab, "run 0", rounds=4, late=True).all()    # {"clean": .0829, "average": …}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from benchmarks.verify_attacks import (
    drawn,
    gross_work,
    noise,
    norm,
    places,
    quiet_work,
    scaled,
)
from benchmarks.verify_lab import SHARDS, Json, Lab, Weights, Work, hexed, plain, root_of
from benchmarks.verify_learn import drop
from benchmarks.verify_rows import CLIPPED, QUIET
from paris_coordinator.merging import Part, Share, merge_shares
from paris_coordinator.rounds import rate
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.evaluate import held_out_losses
from paris_models.merge import merge
from paris_models.shards import read_shards
from paris_protocol.canonical import decimal

UNITS: Final = SHARDS
HOSTILE: Final = UNITS - 1
"""The unit that the hostile node holds in every round."""
MIXED: Final = ("loud noise", "flip", *QUIET, "noise", "x3")
"""What the hostile node does, round by round, while all layers are on."""


LATE: Final = 0.1
"""Part of the peak rate at which late runs begin."""


@dataclass(slots=True)
class Judgements:
    """What became of the units while all layers were on."""

    refused: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    honest: int = 0
    honest_refused: list[str] = field(default_factory=list)


class Runs:
    """Runs of one set of seeds; units that runs have in common are trained once."""

    def __init__(self, lab: Lab, seed: str, rounds: int, *, late: bool) -> None:
        self.lab, self.seed, self.rounds, self.late = lab, seed, rounds, late
        self.start = lab.folder / "mature.safetensors" if late else lab.head
        self.judgements = Judgements()
        self._trained: dict[tuple[str, str], Weights] = {}
        self._roots: dict[tuple[str, str], Sequence[str]] = {}

    def all(self) -> dict[str, float]:
        """The loss of each run's last head, and of the first, on clips that nobody else uses."""
        start = test_loss(self.lab_at(self.start, 0))
        kinds = ("clean", "average", "all layers", *CLIPPED)
        return {"start": start} | {kind: self.run(kind) for kind in kinds}

    def run(self, kind: str) -> float:
        """One run."""
        lab = self.lab_at(self.start, 0)
        for turn in range(self.rounds):
            updates = [self.honest(lab, self.name(turn, unit)) for unit in range(UNITS)]
            if kind in CLIPPED:
                updates[HOSTILE] = self.spoilt(updates[HOSTILE], kind, turn)
            if kind == "all layers":
                updates[HOSTILE] = self.judged(lab, turn, updates[:HOSTILE])
            head = lab.folder / f"head-{hexed(self.seed, kind)[:16]}-{turn + 1}.safetensors"
            save_tensors(merged(lab.parent, updates, clip=kind != "average"), head)
            lab = self.lab_at(head, turn + 1)
        return test_loss(lab)

    def lab_at(self, head: Path, turn: int) -> Lab:
        """The lab at a head of this run."""
        return self.lab.at(head, turn, self.rate(turn), "late" if self.late else "early")

    def rate(self, turn: int) -> Json:
        """The slice of the run's one cosine that belongs to a round."""
        plan = self.lab.policy().plan.model_copy(
            update={"schedule": "slice", "rounds": self.rounds}
        )
        found: Json = plain(rate(plan, turn))
        factor = LATE if self.late else 1.0
        return found | {end: decimal(factor * float(found[end])) for end in ("start", "end")}

    def name(self, turn: int, unit: int, attempt: int = 0) -> str:
        """The seed of a unit."""
        return f"{self.seed} {turn} {unit} {attempt}"

    def honest(self, lab: Lab, name: str) -> Weights:
        """The update of an honest unit; its shard is its place in the round."""
        key = (root_of(lab.parent), name)
        if key not in self._trained:
            work = lab.work(lab.assignment(name, unit=int(name.split()[-2])))
            self._trained[key] = load_tensors(work.update)
            self._roots[key] = work.commitment.states
            drop([work])
        return self._trained[key]

    def spoilt(self, update: Weights, kind: str, turn: int) -> Weights:
        """What the hostile node makes of its honest update when nothing but clipping is on."""
        if kind == "flip x5":
            return scaled(update, -5.0)
        return noise(update, 10.0, f"{self.seed} {turn}")

    def judged(self, lab: Lab, turn: int, others: list[Weights]) -> Weights:
        """The hostile unit, if all layers let it pass, else an honest node's."""
        known = {"history": [norm(update) / norm(lab.parent) for update in others]}
        name = self.name(turn, HOSTILE)
        attack = MIXED[(turn + int(hexed(self.seed)[:4], 16)) % len(MIXED)]
        work = self.attack(lab, name, attack)
        refusal, _ = lab.judge(work, **known)
        if not refusal:
            refusal = str(lab.audit(work, drawn(lab, work.assignment))["code"])
        hostile = load_tensors(work.update)
        drop([work])
        (self.judgements.refused if refusal else self.judgements.accepted).append(attack)
        again = self.honest(lab, self.name(turn, HOSTILE, 1))
        for unit, update in enumerate([*others, again]):
            name = self.name(turn, unit, int(unit == HOSTILE))
            roots = self._roots[root_of(lab.parent), name]
            honest = lab.hand_in(lab.assignment(name, unit=unit), update, roots)
            wrong, _ = lab.judge(honest, **known)
            drop([honest])
            self.judgements.honest += 1
            self.judgements.honest_refused += [wrong] if wrong else []
        return again if refusal else hostile

    def attack(self, lab: Lab, name: str, kind: str) -> Work:
        """A hostile contribution to this head, with all its states kept for the audit."""
        assignment = lab.assignment(name, unit=HOSTILE)
        if kind in QUIET:
            return quiet_work(lab, assignment, name)[kind]()
        honest = lab.work(assignment, keep=range(places(lab)))
        work = gross_work(lab, honest, name)[kind]()
        work.states = honest.states
        return work


def merged(parent: Weights, updates: Sequence[Weights], *, clip: bool) -> Weights:
    """The next head: clipped and weighed, or the plain mean."""
    parts = [Part(str(i), 1, norm(update)) for i, update in enumerate(updates)]
    shares = merge_shares(parts)
    if not clip:
        shares = [Share(part.contribution, 1 / len(parts), 1.0) for part in parts]
    made = merge(
        {n: t.numpy() for n, t in parent.items()},
        [{n: t.numpy() for n, t in update.items()} for update in updates],
        [share.weight for share in shares],
        [share.scale for share in shares],
    )
    return {name: torch.from_numpy(array) for name, array in made.items()}


def test_loss(lab: Lab) -> float:
    """Mean loss of a head on the test clips of its cluster."""
    clips = read_shards([Path(lab.folder / "test0.safetensors")])
    key = b"the test clips'k"
    losses = held_out_losses(lab.parent, lab.size.expert, lab.size.recipe, clips, key)
    return float(losses.double().mean())
