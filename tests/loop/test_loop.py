"""The whole loop in small: real clips in, two volunteers, five kills, a verified release out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from loop.promises import check_promises
from loop.tiny import TinyNetwork
from paris_models.commands.fleet import resolve


@pytest.fixture
def net(tmp_path: Path) -> TinyNetwork:
    network = TinyNetwork(tmp_path, steps=24, rounds=3)
    yield network  # type: ignore[misc]
    network.close()


def test_nothing_accepted_is_lost_when_every_part_is_killed_once(net: TinyNetwork) -> None:
    net.serve()
    net.join("a")
    net.join("b")
    for part in ("trainer", "agent", "network", "coordinator", "worker"):
        net.until(lambda part=part: net.kill(part), 60, f"a living {part} to kill")
        assert not net.view.finished(), "the network finished too early; make its rounds longer"
    net.wait_finished(240)
    check_promises(net)
    release = max((net.state / "releases").iterdir(), key=lambda path: path.name)
    run = subprocess.run(
        resolve(["paris", "verify", str(release), "--network", net.network]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
