"""Networks and coordinators that are not what the volunteer meant, or not there at all."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bad_input.saying import Said, refused, tree
from bad_input.servers import serving
from contracts.server import listening, refusals, routes
from node.test_app import living, make_kit, until
from nodeworld import Office
from paris_node.cli import main
from paris_protocol.net.control import HttpControl

Say = Callable[..., Said]
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def invite(url: str, network: str) -> str:
    return f"paris://{url.removeprefix('http://')}/{network}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silence of some tenths of a second instead of twenty seconds is slow enough."""
    defaults = HttpControl.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "read", 0.4)  # type: ignore[arg-type]


async def page(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>Welcome to the hotel</html>", content_type="text/html")


async def login(_: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": "https://login.example.org/"})


async def prose(_: web.Request) -> web.StreamResponse:
    return web.Response(text="this is no JSON", content_type="application/json")


async def busy(_: web.Request) -> web.StreamResponse:
    return web.Response(status=503, text="<html>Bad gateway</html>", content_type="text/html")


async def silent(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


async def dripping(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100000"})
    await response.prepare(request)
    await response.write(b'{"payload":')
    await asyncio.sleep(30)
    return response


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (page, "network.not-paris"), (login, "network.not-paris"), (prose, "network.not-paris"),
        (busy, "network.down"), (silent, "network.down"), (dripping, "network.down"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["join", "fit"])
def test_what_is_no_coordinator_is_named_and_nothing_is_made(
    say: Say, tmp_path: Path, answer: Answer, code: str, verb: str
) -> None:
    with serving(web.route("*", "/{path:.*}", answer)) as url:
        words = [verb, invite(url, "ab" * 32), "--state", tmp_path / "state"]
        began = time.monotonic()
        refused(say(main, *words, *(["--yes"] if verb == "join" else [])), code)
        assert time.monotonic() - began < 15
    assert tree(tmp_path) == {}


def test_a_coordinator_that_is_not_there(say: Say, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        said = say(main, "join", invite(url, "ab" * 32), "--yes", "--state", tmp_path / "state")
    refused(said, "network.down")
    assert tree(tmp_path) == {}


def test_another_network_than_the_invite_names(say: Say, tmp_path: Path) -> None:
    office = Office()
    with serving(*routes(office.control), middleware=refusals) as url:
        words = ("join", invite(url, "ab" * 32), "--yes", "--state", tmp_path / "state")
        refused(say(main, *words), "network.mismatch")
        same = say(main, "join", invite(url, office.network), "--dry-run", "--state", tmp_path)
        assert (same.exit, office.network in same.out) == (0, True)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("https://train.example.org", "network.bare-url"), ("paris://host/abc", "network.invite"),
        ("nothing.json", "network.invite"), (f"paris:///{'ab' * 32}", "network.invite"),
    ],
)  # fmt: skip
def test_what_names_no_network(say: Say, tmp_path: Path, text: str, code: str) -> None:
    refused(say(main, "join", text, "--yes", "--state", tmp_path / "state"), code)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_wrong_clock(say: Say, tmp_path: Path, seconds: int) -> None:
    office = Office()

    @web.middleware
    async def elsewhen(request: web.Request, handler: Any) -> web.StreamResponse:
        answer: web.StreamResponse = await handler(request)
        answer.headers["Date"] = formatdate(time.time() + seconds, usegmt=True)
        return answer

    with serving(*routes(office.control), middleware=elsewhen) as url:
        words = ("join", invite(url, office.network), "--yes", "--state", tmp_path / "state")
        refused(say(main, *words), "network.clock")
    assert tree(tmp_path) == {}


def test_a_node_at_work_outlives_all_of_it(tmp_path: Path) -> None:
    """Its work is kept, its reason is the code, and it goes on when the coordinator is well."""
    office, sick = Office(units=1), {"answer": page, "date": 0.0}

    @web.middleware
    async def moods(request: web.Request, handler: Any) -> web.StreamResponse:
        answer: web.StreamResponse
        if sick["answer"] is not None:
            return await sick["answer"](request)  # type: ignore[operator]
        answer = await refusals(request, handler)
        answer.headers["Date"] = formatdate(time.time() + float(sick["date"]), usegmt=True)  # type: ignore[arg-type]
        return answer

    async def play() -> None:
        async with (
            listening(*routes(office.control), middleware=moods) as url,
            HttpControl(url, office.network, read=0.3) as control,
        ):
            kit = make_kit(tmp_path / "a", office)
            kit.control, kit.clock = control, time.time
            async with living(kit) as agent:
                for answer, code in (
                    (page, "network.not-paris"), (silent, "network.down"),
                    (busy, "network.down"), (prose, "network.not-paris"),
                ):  # fmt: skip
                    sick["answer"] = answer
                    await until(lambda code=code: agent.volunteer.why == code, code)  # type: ignore[misc]
                sick.update(answer=None, date=4000.0)
                await until(lambda: agent.volunteer.why == "network.clock", "the clock")
                sick["date"] = 0.0
                await until(lambda: len(office.accepted) == 1, "the unit")
                assert len(office.contributions) == 1

    asyncio.run(play())
