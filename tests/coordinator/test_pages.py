"""The pages: whole, readable without JavaScript, and strangers' text stays text."""

from __future__ import annotations

import asyncio
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from browser.network import HOSTILE, Network, digest, key, make_network
from paris_coordinator.web import pages, views
from paris_protocol.errors import REASONS, ParisError

VOID = {"meta", "link", "br", "img", "input"}


class Reader(HTMLParser):
    """Collects elements with their attributes, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return make_network(tmp_path)


def get(network: Network, *paths: str) -> list[tuple[int, dict[str, str], str]]:
    """Status, headers and text of each path, from a real server."""

    async def run() -> list[tuple[int, dict[str, str], str]]:
        app = web.Application()
        pages.add_pages(app, network)
        found = []
        async with TestClient(TestServer(app)) as client:
            for path in paths:
                async with client.get(path) as answer:
                    text = (await answer.read()).decode(errors="replace")
                    found.append((answer.status, dict(answer.headers), text))
        return found

    return asyncio.run(run())


def every_page(network: Network) -> list[str]:
    works = network.desk.works.values()
    return [
        "/", "/releases", "/policy", "/log", "/experts/0", "/experts/1",
        f"/nodes/{key('bad')}", f"/nodes/{key('one')}",
        *[f"/contributions/{work.contribution}" for work in works],
        "/experts/99", f"/contributions/{digest('nothing')}",
    ]  # fmt: skip


def test_every_page_is_whole_and_loads_nothing_from_elsewhere(network: Network) -> None:
    for path, (status, headers, text) in zip(
        every_page(network), get(network, *every_page(network)), strict=True
    ):
        missing = path == "/experts/99" or digest("nothing") in path
        assert status == (404 if missing else 200), path
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        reader = Reader()
        reader.feed(text)
        assert reader.open == [], path
        for tag, attributes in reader.elements:
            assert tag not in {"script", "iframe", "object", "form", "base"}, path
            assert "style" not in attributes, f"{path}: the policy would drop an inline style"
            for name, value in attributes.items():
                assert not name.startswith("on"), path
                if name in {"href", "src"}:
                    assert value is not None
                    assert value.startswith("/"), f"{path}: {value}"


def test_strangers_text_is_text(network: Network) -> None:
    for path, (status, _, text) in zip(
        every_page(network), get(network, *every_page(network)), strict=True
    ):
        assert status != 500, path
        assert "<script" not in text, path
        assert "<img" not in text, path
        assert "\u202e" not in text, f"{path}: text could run backwards"
        assert "\x07" not in text, path
    [(_, _, node)] = get(network, f"/nodes/{key('bad')}")
    assert "&lt;script&gt;" in node


def test_what_the_pages_say(network: Network) -> None:
    contribution = next(
        work.contribution
        for work in network.desk.works.values()
        if work.judged and not work.judged.accepted
    )
    home, refused, expert = get(network, "/", f"/contributions/{contribution}", "/experts/1")
    assert REASONS["loss.damage"].text.replace("'", "&#39;") in home[2]
    assert "5 <small>of 12</small>" in home[2]
    assert "quarantined" not in home[2]
    assert f"paris://127.0.0.1:8420/{digest('network')} --dry-run" in home[2]
    for number in ("0.0213", "0.1941", "0.02", "n</span> 64", "bucket</span> worse"):
        assert number in refused[2], "every measured number stands on the page"
    assert "loss.damage" in refused[2]
    assert "log index 7" in refused[2]
    assert f"/v1/receipts/{contribution}" in refused[2]
    assert "not published" in expert[2]
    assert expert[2].count("<circle") == 3


def test_damaged_files_of_the_store_raise_an_alarm(network: Network) -> None:
    [(_, _, sound)] = get(network, "/")
    assert "damaged" not in sound
    aside = network.state.store / "corrupt" / f"{digest('rotten')}.blob"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(b"rot")
    [(_, _, alarmed)] = get(network, "/")
    assert "1 file of the store is damaged" in alarmed
    assert digest("rotten")[:12] in alarmed


def test_curves_hold_published_merges_only(network: Network) -> None:
    points = [row["loss"] for row in views.home(network)["experts"]]
    assert [[p["round"] for p in row] for row in points] == [[0, 1, 2, 3], [0, 1, 2]]
    assert all(p["se"] == 0.0009 and p["n"] == 128 for row in points for p in row)


def test_files_stay_in_their_folder(network: Network) -> None:
    (network.state.samples / "sample-0.mp4").write_bytes(b"clip")
    release = network.state.releases / "1"
    (release / "expert_0").mkdir(parents=True)
    (release / "expert_0" / "config.json").write_text("{}")
    (network.state.releases / "link").symlink_to(network.state.settings_file)
    (release / "link.json").symlink_to(network.state.settings_file)
    good = get(
        network, "/samples/sample-0.mp4", "/releases/1/expert_0/config.json", "/static/style.css"
    )
    assert [status for status, _, _ in good] == [200, 200, 200]
    assert good[0][2] == "clip"

    def refused(call: Any, *words: Any) -> None:
        with pytest.raises(ParisError, match="no such thing"):
            call(*words)

    for name in ("../settings.json", "..", ".hidden.mp4", "nothing.mp4", "a/b.mp4", "sample-0.css"):
        refused(pages._file, network.state.samples, name, ".mp4")
    for name in ("link.json", "../link", "/etc/passwd", "expert_0", "expert_0//config.json", ""):
        refused(pages._file, release, name)


def test_nothing_here_changes_anything(network: Network) -> None:
    assert {route.method for route in pages.routes()} == {"GET"}


def test_an_empty_network_has_pages_too(tmp_path: Path) -> None:
    network = make_network(tmp_path)
    fresh = type(network.desk)(
        network.network, network.genesis.record, network.desk.policy, network.desk.policy_id
    )
    network.desk, network.people, network.presence = fresh, {}, {}
    home, expert, releases = get(network, "/", "/experts/0", "/releases")
    assert home[0] == expert[0] == releases[0] == 200
    assert "Nobody has joined yet." in home[2]
    assert "None yet" in releases[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("a\nb\tc", "a�b�c"), ("x" * 99, "x" * 59 + "…"), ("\u202eevil", "�evil")],
)
def test_plain(text: str, shown: str) -> None:
    assert pages.plain(text) == shown


def test_how_values_look() -> None:
    assert pages.ago(100, 100) == "0 s ago"
    assert pages.ago(0, 7200) == "2 h ago"
    assert pages.figure("-0.00412") == "−0.00412"
    assert pages.figure(None) == "–"
    assert [pages.figure(v) for v in ("319392", 2.0, 0.25)] == ["319392", "2", "0.25"]
    assert pages.moment(0) == "1970-01-01 00:00:00 UTC"
    assert HOSTILE.startswith("<script>")
