"""What strangers send over HTTP and what local programs send over the node's socket.

Every endpoint of the coordinator that takes a body gets spoiled ones, most of them signed by a
registered node, so that they reach the innermost check. The answer is always the catalogue's, never
`internal`, and what was refused changed nothing. The node's control socket answers every line.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from coordinator.fakes import FakeNode, found, open_office
from fuzz.mutate import damaged, loose, spoiled
from fuzz.statements import predicate_of, signed
from paris_coordinator.web.api import ENDPOINTS, MAX_BODY, Endpoint, add_api
from paris_node.control import Server
from paris_protocol.blobs import Manifest
from paris_protocol.errors import REASONS
from paris_protocol.records import (
    AuditReport,
    Beat,
    Opening,
    OpenState,
    Segment,
    TensorFile,
)

EXAMPLES = int(os.environ.get("PARIS_FUZZ_EXAMPLES", "60"))
D = "ab" * 32
POSTS = [each for each in ENDPOINTS if each.method in ("POST", "PUT")]


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Any, aiohttp.ClientSession]]:
    """A coordinator without models on a free port, and a client of it."""
    office = open_office(found(folder))
    app = web.Application(client_max_size=MAX_BODY)
    add_api(app, office)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(url) as http:
            yield office, http
    finally:
        await runner.cleanup()
        office.close()


def bodies(node: FakeNode, office: Any, lease: Any) -> dict[str, bytes]:
    """A valid body for each kind that an endpoint takes."""
    assignment = node.assignment(lease)
    commitment, contribution, data = node.statements(assignment)
    file = TensorFile(blob=contribution.record.update.blob, root=D)
    opening = Opening(challenge=D, contribution=D, states=(OpenState(index=1, file=file),))
    segment = Segment(
        index=0, exact=True, rho="0", tensor="0", limit="0", tensor_limit="0", passed=True
    )
    report = AuditReport(
        contribution=D, assignment=D, auditor=node.key.id, numerics=D, segments=(segment,),
        passed=True, at=node.now(),
    )  # fmt: skip
    return {
        "registration": node.registration(),
        "lease-request": node.request(),
        "beat": node.seal(Beat(at=node.now(), assignment=D, step=1, state="training")).raw,
        "commitment": commitment.raw,
        "contribution": contribution.raw,
        "opening": node.seal(opening).raw,
        "audit-report": node.seal(report).raw,
        "manifest": Manifest.build([data]).raw,
        "bytes": data,
    }


def spoil(random: Random, raw: bytes, node: FakeNode, kind: str) -> bytes:
    """A body with damage outside, or inside and signed again."""
    if kind in ("manifest", "bytes") or not raw.startswith(b"{") or random.random() < 0.25:
        return damaged(random, raw, [raw])
    if random.random() < 0.2:
        return loose(spoiled(random, json.loads(raw)))
    return signed(kind, spoiled(random, predicate_of(raw)), node.network, node.key)


async def knock(
    http: aiohttp.ClientSession, endpoint: Endpoint, blob: str, body: bytes
) -> tuple[int, Any]:
    """Send a body to an endpoint; status and answer."""
    path = endpoint.path.replace("{blob:[0-9a-f]{64}}", blob).replace("{piece}", "0")
    path = path.replace("{id:[0-9a-f]{64}}", D)
    async with http.request(endpoint.method, path, data=body) as answer:
        return answer.status, json.loads(await answer.text())


@pytest.mark.parametrize("endpoint", POSTS, ids=lambda each: f"{each.method} {each.path[:24]}")
def test_spoiled_bodies_are_refused_by_name(endpoint: Endpoint, tmp_path: Path) -> None:
    async def knocking() -> None:
        async with serving(tmp_path) as (office, http):
            node = FakeNode(office.network, 1)
            await office.register(node.registration())
            lease = await office.lease(node.request())
            valid = bodies(node, office, lease)
            raw = valid.get(endpoint.body, valid["beat"])
            blob = Manifest.build([valid["bytes"]]).id
            if endpoint.method == "PUT":  # only what an open contribution names may be uploaded
                await office.commit(valid["commitment"])
                await office.contribute(valid["contribution"])
            for number in range(EXAMPLES):
                random = Random(f"{endpoint.path} {number}")
                body = spoil(random, raw, node, endpoint.body)
                before = list(office.ledger.entries())
                status, answer = await knock(http, endpoint, blob, body)
                if status != 200:
                    named = answer["code"] in REASONS and answer["code"] != "internal"
                    assert named and status < 500, (number, answer, body[:300])
                    assert list(office.ledger.entries()) == before

    asyncio.run(knocking())


def test_odd_paths_and_headers_are_refused_by_name(tmp_path: Path) -> None:
    paths = (
        "/v1/policy/" + "9" * 400, "/v1/policy/-1", "/v1/policy/%00", "/v1/policy/¹",
        "/v1/statements/" + "F" * 64, "/v1/contributions/%2e%2e", "/log/statements/..%2f..%2fkey",
        "/log/tile/0/000%00", "/log/tile/" + "x" * 4000, "/v1/blobs/" + "0" * 64 + "/pieces/1e3",
    )  # fmt: skip

    async def knocking() -> None:
        async with serving(tmp_path) as (office, http):
            for path in paths:
                for method in ("GET", "PUT", "POST"):
                    async with http.request(method, path, data=b"x") as answer:
                        assert 400 <= answer.status < 500, (path, answer.status)
            blob = office.genesis.record.initial.blob.id
            for header in (
                "bytes=9-1",
                "bytes=-1",
                "bytes=" + "9" * 300 + "-",
                "x=1",
                "bytes=0-0,5-5",
            ):
                async with http.get(f"/v1/blobs/{blob}", headers={"Range": header}) as answer:
                    assert answer.status < 500, header
                    await answer.read()

    asyncio.run(knocking())


LINES = (
    b"\n", b"{}\n", b"[]\n", b"null\n", b'{"v": 1}\n', b'{"v": "1", "verb": "echo"}\n',
    b'{"v": 1, "verb": ["echo"]}\n', b'{"v": 1, "verb": "\\ud800"}\n', b"\xff\xfe\n",
    b"[" * 200_000 + b"\n", b'{"v": 1, "verb": "echo", "n": NaN}\n',
    b'{"v": 1, "verb": "echo", "n": ' + b"9" * 5000 + b"}\n", b"\0" * 1000 + b"\n",
)  # fmt: skip


def test_every_line_on_the_control_socket_is_answered(tmp_path: Path) -> None:
    async def echo(request: Any) -> dict[str, Any]:
        return {"n": int(request.get("n", 0))}

    async def knocking() -> None:
        server = Server(tmp_path, {"echo": echo})
        await server.start()
        good = b'{"n": 7, "v": 1, "verb": "echo"}\n'
        lines = [*LINES]
        for number in range(EXAMPLES):
            spoilt = damaged(Random(f"socket {number}"), good, LINES)
            lines += [part + b"\n" for part in spoilt.split(b"\n") if part]
        try:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "agent.sock")
            for line in lines:
                writer.write(line)
                answer = json.loads(await asyncio.wait_for(reader.readline(), 10))
                assert answer["v"] == 1 and answer["ok"] in (True, False), (line[:100], answer)
            writer.write(good)
            assert json.loads(await reader.readline()) == {"v": 1, "ok": True, "n": 7}
            writer.close()
        finally:
            await server.close()

    asyncio.run(knocking())


def test_an_endless_line_ends_the_connection_and_not_the_agent(tmp_path: Path) -> None:
    async def knocking() -> None:
        server = Server(tmp_path, {})
        await server.start()
        try:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "agent.sock")
            writer.write(b"x" * (3 << 20))
            with suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
            reader, writer = await asyncio.open_unix_connection(tmp_path / "agent.sock")
            writer.write(b"{}\n")
            assert json.loads(await asyncio.wait_for(reader.readline(), 10))["ok"] is False
            writer.close()
        finally:
            await server.close()

    asyncio.run(knocking())
