"""Volunteers for the arena: they lease, train, hand in and lay open over the real client.

`Work` is a unit as its player hands it in, with every committed state; a dishonest player gives
another `Work` than honest training would::

    work = await player.unit(tamper=lambda work: work.with_update(scaled(work.update, -1)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.numerics import numeric_class
from paris_models.shards import ClipTable, read_shards
from paris_models.train import TrainState, new_state, state_tensors, train_step
from paris_models.updates import make_update
from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.canonical import canonical
from paris_protocol.envelope import Sealed, seal, unseal
from paris_protocol.keys import peer_id
from paris_protocol.lineage import committed_steps
from paris_protocol.net.control import HttpControl
from paris_protocol.records import (
    Assignment,
    Beat,
    BlobRef,
    Challenge,
    Commitment,
    Contribution,
    LeaseRequest,
    Opening,
    OpenState,
    Registration,
    TensorFile,
)
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root
from tinynet import key, root_of

if TYPE_CHECKING:
    from adversary.arena import Arena

Tensors = dict[str, torch.Tensor]


@dataclass
class Work:
    """A unit as its player hands it in; `states` are what the roots were taken from."""

    player: Player
    assignment: Sealed[Assignment]
    parent: Tensors
    states: list[Tensors]
    roots: list[str]
    update: Tensors
    numerics: str | None
    id: str = ""
    commitment: str = ""
    kept: dict[int, Path] = field(default_factory=dict)

    def with_update(self, update: Tensors) -> Work:
        """The same work with another result, committed to consistently."""
        return replace(self, update=update)


Tamper = Callable[[Work], Work]
Cheat = Callable[["Player", Sealed[Assignment], Tensors], Work]


class Player:
    """A volunteer of the network, honest unless it is told otherwise."""

    def __init__(self, arena: Arena, name: str, numerics: str | None = "own") -> None:
        self.arena, self.name, self.key = arena, name, key(name)
        self.told = numerics
        self.open_works: dict[str, Work] = {}
        genesis = arena.office.genesis.record
        self.config = ExpertConfig.from_record(genesis.expert)
        self.recipe = RecipeConfig.from_record(genesis.recipe)

    @property
    def id(self) -> str:
        """The node's key id."""
        return self.key.id

    def control(self) -> HttpControl:
        """A new client of the coordinator."""
        return HttpControl(self.arena.url, self.arena.network)

    def seal(self, record: Any) -> Sealed[Any]:
        """Sign a record for the network."""
        return seal(record, self.key, self.arena.network)

    async def post(self, verb: str, raw: bytes) -> dict[str, Any]:
        """One request over HTTP."""
        async with self.control() as control:
            return await control.post(verb, raw)

    async def register(self) -> None:
        """Make the key known."""
        record = Registration(
            node=self.id, peer_id=peer_id(self.id), version="0.1.0", at=self.arena.now
        )
        await self.post("register", self.seal(record).raw)

    async def lease(self) -> Sealed[Assignment]:
        """Ask for work."""
        record = LeaseRequest(
            at=self.arena.now, version="0.1.0", name=self.name, device="cpu", memory_mb=64_000,
            disk_mb=64_000,
        )  # fmt: skip
        answer = await self.post("lease", self.seal(record).raw)
        raw = canonical(answer["assignment"])
        return unseal(raw, Assignment, self.arena.network, {self.arena.office.key.id})

    # ------------------------------------------------------------ training

    def parent(self, assignment: Assignment) -> Tensors:
        """The head that the assignment names."""
        return load_tensors(self.arena.office.head_file(assignment.parent))

    def clips(self, assignment: Assignment) -> ClipTable:
        """The clips of the assignment's shards."""
        store = self.arena.office.store
        return read_shards([store.path(shard.file.blob) for shard in assignment.shards])

    def fresh(self, parent: Mapping[str, torch.Tensor]) -> TrainState:
        """The parent with a fresh optimiser."""
        return new_state(self.config, self.recipe, parent)

    def train(
        self,
        assignment: Sealed[Assignment],
        parent: Tensors,
        *,
        clips: ClipTable | None = None,
        skip: Callable[[int], bool] = lambda step: False,
        **changes: Any,
    ) -> Work:
        """Train the unit and keep its committed states.

        Cheats: other `clips`, steps that are only counted (`skip`), changed fields of the unit.
        """
        record = assignment.record
        table = self.clips(record) if clips is None else clips
        unit = replace(UnitConfig.from_record(record, unit_key(record.seed)), **changes)
        state = self.fresh(parent)
        wanted = committed_steps(record.steps, record.commit_every)
        states = [snapshot(state)]
        while state.step < record.steps:
            if skip(state.step):
                state.step += 1
            else:
                train_step(state, table, unit)
            if state.step in wanted:
                states.append(snapshot(state))
        return self.work_of(assignment, parent, states)

    def work_of(
        self, assignment: Sealed[Assignment], parent: Tensors, states: Sequence[Tensors]
    ) -> Work:
        """The work that these committed states tell of."""
        record = assignment.record
        last = {n.removeprefix("weights."): t for n, t in states[-1].items()
                if n.startswith("weights.")}  # fmt: skip
        numerics = self.told
        if numerics == "own":
            numerics = numeric_class(
                self.config, self.recipe, batch=record.batch, dtype=record.dtype,
                threads=record.threads, kernels=record.kernels,
            )  # fmt: skip
        return Work(
            self, assignment, parent, list(states), [root_of(state) for state in states],
            make_update(parent, last, record.update_codec), numerics,
        )  # fmt: skip

    # ------------------------------------------------------------ handing in

    def statements(self, work: Work) -> tuple[Sealed[Commitment], Sealed[Contribution], bytes]:
        """Commitment, contribution and update file of a work."""
        folder = self.arena.folder / "updates"
        folder.mkdir(exist_ok=True)
        path = folder / f"{work.assignment.id[:16]}-{root_of(work.update)[:8]}.safetensors"
        save_tensors(work.update, path)
        data = path.read_bytes()
        record = work.assignment.record
        commitment = self.seal(
            Commitment(
                assignment=work.assignment.id, states=tuple(work.roots),
                states_root=states_root(work.roots), update_root=root_of(work.update),
                steps=record.steps,
            )
        )  # fmt: skip
        update = TensorFile(blob=Manifest.build([data]).ref, root=root_of(work.update))
        contribution = self.seal(
            Contribution(
                assignment=work.assignment.id, commitment=commitment.id, update=update,
                steps=record.steps, samples=record.steps * record.batch, loss="0.5", seconds=3,
                numerics=work.numerics,
            )
        )  # fmt: skip
        return commitment, contribution, data

    async def hand_in(self, work: Work) -> Work:
        """Commit, hand in, upload."""
        commitment, contribution, data = self.statements(work)
        async with self.control() as control:
            await control.post("commitments", commitment.raw)
            await control.post("contributions", contribution.raw)
            await upload(control, contribution.record.update.blob, data)
            await control.post("contributions", contribution.raw)
        done = replace(work, id=contribution.id, commitment=commitment.id)
        self.open_works[done.id] = done
        return done

    async def unit(self, *, tamper: Tamper | None = None, cheat: Cheat | None = None) -> Work:
        """One unit from the lease to the hand-in."""
        assignment = await self.lease()
        parent = self.parent(assignment.record)
        work = self.train(assignment, parent) if cheat is None else cheat(self, assignment, parent)
        return await self.hand_in(work if tamper is None else tamper(work))

    # ------------------------------------------------------------ audits

    async def challenges(self) -> list[Sealed[Challenge]]:
        """What the coordinator asks this node to lay open, from the answer to a beat."""
        beat = Beat(at=self.arena.now, assignment=None, step=0, state="training")
        answer = await self.post("beat", self.seal(beat).raw)
        keys = {self.arena.office.key.id}
        return [
            unseal(canonical(each), Challenge, self.arena.network, keys)
            for each in answer.get("challenges", ())
        ]

    def opening(
        self, challenge: Sealed[Challenge], states: Mapping[int, Tensors]
    ) -> tuple[Sealed[Opening], dict[str, tuple[BlobRef, bytes]]]:
        """The answer to a challenge from these states, and the blobs to upload."""
        opened, blobs = [], {}
        for index in challenge.record.states:
            path = self.arena.folder / f"state-{self.name}-{index}.safetensors"
            save_tensors(states[index], path)
            data = path.read_bytes()
            ref = Manifest.build([data]).ref
            blobs[ref.id] = (ref, data)
            file = TensorFile(blob=ref, root=root_of(states[index]))
            opened.append(OpenState(index=index, file=file))
        record = Opening(
            challenge=challenge.id, contribution=challenge.record.contribution, states=tuple(opened)
        )
        return self.seal(record), blobs

    async def answer(self) -> int:
        """Lay open whatever is asked for; how many challenges that were."""
        asked = await self.challenges()
        for challenge in asked:
            work = self.open_works[challenge.record.contribution]
            await self.lay_open(challenge, dict(enumerate(work.states)))
        return len(asked)

    async def lay_open(
        self, challenge: Sealed[Challenge], states: Mapping[int, Tensors]
    ) -> dict[str, Any]:
        """Send an opening and its states' bytes; the coordinator's last answer."""
        opening, blobs = self.opening(challenge, states)
        async with self.control() as control:
            answer = await control.post("openings", opening.raw)
            for id in answer["lacking"]:
                await upload(control, *blobs[id])
            return await control.post("openings", opening.raw)


async def upload(control: HttpControl, ref: BlobRef, data: bytes) -> None:
    """A whole blob, piece by piece."""
    await control.put_manifest(ref, Manifest.build([data]).raw)
    for number in range(-(-len(data) // PIECE)):
        await control.put_piece(ref, number, data[number * PIECE : (number + 1) * PIECE])


def snapshot(state: TrainState) -> Tensors:
    """A copy of the whole training state."""
    return {name: tensor.detach().clone() for name, tensor in state_tensors(state).items()}


def noise(update: Tensors, seed: int = 5) -> Tensors:
    """Gaussian noise with the norm of every tensor of an update."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(t.shape, generator=generator) for n, t in update.items()}
    return {n: d * (update[n].norm() / d.norm().clamp_min(1e-12)) for n, d in drawn.items()}


def added(a: Tensors, b: Tensors, factor: float = 1.0) -> Tensors:
    """a + factor · b."""
    return {name: a[name] + factor * b[name] for name in a}


def scaled(update: Tensors, factor: float) -> Tensors:
    """A multiple of an update."""
    return {name: factor * tensor for name, tensor in update.items()}


def flat(update: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All numbers of an update as one vector (float64)."""
    return torch.cat([update[name].double().flatten() for name in sorted(update)])
