"""A unit in training, inside the trainer's process: its state, its commitments, its files.

A state is saved with everything that a resumed training needs; of the committed states as many are
kept as the owner's budget allows, for audits. Files from the network are opened behind the strict
gate (`tensor.header`), with finite values only (`tensor.values`)::

    unit = Unit(Order.parse(value))                  # at its last save, or at its beginning
    while not unit.done:
        unit.step()
    facts = unit.finish()

Layout of a work folder: `state.safetensors`, `states/<place>.safetensors`, `update.safetensors`,
`result.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from paris_models import checkpoint, numerics, shards, train, updates
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import parameter_shapes
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
STATES = "states"


@dataclass(frozen=True)
class Order:
    """One unit: the verified records and where its files are.

    `states_mb`, `states_used`: the budget for kept states, and what other units have of it (bytes).
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
        )

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
        )


class Unit:
    """A unit in training: the state, the roots committed so far, losses and seconds."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.expert, self.recipe, self.config = order.expert, order.recipe, order.config
        torch.set_num_threads(self.config.threads)
        self.parent = open_head(order.parent, self.expert)
        self.clips = open_shards(order)
        self.roots: list[str] = []
        self.losses: list[float] = []
        self.seconds = 0.0
        self.state = self._resume() or self._begin()
        room = room_for(order.states_mb, order.states_used, file_size(self.state))
        self.keeps = frozenset(kept_states(segments_of(order.assignment), room))
        for path in order.work.glob(f"{STATES}/*.safetensors"):  # the budget may be smaller now
            if int(path.stem) not in self.keeps:
                path.unlink()

    def _begin(self) -> train.TrainState:
        state = train.new_state(self.expert, self.recipe, self.parent, device=self.order.device)
        self.roots, self.losses, self.seconds = [root_of(state)], [], 0.0
        return state

    def _resume(self) -> train.TrainState | None:
        """The last save, if there is a whole one of this very unit."""
        path = self.order.work / STATE
        try:
            notes = checkpoint.read_metadata(path)
            if notes.get("unit") != self.order.unit:
                return None
            state = train.load_state(path, self.expert, self.recipe, device=self.order.device)
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
        loss = train.train_step(self.state, self.clips, self.config)
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
            train.save_state(self.state, path, notes)

    def finish(self) -> dict[str, Any]:
        """Write update and result; what is returned also stands in `result.json`."""
        codec = self.order.assignment.update_codec
        result = {name: tensor.cpu() for name, tensor in train.weights(self.state).items()}
        update = updates.make_update(self.parent, result, codec)
        path = self.order.work / UPDATE
        with disk_errors(path):
            checkpoint.save_tensors(update, path)
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        facts = {
            "update": str(path),
            "update_root": tensor_root(checkpoint.raw_items(update)),
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


def root_of(state: train.TrainState) -> str:
    """Merkle root (hex) of weights, optimiser and step."""
    return root_of_tensors(train.state_tensors(state))


def root_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Merkle root (hex) of tensors."""
    return tensor_root(checkpoint.raw_items(tensors))


def file_size(state: train.TrainState) -> int:
    """Bytes that a state takes as a file, at most."""
    tensors = train.state_tensors(state).values()
    return sum(one.numel() * one.element_size() + HEADER_ENTRY for one in tensors)


def keep_state(state: train.TrainState, path: Path) -> None:
    """Write a state as others may see it: its tensors and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        train.save_state(state, path)


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


def open_shards(order: Order) -> shards.ClipTable:
    """The clips of the assignment's shards, each behind the gate with the genesis' geometry."""
    codec, text = order.genesis.codec, order.genesis.text
    for path, shard in zip(order.shards, order.assignment.shards, strict=True):
        found = header_of(path, None).tensors
        captions = found["text_seq"][1][0] if "text_seq" in found and found["text_seq"][1] else 0
        features = found["features"][1][-1] if "features" in found and found["features"][1] else 0
        schema = shards.shard_schema(
            shard.clips,
            captions,
            (codec.channels, codec.frames, codec.height, codec.width),
            text.length,
            text.dim,
            text.pooled_dim,
            first="first" in found,
            features=features,
        )
        header_of(path, schema)
    table = shards.read_shards(order.shards)
    for field in fields(table):
        tensor = getattr(table, field.name)
        if isinstance(tensor, torch.Tensor):
            finite({field.name: tensor})
    return table
