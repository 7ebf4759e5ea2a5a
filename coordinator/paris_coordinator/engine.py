"""Runs the batches of `prepare`: in this process, in several spawned ones, or on a Ray cluster.

All three call the same `Encoder` on the same batches, so the files are the same bits. Workers write
into the work folder themselves, which they have to share with the caller, as the clips. On Ray,
plain actors do: Ray Data would pass the batches through its object store, in no use here, and
wants Arrow and pandas. What a worker refuses is raised here, `prepare.worker` when one dies, and
`engine.missing` without Ray; what is encoded stays::

    with crew(order, tools, workers=2, engine="local") as run:
        for done, job in enumerate(run(order.jobs("captions")), 1):
            ...
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any, Literal

from paris_coordinator.encoding import Encoder, Job, Order, disk_full
from paris_coordinator.tools import Tools, device
from paris_protocol.errors import ParisError

Engine = Literal["local", "ray"]
Run = Callable[[Sequence[Job]], Iterator[Job]]
"""Does all jobs and yields each one as it is done, in any order."""
Refusal = tuple[str, str]
"""Code and facts of a `ParisError`, which cannot be pickled."""


@contextmanager
def crew(order: Order, tools: Tools, workers: int, engine: Engine) -> Iterator[Run]:
    """Workers for an order; with one local worker it is this process."""
    if engine == "ray":
        with _ray(order, tools, workers) as run:
            yield run
    elif workers == 1:
        yield _here(Encoder(order, tools))
    else:
        with _spawned(order, tools, workers) as run:
            yield run


def _here(encoder: Encoder) -> Run:
    def run(jobs: Sequence[Job]) -> Iterator[Job]:
        for job in jobs:
            encoder.do(job)
            yield job

    return run


class Worker:
    """An encoder in a process of its own; it is loaded with the first job."""

    def __init__(self, order: Order, prints: dict[str, str]) -> None:
        self.order, self.prints = order, prints
        self.encoder: Encoder | None = None

    def do(self, job: Job) -> tuple[Job, Refusal | None]:
        """Does a job; a refusal comes back as code and facts."""
        try:
            if self.encoder is None:
                self.encoder = self._load()
            self.encoder.do(job)
        except ParisError as error:
            return job, (error.code, error.detail)
        except OSError as error:
            if disk_full(error):
                return job, ("disk.full", str(self.order.work.parent))
            raise
        return job, None

    def _load(self) -> Encoder:
        order = self.order
        tools = Tools.load(order.recipe, order.items, order.work, lambda stage, done, total: None)
        for name, wanted in self.prints.items():
            if tools.prints[name] != wanted:
                facts = f"{name}: a worker has {tools.prints[name][:16]}…"
                raise ParisError("encoder.mismatch", facts)
        return Encoder(order, tools)


def _checked(done: tuple[Job, Refusal | None]) -> Job:
    job, refusal = done
    if refusal is not None:
        raise ParisError(*refusal)
    return job


# ---------------------------------------------------------------- processes of this machine

_worker: Worker | None = None
"""The worker of a spawned process."""


def _begin(order: Order, prints: dict[str, str]) -> None:
    global _worker
    _worker = Worker(order, prints)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us, in its own time
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot tell us: its end of the queue stays open in our own process."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(job: Job) -> tuple[Job, Refusal | None]:
    assert _worker is not None
    return _worker.do(job)


@contextmanager
def _spawned(order: Order, tools: Tools, workers: int) -> Iterator[Run]:
    context = get_context("spawn")
    begun = (order, dict(tools.prints))
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=begun)

    def run(jobs: Sequence[Job]) -> Iterator[Job]:
        try:
            for future in as_completed([pool.submit(_work, job) for job in jobs]):
                yield _checked(future.result())
        except BrokenProcessPool as error:
            raise ParisError("prepare.worker", f"one of {workers}") from error

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- a cluster


@contextmanager
def _ray(order: Order, tools: Tools, workers: int) -> Iterator[Run]:
    """Actors on the cluster that RAY_ADDRESS names, or on one of this machine."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise ParisError("engine.missing", "ray") from error
    own = None if os.environ.get("RAY_ADDRESS") else workers
    ray.init(num_cpus=own, include_dashboard=False, log_to_driver=False)
    try:
        actor: Any = ray.remote(num_cpus=1, num_gpus=device() == "cuda")(Worker)
        shared = ray.put(order)
        pool: Any = ActorPool([actor.remote(shared, dict(tools.prints)) for _ in range(workers)])

        def run(jobs: Sequence[Job]) -> Iterator[Job]:
            try:
                for done in pool.map_unordered(lambda worker, job: worker.do.remote(job), jobs):
                    yield _checked(done)
            except ray.exceptions.RayActorError as error:
                raise ParisError("prepare.worker", f"one of {workers}") from error

        yield run
    finally:
        ray.shutdown()
