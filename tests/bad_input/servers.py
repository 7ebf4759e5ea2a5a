"""Web servers in a thread, for commands that run their own event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from contracts.server import listening


@contextmanager
def serving(*routes: web.RouteDef, middleware: Any = None) -> Iterator[str]:
    """Serve these routes on a free port of this machine; gives the address."""
    ready, done = threading.Event(), asyncio.Event()
    found: list[Any] = []

    async def main() -> None:
        async with listening(*routes, middleware=middleware) as url:
            found.extend([url, asyncio.get_running_loop()])
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(10)
        yield str(found[0])
    finally:
        found[1].call_soon_threadsafe(done.set)
        thread.join(10)
