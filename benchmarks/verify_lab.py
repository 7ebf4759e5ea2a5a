"""The small network that `verify` measures on: files on disk, honest work, and the real judge.

Three clusters of the demo's rendered clips with the shipped codec and word table, an expert of
72,352 parameters, units of 40 steps × 16 whose rate decays inside the unit. Everything follows from
seeds, so that another process makes the same network's work::

    lab = Lab(folder); lab.prepare()                 # once; others only open the folder
    work = lab.work(lab.assignment("honest 7"))      # trained honestly, committed, handed in
    refusal, found = lab.judge(work)                 # ("", …) or ("L2 statistics.noise", …)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import paris_models
from paris_coordinator.jobs.replay import replay
from paris_coordinator.jobs.verify import verify
from paris_coordinator.judging import decide
from paris_models import worlds
from paris_models.checkpoint import load_tensors, raw_items, save_tensors
from paris_models.codec import PatchPCA
from paris_models.config import DEMO_RECIPE, LADDER, ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import build_expert
from paris_models.initial import clip_table
from paris_models.shards import ClipTable, concatenate, read_shards, write_shard
from paris_models.text import HashedWords
from paris_models.train import TrainState, new_state, state_tensors, train_step, weights
from paris_models.updates import make_update
from paris_protocol.canonical import decimal
from paris_protocol.envelope import SELF, open_genesis, seal
from paris_protocol.keys import PrivateKey
from paris_protocol.records import (
    Assignment,
    Commitment,
    Contribution,
    Genesis,
    Layer,
    Policy,
)
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root, tensor_root

Json = dict[str, Any]
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """An expert and its unit of work."""

    expert: ExpertConfig
    recipe: RecipeConfig
    steps: int
    batch: int
    every: int


SMALL = Size(
    ExpertConfig(1, 32, 32, 1, 1, 2, 16, (4, 6, 6), 64, 64),
    replace(DEMO_RECIPE, batch=16, lr=1e-3, matrix_lr=0.01),
    steps=40, batch=16, every=5,
)  # fmt: skip
REFERENCE = Size(LADDER["demo"], replace(DEMO_RECIPE, batch=16), steps=500, batch=16, every=5)
"""The reference unit of the trust reference, on the demo's expert."""
DEMO = Size(LADDER["demo"], DEMO_RECIPE, steps=120, batch=96, every=5)
"""The demo's own unit."""
CLUSTERS, SHARDS, CLIPS, SECRET = 3, 4, 400, 512
"""Twice as many secret clips as one test draws, so that they rotate with the head."""
INITIAL_STEPS, MATURE_STEPS, INITIAL_BATCH = 900, 1000, 32
NOW = 1_700_000_000


def hexed(*name: object) -> str:
    """64 hex digits that follow from a name."""
    return sha256(repr(name).encode()).hexdigest()


def root_of(tensors: Mapping[str, Tensor]) -> str:
    """The Merkle root over tensors, as statements name it."""
    return tensor_root(raw_items(tensors))


def plain(record: Any) -> Any:
    """A record as the plain JSON of a job."""
    return json.loads(record.model_dump_json())


@dataclass(slots=True)
class Work:
    """What a node hands in, true or not; `states` are those it kept, by their place."""

    assignment: Assignment
    commitment: Commitment
    contribution: Contribution
    update: Path
    states: dict[int, Path] = field(default_factory=dict)


