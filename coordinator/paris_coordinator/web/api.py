"""The coordinator's HTTP interface: bytes in, the office's answers out.

One table of endpoints gives the routes and the published OpenAPI document. Bodies are read up to
the size that their type allows and no further; files are streamed with Range. Every refusal is the
catalogue's JSON (code, message, fix, retry_after) with the reason's HTTP status, a path that does
not exist is `not-found`, and what goes wrong inside is `internal` and stands in the log::

    app = web.Application(client_max_size=MAX_BODY)
    add_api(app, office)
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web

from paris_coordinator.office import Office
from paris_protocol.blobs import PIECE, manifest_limit
from paris_protocol.errors import ParisError
from paris_protocol.log import MAX_NOTE
from paris_protocol.records import (
    AuditReport,
    Beat,
    BlobRef,
    Commitment,
    Contribution,
    KeyRotation,
    LeaseRequest,
    Opening,
    Registration,
    Statement,
)

MAX_BODY = PIECE + 4096
OFFICE: web.AppKey[Office] = web.AppKey("office", Office)
CHANGING = frozenset({"checkpoint", "witnessed", "index.json"})
"""Files of the log that are written anew as it grows; all others never change."""
LOG_NAME = re.compile(
    r"checkpoint|witnessed|index\.json|(?:tile|statements)/[0-9a-z./]{1,120}", re.ASCII
)
LOG = logging.getLogger("paris.api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Endpoint(NamedTuple):
    """One line of the interface."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: str = ""


def json_answer(value: Any, status: int = 200) -> web.Response:
    """Compact JSON."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return web.Response(body=body, status=status, content_type="application/json")


def refusal(error: ParisError) -> web.Response:
    """A ParisError as it crosses the network."""
    answer = json_answer(error.as_json(), error.reason.http)
    if error.retry_after is not None:
        answer.headers["Retry-After"] = str(max(1, round(error.retry_after)))
    return answer


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every failure into the catalogue's JSON."""
    try:
        return await handler(request)
    except ParisError as error:
        return refusal(error)
    except web.HTTPRequestEntityTooLarge:
        return refusal(ParisError("record.too-large"))
    except web.HTTPNotFound:
        return refusal(ParisError("not-found", request.path[:200]))
    except web.HTTPMethodNotAllowed:
        answer = refusal(ParisError("usage", f"{request.method} {request.path[:200]}"))
        answer.set_status(405)
        return answer
    except web.HTTPException:
        raise
    except Exception:
        LOG.exception("%s %s", request.method, request.path)
        return refusal(ParisError("internal"))


# ---------------------------------------------------------------- reading requests


async def body_of(request: web.Request, limit: int, code: str = "record.too-large") -> bytes:
    """The request's body, at most `limit` bytes; what is longer is refused before it is read."""
    if request.content_length is not None and request.content_length > limit:
        raise ParisError(code, f"{request.content_length} bytes, at most {limit}")
    found = bytearray()
    async for chunk in request.content.iter_chunked(1 << 16):
        found += chunk
        if len(found) > limit:
            raise ParisError(code, f"more than {limit} bytes")
    return bytes(found)


def post(
    path: str, kind: type[Statement], method: str, summary: str, *, seen: bool = False
) -> Endpoint:
    """An endpoint that gives an envelope of this kind to the office's method of that name.

    `seen`: the method is also told from which address the request came.
    """

    async def handler(request: web.Request) -> web.StreamResponse:
        raw = await body_of(request, 2 * kind.MAX_BYTES)
        run = getattr(request.app[OFFICE], method)
        return json_answer(await (run(raw, request.remote) if seen else run(raw)))

    return Endpoint("POST", path, handler, summary, kind.TYPE)


def envelope(raw: bytes) -> web.Response:
    """An envelope as it was signed; it never changes under its id."""
    return web.Response(body=raw, content_type="application/json")


