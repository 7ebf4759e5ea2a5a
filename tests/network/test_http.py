"""Addresses that answer wrongly, slowly, or not at all; every one has its own code."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from contracts.control_contract import code_of, coordinator
from contracts.server import listening, refusals, routes
from paris_protocol.blobs import PIECE
from paris_protocol.envelope import seal
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.net.control import HttpControl, refusal
from paris_protocol.records import BlobRef
from protocol.world import COORDINATOR, NODES, OTHER, ROOT, World, policy_record

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ask(answer: Answer, call: Callable[[HttpControl], Awaitable[Any]], **options: Any) -> str:
    """The code of one call to a server that answers everything in one way."""

    async def main() -> str:
        async with (
            listening(web.route("*", "/{path:.*}", answer)) as url,
            HttpControl(url, None, **options) as control,
        ):
            return await code_of(call(control))

    return asyncio.run(main())


def fixed(body: str, status: int = 200, kind: str = "application/json", **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(text=body, status=status, content_type=kind, headers=headers)

    return answer


PAGE = "<html><body>Please log in</body></html>"
ERROR = json.dumps(ParisError("unit.closed", "x").as_json())


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (fixed(PAGE, kind="text/html"), "network.not-paris"),
        (fixed(PAGE, 404, "text/html"), "network.not-paris"),
        (fixed(PAGE, 302, "text/html", Location="https://login.example/"), "network.not-paris"),
        (fixed(PAGE, 502, "text/html"), "network.down"),
        (fixed("", 503), "network.down"),
        (fixed("slow down", 429, "text/plain"), "network.rate"),
        (fixed("[1]"), "network.not-paris"),
        (fixed("{"), "network.not-paris"),
        (fixed("[" * 100_000), "network.not-paris"),
        (fixed(ERROR, 409), "unit.closed"),
        (fixed('{"code":"new.reason","message":"of a newer version"}', 400), "network.not-paris"),
        (fixed('{"code":[1],"message":2}', 400), "network.not-paris"),
        (fixed("x" * (9 << 20)), "blob.too-large"),
    ],
)
def test_whatever_answers_is_named(answer: Answer, code: str) -> None:
    assert ask(answer, lambda control: control.get("receipts/x")) == code


def test_what_is_no_genesis_is_not_paris() -> None:
    for answer in (fixed(PAGE, kind="text/html"), fixed("{}"), fixed("not json")):
        assert ask(answer, lambda control: control.hello()) == "network.not-paris"


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_refusal_comes_back_whole(reason: str) -> None:
    for error in (
        ParisError(reason, "the detail (of it)", retry_after=3.0),
        ParisError(reason),
    ):
        again = refusal(error.reason.http, json.dumps(error.as_json()).encode())
        assert again.as_json() == error.as_json()


def test_a_hostile_retry_after_is_ignored() -> None:
    for wait in ("NaN", "-1", "1e999", '"soon"', "[]"):
        body = f'{{"code":"work.none","message":"","retry_after":{wait}}}'
        assert refusal(503, body.encode(), 5.0).retry_after == 5.0


def test_silence_is_down_within_the_limit() -> None:
    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError

    began = time.monotonic()
    assert ask(silent, lambda control: control.get("x"), read=0.3) == "network.down"
    assert time.monotonic() - began < 5


def test_a_body_that_stops_or_breaks_off_is_down() -> None:
    def partly(close: bool) -> Answer:
        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(PIECE)})
            await response.prepare(request)
            await response.write(b"x" * 1000)
            if close:
                assert request.transport is not None
                request.transport.close()
            else:
                await asyncio.sleep(30)
            return response

        return answer

    ref = BlobRef(id="0" * 64, size=PIECE)
    for close in (True, False):
        answer = partly(close)
        assert ask(answer, lambda control: control.piece(ref, 0, 0.3)) == "network.down"


@pytest.mark.parametrize("url", ["http://example.org", "http://10.0.0.1:80", "http://[2001::1]/"])
def test_plain_http_is_for_loopback_only(url: str) -> None:
    with pytest.raises(ParisError) as caught:
        HttpControl(url, None)
    assert caught.value.code == "network.plain-http"


def with_clock(offset: float) -> str:
    world = World()

    async def main() -> str:
        async with (
            listening(*routes(coordinator(world)), middleware=refusals) as url,
            HttpControl(url, world.network, clock=lambda: time.time() + offset) as control,
        ):
            return await code_of(control.hello())

    return asyncio.run(main())


@pytest.mark.parametrize("offset", [-310, 310, 1e9])
def test_a_wrong_clock_is_told(offset: float) -> None:
    assert with_clock(offset) == "network.clock"


@pytest.mark.parametrize("offset", [-280, 280])
def test_a_slightly_wrong_clock_is_none(offset: float) -> None:
    assert with_clock(offset) == "none"


def test_a_server_without_ranges_will_do() -> None:
    data = bytes(range(251)) * 40_000  # two pieces and something

    async def whole(_: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(_)
        for start in range(0, len(data), 1 << 18):
            await response.write(data[start : start + (1 << 18)])
        return response

    async def main() -> None:
        ref = BlobRef(id="0" * 64, size=len(data))
        async with (
            listening(web.get("/{path:.*}", whole)) as url,
            HttpControl(url, None) as control,
        ):
            assert await control.piece(ref, 0) == data[:PIECE]
            assert await control.piece(ref, 2) == data[2 * PIECE :]

    asyncio.run(main())


def test_the_chain_of_policies_leads_to_the_root() -> None:
    world = World()

    def served(policies: list[Any]) -> str:
        there = coordinator(world)
        there.policies = [policy.raw for policy in policies]

        async def main() -> str:
            async with (
                listening(*routes(there), middleware=refusals) as url,
                HttpControl(url, world.network) as control,
            ):
                return await code_of(control.policy())

        return asyncio.run(main())

    first, second = world.policies
    assert served([first, second]) == "none"
    stranger = seal(policy_record(1, None, (NODES[0].id,)), NODES[0], world.network)
    assert served([stranger]) == "record.signer"
    forged = seal(policy_record(2, first.id, (NODES[0].id,)), NODES[0], world.network)
    assert served([first, forged]) == "record.signer"
    assert served([stranger, forged]) == "record.signer"
    linked = seal(policy_record(2, first.id, (OTHER.id,)), OTHER, world.network)
    assert served([first, linked]) == "none"
    other = seal(policy_record(1, None, (OTHER.id, NODES[0].id)), ROOT, world.network)
    assert served([other, linked]) == "record.signer"
    # A coordinator may change numbers; keys are named by the root key alone.
    usurped = seal(policy_record(2, first.id, (COORDINATOR.id,)), OTHER, world.network)
    assert served([first, usurped]) == "record.signer"
    third = seal(policy_record(3, second.id, (COORDINATOR.id,)), COORDINATOR, world.network)
    assert served([first, second, third]) == "none"


def test_an_older_policy_than_before_is_refused() -> None:
    world, there = World(), coordinator(World())

    async def main() -> None:
        async with (
            listening(*routes(there), middleware=refusals) as url,
            HttpControl(url, world.network) as control,
        ):
            assert (await control.policy()).record.number == 2
            assert (await control.policy()).record.number == 2
            there.policies.pop()
            assert await code_of(control.policy()) == "record.signer"

    asyncio.run(main())
