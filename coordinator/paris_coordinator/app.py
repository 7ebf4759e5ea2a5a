"""The running coordinator: office, shift, web server, worker and network process put together.

`serve` owns the state folder until it is told to stop (SIGTERM, SIGINT) or, if so asked, until the
finished network is released. A kill at any moment costs at most the job in hand: everything else is
in the ledger. Refused before anything starts: a folder in use, a damaged or newer ledger
(`state.*`), and a port that is taken (`port.in-use`)::

    asyncio.run(serve(State(folder), Options(port=8420)))
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from paris_coordinator.config import State
from paris_coordinator.events import Ordered
from paris_coordinator.genesis import multiaddress
from paris_coordinator.office import Office
from paris_coordinator.orders import take_orders
from paris_coordinator.pruning import expendable, prune
from paris_coordinator.shift import Shift
from paris_coordinator.web.api import MAX_BODY, add_api
from paris_coordinator.web.pages import add_pages
from paris_coordinator.withdrawing import find
from paris_coordinator.worker import Worker
from paris_protocol.errors import ParisError
from paris_protocol.net.process import NetworkProcess

LOG = logging.getLogger("paris")
TICK = 1.0
"""Seconds between looks at the clock when nothing happens."""
TIDY = 3600
"""Seconds between two looks for what need not be kept."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `serve` was told; None means the state folder's settings."""

    host: str | None = None
    port: int | None = None
    swarm: bool = True
    until_released: bool = False
    threads: int = 1
    certificate: Path | None = None
    key: Path | None = None


class Coordinator:
    """All parts of one coordinator while it runs."""

    def __init__(self, state: State, options: Options) -> None:
        self.state, self.options = state, options
        self.settings = state.settings()
        self.office = Office(state, time.time)
        self.worker = Worker(threads=options.threads, log=state.logs / "worker.log")
        self.shift = Shift(self.office, self.worker, self.note)
        self.swarm: NetworkProcess | None = None
        self.ready, self.stopping = asyncio.Event(), asyncio.Event()
        self._announced: set[str] = set()
        self._tidied = 0

    def note(self, what: str, facts: dict[str, Any]) -> None:
        """One line for people, one JSON line for programs."""
        LOG.info("%s %s", what, facts)
        line = json.dumps({"at": time.time(), "what": what, **facts}, sort_keys=True)
        with suppress(OSError), (self.state.logs / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    # ------------------------------------------------------------ parts

    async def start_web(self, stack: AsyncExitStack) -> int:
        """Serves interface and pages; the port in use."""

        @web.middleware
        async def when_ready(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            await self.ready.wait()
            return await handler(request)

        app = web.Application(client_max_size=MAX_BODY, middlewares=[when_ready])
        add_api(app, self.office)
        add_pages(app, self.office)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=3.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        host = self.options.host or self.settings.host
        port = self.settings.port if self.options.port is None else self.options.port
        site = web.TCPSite(runner, host, port, ssl_context=self._tls())
        try:
            await site.start()
        except OSError as error:
            code = "port.in-use" if error.errno == errno.EADDRINUSE else "usage"
            raise ParisError(code, f"{host}:{port}: {error.strerror}") from error
        return int(runner.addresses[0][1])

    def _tls(self) -> ssl.SSLContext | None:
        if self.options.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.options.certificate, self.options.key)
        except (OSError, ssl.SSLError) as error:
            raise ParisError("usage", f"{self.options.certificate}: {error}") from error
        return context

    async def start_swarm(self, stack: AsyncExitStack) -> None:
        """Joins the peers, as one of them; the truth does not depend on it."""
        if not self.options.swarm:
            return
        host = self.options.host or self.settings.host
        self.swarm = NetworkProcess(
            self.office.store,
            self.office.key,
            self.office.network,
            host_maddrs=[multiaddress(host, self.settings.swarm_port)],
            log=self.state.logs / "network.log",
        )
        await self.swarm.start()
        stack.push_async_callback(self.swarm.close)

    # ------------------------------------------------------------ the loop

    async def work(self) -> None:
        """Does what is due until told to stop."""
        while not self.stopping.is_set():
            await self._orders()
            if await self.shift.step():
                continue
            if self.options.until_released and self._released():
                self.stopping.set()
                return
            await self._tidy()
            await self._pause()

    async def _tidy(self) -> None:
        """Every hour: lets go of updates that the policy no longer keeps."""
        now = self.office.now()
        if now - self._tidied >= TIDY:
            self._tidied = now
            old = expendable(self.office.desk, now)
            if removed := await asyncio.to_thread(prune, self.office.store, old):
                self.note("pruned", {"blobs": removed})

    async def _pause(self) -> None:
        """Until something was written into the ledger, or a tick has passed."""
        self.office.changed.clear()
        waits = [asyncio.create_task(e.wait()) for e in (self.office.changed, self.stopping)]
        await asyncio.wait(waits, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _released(self) -> bool:
        desk = self.office.desk
        return desk.complete and bool(desk.releases) and not self.shift.due()

    async def _orders(self) -> None:
        """What the operator left in the folder, signed with the operator's key."""
        try:
            orders = await asyncio.to_thread(take_orders, self.state, self.office.key)
        except OSError as error:
            LOG.warning("orders: %s", error)
            return
        for order in orders:
            try:
                if order.order == "withdraw":  # what no shard holds is refused before it counts
                    genesis = self.office.genesis.record
                    await asyncio.to_thread(find, self.state, genesis, order.subject)
                await self.office.tell(Ordered(*order))
                self.note("order", order._asdict())
            except ParisError as error:
                self.note("order", {**order._asdict(), "error": error.code})

    async def keep_log(self) -> None:
        """Keeps the log up with the ledger, and the peers informed of what is here."""
        while True:
            try:
                await self.office.project()
                await self._announce()
            except ParisError as error:
                if error.code == "state.corrupt":
                    raise
                LOG.warning("log: %s", error.sentence)
            except OSError as error:  # such as no file handle left while strangers hold them all
                LOG.warning("log: %s", error)
            await asyncio.sleep(TICK / 2)

    async def _announce(self) -> None:
        if self.swarm is None:
            return
        here = set(await asyncio.to_thread(self.office.store.ids))
        if here != self._announced:
            await self.swarm.announce(sorted(here))
            self._announced = here


async def serve(state: State, options: Options) -> None:
    """Runs a coordinator until it is told to stop. Raises ParisError for what it refuses."""
    async with AsyncExitStack() as stack:
        stack.enter_context(state.lock())
        coordinator = Coordinator(state, options)
        stack.callback(coordinator.office.close)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, coordinator.stopping.set)
        port = await coordinator.start_web(stack)  # a port in use changes nothing on the disk
        await coordinator.office.project()
        await coordinator.office.resume_uploads()
        coordinator.ready.set()
        stack.push_async_callback(coordinator.worker.close)
        await coordinator.start_swarm(stack)
        coordinator.note("started", {"port": port, "network": coordinator.office.network})
        await _run(coordinator)
        coordinator.note("stopped", {})


async def _run(coordinator: Coordinator) -> None:
    """Both loops, until the work is over or one of them fails."""
    work = asyncio.create_task(coordinator.work())
    log = asyncio.create_task(coordinator.keep_log())
    stop = asyncio.create_task(coordinator.stopping.wait())
    try:
        done, _ = await asyncio.wait({work, log, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()
    finally:
        # A job in hand is dropped: its result was not yet in the ledger, so it is done again.
        for task in (work, log, stop):
            task.cancel()
        await asyncio.gather(work, log, stop, return_exceptions=True)
        await coordinator.office.project()
