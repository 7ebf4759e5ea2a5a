"""kill -9 at thirty random moments: promise 2 of the design, on real processes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from loop.promises import check_promises
from loop.tiny import TinyNetwork

KILLS = 30
PARTS = ("agent", "trainer", "network", "coordinator", "worker")


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path: Path) -> None:
    dice = random.Random(20261121)
    net = TinyNetwork(tmp_path, steps=30, rounds=8, units=2, commit_every=10)
    try:
        net.serve()
        net.join("a")
        net.join("b")
        killed = []
        deadline = time.monotonic() + 900
        while len(killed) < KILLS and time.monotonic() < deadline and not net.view.finished():
            moment = time.monotonic() + dice.uniform(0.5, 6.0)
            net.until(lambda moment=moment: time.monotonic() > moment, 10, "a random moment")
            part = dice.choice(PARTS)
            if net.kill(part, dice.randrange(8)):
                killed.append(part)
        print("killed", {part: killed.count(part) for part in PARTS})
        net.wait_finished(600)
        assert len(killed) == KILLS, (
            "the network finished before thirty kills; make the rounds longer"
        )
        check_promises(net, recompute=4)
    finally:
        net.close()
