"""`paris demo`: a whole network on one machine, all parts real, ending in videos and a report.

Real MP4 files are prepared, a coordinator serves, three honest volunteers and a hostile one join
over real sockets as processes of their own. One volunteer is killed in mid-unit, the coordinator
once; the release is pulled, verified, judged and generated from. The demo starts the other programs
and reads what is public; it imports neither node nor coordinator::

    run_demo(smoke=True, clips=None, out=Path("demo-out"), from_scratch=False)
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paris_models.commands.attacks import Hostiles, is_hostile
from paris_models.commands.evidence import read_log
from paris_models.commands.fleet import Fleet, Running, free_port
from paris_models.commands.watch import Coordinator, NodeView
from paris_protocol.errors import ParisError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MARK = ".paris-demo"
HONEST = ("volunteer-1", "volunteer-2", "volunteer-3")
VICTIM = "volunteer-2"
PLANS = {"volunteer-3": "lora-32-bf16"}
"""Who trains otherwise than by the network's own plan."""
PACE = (
    "--set", "retry=1", "--set", "retry_cap=4", "--set", "beat=2",
    "--set", 'listen=["/ip4/127.0.0.1/tcp/0"]',
)  # fmt: skip
"""A network that lives for minutes asks again after seconds; peers meet on loopback only."""
PROMPTS = ("a red ball moves left", "blue checkers camera pans right", "a yellow cross grows")
"""The status page's sample clips."""


@dataclass(frozen=True)
class Scale:
    """How large the demo is: clips rendered, prompts judged, longest wait in seconds, attacks."""

    recipe: str
    clips: int
    prompts: int
    patience: float
    attacks: tuple[str, ...]


SMOKE = Scale(
    "smoke.toml",
    clips=2400,
    prompts=192,
    patience=420,
    attacks=("skip-steps", "copy", "reorder", "sign-flip", "noise", "tamper"),
)
FULL = Scale(
    "demo.toml",
    clips=10800,
    prompts=768,
    patience=1500,
    attacks=(
        "skip-steps", "copy", "reorder", "sign-flip", "rate", "noise", "half-batch", "inflate",
        "own-data", "tamper", "extrapolate", "refuse-opening",
    ),
)  # fmt: skip
"""The attacks are made in this order; a revoked key ends a volunteer, and the next one goes on."""


