"""A network to attack: a real coordinator on loopback, real judging and training, a small expert.

`Arena` founds a network from real clips and serves it over HTTP: office, shift, the worker's job
functions (in this process), and a clock that the test moves. `Player` is a volunteer over the real
client; it trains honestly, or as it is told, keeps all its committed states, and lays them
open when it is asked to. Every attack stands beside an honest twin::

    async with Arena(folder) as arena:
        honest, cheat = await arena.player("ada"), await arena.player("eve")
        done = await honest.unit()
        lie = await cheat.unit(tamper=lambda work: work.with_update(flipped(work.update)))
        assert (await arena.judge(done)).accepted and not (await arena.judge(lie)).accepted
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from aiohttp import web

from adversary.players import Player, Work
from paris_coordinator.config import State
from paris_coordinator.genesis import Setup, init
from paris_coordinator.office import Office
from paris_coordinator.shift import Shift
from paris_coordinator.web.api import MAX_BODY, add_api
from paris_coordinator.worker import perform
from paris_protocol.errors import ParisError
from paris_protocol.keys import save_key
from paris_protocol.records import Verdict
from tinynet import TinyNet, key, render, write_shard

START = 1_800_000_000
UNITS, SHARDS = 4, 8


@functools.cache
def files() -> TinyNet:
    """The clips, codec and initial expert that all arenas share; made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="paris-arena-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return TinyNet(folder)


def described(net: TinyNet, folder: Path, shards: int) -> None:
    """What `prepare` would have left of these clips: `prepared.json` and the files it names."""
    folder.mkdir(parents=True)
    genesis = net.genesis.record
    for name in ("codec", "text", "initial"):
        shutil.copy(net.folder / f"{name}.safetensors", folder)
    clusters = []
    for k in range(2):
        listed = []
        for i in range(shards):
            name = f"shard{k}.{i}.safetensors"
            made = net.folder / name
            if not made.exists():
                write_shard(made, net.table(render(48, 10 + 10 * k + i, k)))
            shutil.copy(made, folder)
            listed.append({"path": name, "clips": 48})
        shutil.copy(net.private(k), folder)
        held = {"path": net.private(k).name, "clips": 64}
        clusters.append({
            "index": k, "clips": 48 * shards, "prior": "0.5", "centroid": ["0.5"],
            "shards": listed, "validation": held, "audit": held,
        })  # fmt: skip
    plain = json.loads(genesis.model_dump_json())
    value = {name: plain[name] for name in (
        "name", "notes", "geometry", "features", "expert", "recipe", "router", "sampler",
        "licences",
    )}  # fmt: skip
    for name in ("codec", "text"):
        entry = {k: v for k, v in plain[name].items() if k != "file"}
        value[name] = entry | {"path": f"{name}.safetensors"}
    policy = json.loads(net.policy.record.model_dump_json())
    kept = ("commit_every", "soft_deadline", "hard_deadline", "refusals_to_quarantine")
    value |= {
        "format": 1, "inputs": "0" * 64, "initial": {"path": "initial.safetensors"},
        "clusters": clusters, "plan": policy["plan"] | {"units": UNITS},
        "margins": policy["margins"], "policy": {name: policy[name] for name in kept}, "report": {},
    }  # fmt: skip
    (folder / "prepared.json").write_text(json.dumps(value))


class InProcess:
    """The worker's jobs, run here; `done` keeps what was asked."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []

    async def run(self, job: dict[str, Any], timeout: float = 0.0) -> dict[str, Any]:
        """The job's answer, or its refusal, as `Worker` gives it."""
        self.done.append(job)
        answer = perform(json.loads(json.dumps(job)))
        if "error" in answer:
            raise ParisError(answer["error"]["code"], answer["error"]["detail"])
        return dict(answer["result"])


class Arena:
    """One network; `now` is its clock in unix seconds."""

    def __init__(self, folder: Path, *, shards: int = SHARDS, **policy: Any) -> None:
        self.folder, self.now = folder, START
        described(files(), folder / "prepared", shards)
        # One key, hence one network id and one seed for every unit: runs can be repeated.
        (folder / "state").mkdir()
        save_key(folder / "state" / "key.json", key("operator"))
        init(folder / "prepared", folder / "state", Setup(overrides=policy), START)
        self.state = State(folder / "state")
        self.jobs = InProcess()
        self.notes: list[tuple[str, Any]] = []

    async def __aenter__(self) -> Arena:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Start (or start again) from what is on the disk."""
        self.office = Office(self.state, lambda: float(self.now))
        await self.office.project()
        self.shift = Shift(
            self.office, self.jobs, lambda what, facts: self.notes.append((what, facts))
        )
        app = web.Application(client_max_size=MAX_BODY)
        add_api(app, self.office)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stop serving; what was acknowledged stays."""
        await self._runner.cleanup()
        self.office.close()

    @property
    def network(self) -> str:
        """The network's id."""
        return self.office.network

    async def player(self, name: str, **more: Any) -> Player:
        """A registered volunteer of this name."""
        player = Player(self, name, **more)
        await player.register()
        return player

    async def work(self, most: int = 50) -> None:
        """Let the coordinator do whatever is due now."""
        for _ in range(most):
            if not await self.shift.step():
                return

    def verdict(self, contribution: str) -> Verdict | None:
        """The verdict on a contribution, if it was given."""
        return self.office.desk.work_of(contribution).judged

    async def judge(self, work: Work, patience: int = 0) -> Verdict:
        """The verdict on a unit, after whatever audit it needs; its player answers challenges.

        `patience`: seconds that pass between two looks, so that nobody waits for volunteers.
        """
        for _ in range(8):
            await self.work()
            found = self.verdict(work.id)
            if found is not None:
                return found
            await work.player.answer()
            self.now += patience
        troubles = [facts for _, facts in self.notes if "error" in facts]
        raise AssertionError(f"no verdict on {work.id}: {troubles[-3:]}")
