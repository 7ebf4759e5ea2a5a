"""A tiny network of real processes on loopback, for tests of the whole loop.

Two clusters of rendered clips, the demo's expert and codec, a few short units: everything is real
but small. Processes carry a tag, so that trainers, workers and network processes can be found and
killed::

    net = TinyNetwork(tmp_path, steps=8, rounds=2)
    net.serve(); net.join("a"); net.join("b"); net.wait_finished(); net.close()
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from paris_models.commands.demo import ASSETS
from paris_models.commands.evidence import Evidence, read_log
from paris_models.commands.fleet import Fleet, Running, free_port
from paris_models.commands.watch import Coordinator, NodeView
from paris_models.worlds import write_clips

PARTS = {
    "agent": "paris-node",
    "trainer": "paris_node.trainer",
    "network": "paris_protocol.net.dht",
    "coordinator": "paris-coordinator",
    "worker": "paris_coordinator.worker",
}

PACE = (
    "--set",
    "retry=0.5",
    "--set",
    "retry_cap=2",
    "--set",
    "beat=1",
    "--set",
    'listen=["/ip4/127.0.0.1/tcp/0"]',
)


class TinyNetwork:
    """Folders and processes of one network; always `close()` it.

    `policy`: further fields of the first policy, as lines of TOML.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clips: int = 120,
        steps: int = 8,
        rounds: int = 2,
        units: int = 2,
        swarm: bool = True,
        commit_every: int = 4,
        policy: str = "",
    ) -> None:
        self.folder = folder
        self.swarm = swarm
        self.fleet = Fleet(folder)
        self.port = free_port()
        self.state = folder / "coordinator"
        self.nodes: dict[str, Running] = {}
        write_clips(folder / "clips", clips, seed=11)
        recipe = folder / "recipe.toml"
        recipe.write_text(tiny_recipe(steps, rounds, units))
        for asset in ("codec", "text", "initial"):
            (folder / f"{asset}.safetensors").write_bytes(
                (ASSETS / f"{asset}.safetensors").read_bytes()
            )
        rules = folder / "policy.toml"
        rules.write_text(
            f"{policy}\ncommit_every = {commit_every}\nsoft_deadline = 60\nhard_deadline = 600\n"
            # A few steps from fresh weights: plumbing is tested here, not statistics.
            '[margins]\ndamage = ["10"]\nmerge_damage = "10"\nnoise_cosine = "-1"\n'
            'norm_low = "0.01"\nnorm_high = "100"\nblock_z = "0"\n'
        )
        self.fleet.call(
            "prepare",
            [
                "paris-coordinator",
                "prepare",
                str(recipe),
                str(folder / "clips"),
                "--out",
                str(folder / "prepared"),
            ],
            120,
        )
        out = self.fleet.call(
            "init",
            [
                "paris-coordinator",
                "init",
                str(folder / "prepared"),
                "--state",
                str(self.state),
                "--port",
                str(self.port),
                "--swarm-port",
                str(free_port()),
                "--policy",
                str(rules),
                "--json",
            ],
            60,
        )
        self.invite = str(json.loads(out[out.index("{") :])["invite"])
        self.network = self.invite.rsplit("/", 1)[-1]
        self.view = Coordinator(self.port, self.network)
        self.server: Running | None = None

    def serve(self) -> None:
        """Start the coordinator and wait until it answers."""
        command = [
            "paris-coordinator",
            "serve",
            "--state",
            str(self.state),
            "--port",
            str(self.port),
        ]
        self.server = self.fleet.start(
            "coordinator", [*command, *([] if self.swarm else ["--no-swarm"])]
        )
        self.until(self.view.answers, 60, "the coordinator to answer")

    def join(self, name: str, *more: str) -> Running:
        """Start a volunteer that leaves when the network has finished; hostile with attacks.

        One that has joined before is started as a service would: it may be alone at first.
        """
        state = ["--state", str(self.folder / name), "--until-finished"]
        program = ["python", "-m", "paris_node.hostile"] if "--attacks" in more else ["paris-node"]
        if (self.folder / name / "genesis.json").exists():
            command = [*program, "run", *state]
        else:
            command = [*program, "join", self.invite, "--yes", *state, "--name", name, *PACE]
        run = self.fleet.start(name, [*command, *([] if self.swarm else ["--no-swarm"]), *more])
        self.nodes[name] = run
        return run

    def node(self, name: str) -> NodeView:
        """A volunteer as its owner sees it."""
        return NodeView(self.folder / name)

    def pids(self, part: str) -> list[int]:
        """Processes of one kind that belong to this network."""
        found = []
        for pid in self.fleet.pids():
            try:
                words = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                )
            except OSError:
                continue
            if any(word == PARTS[part] or word.endswith("/" + PARTS[part]) for word in words):
                found.append(pid)
        return sorted(found)

    def kill(self, part: str, choice: int = 0) -> bool:
        """kill -9 one of a kind; False when none is alive. Agents and coordinator are restarted."""
        pids = self.pids(part)
        if not pids:
            return False
        victim = pids[choice % len(pids)]
        runs = {run.process.pid: name for name, run in self.nodes.items()}
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return False
        if self.server is not None and victim == self.server.process.pid:
            self.server.process.wait()
            self.fleet.finished(self.server)
            self.serve()
        elif victim in runs:
            self.fleet.finished(self.nodes[runs[victim]])
            self.join(runs[victim])
        return True

    def wait_finished(self, patience: float) -> None:
        """Until all rounds are merged and released."""
        self.until(self.view.finished, patience, "the network to finish")

    def until(self, met: Callable[[], bool], patience: float, what: str) -> None:
        """Poll; the failure names what was awaited and the last words of all logs."""
        deadline = time.monotonic() + patience
        while not met():
            if time.monotonic() > deadline:
                tails = "\n".join(
                    f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}"
                    for p in sorted((self.folder / "logs").glob("*.log"))
                )
                raise AssertionError(f"waited {patience:.0f} s for {what}\n{tails}")
            time.sleep(0.1)

    def evidence(self) -> Evidence:
        """The public log."""
        return read_log(self.state / "log", self.network)

    def close(self) -> None:
        """End every process."""
        self.fleet.close()


def tiny_recipe(steps: int, rounds: int, units: int) -> str:
    """The demo's recipe with two clusters and short units."""
    text = (ASSETS / "demo.toml").read_text()
    for old, new in {
        "count = 3": "count = 2",
        "per_cluster = 6": "per_cluster = 4",
        "validation = 256": "validation = 8",
        "audit = 256": "audit = 4",
        "batch = 96": "batch = 16",
        "units = 2": f"units = {units}",
        "steps = 120": f"steps = {steps}",
        "rounds = 6": f"rounds = {rounds}",
        "matrix_lr = 0.03": "matrix_lr = 0.003",
    }.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    return text.replace("steps = 200", "steps = 10").replace("steps = 20\n", "steps = 4\n")
