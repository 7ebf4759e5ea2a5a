"""The trainer: a process of its own that does units of work, one after the other.

Started as `python -m paris_node.trainer`; orders come in as JSON lines, reports go out likewise and
carry the number of their order. It is killed whenever the owner wants the machine, so its state is
on disk before that matters: at every committed step, at least every few minutes, and when asked. An
opening goes before training, which is saved for it and then goes on. A step is saved whole or not
at all, whatever the plan. It imports no encoder, opens no file from the network before the strict
gate has seen its header, and ends with its parent::

    {"do": "train", "order": 1, "unit": ID, "assignment": {…}, "genesis": PATH, "network": ID,
     "work": DIR, "parent": PATH, "shards": [PATH…], "device": "cpu", "save_every": 240,
     "states_mb": 2048, "states_used": 0, "swap": 0}
    {"do": "open", "order": 2, …, "roots": [ROOT…], "states": [PLACE…]}
    {"do": "replay", "order": 3, …, "commitment": {…}, "states": [[PLACE, PATH]…], …}
    {"do": "test", "order": 4, "device": "cuda", "cases": [CASE…]}
    {"do": "follow", "order": 5, "genesis": PATH, "network": ID, "parent": PATH, "steps": […], …}
    {"do": "save"}   {"do": "quit"}
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final, TextIO

import torch

from paris_models.pages import keep_pages
from paris_models.selftest import cases, examine
from paris_node.merged import follow
from paris_node.rework import REPORT_EVERY, open_states, replay_audit
from paris_node.unit import RESULT, Order, Unit
from paris_protocol.errors import ParisError

FIRST: Final = frozenset({"open"})
"""Orders that training makes way for."""

LOST: Final = ("CUDA error", "CUDA driver", "No CUDA GPUs", "HIP error")
"""How torch says that a GPU is gone; its memory is said to be short in another class."""

EXPERIMENTAL: Final = frozenset({"xpu", "mps"})
"""Devices that nobody has run this on: they have to pass all numeric tests (docs/plans.md)."""

Say = Callable[[dict[str, Any]], None]
Json = dict[str, Any]


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Asked:
    """What may be asked of a unit between two steps."""

    save: Callable[[], bool] = _never
    way: Callable[[], bool] = _never
    """Make way for something that goes first."""


def train_unit(
    order: Order, say: Say, asked: Asked, begin: str = "started", kind: type[Unit] = Unit
) -> bool:
    """Do a unit from wherever it stands to its result; says `begin`, progress, saved and done.

    False when it was saved and made way for another order; then it is to be called again.
    """
    done = order.work / RESULT
    if done.exists():
        say({"event": "done", **json.loads(done.read_bytes())})
        return True
    order.work.mkdir(parents=True, exist_ok=True)
    unit = kind(order)
    say({"event": begin, "step": unit.state.step})
    saved = told = time.monotonic()
    while not unit.done:
        loss = unit.step()
        now = time.monotonic()
        wanted, way = asked.save(), asked.way()
        if wanted or way or unit.committing or now - saved >= order.save_every:
            unit.save()
            saved = time.monotonic()
            say({"event": "saved", "step": unit.state.step, "asked": wanted})
        if way:
            say({"event": "waiting", "step": unit.state.step})
            return False
        if now - told >= REPORT_EVERY:
            told = now
            say({"event": "progress", "step": unit.state.step, "loss": loss})
    say({"event": "done", **unit.finish()})
    return True


def reason_of(error: Exception) -> ParisError:
    """The catalogue's name for whatever went wrong in a unit."""
    if isinstance(error, ParisError):
        return error
    # The CPU's allocator has no class of its own for what it cannot give.
    short = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if short or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ParisError("machine.too-small", str(error)[:200])
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
        return ParisError("gpu.unavailable", str(error).splitlines()[0][:200])
    if isinstance(error, ArithmeticError):
        return ParisError("tensor.values", str(error)[:200])
    return ParisError("trainer.failed", f"{type(error).__name__}: {error}"[:300])


def pick_device(wanted: str) -> str:
    """`auto` becomes the best device there is; a wanted GPU that is not there is said so.

    CUDA first, of which ROCm is another build under the same name. Another accelerator that torch
    knows (XPU, MPS) only if every numeric test passes on it; then the CPU.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else _accelerator() or "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ParisError("gpu.unavailable", "torch sees no CUDA device")
    return wanted


@cache
def _accelerator() -> str | None:
    """An accelerator that is not CUDA and computes rightly; tested once in a process."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type not in EXPERIMENTAL:
        return None
    return found.type if all(one.passed for one in examine(cases(), found.type)) else None


class Service:
    """The process around the units: reads orders in a thread, so that a save can be asked for."""

    def __init__(self, orders: TextIO, reports: TextIO) -> None:
        self._orders, self._reports = orders, reports
        self._pending: queue.PriorityQueue[tuple[bool, int, Json]] = queue.PriorityQueue()
        self._save = threading.Event()

    def say(self, message: Json) -> None:
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
                self._put(order)
        # The parent is gone or wants us gone: what is saved is saved.
        os._exit(0)

    def _put(self, order: Json) -> None:
        self._pending.put((order["do"] not in FIRST, order["order"], order))

    def _save_asked(self) -> bool:
        asked = self._save.is_set()
        self._save.clear()
        return asked

    def _way_asked(self) -> bool:
        waiting = self._pending.queue
        return bool(waiting) and not waiting[0][0]

    def run(self) -> None:
        """Serve orders until the parent goes away."""
        threading.Thread(target=self._listen, daemon=True).start()
        self.say({"event": "ready", "pid": os.getpid()})
        while True:
            _, number, value = self._pending.get()

            def say(report: Json, number: int = number) -> None:
                self.say({**report, "order": number})

            try:
                self.do(value, say)
            except Exception as error:  # noqa: BLE001 - every failure is the parent's to judge
                traceback.print_exc()
                say({"event": "failed", **reason_of(error).as_json()})
            release()

    def do(self, value: Json, say: Say) -> None:
        """Carry out one order; its last report is `done`, `opened`, `replayed` and the like."""
        value = {**value, "device": pick_device(value["device"])}
        if value["do"] == "test":
            found = examine(value["cases"], value["device"])
            say({"event": "tested", "found": [{**asdict(f), "passed": f.passed} for f in found]})
            return
        if value["do"] == "follow":
            follow(value, lambda done: say({"event": "progress", "step": done}))
            say({"event": "followed"})
            return
        order = Order.parse(value)
        match value["do"]:
            case "train":
                begin = "resumed" if value.get("again") else "started"
                if not self.train(value, order, say, begin):
                    self._put({**value, "again": True})
            case "open":
                states = open_states(order, value["roots"], value["states"], say)
                say({"event": "opened", "states": states})
            case "replay":
                say({"event": "replayed", **replay_audit(order, value, say)})
            case other:
                raise ParisError("internal", f"no order {other!r}")

    def train(self, value: Json, order: Order, say: Say, begin: str) -> bool:
        """Train a unit; False when it made way. What the hostile double does differently."""
        return train_unit(order, say, Asked(self._save_asked, self._way_asked), begin)


def release() -> None:
    """Give back what an order took: the next plan is chosen by what is free."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def serve(kind: type[Service] = Service) -> None:
    """Take stdout for reports alone (what libraries print goes to stderr) and serve."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # A Ctrl-C in the owner's terminal is for the agent, which saves before it ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)
    keep_pages()
    kind(sys.stdin, reports).run()


if __name__ == "__main__":
    serve()
