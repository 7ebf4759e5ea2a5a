"""The coordinator's heavy work in a process of its own: verify, merge, router, samples, bundle.

`Worker` is the coordinator's end: it starts `python -m paris_coordinator.worker`, sends a job as
one JSON line and awaits one JSON line. Strangers' files are opened and models run in that process
alone, so a crash or a kill -9 costs a job, never the coordinator; every job writes to a temporary
name and renames, so it can simply be run again. The process ends with its parent. It refuses jobs
that it does not know and answers failures with a catalogue code::

    worker = Worker()
    answer = await worker.run({"job": "verify", ...}, timeout=600)
    await worker.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Final

from paris_protocol.errors import ParisError

LINE_LIMIT: Final = 16 << 20
JOBS: Final = {
    "verify": "verify:verify",
    "merge": "merge:merge",
    "router": "router:train",
    "samples": "samples:samples",
    "bundle": "bundle:bundle",
    "secret": "secret:secret",
    "scan": "scan:scan",
    "loose": "loose:loose",
    "replay": "replay:replay",
    "numerics": "replay:numerics",
    "answer": "replay:answer",
    "revert": "merge:revert",
    "average": "merge:average",
    "pictures": "pictures:pictures",
}
"""Job → module below `paris_coordinator.jobs` and its function, loaded when it is asked for."""
HERE: Final = ("ping", "ready")
"""Jobs that this module answers itself."""

Json = dict[str, Any]


class Worker:
    """One spawned worker process; jobs run one after the other.

    A process that dies in mid-job is started again and the job repeated once; if it dies twice over
    the same job, or exceeds the timeout, the job fails with `internal`.
    """

    def __init__(self, *, threads: int = 1, log: Path | None = None) -> None:
        self._threads = threads
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The process id while one is running."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process is not None else None

    async def run(self, job: Json, timeout: float = 3600.0) -> Json:
        """The job's answer. Raises ParisError with the code that the worker reported.

        `timeout` is in seconds and covers one attempt, start-up included.
        """
        if job.get("job") not in (*HERE, *JOBS):
            raise ParisError("internal", f"unknown job {job.get('job')!r}")
        async with self._one_at_a_time:
            for _attempt in range(2):
                answer = await self._attempt(job, timeout)
                if answer is not None:
                    return _result(answer)
            raise ParisError("internal", f"the worker died twice over a {job['job']} job")

    async def _attempt(self, job: Json, timeout: float) -> Json | None:
        """One try; None when the process died under it."""
        try:
            async with asyncio.timeout(timeout):
                process = await self._running()
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(ConnectionError):
                    process.stdin.write(json.dumps(job).encode() + b"\n")
                    await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            await self._stop()
            raise ParisError(
                "internal", f"a {job['job']} job took longer than {timeout:g} s"
            ) from None
        except asyncio.CancelledError:
            await self._stop()
            raise
        if not line.endswith(b"\n"):
            await self._stop()
            return None
        answer: Json = json.loads(line)
        return answer

    async def close(self) -> None:
        """End the process, whatever it is doing."""
        await self._stop()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        stderr = self._open_log()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "paris_coordinator.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                limit=LINE_LIMIT,
                env=self._environment(),
            )
        finally:
            if stderr is not None:
                stderr.close()
        return self._process

    def _open_log(self) -> IO[bytes] | None:
        if self._log is None:
            return None
        self._log.parent.mkdir(parents=True, exist_ok=True)
        return self._log.open("ab")

    def _environment(self) -> dict[str, str]:
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}
        return {**os.environ, "OMP_NUM_THREADS": str(self._threads), **quiet}

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _result(answer: Json) -> Json:
    refusal = answer.get("error")
    if refusal is not None:
        raise ParisError(str(refusal["code"]), str(refusal["detail"]))
    result: Json = answer["result"]
    return result


# ---------------------------------------------------------------- the process itself


def perform(job: Json) -> Json:
    """Run one job in this process: {"result": …} or {"error": {"code", "detail"}}."""
    try:
        return {"result": _dispatch(job)}
    except ParisError as error:
        return _refusal(error.code, error.detail)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _refusal("disk.full", str(error))
        traceback.print_exc()
        return _refusal("internal", f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - the process's last resort: a job must have an answer
        traceback.print_exc()
        return _refusal("internal", f"{type(error).__name__}: {error}")


def _dispatch(job: Json) -> Json:
    name = job["job"]
    if name == "ping":
        return {"pid": os.getpid()}
    if name == "ready":  # all that judging needs can be loaded
        importlib.import_module("paris_coordinator.jobs.verify")
        return {}
    if name in JOBS:
        module, function = JOBS[name].split(":")
        run = getattr(importlib.import_module(f"paris_coordinator.jobs.{module}"), function)
        answer: Json = run(job)
        return answer
    raise ParisError("internal", f"unknown job {name!r}")


def _refusal(code: str, detail: str) -> Json:
    return {"error": {"code": code, "detail": detail[:500]}}


def _read_lines(source: IO[str], lines: SimpleQueue[str]) -> None:
    for line in source:
        lines.put(line)
    os._exit(0)  # the coordinator is gone: nobody waits for the answer


def serve(answers: IO[str]) -> None:
    """Answer jobs from stdin until the parent goes away."""
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read_lines, args=(sys.stdin, lines), daemon=True).start()
    while True:
        answer = perform(json.loads(lines.get()))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Keep the real stdout for answers; whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(answers)


if __name__ == "__main__":
    main()