@dataclass
class Demo:
    """One run: folders, processes, and the facts that the report will tell."""

    scale: Scale
    out: Path
    clips: Path | None
    assets: Path
    fleet: Fleet
    seconds: dict[str, float] = field(default_factory=dict)
    interruptions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    last_status: dict[str, dict[str, Any]] = field(default_factory=dict)

    # ------------------------------------------------------------ the story

    def run(self) -> dict[str, Any]:
        """The whole demo; returns the report's data."""
        self.stage("clips", self.make_clips)
        self.stage("prepare", self.prepare)
        self.stage("network", self.network)
        self.stage("verify", self.pull_and_verify)
        data: dict[str, Any] = self.stage("judge", self.judge)
        return data

    def stage(self, name: str, work: Any) -> Any:
        """Run one stage, time it, and say so on the terminal."""
        start = self.fleet.seconds()
        say(f"{name} …")
        result = work()
        self.seconds[name] = round(self.fleet.seconds() - start, 1)
        self.fleet.mark("demo", "stage", start, self.fleet.seconds(), name)
        say(f"{name}: {self.seconds[name]:.0f} s")
        return result

    def make_clips(self) -> None:
        """Render the demo's worlds as MP4 files with captions, unless clips were given."""
        if self.clips is None:
            self.clips = self.out / "clips"
            count = str(self.scale.clips)
            command = ["python", "-m", "paris_models.worlds", str(self.clips), count]
            self.fleet.call("render", [*command, "--seed", "100"], 300)
        else:
            self.notes.append(
                "The clips were given; the stand-in judge knows the demo's own worlds only, "
                "so quality is not measured."
            )

    def prepare(self) -> None:
        """`paris-coordinator prepare` and `init`."""
        assert self.clips is not None
        recipe = self.assets / self.scale.recipe
        self.fleet.call(
            "prepare",
            [
                "paris-coordinator",
                "prepare",
                str(recipe),
                str(self.clips),
                "--out",
                str(self.out / "prepared"),
                *([] if self.clips == self.out / "clips" else ["--allow-unlicensed"]),
            ],
            600,
        )
        prompts = self.out / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n")
        self.port = free_port()
        command = [
            "paris-coordinator",
            "init",
            str(self.out / "prepared"),
            "--state",
            str(self.state),
            "--port",
            str(self.port),
            "--swarm-port",
            str(free_port()),
            "--prompts",
            str(prompts),
            "--json",
        ]
        printed = self.fleet.call("init", command, 120)
        self.invite = str(json.loads(printed[printed.index("{") :])["invite"])
        self.coordinator = Coordinator(self.port, self.invite.rsplit("/", 1)[-1])
        say(f"invite {self.invite}")

    @property
    def state(self) -> Path:
        """The coordinator's state folder."""
        return self.out / "coordinator"

    # ------------------------------------------------------------ the network

    def network(self) -> None:
        """Serve, join, interrupt, and wait for the release."""
        server = self.serve()
        self.wait("the coordinator to answer", self.coordinator.answers, 60)
        nodes = {name: self.join(name) for name in HONEST}
        hostiles = Hostiles(self.join, self.out, self.scale.attacks)
        hostiles.start()
        deadline = time.monotonic() + self.scale.patience
        killed = restarted = False
        while not self.coordinator.finished():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"not finished after {self.scale.patience:.0f} s; see {self.out}/logs"
                )
            if not killed:
                killed = self.kill_in_mid_unit(nodes)
            elif not restarted and self.coordinator.merges() >= 1:
                server = self.restart(server)
                restarted = True
            self.alive(server, nodes)
            if hostiles.look():
                say(f"a hostile key was revoked; {hostiles.names[-1]} joins with another")
            time.sleep(0.5)
        if not (killed and restarted):
            self.notes.append(
                "The network finished before every planned interruption had its turn."
            )
        self.settle(nodes, hostiles.running)
        everyone = (*HONEST, *hostiles.names)
        self.last_status = {name: NodeView(self.out / name).status() for name in everyone}
        server.process.terminate()
        server.process.wait(30)
        self.fleet.finished(server)

    def serve(self) -> Running:
        """Start the coordinator."""
        return self.fleet.start(
            "coordinator",
            ["paris-coordinator", "serve", "--state", str(self.state), "--port", str(self.port)],
        )

    def join(self, name: str, attacks: Sequence[str] = ()) -> Running:
        """A volunteer joins, with its own state folder; a hostile one by its own program."""
        program = ["python", "-m", "paris_node.hostile"] if is_hostile(name) else ["paris-node"]
        return self.fleet.start(
            name,
            [
                *program,
                "join",
                self.invite,
                "--yes",
                "--state",
                str(self.out / name),
                "--name",
                name,
                "--until-finished",
                *PACE,
                *(["--plan", PLANS[name]] if name in PLANS else []),
                *(["--attacks", ",".join(attacks)] if attacks else []),
            ],
        )

    def kill_in_mid_unit(self, nodes: dict[str, Running]) -> bool:
        """kill -9 a volunteer while it trains, start it again, wait until it trains on."""
        victim = NodeView(self.out / VICTIM)
        if not victim.training():
            return False
        at = self.fleet.seconds()
        self.fleet.kill(nodes[VICTIM])
        nodes[VICTIM] = self.join(VICTIM)
        self.wait(
            "the killed volunteer to work again",
            lambda: victim.training() or self.coordinator.finished(),
            90,
        )
        recovered = self.fleet.seconds() - at
        self.interruptions.append(
            {
                "kind": "kill",
                "at": round(at, 1),
                "recovered_after_s": round(recovered, 1),
                "process": VICTIM,
            }
        )
        say(f"{VICTIM} was killed in mid-unit and works again after {recovered:.1f} s")
        return True

    def restart(self, server: Running) -> Running:
        """kill -9 the coordinator and start it again, wait until it answers."""
        at = self.fleet.seconds()
        self.fleet.kill(server)
        fresh = self.serve()
        self.wait("the coordinator to answer again", self.coordinator.answers, 60)
        recovered = self.fleet.seconds() - at
        self.fleet.mark(
            "coordinator", "restart", self.fleet.seconds(), self.fleet.seconds(), "back"
        )
        self.interruptions.append(
            {
                "kind": "coordinator restart",
                "at": round(at, 1),
                "recovered_after_s": round(recovered, 1),
                "process": "coordinator",
            }
        )
        say(f"the coordinator was killed and answers again after {recovered:.1f} s")
        return fresh

    def alive(self, server: Running, nodes: dict[str, Running]) -> None:
        """A process that ended before its time ends the demo, with its last words."""
        for run in [server, *nodes.values()]:
            code = run.process.poll()
            if code is not None and not (code == 0 and run is not server):
                raise RuntimeError(
                    f"{run.name} ended with {code}: {run.log.read_text(errors='replace')[-800:]}"
                )

    def settle(self, nodes: dict[str, Running], hostile: Running | None) -> None:
        """The volunteers leave by themselves once the network has finished."""
        for run in nodes.values():
            self.wait(f"{run.name} to leave", lambda run=run: run.process.poll() is not None, 60)
            self.fleet.finished(run)
        if hostile is None:
            return
        if hostile.process.poll() is None:
            hostile.process.terminate()
            self.wait(
                "the hostile volunteer to leave", lambda: hostile.process.poll() is not None, 30
            )
        self.fleet.finished(hostile)

    def wait(self, what: str, met: Any, patience: float) -> None:
        """Poll a condition of another process; what never comes fails with a sentence."""
        deadline = time.monotonic() + patience
        while not met():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {patience:.0f} s for {what}; see {self.out}/logs")
            time.sleep(0.2)

    # ------------------------------------------------------------ the release and the report

    def pull_and_verify(self) -> None:
        """Pull the release as a user would, verify it, generate one video by the command."""
        newest = max(
            (p for p in (self.state / "releases").iterdir() if p.name.isdigit()),
            key=lambda p: int(p.name),
        )
        release = self.out / "release"
        self.fleet.call("pull", ["paris", "pull", str(newest), "-o", str(release)], 120)
        self.fleet.call(
            "verify", ["paris", "verify", str(release), "--network", self.coordinator.network], 120
        )
        (self.out / "videos").mkdir(exist_ok=True)
        video = str(self.out / "videos" / "generated.mp4")
        self.fleet.call(
            "generate", ["paris", "generate", str(release), PROMPTS[0], "-o", video], 120
        )
        shutil.copytree(self.state / "log", self.out / "log", dirs_exist_ok=True)
        (self.out / "blobs").mkdir(exist_ok=True)
        for blob in (self.state / "store" / "blobs").glob("*.blob"):
            shutil.copy(blob, self.out / "blobs" / blob.name)

    def judge(self) -> dict[str, Any]:
        """Measure, draw and write down; everything that is told comes from files of this run."""
        from paris_models.commands.conclude import conclude

        evidence = read_log(self.out / "log", self.coordinator.network)
        return conclude(self, evidence)


