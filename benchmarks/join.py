"""`join`: seconds from `paris-node join` to the first training step, beside a local script.

A real coordinator serves a small demo network on loopback; a real node with an empty state folder
joins it. The alternative is a Python script on the same machine that has everything on its disk
already: it imports, reads checkpoint and shard, and takes one step.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.table import Row, conditions, middle, row

CLIPS = 600
PATIENCE = 180.0
PACE = ("--set", "retry=1", "--set", "retry_cap=4", "--set", "beat=5")
NODE, COORDINATOR = "paris_node.cli", "paris_coordinator.cli"
RENDER = (
    "import sys; from pathlib import Path; from paris_models.worlds import write_clips;"
    "write_clips(Path(sys.argv[1]), int(sys.argv[2]), seed=100)"
)
SCRIPT = """
import sys
from pathlib import Path
from paris_models.checkpoint import load_tensors
from paris_models.config import DEMO_RECIPE, LADDER, UnitConfig
from paris_models.shards import read_shards
from paris_models.train import new_state, train_step
prepared = Path(sys.argv[1])
clips = read_shards(sorted(prepared.glob("shards/cluster0/*.safetensors")))
state = new_state(LADDER["demo"], DEMO_RECIPE, load_tensors(prepared / "initial.safetensors"))
train_step(state, clips, UnitConfig(key=b"benchmark of 16b", steps=30, batch=96))
"""


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """`join.first_step` in seconds."""
    n = 1 if quick else 3
    times: list[float] = []
    local: list[float] = []
    with tempfile.TemporaryDirectory(prefix="paris-bench-") as folder:
        place = Path(folder)
        invite, port = _network(place)
        with _served(place / "coordinator", port):
            script = [sys.executable, "-c", SCRIPT, str(place / "prepared")]
            for i in range(n):  # in turn: both meet the same load
                local.append(_seconds(script))
                times.append(_first_step(invite, place / f"node{i}"))
    ours, spread = middle(times)
    rows = [
        row(
            "join.first_step", "from `paris-node join` with an empty folder to the first step",
            ours=ours, spread=spread, better="lower", unit="s", n=n,
            alternative=middle(local)[0], alternative_name="local script, everything on disk",
        )
    ]  # fmt: skip
    return conditions(size="demo", clips=CLIPS, B=96, n=n, network="loopback, no peers"), rows


def _program(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _call(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:5])} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def _seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    _call(command)
    return time.perf_counter() - begin


def _network(place: Path) -> tuple[str, int]:
    """Render, prepare and found a network; its invite and port."""
    from paris_models import assets

    recipe = Path(str(assets.__file__)).parent / "smoke.toml"
    prepared, state = place / "prepared", place / "coordinator"
    _call([sys.executable, "-c", RENDER, str(place / "clips"), str(CLIPS)])
    _call(
        _program(COORDINATOR, "prepare", str(recipe), str(place / "clips"), "--out", str(prepared))
    )
    port = _free_port()
    printed = _call(
        _program(COORDINATOR, "init", str(prepared), "--state", str(state), "--port", str(port),
                 "--swarm-port", str(_free_port()), "--json")
    )  # fmt: skip
    return str(json.loads(printed[printed.index("{") :])["invite"]), port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _served(state: Path, port: int) -> Iterator[None]:
    command = _program(COORDINATOR, "serve", "--state", str(state), "--no-swarm")
    with (state.parent / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(lambda: _answers(port), "the coordinator answers")
        yield
    finally:
        server.terminate()
        server.wait(30)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _first_step(invite: str, state: Path) -> float:
    """Start a node, wait for its first step, end it."""
    from paris_node.control import ask
    from paris_protocol.errors import ParisError

    def stepped() -> bool:
        try:
            status = ask(state, "status", timeout=5)
        except ParisError:
            return False
        # `step` counts whatever the phase counts, pieces while it fetches.
        return status.get("state") == "training" and int(status.get("step") or 0) >= 1

    begin = time.perf_counter()
    command = _program(NODE, "join", invite, "--yes", "--no-swarm", "--state", str(state), *PACE)
    with state.with_suffix(".log").open("wb") as log:
        node = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(stepped, "the node takes its first step", node)
        return time.perf_counter() - begin
    finally:
        node.terminate()
        node.wait(30)


def _wait(condition: Any, what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if process is not None and process.poll() is not None:
            raise SystemExit(f"waiting until {what}: the process ended with {process.returncode}")
        if time.monotonic() > end:
            raise SystemExit(f"waited {PATIENCE:g} s until {what}")
        time.sleep(0.02)
