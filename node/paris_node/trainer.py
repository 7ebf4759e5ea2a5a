"""The trainer: a process of its own that does units of work, one after the other.

Started as `python -m paris_node.trainer`; orders come in as JSON lines, reports go out likewise.
It is killed whenever the owner wants the machine, so its state is on disk before that matters: at
every committed step, at least every few minutes, and when asked. It imports no encoder, opens no
file from the network before the strict gate has seen its header (`tensor.header`), and ends with
its parent::

    {"do": "train", "unit": ID, "assignment": {…}, "genesis": PATH, "network": ID, "work": DIR,
     "parent": PATH, "shards": [PATH…], "device": "cpu", "save_every": 240}
    {"do": "save"}   {"do": "quit"}
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TextIO

import torch
from safetensors import SafetensorError

from paris_models import checkpoint, shards, train, updates
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.expert import parameter_shapes
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError
from paris_protocol.gate import Header, check_header
from paris_protocol.net.store import disk_errors, write_atomic
from paris_protocol.records import Assignment, Genesis
from paris_protocol.streams import unit_key
from paris_protocol.tensors import states_root, tensor_root

REPORT_EVERY: Final = 0.5
HEADER_LIMIT: Final = (32 << 20) + 8
STATE, UPDATE, RESULT = "state.safetensors", "update.safetensors", "result.json"

Say = Callable[[dict[str, Any]], None]
Asked = Callable[[], bool]


@dataclass(frozen=True)
class Order:
    """One unit to train: the verified records and where its files are."""

    unit: str
    assignment: Assignment
    genesis: Genesis
    work: Path
    parent: Path
    shards: tuple[Path, ...]
    device: str
    save_every: float

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
        )


class Unit:
    """A unit in training: the state, the roots committed so far, losses and seconds."""

    def __init__(self, order: Order) -> None:
        self.order = order
        genesis, assignment = order.genesis, order.assignment
        self.expert = ExpertConfig.from_record(genesis.expert)
        self.recipe = RecipeConfig.from_record(genesis.recipe)
        self.config = UnitConfig.from_record(assignment, unit_key(assignment.seed))
        torch.set_num_threads(self.config.threads)
        self.parent = open_head(order.parent, self.expert)
        self.clips = open_shards(order)
        self.roots: list[str] = []
        self.losses: list[float] = []
        self.seconds = 0.0
        self.state = self._resume() or self._begin()

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
            self.roots.append(root_of(self.state))
        self.seconds += time.monotonic() - begun
        return loss

    @property
    def committing(self) -> bool:
        """Whether the present step is one whose state is committed to: every k-th and the last."""
        every = self.config.commit_every
        return self.done or (every > 0 and self.state.step % every == 0)

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
            "samples": self.state.step * self.config.batch,
            "loss": sum(tail) / len(tail),
            "seconds": round(self.seconds, 3),
        }
        write_atomic(self.order.work / RESULT, json.dumps(facts).encode())
        return facts


def root_of(state: train.TrainState) -> str:
    """Merkle root (hex) of weights, optimiser and step."""
    return tensor_root(checkpoint.raw_items(train.state_tensors(state)))


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
    tensors = checkpoint.load_tensors(path)
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
        if isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
            raise ParisError("tensor.values", field.name)
    return table


def train_unit(order: Order, say: Say, save_asked: Asked) -> None:
    """Do a unit from wherever it stands to its result; says started, progress, saved and done."""
    done = order.work / RESULT
    if done.exists():
        say({"event": "done", **json.loads(done.read_bytes())})
        return
    order.work.mkdir(parents=True, exist_ok=True)
    unit = Unit(order)
    say({"event": "started", "step": unit.state.step})
    saved = told = time.monotonic()
    while not unit.done:
        loss = unit.step()
        now = time.monotonic()
        asked = save_asked()
        if asked or unit.committing or now - saved >= order.save_every:
            unit.save()
            saved = time.monotonic()
            say({"event": "saved", "step": unit.state.step})
        if now - told >= REPORT_EVERY:
            told = now
            say({"event": "progress", "step": unit.state.step, "loss": loss})
    say({"event": "done", **unit.finish()})


def reason_of(error: Exception) -> ParisError:
    """The catalogue's name for whatever went wrong in a unit."""
    if isinstance(error, ParisError):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ParisError("machine.too-small", str(error)[:200])
    if isinstance(error, ArithmeticError):
        return ParisError("tensor.values", str(error)[:200])
    return ParisError("trainer.failed", f"{type(error).__name__}: {error}"[:300])


def pick_device(wanted: str) -> str:
    """`auto` becomes cuda where there is one; a wanted GPU that is not there is said so."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ParisError("gpu.unavailable", "torch sees no CUDA device")
    return wanted


class Service:
    """The process around the units: reads orders in a thread, so that a save can be asked for."""

    def __init__(self, orders: TextIO, reports: TextIO) -> None:
        self._orders, self._reports = orders, reports
        self._pending: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._save = threading.Event()

    def say(self, message: dict[str, Any]) -> None:
        """Send one report line."""
        self._reports.write(json.dumps(message) + "\n")
        self._reports.flush()

    def _listen(self) -> None:
        for line in self._orders:
            order = json.loads(line)
            if order["do"] == "save":
                self._save.set()
            elif order["do"] == "quit":
                break
            else:
                self._pending.put(order)
        # The parent is gone or wants us gone: what is saved is saved.
        os._exit(0)

    def _save_asked(self) -> bool:
        asked = self._save.is_set()
        self._save.clear()
        return asked

    def run(self) -> None:
        """Serve orders until the parent goes away."""
        threading.Thread(target=self._listen, daemon=True).start()
        self.say({"event": "ready", "pid": os.getpid()})
        while True:
            value = self._pending.get()
            self._save.clear()
            try:
                order = Order.parse({**value, "device": pick_device(value["device"])})
                train_unit(order, self.say, self._save_asked)
            except Exception as error:  # noqa: BLE001 - every failure is the parent's to judge
                traceback.print_exc()
                self.say({"event": "failed", **reason_of(error).as_json()})


def main() -> None:
    """Take stdout for reports alone (what libraries print goes to stderr) and serve."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # A Ctrl-C in the owner's terminal is for the agent, which saves before it ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)
    Service(sys.stdin, reports).run()


if __name__ == "__main__":
    main()
