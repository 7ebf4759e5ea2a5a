"""A real network in small: real clips, codec, expert and files on disk, for tests of heavy work.

Two clusters of moving gradients (one drifts, one pulses), a 4-channel codec, an expert of some
thousand parameters that has learned a little, so that honest units help and attacks hurt.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paris_models.checkpoint import load_tensors, raw_items, save_tensors
from paris_models.codec import PatchPCA
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import build_expert
from paris_models.shards import ClipTable, write_shard
from paris_models.text import HashedWords
from paris_models.train import TrainState, new_state, state_tensors, train_step, weights
from paris_models.updates import make_update
from paris_protocol.blobs import Manifest
from paris_protocol.envelope import SELF, Sealed, seal
from paris_protocol.keys import PrivateKey
from paris_protocol.records import (
    Assignment,
    BlobRef,
    Cluster,
    Codec,
    Commitment,
    Contribution,
    ExpertSpec,
    Genesis,
    Geometry,
    Head,
    Licence,
    Margins,
    Policy,
    Rate,
    Recipe,
    RoundPlan,
    RouterSpec,
    Sampler,
    Shard,
    TensorFile,
    Text,
)
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root, tensor_root

CAPTIONS = ["a red wave drifts", "a blue wave drifts", "a red wave pulses", "a blue wave pulses"]
STEPS, BATCH, EVERY = 12, 16, 5
SECRET = "5e" * 32


def hexed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def key(name: str) -> PrivateKey:
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())


ROOT, NODES = key("root"), (key("ada"), key("bob"), key("eve"))


def render(n: int, seed: int, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 clips (n, 3, 5, 16, 16) and caption indices."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(n, 1, 1, 1, 1, generator=generator)
    colour = torch.randint(2, (n,), generator=generator)
    t = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
    x = torch.arange(16.0).reshape(1, 1, 1, 1, 16).expand(1, 1, 1, 16, 16)
    wave = torch.sin(0.6 * x + phase + t) if cluster == 0 else torch.sin(phase + t) * torch.cos(x)
    tint = torch.tensor([[1.0, 0.2, 0.1], [0.1, 0.3, 1.0]])[colour].reshape(n, 3, 1, 1, 1)
    clips = ((wave + 1) * 127 * tint).round().to(torch.uint8)
    return clips.expand(n, 3, 5, 16, 16).contiguous(), colour + 2 * cluster


@dataclass(frozen=True)
class Unit:
    """Records and files of one contribution."""

    assignment: Assignment
    commitment: Commitment
    contribution: Contribution
    update: Path


class TinyNet:
    """The network's files in `folder`, and honest work for it."""

    def __init__(self, folder: Path, ema: str = "0") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [render(64, 1 + k, k) for k in range(2)]
        self.codec = PatchPCA.fit(torch.cat([clips for clips, _ in drawn]), 4, patch=4, block=4)
        self.text = HashedWords.fit(CAPTIONS, length=5, dim=8)
        save_tensors(self.codec.tensors(), folder / "codec.safetensors")
        save_tensors(self.text.tensors(), folder / "text.safetensors")
        for k in range(2):
            for i in range(2):
                write_shard(self.shard(k, i), self.table(render(48, 10 + 10 * k + i, k)))
            write_shard(self.private(k), self.table(render(64, 90 + k, k)))
        self.spec = ExpertSpec(
            patch=1, in_channels=4, out_channels=4, double_blocks=1, single_blocks=1, heads=1,
            head_dim=16, rope_axes=(4, 6, 6), text_dim=8, pooled_dim=8,
        )  # fmt: skip
        self.config = ExpertConfig.from_record(self.spec)
        self.recipe_record = Recipe(
            objective="x0", sigma_min="0", t_mean="0", t_std="1", t_shift="1", null_text="0.1",
            batch=BATCH, optimiser="muon", lr="3e-3", matrix_lr="0.02", beta1="0.9", beta2="0.99",
            eps="1e-8", weight_decay="0.01", momentum="0.95", clip_norm="1", ema=ema,
        )  # fmt: skip
        self.recipe = RecipeConfig.from_record(self.recipe_record)
        save_tensors(self._initial(), folder / "initial.safetensors")
        self.genesis = seal(self._genesis(), ROOT, SELF)
        (folder / "genesis.json").write_bytes(self.genesis.raw)
        self.policy = seal(self._policy(), ROOT, self.genesis.id)
        self.head = Head(round=0, weights=self.genesis.record.initial)
        self.head_file = folder / "initial.safetensors"

    def shard(self, cluster: int, i: int) -> Path:
        return self.folder / f"shard{cluster}.{i}.safetensors"

    def private(self, cluster: int) -> Path:
        return self.folder / f"private{cluster}.safetensors"

    def table(self, drawn: tuple[torch.Tensor, torch.Tensor]) -> ClipTable:
        clips, captions = drawn
        sequence, pooled = self.text.encode(CAPTIONS)
        null_seq, null_pooled = self.text.encode([""])
        return ClipTable(
            self.codec.encode(clips), captions, sequence, pooled, null_seq[0], null_pooled[0]
        )

    def _initial(self) -> dict[str, torch.Tensor]:
        """A short common start on both clusters."""
        parts = [render(96, 70 + k, k) for k in range(2)]
        both = self.table((torch.cat([c for c, _ in parts]), torch.cat([t for _, t in parts])))
        fresh = {n: p.detach() for n, p in build_expert(self.config, seed=0).named_parameters()}
        unit = UnitConfig(key=b"0" * 16, steps=60, batch=BATCH, warmup=3)
        return self.trained(fresh, both, unit)[0]

    def trained(
        self, parent: dict[str, torch.Tensor], clips: ClipTable, unit: UnitConfig
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The weights after a unit, and the roots of its committed states."""
        state = new_state(self.config, self.recipe, parent)
        roots = [state_root(state)]
        while state.step < unit.steps:
            train_step(state, clips, unit)
            if state.step == unit.steps or (
                unit.commit_every and not state.step % unit.commit_every
            ):
                roots.append(state_root(state))
        return {name: tensor.clone() for name, tensor in weights(state).items()}, roots

    def _genesis(self) -> Genesis:
        return Genesis(
            name="tiny", created=1_700_000_000, root_key=ROOT.id,
            geometry=Geometry(frames=5, height=16, width=16, fps=8),
            codec=Codec(
                kind="patch-pca", source="here", fingerprint=self.codec.fingerprint, channels=4,
                frames=2, height=4, width=4, file=tensor_file(self.folder / "codec.safetensors"),
            ),
            text=Text(
                kind="hashed-words", source="here", fingerprint=self.text.fingerprint, length=5,
                dim=8, pooled_dim=8, file=tensor_file(self.folder / "text.safetensors"),
            ),
            features="none", expert=self.spec,
            initial=tensor_file(self.folder / "initial.safetensors"), recipe=self.recipe_record,
            router=RouterSpec(width=12, blocks=1, heads=2, batch=16, steps=30, lr="4e-3"),
            sampler=Sampler(steps=4, shift="1", guidance="1.5", top_k=1),
            clusters=tuple(
                Cluster(
                    index=k, clips=96, prior="0.5", centroid=("0.5",),
                    shards=tuple(
                        Shard(file=tensor_file(self.shard(k, i)), clips=48) for i in range(2)
                    ),
                )
                for k in range(2)
            ),
            licences=(Licence(part="code", name="Apache-2.0", url="https://apache.org"),),
        )  # fmt: skip

    def _policy(self) -> Policy:
        return Policy(
            number=1, previous=None, since=1_700_000_000, coordinator_keys=(ROOT.id,),
            addresses=("http://127.0.0.1:1",), bootstraps=(),
            plan=RoundPlan(
                units=2, steps=STEPS, rounds=2, schedule="unit-cosine", floor="0.02",
                warmup="0.1", close_after=60,
            ),
            margins=Margins(
                damage=("0.02",), merge_damage="0.01", standard_errors="3", clips=48,
                norm_high="3", norm_low="0.2", copy_cosine="0.9", noise_cosine="0.02",
                source="test",
            ),
            dtype="float32", threads=1, kernels="reference", update_codec="dense-f32",
            commit_every=EVERY, soft_deadline=60, hard_deadline=120, refusals_to_quarantine=3,
            min_version="0.1.0",
        )  # fmt: skip

    # ------------------------------------------------------------ work

    def assignment(self, expert: int, unit: int, **changes: Any) -> Assignment:
        made = Assignment(
            kind="train", plan="float32", node=NODES[unit].id, expert=expert, round=self.head.round,
            unit=unit, parent=self.head,
            shards=(self.genesis.record.clusters[expert].shards[unit % 2],),
            seed=hexed(f"seed {expert} {unit}"), steps=STEPS, batch=BATCH,
            rate=Rate(start="1", end="0.02", shape="cosine", warmup=2), optimiser_state="fresh",
            dtype="float32", threads=1, kernels="reference", update_codec="dense-f32",
            commit_every=EVERY, policy=1, issued=1_700_000_000, soft_deadline=1_700_000_060,
            hard_deadline=1_700_000_120,
        )  # fmt: skip
        return made.model_copy(update=changes)

    def unit(self, expert: int, unit: int) -> Unit:
        """An honest contribution."""
        from paris_models.shards import read_shards

        assignment = self.assignment(expert, unit)
        config = UnitConfig.from_record(assignment, unit_key(assignment.seed))
        parent = load_tensors(self.head_file)
        result, roots = self.trained(parent, read_shards([self.shard(expert, unit % 2)]), config)
        return self.hand_in(assignment, make_update(parent, result, "dense-f32"), roots)

    def hand_in(
        self, assignment: Assignment, update: dict[str, torch.Tensor], roots: list[str]
    ) -> Unit:
        """Commit to an update and hand it in, whatever it is."""
        name = hexed(f"{assignment.seed} {root_of(update)}")[:16]
        path = self.folder / f"update-{name}.safetensors"
        save_tensors(update, path)
        commitment = Commitment(
            assignment=hexed(assignment.seed), states=tuple(roots), states_root=states_root(roots),
            update_root=root_of(update), steps=assignment.steps,
        )  # fmt: skip
        contribution = Contribution(
            assignment=hexed(assignment.seed), commitment=hexed(f"commitment {name}"),
            update=tensor_file(path), steps=assignment.steps,
            samples=assignment.steps * assignment.batch, loss="0.5", seconds=3,
        )  # fmt: skip
        return Unit(assignment, commitment, contribution, path)

    def verify_job(self, unit: Unit, **changes: Any) -> dict[str, Any]:
        """The job that judges a unit."""
        return {
            "job": "verify",
            "genesis": str(self.folder / "genesis.json"),
            "assignment": plain(unit.assignment),
            "commitment": plain(unit.commitment),
            "contribution": plain(unit.contribution),
            "update": str(unit.update),
            "parent": str(self.head_file),
            "private": str(self.private(unit.assignment.expert)),
            "others": [],
            "history": [],
            "policy": plain(self.policy.record),
            "secret": SECRET,
            **changes,
        }


def plain(record: Any) -> Any:
    return json.loads(record.model_dump_json())


def root_of(tensors: dict[str, torch.Tensor]) -> str:
    return tensor_root(raw_items(tensors))


def state_root(state: TrainState) -> str:
    return root_of(state_tensors(state))


def tensor_file(path: Path) -> TensorFile:
    manifest = Manifest.build([path.read_bytes()])
    size = path.stat().st_size
    return TensorFile(blob=BlobRef(id=manifest.id, size=size), root=root_of(load_tensors(path)))


Statement = Sealed[Any]
