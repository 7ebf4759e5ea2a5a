"""The whole loop in small: real clips in, two volunteers, five kills, a verified release out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from loop.promises import check_promises
from loop.tiny import TinyNetwork
from paris_models.commands.attacks import audits, told_attacks
from paris_models.commands.fleet import resolve
from paris_protocol.errors import REASONS


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
        net.until(lambda part=part: net.kill(part), 120, f"a living {part} to kill")
        assert not net.view.finished(), "the network finished too early; make its rounds longer"
    net.wait_finished(300)
    check_promises(net)
    release = max((net.state / "releases").iterdir(), key=lambda path: path.name)
    run = subprocess.run(
        resolve(["paris", "verify", str(release), "--network", net.network]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_skipped_steps_are_found_and_the_next_key_is_found_as_well(net: TinyNetwork) -> None:
    net.serve()
    net.join("a")
    revoked = REASONS["node.revoked"].exit
    for name, attack in (("hostile", "skip-steps"), ("hostile-2", "reorder")):
        run = net.join(name, "--attacks", attack)
        net.until(lambda run=run: run.process.poll() is not None, 200, f"the end of {name}")
        assert run.process.returncode == revoked
    net.wait_finished(300)
    evidence = net.evidence()
    rows = told_attacks(net.folder, evidence)
    found = [(row["attack"], row["layer"], row["code"]) for row in rows]
    assert found == [(name, "L4", "audit.mismatch") for name in ("skip-steps", "reorder")]
    told = audits(evidence)
    assert (told["refused"], told["revoked"]) == (2, 2)
    assert told["equal_bits"] == told["replayed"] - 2 > 0
    check_promises(net)
