"""Pages and report in a real browser: readable without JavaScript, hostile text never runs.

Needs Chromium (apt install chromium); without it every test here is skipped, loudly.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from browser.network import HOSTILE, Network, digest, key, make_network
from browser.report_data import report_data

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "SKIPPED: no Chromium (apt install chromium); pages are NOT looked at in a browser"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        print(MISSING, file=sys.stderr)
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        yield found
        found.close()


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return make_network(tmp_path / "state")


@pytest.fixture
def address(network: Network) -> Iterator[str]:
    """The pages on a loopback port, served by a thread."""
    from paris_coordinator.web.pages import add_pages

    loop = asyncio.new_event_loop()
    app = web.Application()
    add_pages(app, network)
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    # In a thread of its own: this one runs the browser's loop.
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


class Visit:
    """An opened page, what it asked for and what it complained about."""

    def __init__(self, browser: Any, url: str, *, scripts: bool = True, dark: bool = False) -> None:
        self.context = browser.new_context(
            java_script_enabled=scripts, color_scheme="dark" if dark else "light"
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss())
        )
        self.page.goto(url)

    def text(self) -> str:
        return str(self.page.inner_text("body"))


def test_status_page_reads_without_javascript(browser: Any, address: str) -> None:
    visit = Visit(browser, address, scripts=False)
    text = visit.text()
    assert "merges" in text
    assert "refused L3: the update makes the expert worse on held-out clips." in text
    assert visit.page.locator("svg.chart circle").count() == 7
    assert visit.page.locator("table tr").count() > 10
    assert all(url.startswith(address) for url in visit.requests), visit.requests
    color = visit.page.locator(".curve").first
    assert color.bounding_box()["width"] > 50
    visit.context.close()


def test_hostile_text_is_shown_and_not_run(browser: Any, address: str) -> None:
    works = [f"/nodes/{key('bad')}", "/", "/experts/0", f"/contributions/{digest('none')}"]
    for path in works:
        visit = Visit(browser, address + path)
        assert "pwned" not in visit.page.title().replace('<script>document.title="pwned"', "")
        assert visit.page.locator("main script, main img").count() == 0
        assert not visit.dialogs
        assert not [c for c in visit.complaints if "404" not in c], visit.complaints
        visit.context.close()
    node = Visit(browser, address + works[0])
    assert HOSTILE[:20] in node.text()
    node.context.close()


def test_contribution_page_is_one_click_away(browser: Any, address: str, network: Network) -> None:
    visit = Visit(browser, address, scripts=False)
    refused = next(w for w in network.desk.works.values() if w.judged and not w.judged.accepted)
    visit.page.click(f'a[href="/contributions/{refused.contribution}"]')
    text = visit.text()
    for expected in ("refused", "loss.damage", "log index 7"):
        assert expected in text
    visit.context.close()


def test_pages_follow_the_dark_scheme_and_a_narrow_screen(browser: Any, address: str) -> None:
    grounds = set()
    for dark in (False, True):
        visit = Visit(browser, address, dark=dark)
        script = "getComputedStyle(document.body).backgroundColor"
        grounds.add(visit.page.evaluate(script))
        visit.page.set_viewport_size({"width": 380, "height": 800})
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 380
        visit.context.close()
    assert len(grounds) == 2


def test_report_opens_from_the_disk_and_loads_nothing_else(browser: Any, tmp_path: Path) -> None:
    from paris_models.commands.report import write_report

    data = report_data(hostile=HOSTILE)
    path = write_report(data, tmp_path)
    visit = Visit(browser, path.as_uri(), scripts=False)
    text = visit.text()
    for expected in ("A network of volunteers", "96.2 %", "kill -9 of volunteer-2", "loss.damage"):
        assert expected in text
    assert visit.page.locator("svg.loss").count() == 3
    assert visit.page.locator("svg.timeline .mark").count() == 4
    assert all(url.startswith("file://") for url in visit.requests), visit.requests
    visit.context.close()
    running = Visit(browser, path.as_uri())
    assert running.page.title() == "Paris: report of a network on one machine"
    assert not running.dialogs
    missing = ("ERR_FILE_NOT_FOUND", "Failed to load resource")
    assert not [c for c in running.complaints if not any(m in c for m in missing)]
    running.context.close()
