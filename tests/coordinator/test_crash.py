"""A crash at any step on the disk: what was acknowledged is kept, what is promised can be read."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.crash_target import COUNT, KEY, NETWORK, statement
from paris_coordinator.ledger import Ledger
from paris_coordinator.projector import Projector
from paris_protocol.log import Checkpoint, origin
from paris_protocol.net.logs import LogPlace
from paris_protocol.tiles import TileReader

TARGET = Path(__file__).with_name("crash_target.py")


def crash(folder, step):
    """Runs until step `step`; True if it came to its end before."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, str(TARGET), str(folder), str(step)], env=environment, check=False
    )
    assert run.returncode in (0, 9)
    return run.returncode == 0


def check(folder):
    """What the disk holds after a crash, read by others than who wrote it."""
    told = (folder / "acknowledged").read_bytes().split(b"\n")[:-1]
    ledger = Ledger(folder / "ledger.sqlite")
    kept = ledger.statement_ids(frozenset({"registration"}))
    ledger.close()
    assert len(kept) == len(set(kept))
    assert {line.decode() for line in told} <= set(kept), "acknowledged and lost"
    if not (folder / "log" / "checkpoint").exists():
        return 0
    place = LogPlace(folder / "log")
    note = place.read("checkpoint").decode()
    checkpoint = Checkpoint.open(note, origin(NETWORK), {KEY.id})
    reader = TileReader(checkpoint, place.read)
    assert list(reader.entries()) == kept[: checkpoint.size], "promised and not there"
    for id in kept[: checkpoint.size]:
        assert place.read(f"statements/{id}.json") == b'{"id":"%s"}' % id.encode()
    return checkpoint.size


def survive(folder, steps):
    sizes = [0]
    for step in steps:
        if crash(folder, step):
            break
        sizes.append(check(folder))
        assert sizes[-1] >= sizes[-2], "a checkpoint that was served is never taken back"
    while not crash(folder, 1 << 30):
        raise AssertionError("it did not end")
    assert check(folder) == COUNT
    again = Projector(folder / "log", NETWORK, KEY)
    ledger = Ledger(folder / "ledger.sqlite")
    assert not again.catch_up(ledger.logged)
    assert {statement(n).id for n in range(COUNT)} == set(
        ledger.statement_ids(frozenset({"registration"}))
    )
    ledger.close()


def test_crashes_at_the_first_steps(tmp_path):
    # Before anything is kept; in a commit; in the log's first and later files.
    survive(tmp_path, [1, 7, 57, 64])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_crashes_anywhere(tmp_path, seed):
    dice = random.Random(seed)
    survive(tmp_path, [dice.randint(1, 250) for _ in range(12)])
