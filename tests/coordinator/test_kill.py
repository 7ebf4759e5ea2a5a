"""kill -9 at any moment: nothing promised is lost or counted twice, and it goes on by itself."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator.fakes import found
from paris_coordinator.ledger import Ledger
from paris_coordinator.replay import replay
from paris_protocol.log import Checkpoint, origin
from paris_protocol.net.folder import verify_folder
from paris_protocol.records import LOGGED

TARGET = Path(__file__).with_name("kill_target.py")
DEADLINE = 120.0


def start(state):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (state.folder / "target.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(TARGET), str(state.folder)],
            env=environment,
            stdout=log,
            stderr=log,
        )


def lines(state):
    path = state.folder / "answers"
    return path.read_text().splitlines() if path.exists() else []


def kill_after(state, process, answers, extra):
    """SIGKILL when so many new lines were written and a little later; False if it ended first."""
    before, end = len(lines(state)), time.monotonic() + DEADLINE
    while len(lines(state)) < before + answers:
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, (state.folder / "target.log").read_text()[-2000:]
        time.sleep(0.002)
    time.sleep(extra)
    process.kill()
    process.wait()
    return True


def survive(tmp_path, kills, seed):
    state = found(tmp_path, experts=2, plan={"rounds": 6})
    dice = random.Random(seed)
    done = 0
    while done < kills:
        process = start(state)
        if not kill_after(state, process, dice.randint(1, 4), dice.random() * 0.05):
            break
        done += 1
        check(state, complete=False)
    process = start(state)
    assert process.wait(DEADLINE) == 0, (state.folder / "target.log").read_text()[-3000:]
    check(state, complete=True)
    return done


def check(state, complete):
    ledger = Ledger(state.ledger_file)
    desk, _ = replay(ledger, state)
    logged = ledger.statement_ids(LOGGED)
    ledger.close()
    promised = [line for line in lines(state) if len(line) == 64]
    assert set(promised) <= set(desk.contributions), "a promised contribution is lost"
    assert all(desk.work_of(id).state not in ("open", "uploading") for id in promised)
    inputs = [part.contribution for merge in desk.merges.values() for part in merge.inputs]
    assert len(inputs) == len(set(inputs)), "counted twice"
    for work in desk.works.values():
        if work.judged is not None and work.judged.accepted:
            assert (work.state == "accepted") != (work.contribution in inputs), "accepted and lost"
    note = (state.log / "checkpoint").read_text()
    size = Checkpoint.open(note, origin(desk.network), {state.key().id}).size
    assert size <= len(logged), "the log promises what the ledger does not hold"
    if complete:
        assert desk.complete
        assert size == len(logged)
        assert all(work.state in ("merged", "closed") for work in desk.works.values())
        assert len(desk.releases) == 1
        verify_folder(state.releases / "1", desk.network)


def test_five_kills(tmp_path):
    assert survive(tmp_path, kills=5, seed=1) == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_kills(tmp_path, seed):
    survive(tmp_path, kills=8, seed=seed)