class Lab:
    """The network in `folder`, at one of its heads."""

    def __init__(self, folder: Path, size: Size = SMALL) -> None:
        self.folder, self.size, self.round = folder, size, 0
        self.head = folder / "initial.safetensors"
        self.rate: Json = {"start": "1", "end": "0.02", "shape": "cosine", "warmup": 5}
        self.phase = "early"

    def at(self, head: Path, turn: int, rate: Json, phase: str) -> Lab:
        """The same network at another head, where units train at another rate.

        `phase`: "early" or "late" in training; each has a policy of its own.
        """
        lab = Lab(self.folder, self.size)
        lab.head, lab.round, lab.rate, lab.phase = head, turn, rate, phase
        return lab

    # ------------------------------------------------------------ the network

    def prepare(self) -> None:
        """Render, encode and write the clips; train the common start; sign genesis and policy."""
        assets = Path(paris_models.__file__).parent / "assets"
        codec = PatchPCA.from_tensors(load_tensors(assets / "codec.safetensors"))
        words = HashedWords.from_tensors(load_tensors(assets / "text.safetensors"))
        per = SHARDS * CLIPS + SECRET + CLIPS
        clips, captions = worlds.render(CLUSTERS * per, seed=900)
        table = clip_table(clips, captions, codec, words)
        for k in range(CLUSTERS):
            mine = torch.arange(per) * CLUSTERS + k
            for i in range(SHARDS):
                write_shard(self.shard(k, i), table.rows(mine[i * CLIPS : (i + 1) * CLIPS]))
            rest = mine[SHARDS * CLIPS :]
            write_shard(self.private(k), table.rows(rest[:SECRET]))
            write_shard(self.folder / f"test{k}.safetensors", table.rows(rest[SECRET:]))
        save_tensors(self._initial(assets), self.head)
        self.sign()

    def sign(self) -> None:
        """Write the signed genesis of this size."""
        root = PrivateKey.from_seed(bytes(32))
        described = json.dumps(_genesis(root.id, self.size))
        sealed = seal(Genesis.model_validate_json(described), root, SELF)
        (self.folder / "genesis.json").write_bytes(sealed.raw)

    def _initial(self, assets: Path) -> Weights:
        """A start that has seen all clusters, but has much to learn of each."""
        if self.size.expert == LADDER["demo"]:
            return load_tensors(assets / "initial.safetensors")
        shards = [self.clips(k, range(SHARDS)) for k in range(CLUSTERS)]
        fresh = build_expert(self.size.expert, seed=0).named_parameters()
        unit = UnitConfig(bytes(16), INITIAL_STEPS, INITIAL_BATCH, warmup=20)
        state = new_state(self.size.expert, DEMO_RECIPE, {n: p.detach() for n, p in fresh})
        return trained(state, concatenate(shards), unit)

    def mature(self) -> None:
        """Write a head that has learnt nearly all of its own cluster."""
        unit = UnitConfig(b"long training of", MATURE_STEPS, INITIAL_BATCH, warmup=20)
        state = new_state(self.size.expert, DEMO_RECIPE, self.parent)
        found = trained(state, self.clips(0, range(SHARDS)), unit)
        save_tensors(found, self.folder / "mature.safetensors")

    def shard(self, cluster: int, i: int) -> Path:
        """Training clips."""
        return self.folder / f"shard{cluster}.{i}.safetensors"

    def private(self, cluster: int) -> Path:
        """Secret clips of a cluster."""
        return self.folder / f"private{cluster}.safetensors"

    def clips(self, cluster: int, shards: Iterable[int]) -> ClipTable:
        """The clips of some shards."""
        return read_shards([self.shard(cluster, i) for i in shards])

    @cached_property
    def genesis(self) -> Genesis:
        """The signed genesis."""
        return open_genesis((self.folder / "genesis.json").read_bytes()).record

    @cached_property
    def parent(self) -> Weights:
        """The head that is trained from."""
        return load_tensors(self.head)

    def fresh(self) -> TrainState:
        """The state in which every unit of this head begins."""
        return new_state(self.size.expert, self.size.recipe, self.parent)

    @property
    def policy_file(self) -> Path:
        """Where the policy of this phase is."""
        return self.folder / f"policy-{self.phase}.json"

    def policy(self) -> Policy:
        """The policy with the margins that `verify_learn` has written."""
        return Policy.model_validate_json(self.policy_file.read_text())

    # ------------------------------------------------------------ work

    def assignment(self, seed: str, **changes: Any) -> Assignment:
        """A unit of the present head for a node of its own; its shard goes with the seed."""
        number = int(hexed(seed)[:8], 16)
        value = {
            "kind": "train", "plan": "float32", "node": f"ed25519:{hexed('node', seed)}",
            "expert": 0, "round": self.round, "unit": number % SHARDS,
            "parent": {"round": self.round, "weights": _file(root_of(self.parent))},
            "shards": [], "seed": hexed("unit", seed), "steps": self.size.steps,
            "batch": self.size.batch, "commit_every": self.size.every,
            "rate": self.rate,
            "optimiser_state": "fresh", "dtype": "float32", "threads": 1, "kernels": "reference",
            "update_codec": "dense-f32", "policy": 1, "issued": NOW,
            "soft_deadline": NOW + 60, "hard_deadline": NOW + 120,
        }  # fmt: skip
        return Assignment.model_validate_json(json.dumps(value | changes))

    def own_clips(self, assignment: Assignment) -> ClipTable:
        """The clips of an assignment."""
        return self.clips(assignment.expert, [assignment.unit])

    def work(
        self,
        assignment: Assignment,
        *,
        clips: ClipTable | None = None,
        unit: UnitConfig | None = None,
        keep: Sequence[int] = (),
        numerics: str | None = None,
    ) -> Work:
        """Train and hand in; on other `clips` or as another `unit`, if the node cheats.

        `keep`: places of the committed states that are kept for an audit.
        """
        state = self.fresh()
        states: dict[int, Path] = {}
        roots = [root_of(state_tensors(state))]

        def commit(state: TrainState) -> None:
            tensors = state_tensors(state)
            place, root = len(roots), root_of(tensors)
            roots.append(root)
            if place in keep:
                states[place] = self.folder / f"state-{root[:24]}.safetensors"
                save_tensors(tensors, states[place])

        data = clips or self.own_clips(assignment)
        result = trained(state, data, unit or unit_of(assignment), commit)
        update = make_update(self.parent, result, assignment.update_codec)
        made = self.hand_in(assignment, update, roots, numerics)
        made.states = states
        return made

    def hand_in(
        self,
        assignment: Assignment,
        update: Weights,
        roots: Sequence[str],
        numerics: str | None = None,
    ) -> Work:
        """Commit to an update, whatever it is, and hand it in."""
        root = root_of(update)
        path = self.folder / f"update-{root[:24]}.safetensors"
        save_tensors(update, path)
        commitment = {
            "assignment": hexed(assignment.seed), "states": list(roots),
            "states_root": states_root(roots), "update_root": root, "steps": assignment.steps,
        }  # fmt: skip
        contribution = {
            "assignment": hexed(assignment.seed), "commitment": hexed("commitment", root),
            "update": _file(root, path.stat().st_size), "steps": assignment.steps,
            "samples": assignment.steps * assignment.batch, "loss": "0.5", "seconds": 1,
            "numerics": numerics,
        }  # fmt: skip
        return Work(
            assignment,
            Commitment.model_validate_json(json.dumps(commitment)),
            Contribution.model_validate_json(json.dumps(contribution)),
            path,
        )

    # ------------------------------------------------------------ the judge

    def job(self, work: Work, **changes: Any) -> Json:
        """The job that judges a contribution, as the coordinator writes it."""
        return {
            "job": "verify", "genesis": str(self.folder / "genesis.json"),
            "assignment": plain(work.assignment), "commitment": plain(work.commitment),
            "contribution": plain(work.contribution), "update": str(work.update),
            "parent": str(self.head), "private": str(self.private(work.assignment.expert)),
            "others": [], "history": [], "policy": plain(self.policy()), "secret": hexed("secret"),
            **changes,
        }  # fmt: skip

    def judge(self, work: Work, **changes: Any) -> tuple[str, Json]:
        """("", answer) when L0 to L3 accept it, else ("layer code", answer)."""
        answer = verify(self.job(work, **changes))
        layers = [Layer.model_validate_json(json.dumps(one)) for one in answer["layers"]]
        accepted, code = decide(layers, self.policy(), work.assignment.round)
        return "" if accepted else f"{layers[-1].layer} {code}", answer

    def audit(self, work: Work, segments: Sequence[int]) -> Json:
        """The replay job's answer about some segments of a contribution whose states were kept."""
        return replay(
            {
                "job": "replay", "genesis": str(self.folder / "genesis.json"),
                "assignment": plain(work.assignment), "commitment": plain(work.commitment),
                "numerics": work.contribution.numerics, "parent": str(self.head),
                "shards": [str(self.shard(work.assignment.expert, work.assignment.unit))],
                "states": [[place, str(path)] for place, path in sorted(work.states.items())],
                "segments": list(segments), "audit": plain(self.policy())["audit"],
            }
        )  # fmt: skip


