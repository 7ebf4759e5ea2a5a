"""A unit in training, inside the trainer's process: its state, its commitments, its files.

It is trained under its assignment's plan (`paris_models.lean`). A state is saved with everything
that a resumed training needs, between whole steps; of the committed states as many are kept as the
owner's budget allows, for audits. Files from the network are opened behind the strict gate
(`tensor.header`), with finite values only (`tensor.values`)::

    unit = Unit(Order.parse(value))                  # at its last save, or at its beginning
    while not unit.done:
        unit.step()
    facts = unit.finish()

Layout of a work folder: `state.safetensors`, `states/<place>.safetensors`, `update.safetensors`,
`residual.safetensors`, `result.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from paris_models import checkpoint, lean, numerics, shards
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import parameter_shapes
from paris_models.plans import Plan, plan_of, with_swap
from paris_node.kept import kept_states, room_for
from paris_protocol.audit import segments_of
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError
from paris_protocol.gate import Header, check_header
from paris_protocol.net.store import disk_errors, write_atomic
from paris_protocol.records import Assignment, Genesis
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root, tensor_root

HEADER_LIMIT: Final = (32 << 20) + 8
HEADER_ENTRY: Final = 512
"""Bytes of a file's header that a tensor takes at most."""
STATE, UPDATE, RESULT = "state.safetensors", "update.safetensors", "result.json"
STATES, RESIDUAL = "states", "residual.safetensors"