def say(text: str) -> None:
    """One line of progress on the terminal."""
    print(f"paris demo: {text}", flush=True)


def told_quality(quality: dict[str, Any], *, smoke: bool) -> str:
    """The quality gate as one sentence, with its frozen-frame baseline and who judged."""
    if not quality["n"]:
        return "quality was not measured: the clips were given"
    gate = "no claim" if smoke else "passed" if quality["gate_passed"] else "not passed"
    return (
        f"all factors right {quality['all_right']:.3f} of {quality['n']} held-out prompts (gate"
        f" .95: {gate}), initial checkpoint {quality['initial']['all_right']:.3f}, frozen frame"
        f" {quality['frozen_frame']['all_right']:.3f}; judge: {quality['judge']}"
    )


def empty_folder(out: Path) -> None:
    """Make the output folder anew; a folder that is not a demo's is left alone."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise ParisError("usage", f"{out} is not empty and no demo's folder; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("paris demo writes here; it removes the folder when it is run again\n")


def run_demo(*, smoke: bool, clips: Path | None, out: Path, from_scratch: bool) -> int:
    """Run the demo; 0 when the network finished, verified and the report is written."""
    from paris_models.commands.report import write_report

    out = out.resolve()
    if clips is not None and not clips.is_dir():
        raise ParisError("clips.none", str(clips))
    if clips is not None and clips.resolve().is_relative_to(out):
        raise ParisError("usage", f"{clips} stands in {out}, which is made anew; move the clips")
    empty_folder(out)
    fleet = Fleet(out)
    demo = Demo(SMOKE if smoke else FULL, out, clips and clips.resolve(), ASSETS, fleet)
    try:
        if from_scratch:
            demo.assets = out / "assets"
            demo.stage(
                "initial checkpoint",
                lambda: fleet.call(
                    "initial",
                    ["python", "-m", "paris_models.initial", "--out", str(demo.assets)],
                    3000,
                ),
            )
            for recipe in ASSETS.glob("*.toml"):
                shutil.copy(recipe, demo.assets / recipe.name)
        data = demo.run()
    except RuntimeError as error:
        print(f"paris demo: {error}", file=sys.stderr)
        return 50
    finally:
        fleet.close()
    write_report(data, out)
    say(told_quality(data["report"]["quality"], smoke=smoke))
    say(f"done in {fleet.seconds():.0f} s: open {out / 'report.html'}")
    return 0
