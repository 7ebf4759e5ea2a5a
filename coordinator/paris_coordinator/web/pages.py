"""The coordinator's pages: plain HTML without JavaScript, where strangers' text is only text.

Five pages, one style sheet, sample clips and the files of releases; all GET, none changes anything:
the operator's actions are commands that need the operator's key. Every answer carries a policy that
lets the browser load from this host alone and run no script. What does not exist is a page with the
catalogue's sentence::

    app = web.Application()
    add_pages(app, office)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from paris_coordinator.web import views
from paris_coordinator.web.views import PageSource
from paris_models import charts
from paris_protocol.canonical import real
from paris_protocol.errors import ParisError

HERE: Final = Path(__file__).resolve().parent
SOURCE: Final[web.AppKey[Any]] = web.AppKey("page-source")
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; media-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
View = Callable[[PageSource, web.Request], dict[str, Any]]


def add_pages(app: web.Application, source: PageSource) -> None:
    """Mounts all pages on `app`; they read `source` anew at every request."""
    app[SOURCE] = source
    app.add_routes(routes())


def routes() -> list[web.RouteDef]:
    """The route table."""
    key = "{key:ed25519:[0-9a-f]{64}}"
    return [
        web.get("/", page("home.html", lambda s, _: views.home(s))),
        web.get("/experts/{index:[0-9]{1,6}}", page("expert.html", _expert)),
        web.get("/contributions/{id:[0-9a-f]{64}}", page("contribution.html", _contribution)),
        web.get(f"/nodes/{key}", page("node.html", _node)),
        web.get("/releases", page("releases.html", lambda s, _: views.releases_page(s))),
        web.get("/releases/{number:[0-9]{1,9}}/{path:.+}", release_file),
        web.get("/samples/{name}", sample),
        web.get("/static/{name}", static),
    ]


def _expert(source: PageSource, request: web.Request) -> dict[str, Any]:
    return views.expert_page(source, int(request.match_info["index"]))


def _contribution(source: PageSource, request: web.Request) -> dict[str, Any]:
    return views.contribution(source, request.match_info["id"])


def _node(source: PageSource, request: web.Request) -> dict[str, Any]:
    return views.node_page(source, request.match_info["key"])


def page(template: str, view: View) -> Callable[[web.Request], Any]:
    """A handler that prints what `view` found; a ParisError becomes a page with its sentence."""

    async def handler(request: web.Request) -> web.Response:
        source: PageSource = request.app[SOURCE]
        name, status = template, 200
        try:
            found = view(source, request)
        except ParisError as error:
            found = {**views.frame(source), "error": error.as_json()}
            name, status = "error.html", error.reason.http
        text = ENVIRONMENT.get_template(name).render(found)
        headers = {**HEADERS, "Cache-Control": "no-cache"}
        return web.Response(text=text, content_type="text/html", status=status, headers=headers)

    return handler


# ---------------------------------------------------------------- files


async def sample(request: web.Request) -> web.StreamResponse:
    """A sample clip of the current heads."""
    source: PageSource = request.app[SOURCE]
    return _file(source.state.samples, request.match_info["name"], ".mp4")


async def static(request: web.Request) -> web.StreamResponse:
    """The style sheet."""
    return _file(HERE / "static", request.match_info["name"], ".css")


async def release_file(request: web.Request) -> web.StreamResponse:
    """A file of a published release: the address of the folder is a mirror for `paris pull`."""
    source: PageSource = request.app[SOURCE]
    folder = source.state.releases / request.match_info["number"]
    return _file(folder, request.match_info["path"])


def _file(folder: Path, name: str, suffix: str = "") -> web.StreamResponse:
    """A plain file below `folder`; hidden files, links and ways out do not exist."""
    parts = name.split("/")
    path = folder.joinpath(*parts)
    if (
        not all(FILE_NAME.fullmatch(part) for part in parts)
        or not name.endswith(suffix)
        or not path.is_file()
        or path.resolve() != folder.resolve().joinpath(*parts)
    ):
        raise ParisError("not-found", plain(name, 80))
    return web.FileResponse(path, headers={**HEADERS, "Cache-Control": "no-cache"})


# ---------------------------------------------------------------- how values look


def plain(text: str, most: int = 60) -> str:
    """A stranger's text on one line: no control, format or direction characters, not too long."""
    clean = "".join("�" if unicodedata.category(c)[0] == "C" else c for c in text)
    return charts.clip(" ".join(clean.split()), most)


def moment(at: int | None) -> str:
    """Unix seconds as 2026-01-31 13:05:09 UTC."""
    return "–" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(at: int | None, now: int) -> str:
    """How long ago, in the largest fitting unit."""
    if at is None:
        return "–"
    seconds = max(0, now - at)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def figure(value: str | float | None) -> str:
    """A number of a record, or of ours, with four significant digits."""
    if value is None:
        return "–"
    return charts.number(real(value) if isinstance(value, str) else value).replace("-", "−")


def short(digest: str) -> str:
    """The beginning of a digest or key; the whole stands in the link."""
    return digest.removeprefix("ed25519:")[:12]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        plain=plain, moment=moment, ago=ago, figure=figure, short=short, bytes=charts.size
    )
    environment.globals.update(loss_chart=charts.loss_chart)
    return environment


ENVIRONMENT: Final = _environment()