def unit_of(assignment: Assignment) -> UnitConfig:
    """What training needs of an assignment."""
    return UnitConfig.from_record(assignment, unit_key(assignment.seed))


def trained(
    state: TrainState,
    clips: ClipTable,
    unit: UnitConfig,
    commit: Callable[[TrainState], None] | None = None,
) -> Weights:
    """The weights after the unit; `commit` sees the state at each committed step but the first."""
    while state.step < unit.steps:
        train_step(state, clips, unit)
        last = state.step == unit.steps
        if commit and (last or (unit.commit_every and state.step % unit.commit_every == 0)):
            commit(state)
    return {name: tensor.clone() for name, tensor in weights(state).items()}


def _file(root: str, size: int = 1) -> Json:
    return {"blob": {"id": hexed("blob", root), "size": size}, "root": root}


def _genesis(key: str, size: Size) -> Json:
    recipe = {f: getattr(size.recipe, f) for f in RecipeConfig.__dataclass_fields__}
    spec = {f: getattr(size.expert, f) for f in ExpertConfig.__dataclass_fields__}
    made = {"source": "shipped", "fingerprint": hexed("shipped"), "file": None}
    return {
        "name": "verify", "created": NOW, "root_key": key,
        "geometry": {"frames": 9, "height": 24, "width": 24, "fps": 8},
        "codec": {"kind": "patch-pca", "channels": 32, "frames": 3, "height": 4, "width": 4} | made,
        "text": {"kind": "hashed-words", "length": 6, "dim": 64, "pooled_dim": 64} | made,
        "features": "world", "expert": spec, "initial": _file(hexed("initial")),
        "recipe": {k: decimal(v) if isinstance(v, float) else v for k, v in recipe.items()},
        "router": {"width": 12, "blocks": 1, "heads": 2, "batch": 4, "steps": 1, "lr": "0.001"},
        "sampler": {"steps": 4, "shift": "1", "guidance": "1", "top_k": 1},
        "clusters": [
            {"index": k, "clips": SHARDS * CLIPS, "prior": "0.3", "centroid": ["0"], "shards": []}
            for k in range(CLUSTERS)
        ],
        "licences": [],
    }  # fmt: skip
