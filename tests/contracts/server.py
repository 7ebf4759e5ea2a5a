"""A real HTTP server in front of a `MemoryControl`: the paths of the coordinator, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from paris_protocol.errors import ParisError
from paris_protocol.net.memory import MemoryControl
from paris_protocol.records import BlobRef

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def listening(*routes: web.RouteDef, middleware: Any = None) -> AsyncIterator[str]:
    """Serve these routes on a free port of this machine; gives the address."""
    middlewares = [middleware] if middleware is not None else []
    app = web.Application(middlewares=middlewares, client_max_size=16 << 20)
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@web.middleware
async def refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ParisError as error:
        return web.json_response(error.as_json(), status=error.reason.http)


def routes(there: MemoryControl) -> list[web.RouteDef]:
    def raw(data: bytes) -> web.Response:
        return web.Response(body=data, content_type="application/json")

    async def genesis(_: web.Request) -> web.Response:
        return raw(there.genesis)

    async def policy(request: web.Request) -> web.Response:
        number = int(request.match_info.get("n", len(there.policies)))
        return raw(there.policies[number - 1])

    async def index(_: web.Request) -> web.Response:
        return raw(there.index_raw)

    async def statement(request: web.Request) -> web.Response:
        return raw(await there.statement(request.match_info["id"]))

    async def get(request: web.Request) -> web.Response:
        return web.json_response(await there.get(request.match_info["path"]))

    async def post(request: web.Request) -> web.Response:
        return web.json_response(await there.post(request.match_info["verb"], await request.read()))

    def ref(request: web.Request) -> BlobRef:
        blob_id = request.match_info["id"]
        size = request.headers.get("X-Paris-Size")
        return BlobRef(id=blob_id, size=int(size) if size else there.size(blob_id))

    async def manifest(request: web.Request) -> web.Response:
        return raw(await there.manifest(ref(request)))

    async def blob(request: web.Request) -> web.Response:
        data, part = there.blob(request.match_info["id"]), request.http_range
        body = data[part] if request.headers.get("Range") else data
        return web.Response(body=body, status=206 if request.headers.get("Range") else 200)

    async def put_manifest(request: web.Request) -> web.Response:
        return web.json_response(await there.put_manifest(ref(request), await request.read()))

    async def put_piece(request: web.Request) -> web.Response:
        i = int(request.match_info["i"])
        left = await there.put_piece(ref(request), i, await request.read())
        return web.json_response({"missing": left})

    return [
        web.get("/v1/genesis", genesis), web.get("/v1/policy", policy),
        web.get("/v1/policy/{n}", policy), web.get("/v1/index", index),
        web.get("/v1/statements/{id}", statement), web.get("/v1/blobs/{id}/manifest", manifest),
        web.get("/v1/blobs/{id}", blob), web.put("/v1/blobs/{id}/manifest", put_manifest),
        web.put("/v1/blobs/{id}/pieces/{i}", put_piece), web.get("/v1/{path:.+}", get),
        web.post("/v1/{verb}", post),
    ]  # fmt: skip
