"""A coordinator whose experts are three numbers: for attacks that never reach a model.

Real office, real HTTP, instant jobs::

    async with counter(tmp_path) as (office, control):
        await control.post("register", FakeNode(office.network, 1).registration())
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from coordinator.fakes import FakeNode, found, open_office
from paris_coordinator.office import Office
from paris_coordinator.web.api import MAX_BODY, add_api
from paris_protocol.errors import ParisError
from paris_protocol.net.control import HttpControl

__all__ = ["FakeNode", "counter", "refusal"]


@asynccontextmanager
async def counter(folder: Path, **more: Any) -> AsyncIterator[tuple[Office, HttpControl]]:
    """Office and client of a new network in `folder`; `more` goes to `found`."""
    clock = more.pop("clock", None)
    state = found(folder, **more)
    office = open_office(state, clock) if clock else open_office(state)
    await office.project()
    app = web.Application(client_max_size=MAX_BODY)
    add_api(app, office)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with HttpControl(f"http://127.0.0.1:{runner.addresses[0][1]}", None) as control:
            yield office, control
    finally:
        await runner.cleanup()
        office.close()


async def refusal(asked: Any) -> str:
    """The code with which an awaitable is refused; "" if it is not."""
    try:
        await asked
    except ParisError as error:
        return error.code
    return ""