@dataclass(frozen=True)
class Order:
    """One unit: the verified records and where its files are.

    `states_mb`, `states_used`: the budget for kept states, and what other units have of it (bytes).
    `swap`: how many blocks wait in host memory, this machine's own choice. `residual`: where what
    an earlier update left out stands, if the unit begins with it.
    """

    unit: str
    assignment: Assignment
    genesis: Genesis
    work: Path
    parent: Path
    shards: tuple[Path, ...]
    device: str
    save_every: float
    states_mb: int = 0
    states_used: int = 0
    swap: int = 0
    residual: Path | None = None

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Order:
        """Read an order of the parent process."""
        raw = Path(value["genesis"]).read_bytes()
        return cls(
            unit=value["unit"],
            assignment=Assignment.model_validate_json(json.dumps(value["assignment"])),
            genesis=open_genesis(raw, value["network"]).record,
            work=Path(value["work"]),
            parent=Path(value["parent"]),
            shards=tuple(Path(path) for path in value["shards"]),
            device=value["device"],
            save_every=float(value["save_every"]),
            states_mb=int(value.get("states_mb", 0)),
            states_used=int(value.get("states_used", 0)),
            swap=int(value.get("swap", 0)),
            residual=Path(value["residual"]) if value.get("residual") else None,
        )

    @cached_property
    def plan(self) -> Plan:
        """The assignment's training plan; `structure.lineage` for one that there is not."""
        try:
            return with_swap(plan_of(self.assignment.plan), self.swap)
        except ValueError as error:
            raise ParisError("structure.lineage", str(error)) from error

    @cached_property
    def expert(self) -> ExpertConfig:
        """The expert's shape."""
        return ExpertConfig.from_record(self.genesis.expert)

    @cached_property
    def recipe(self) -> RecipeConfig:
        """Objective and optimiser."""
        return RecipeConfig.from_record(self.genesis.recipe)

    @cached_property
    def config(self) -> UnitConfig:
        """The unit's numbers, with the key of its streams."""
        return UnitConfig.from_record(self.assignment, unit_key(self.assignment.seed))

    def kept(self, place: int) -> Path:
        """Where a kept state stands."""
        return self.work / STATES / f"{place}.safetensors"

    def numerics(self) -> str:
        """The numeric class of this machine for such units."""
        config = self.config
        return numerics.numeric_class(
            self.expert,
            self.recipe,
            batch=config.batch,
            dtype=config.dtype,
            threads=config.threads,
            kernels=config.kernels,
            device=self.device,
            plan=self.plan,
        )

    @cached_property
    def rest(self) -> dict[str, torch.Tensor] | None:
        """The residual that the unit begins with; `audit.state` if it is not the assigned one."""
        if self.assignment.residual is None:
            return None
        if self.residual is None:
            raise ParisError("audit.state", "the residual of the last update is not here")
        rest = open_head(self.residual, self.expert)
        if root_of_tensors(rest) != self.assignment.residual:
            raise ParisError("audit.state", "that is not the residual of the last update")
        return rest

    def start(self, parent: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The weights that the unit begins with."""
        return parent if self.rest is None else lean.start_of(parent, self.rest)

    def state(self, parent: Mapping[str, torch.Tensor]) -> lean.State:
        """A fresh state of the unit from its parent's weights."""
        begin, key = self.start(parent), self.config.key
        return lean.new_state(
            self.plan, self.expert, self.recipe, begin, key=key, device=self.device
        )


class Unit:
    """A unit in training: the state, the roots committed so far, losses and seconds."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.expert, self.recipe, self.config = order.expert, order.recipe, order.config
        torch.set_num_threads(self.config.threads)
        parent = open_head(order.parent, self.expert)
        # Where memory is short the parent is read again at the end; see `need_of` in plans.
        self._parent = parent if order.plan.base == "float32" else None
        self.clips = open_shards(order)
        self.roots: list[str] = []
        self.losses: list[float] = []
        self.seconds = 0.0
        self.state = self._resume(parent) or self._begin(parent)
        room = room_for(order.states_mb, order.states_used, file_size(self.state))
        self.keeps = frozenset(kept_states(segments_of(order.assignment), room))
        for path in order.work.glob(f"{STATES}/*.safetensors"):  # the budget may be smaller now
            if int(path.stem) not in self.keeps:
                path.unlink()

    @property
    def parent(self) -> dict[str, torch.Tensor]:
        """The weights that the unit began with."""
        return self._parent or open_head(self.order.parent, self.expert)

    def _begin(self, parent: Mapping[str, torch.Tensor]) -> lean.State:
        state = self.order.state(parent)
        self.roots, self.losses, self.seconds = [root_of(state)], [], 0.0
        return state

    def _resume(self, parent: Mapping[str, torch.Tensor]) -> lean.State | None:
        """The last save, if there is a whole one of this very unit."""
        path = self.order.work / STATE
        try:
            notes = checkpoint.read_metadata(path)
            if notes.get("unit") != self.order.unit:
                return None
            state = self.order.state(parent)
            lean.load_state_tensors(state, checkpoint.load_tensors(path))
            roots, losses = json.loads(notes["roots"]), json.loads(notes["losses"])
            seconds = float(notes["seconds"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, SafetensorError):
            # Only the disk can have done this; the unit begins anew, which costs time, not truth.
            path.replace(path.with_name(f"{STATE}.damaged"))
            return None
        self.roots, self.losses, self.seconds = roots, losses, seconds
        return state

    @property
    def done(self) -> bool:
        """Whether all steps of the assignment are behind us."""
        return self.state.step >= self.config.steps

    def step(self) -> float:
        """Take one step, and commit to the state where the assignment asks for it."""
        begun = time.monotonic()
        loss = lean.train_step(self.state, self.clips, self.config)
        self.losses.append(loss)
        if self.committing:
            self.commit()
        self.seconds += time.monotonic() - begun
        return loss

    @property
    def committing(self) -> bool:
        """Whether the present step is one whose state is committed to: every k-th and the last."""
        every = self.config.commit_every
        return self.done or (every > 0 and self.state.step % every == 0)

    def commit(self) -> None:
        """Note the present state's root, and keep the state if it is one of those that are kept."""
        if len(self.roots) in self.keeps:
            keep_state(self.state, self.order.kept(len(self.roots)))
        self.roots.append(root_of(self.state))

    def save(self) -> None:
        """Write state, roots and losses in one file, whole or not at all."""
        notes = {
            "unit": self.order.unit,
            "roots": json.dumps(self.roots),
            "losses": json.dumps(self.losses),
            "seconds": repr(self.seconds),
        }
        path = self.order.work / STATE
        with disk_errors(path):
            checkpoint.save_tensors(lean.state_tensors(self.state), path, notes)

    def finish(self) -> dict[str, Any]:
        """Write update and result; what is returned also stands in `result.json`."""
        order, last, parent = self.order, lean.state_tensors(self.state), self.parent
        codec = order.assignment.update_codec
        update = lean.update_of(order.plan, parent, last, codec, order.rest)
        rest = lean.rest_of(order.plan, parent, last, update, codec, order.rest)
        path = order.work / UPDATE
        with disk_errors(path):
            checkpoint.save_tensors(update, path)
            if rest is not None:
                checkpoint.save_tensors(rest, order.work / RESIDUAL)
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        facts = {
            "update": str(path),
            "update_root": tensor_root(checkpoint.raw_items(update)),
            "residual": None if rest is None else root_of_tensors(rest),
            "states": self.roots,
            "states_root": states_root(self.roots),
            "steps": self.state.step,
            "samples": self.state.step * self.order.assignment.batch,
            "loss": sum(tail) / len(tail),
            "seconds": round(self.seconds, 3),
            "numerics": self.order.numerics(),
        }
        write_atomic(self.order.work / RESULT, json.dumps(facts).encode())
        return facts


def root_of(state: lean.State) -> str:
    """Merkle root (hex) of what is trained, optimiser and step."""
    return root_of_tensors(lean.state_tensors(state))


def root_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Merkle root (hex) of tensors."""
    return tensor_root(checkpoint.raw_items(tensors))


def file_size(state: lean.State) -> int:
    """Bytes that a state takes as a file, at most."""
    tensors = lean.state_tensors(state).values()
    return sum(one.numel() * one.element_size() + HEADER_ENTRY for one in tensors)


def keep_state(state: lean.State, path: Path) -> None:
    """Write a state as others may see it: its tensors and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        checkpoint.save_tensors(lean.state_tensors(state), path)


def header_of(path: Path, schema: checkpoint.Schema | None) -> Header:
    """The header of a file after the strict gate; the library has not touched the file yet."""
    with path.open("rb") as file:
        prefix = file.read(8)
        wanted = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
        prefix += file.read(min(wanted, HEADER_LIMIT))
    return check_header(prefix, path.stat().st_size, schema)


def open_head(path: Path, expert: ExpertConfig) -> dict[str, torch.Tensor]:
    """The weights of a parent head: exactly the expert's tensors, all finite."""
    header_of(path, {name: ("F32", shape) for name, shape in parameter_shapes(expert).items()})
    return finite(checkpoint.load_tensors(path))


def finite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, all of whose values are finite; `tensor.values` names the first other."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ParisError("tensor.values", name)
    return tensors


def open_shards(order: Order) -> shards.Clips:
    """The clips of the assignment's shards, each behind the gate with its bucket's geometry."""
    codec, text, buckets = order.genesis.codec, order.genesis.text, order.genesis.buckets
    own = (codec.channels, codec.frames, codec.height, codec.width)
    made_by = {"codec": codec.fingerprint, "text": text.fingerprint}
    for path, shard in zip(order.shards, order.assignment.shards, strict=True):
        found = header_of(path, None).tensors
        captions = found["text_seq"][1][0] if "text_seq" in found and found["text_seq"][1] else 0
        features = found["features"][1][-1] if "features" in found and found["features"][1] else 0
        kind = found["text_seq"][0] if "text_seq" in found else "F32"
        if shard.bucket > len(buckets):
            raise ParisError("structure.lineage", f"there is no bucket {shard.bucket}")
        schema = shards.shard_schema(
            shard.clips,
            captions,
            buckets[shard.bucket - 1].latent if shard.bucket else own,
            text.length,
            text.dim,
            text.pooled_dim,
            first="first" in found,
            last="last" in found,
            features=features,
            store=shards.store_of(kind),
        )
        header_of(path, schema)
        try:
            shards.check_encoders(checkpoint.read_metadata(path), made_by)
        except ValueError as error:
            raise ParisError("encoder.mismatch", str(error)) from error
    batches = {number: bucket.batch for number, bucket in enumerate(buckets, 1)}
    named = [shard.bucket for shard in order.assignment.shards]
    clips = shards.read_training(order.shards, named, batches)
    for table in [clips] if isinstance(clips, shards.ClipTable) else clips.tables.values():
        finite(table.tensors())
    return clips
