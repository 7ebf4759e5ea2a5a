"""The commands of README.md are taken from its code blocks and run, in its order.

Placeholders (INVITE, CLIPS, …) become the parts of a tiny network; `make` targets are resolved
without being run (`make -n`), since this is one of them; `make demo SMOKE=1` has a test of its own.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    """Every command of the shell blocks, `&&` split."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split("&&")]


def of(program: str) -> list[str]:
    return [command for command in commands() if command.split()[0] == program]


def test_every_command_is_of_a_known_kind() -> None:
    known = {"git", "cd", "make", "paris", "paris-node", "paris-coordinator"}
    assert {command.split()[0] for command in commands()} == known


@pytest.mark.parametrize("command", of("make"))
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def network(tmp_path: Path) -> Iterator[object]:
    from loop.tiny import TinyNetwork

    tiny = TinyNetwork(tmp_path, steps=4, rounds=1, units=1, clips=60, commit_every=2)
    yield tiny
    tiny.close()


def run(command: str, places: dict[str, str]) -> str:
    """Run a README command with its placeholders filled in; returns what it printed."""
    words = [places.get(word, word) for word in shlex.split(command)]
    words[0] = str(BIN / words[0])
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]} {done.stderr[-1500:]}"
    return done.stdout


@pytest.mark.slow
def test_the_readmes_story(network: object, tmp_path: Path) -> None:
    from loop.tiny import TinyNetwork

    assert isinstance(network, TinyNetwork)
    places = {
        "RECIPE.toml": str(tmp_path / "recipe.toml"),
        "CLIPS": str(tmp_path / "clips"),
        "PREPARED": str(tmp_path / "prepared-again"),
        "STATE": str(tmp_path / "state-again"),
        "SOURCE": str(network.state / "releases" / "1"),
        "RELEASE": str(tmp_path / "release"),
        "out.mp4": str(tmp_path / "out.mp4"),
        "BLOBS": str(network.state / "store"),
        "INVITE": network.invite,
        "witness.key": str(tmp_path / "witness.key"),
        "WITNESS": str(tmp_path / "witness"),
    }
    prepare, init, serve = of("paris-coordinator")
    run(prepare, places)
    assert re.search(r"paris://127\.0\.0\.1:\d+/[0-9a-f]{64}", run(init, places))
    assert serve.split()[1:] == ["serve", "--state", "STATE"]
    network.serve()
    join, status, stop = of("paris-node")
    state = str(tmp_path / "reader")
    words = [network.invite if word == "INVITE" else word for word in join.split()]
    node = network.fleet.start("reader", [*words, "--state", state, "--yes"])
    network.until(lambda: answers(status, state), 60, "the node to tell its status")
    network.wait_finished(240)
    network.until((network.state / "releases/1/release.json").is_file, 60, "the release")
    run(f"{stop} --state {state}", {})
    network.until(lambda: node.process.poll() is not None, 30, "the node to stop")
    for command in of("paris"):
        run(command, places)
    assert (tmp_path / "out.mp4").read_bytes()[4:8] == b"ftyp"


def answers(status: str, state: str) -> bool:
    """Whether `paris-node status` knows a state of a running node (its exit code is the state)."""
    done = subprocess.run(
        [str(BIN / "paris-node"), *status.split()[1:], "--state", state],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return done.returncode in (0, 12)


@pytest.mark.slow
def test_the_demo_in_its_smoke_form(tmp_path: Path) -> None:
    [demo] = [command for command in of("make") if "demo" in command]
    words = [*shlex.split(demo), f"OUT={tmp_path / 'out'}", "-o", ".venv/.ready"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "out" / "report.html").is_file()
