"""Writing into the ledger from the event loop: whoever waits goes on when it is on the disk.

Entries that arrive while a commit is under way share the next one, so the disk's speed limits the
delay and not the rate. When a commit fails, everything not yet written fails with it, in order::

    pen = Pen(ledger)
    await pen.write(entry)     # returns after fsync, or raises ParisError("disk.full")
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from paris_coordinator.ledger import Entry, Ledger
from paris_protocol.errors import ParisError

LOG = logging.getLogger("paris.pen")


class Pen:
    """The only writer of events. `on_failure` is called once for every failed commit."""

    def __init__(self, ledger: Ledger, on_failure: Callable[[], None]) -> None:
        self._ledger, self._on_failure = ledger, on_failure
        self._waiting: list[tuple[Entry, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None
        self._stale = False

    async def write(self, *entries: Entry) -> None:
        """Durable when it returns. Cancelling the caller does not take the entries back."""
        if self._stale:
            self._set_right()
            raise ParisError("internal", "the ledger could not be read; ask again")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in entries]
        self._waiting.extend(zip(entries, futures, strict=True))
        self._start()
        for future in futures:
            await asyncio.shield(future)

    async def settled(self) -> None:
        """Waits until everything handed over so far is on the disk or has failed."""
        while self._task is not None:
            await asyncio.wait({self._task})
        if self._stale:
            self._set_right()

    def _set_right(self) -> None:
        """While `on_failure` itself fails, nobody is told that anything is on the disk."""
        self._stale = True
        self._on_failure()
        self._stale = False

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await asyncio.to_thread(self._ledger.append, [entry for entry, _ in batch])
                except ParisError as error:
                    batch, self._waiting = batch + self._waiting, []
                    # The desk is put right before anybody learns of the failure and asks again.
                    try:
                        self._set_right()
                    except Exception:
                        LOG.exception("the ledger cannot be replayed")
                    for _, future in batch:
                        future.set_exception(error)
                        future.exception()  # nobody may be waiting any more
                else:
                    for _, future in batch:
                        future.set_result(None)
        finally:
            self._task = None
