"""The worker process: answers jobs, survives kill -9, dies with its parent, writes whole files."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from paris_coordinator.worker import Worker, perform
from paris_protocol.errors import ParisError

DEADLINE = 60.0


def run(story: Callable[[Worker], Awaitable[None]], log: Path | None = None) -> None:
    async def live() -> None:
        worker = Worker(log=log)
        try:
            await story(worker)
        finally:
            await worker.close()

    asyncio.run(live())


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "deadline passed"
        time.sleep(0.02)


def test_one_process_serves_many_jobs() -> None:
    async def story(worker: Worker) -> None:
        first = await worker.run({"job": "ping"})
        assert (await worker.run({"job": "ping"})) == first == {"pid": worker.pid}

    run(story)


def test_a_killed_worker_is_started_again() -> None:
    async def story(worker: Worker) -> None:
        first = (await worker.run({"job": "ping"}))["pid"]
        os.kill(first, signal.SIGKILL)
        second = (await worker.run({"job": "ping"}))["pid"]
        assert second != first
        # Killed while it works: the job is run again by the next process.
        task = asyncio.create_task(worker.run({"job": "ping"}))
        await asyncio.sleep(0)
        os.kill(second, signal.SIGKILL)
        assert (await task)["pid"] != first

    run(story)


def test_refusals_come_back_as_the_same_error(tmp_path: Path) -> None:
    async def story(worker: Worker) -> None:
        with pytest.raises(ParisError) as caught:
            await worker.run({"job": "unknown"})
        assert caught.value.code == "internal"
        (tmp_path / "genesis.json").write_text("{}")
        with pytest.raises(ParisError) as caught:
            await worker.run(
                {"job": "merge", "genesis": str(tmp_path / "genesis.json"), "out": "x"}
            )
        assert caught.value.code == "record.malformed"
        assert worker.pid is not None

    run(story, tmp_path / "worker.log")


def test_a_job_that_takes_too_long_fails_and_frees_the_process() -> None:
    async def story(worker: Worker) -> None:
        pid = (await worker.run({"job": "ping"}))["pid"]
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ParisError, match="longer than"):
            await worker.run({"job": "ping"}, timeout=0.2)
        assert gone(pid)
        assert (await worker.run({"job": "ping"}))["pid"] != pid

    run(story)


def test_the_worker_ends_with_its_parent() -> None:
    program = (
        "import asyncio, os, signal\n"
        "from paris_coordinator.worker import Worker\n"
        "async def main():\n"
        "    print((await Worker().run({'job': 'ping'}))['pid'], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    pid = int(done.stdout)
    wait_until(lambda: gone(pid))


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(job: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paris_coordinator.worker._dispatch", full)
    assert perform({"job": "merge"})["error"]["code"] == "disk.full"


def test_the_parents_end_loads_no_torch() -> None:
    modules = "paris_coordinator.worker, paris_coordinator.release"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "False"
