"""The coordinator's pages: plain HTML without JavaScript, where strangers' text is only text.

Eight pages, one style sheet, sample clips and the files of releases; all GET, none changes
anything: the operator's actions are commands that need the operator's key. Every answer carries a
policy that lets the browser load from this host alone and run no script. What does not exist is a
page with the catalogue's sentence::

    app = web.Application()
    add_pages(app, office)
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from paris_coordinator.web import clusters, views
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
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")
PICTURE: Final = re.compile(r"[0-9]{1,3}\.png")
View = Callable[[PageSource, web.Request], dict[str, Any]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_pages(app: web.Application, source: PageSource) -> None:
    """Mounts all pages on `app`; they read `source` anew at every request."""
    app[SOURCE] = source
    app[clusters.STUDIO] = clusters.Studio()
    app.add_routes(routes())


def routes() -> list[web.RouteDef]:
    """The route table."""
    key = "{key:ed25519:[0-9a-f]{64}}"
    return [
        web.get("/", page("home.html", lambda s, _: views.home(s))),
        web.get("/experts/{index:[0-9]{1,6}}", page("expert.html", _expert)),
        web.get("/clusters/{index:[0-9]{1,6}}", told(cluster)),
        web.get("/clusters/{index:[0-9]{1,6}}/{name}", told(picture)),
        web.get("/contributions/{id:[0-9a-f]{64}}", page("contribution.html", _contribution)),
        web.get(f"/nodes/{key}", page("node.html", _node)),
        web.get("/policy", page("policy.html", lambda s, _: views.policy_page(s))),
        web.get("/log", page("log.html", lambda s, _: views.log_page(s))),
        web.get("/releases", page("releases.html", lambda s, _: views.releases_page(s))),
        web.get("/releases/{number:[0-9]{1,9}}/{path:.+}", told(release_file)),
        web.get("/samples/{name}", told(sample)),
        web.get("/static/{name}", told(static)),
    ]


def _expert(source: PageSource, request: web.Request) -> dict[str, Any]:
    return views.expert_page(source, int(request.match_info["index"]))


def _contribution(source: PageSource, request: web.Request) -> dict[str, Any]:
    return views.contribution(source, request.match_info["id"])


def _node(source: PageSource, request: web.Request) -> dict[str, Any]:
    return views.node_page(source, request.match_info["key"])


async def cluster(request: web.Request) -> web.StreamResponse:
    """A cluster by its clips; the table of origins may be long, so it is read beside the loop."""
    source, index = request.app[SOURCE], int(request.match_info["index"])
    return html("cluster.html", await asyncio.to_thread(clusters.cluster_page, source, index))


def page(template: str, view: View) -> Handler:
    """A handler that prints what `view` found."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return html(template, view(request.app[SOURCE], request))

    return told(handler)


def told(handler: Handler) -> Handler:
    """The handler, with a page of the catalogue's words where it raises a ParisError."""

    async def wrapped(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ParisError as error:
            found = {**views.frame(request.app[SOURCE]), "error": error.as_json()}
            return html("error.html", found, error.reason.http)

    return wrapped


def html(template: str, found: dict[str, Any], status: int = 200) -> web.Response:
    """A page as an answer."""
    text = ENVIRONMENT.get_template(template).render(found)
    headers = {**HEADERS, "Cache-Control": "no-cache"}
    return web.Response(text=text, content_type="text/html", status=status, headers=headers)


# ---------------------------------------------------------------- files


async def sample(request: web.Request) -> web.StreamResponse:
    """A sample clip of the current heads."""
    source: PageSource = request.app[SOURCE]
    return _file(source.state.samples, request.match_info["name"], ".mp4")


async def picture(request: web.Request) -> web.StreamResponse:
    """A picture of a cluster's clip, made when it is first asked for."""
    source, name = request.app[SOURCE], request.match_info["name"]
    if PICTURE.fullmatch(name) is None or int(name.removesuffix(".png")) >= clusters.SHOWN:
        raise ParisError("not-found", plain(name, 80))
    folder = await request.app[clusters.STUDIO].folder(source, int(request.match_info["index"]))
    return _file(folder, name, ".png")


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
    """A number of a record, or of ours: four significant digits, counts in full."""
    if value is None:
        return "–"
    found = real(value) if isinstance(value, str) else value
    whole = abs(found) < 1e12 and found == int(found)
    return (f"{found:.0f}" if whole else charts.number(found)).replace("-", "−")


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
