"""Both control clients keep the contract: the double, and HTTP to a real server."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from contracts.control_contract import Body, ControlContract
from contracts.server import listening, refusals, routes
from paris_protocol.net.control import HttpControl
from paris_protocol.net.memory import MemoryControl


class TestMemoryControl(ControlContract):
    def run(self, body: Body, there: MemoryControl, expect: str | None = None) -> None:
        asyncio.run(body(there, there))


class TestHttpControl(ControlContract):
    def run(self, body: Body, there: MemoryControl, expect: str | None = None) -> None:
        async def main() -> None:
            async with AsyncExitStack() as stack:
                server = listening(*routes(there), middleware=refusals)
                if there.down:  # nobody listens there any more
                    async with server as url:
                        pass
                else:
                    url = await stack.enter_async_context(server)
                await body(await stack.enter_async_context(HttpControl(url, expect)), there)

        asyncio.run(main())