def number(text: str) -> int:
    """A number from a path."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise ParisError("not-found", text[:40])
    return int(text)


# ---------------------------------------------------------------- the endpoints


async def genesis(request: web.Request) -> web.StreamResponse:
    """The genesis envelope."""
    return envelope(request.app[OFFICE].genesis.raw)


async def policy(request: web.Request) -> web.StreamResponse:
    """The current policy, or the one of a number."""
    wanted = request.match_info.get("number")
    return envelope(request.app[OFFICE].policy(None if wanted is None else number(wanted)).raw)


async def index(request: web.Request) -> web.StreamResponse:
    """The signed index of this moment."""
    await request.app[OFFICE].settled()
    return envelope(request.app[OFFICE].index().raw)


async def one_statement(request: web.Request) -> web.StreamResponse:
    """Any statement of the ledger by its id."""
    return envelope(request.app[OFFICE].raw(request.match_info["id"]))


async def contribution(request: web.Request) -> web.StreamResponse:
    """Where a contribution stands."""
    await request.app[OFFICE].settled()
    return json_answer(request.app[OFFICE].contribution(request.match_info["id"]))


async def receipt(request: web.Request) -> web.StreamResponse:
    """A judged contribution with its log proofs."""
    return json_answer(await request.app[OFFICE].receipt(request.match_info["id"]))


async def blob(request: web.Request) -> web.StreamResponse:
    """The bytes of a blob, or a range of them."""
    office, id = request.app[OFFICE], request.match_info["blob"]
    ref = BlobRef(id=id, size=office.store.manifest(id).size)
    path = await asyncio.to_thread(office.store.path, ref)  # hashed when it is opened first
    headers = {"Content-Type": "application/octet-stream", "ETag": f'"{id}"'}
    return web.FileResponse(path, chunk_size=1 << 18, headers=headers)


async def manifest(request: web.Request) -> web.StreamResponse:
    """The manifest of a blob."""
    return envelope(request.app[OFFICE].store.manifest(request.match_info["blob"]).raw)


async def put_manifest(request: web.Request) -> web.StreamResponse:
    """The manifest of an update that an open contribution names."""
    office, id = request.app[OFFICE], request.match_info["blob"]
    told = request.headers.get("X-Paris-Size")
    size = None if told is None else number(told)
    limit = manifest_limit(office.uploads.expected(id, size).size)
    raw = await body_of(request, limit, "blob.too-large")
    return json_answer(await office.uploads.put_manifest(id, size, raw))


async def put_piece(request: web.Request) -> web.StreamResponse:
    """A piece of an update that an open contribution names."""
    office, id = request.app[OFFICE], request.match_info["blob"]
    data = await body_of(request, PIECE, "blob.too-large")
    return json_answer(
        await office.uploads.put_piece(id, number(request.match_info["piece"]), data)
    )


async def log_file(request: web.Request) -> web.StreamResponse:
    """A file of the transparency log (C2SP tlog-tiles)."""
    folder = request.app[OFFICE].log.folder
    name = request.match_info["name"]
    if LOG_NAME.fullmatch(name) is None:
        raise ParisError("not-found", name[:200])
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.name[:1] == ".":
        raise ParisError("not-found", name[:200])
    note = name in ("checkpoint", "witnessed")
    kind = "text/plain; charset=utf-8" if note else "application/octet-stream"
    fresh = "no-cache" if name in CHANGING else "public, max-age=31536000, immutable"
    return web.FileResponse(path, headers={"Content-Type": kind, "Cache-Control": fresh})


async def cosign(request: web.Request) -> web.StreamResponse:
    """A cosigned checkpoint from a witness."""
    raw = await body_of(request, MAX_NOTE)
    return json_answer(await request.app[OFFICE].cosign(raw))


async def health(request: web.Request) -> web.StreamResponse:
    """Whether the coordinator is up, and of which network."""
    office = request.app[OFFICE]
    return json_answer({"ok": True, "network": office.network, "log_size": office.log.size})


async def openapi(request: web.Request) -> web.StreamResponse:
    """This interface as an OpenAPI document."""
    return json_answer(document())


ID = "{id:[0-9a-f]{64}}"
BLOB = "{blob:[0-9a-f]{64}}"

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/v1/genesis", genesis, "The signed genesis; its id is the network's."),
    Endpoint("GET", "/v1/policy", policy, "The current policy."),
    Endpoint("GET", "/v1/policy/{number}", policy, "The policy of this number."),
    Endpoint("GET", "/v1/index", index, "The signed index: heads, policy, release, log."),
    Endpoint("GET", f"/v1/statements/{ID}", one_statement, "A signed statement by its id."),
    post("/v1/register", Registration, "register", "Make a key known."),
    post("/v1/rotations", KeyRotation, "rotate", "Let a key give way to another."),
    post("/v1/lease", LeaseRequest, "lease", "Ask for an assignment.", seen=True),
    post("/v1/beat", Beat, "beat", "Say that a node is alive.", seen=True),
    post("/v1/commitments", Commitment, "commit", "Commit to a result."),
    post("/v1/contributions", Contribution, "contribute", "Hand in a result."),
    post("/v1/openings", Opening, "open_states", "Lay committed states open."),
    post("/v1/audits", AuditReport, "audit", "Report what an audit found."),
    Endpoint("GET", f"/v1/contributions/{ID}", contribution, "Where a contribution stands."),
    Endpoint("GET", f"/v1/receipts/{ID}", receipt, "A contribution's verdict with log proofs."),
    Endpoint("GET", f"/v1/blobs/{BLOB}/manifest", manifest, "The manifest of a blob."),
    Endpoint("GET", f"/v1/blobs/{BLOB}", blob, "A blob; Range is supported."),
    Endpoint("PUT", f"/v1/blobs/{BLOB}/manifest", put_manifest, "Upload a manifest.", "manifest"),
    Endpoint("PUT", f"/v1/blobs/{BLOB}/pieces/{{piece}}", put_piece, "Upload a piece.", "bytes"),
    Endpoint("POST", "/v1/cosignatures", cosign, "Hand in a cosigned checkpoint.", "note"),
    Endpoint("GET", "/log/{name:.+}", log_file, "checkpoint, tile/…, statements/…"),
    Endpoint("GET", "/healthz", health, "Whether the coordinator is up."),
    Endpoint("GET", "/api/openapi.json", openapi, "This document."),
)  # fmt: skip


def document() -> dict[str, Any]:
    """The OpenAPI document of the table above."""
    error = {"$ref": "#/components/schemas/Error"}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace(":[0-9a-f]{64}", "").replace(":.+", "")
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        entry: dict[str, Any] = {
            "summary": endpoint.summary,
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in names
            ],
            "responses": {
                "200": {"description": "done"},
                "default": {
                    "description": "refused",
                    "content": {"application/json": {"schema": error}},
                },
            },
        }
        if endpoint.body:
            kind = "application/octet-stream" if endpoint.body == "bytes" else "application/json"
            entry["requestBody"] = {
                "required": True,
                "description": endpoint.body,
                "content": {kind: {"schema": {}}},
            }
        paths.setdefault(path, {})[endpoint.method.lower()] = entry
    fields = {"code": "string", "message": "string", "fix": "string", "retry_after": "number"}
    schema = {
        "type": "object",
        "required": ["code", "message", "fix", "retry_after"],
        "properties": {name: {"type": [kind, "null"]} for name, kind in fields.items()},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Paris coordinator", "version": "1"},
        "paths": paths,
        "components": {"schemas": {"Error": schema}},
    }


def add_api(app: web.Application, office: Office) -> None:
    """Mounts the interface; `app` should have `client_max_size=MAX_BODY`."""
    app[OFFICE] = office
    app.middlewares.append(errors)
    for endpoint in ENDPOINTS:
        app.router.add_route(endpoint.method, endpoint.path, endpoint.handler)
