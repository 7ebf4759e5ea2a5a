"""The one way to speak to a running agent: versioned JSON lines on a Unix socket in its folder.

Every verb is answered by one line, `{"v": 1, "ok": true, …}` or the error of the catalogue. A lock
file keeps two agents from one folder (`state.in-use`); a socket that a killed agent left behind is
replaced. Paths that are too long for a socket get a short one, named in `agent.sock.path`::

    with FolderLock(folder):
        server = await serve(folder, {"status": status})
    ask(folder, "status")["why"]                       # from another process
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from paris_protocol.errors import REASONS, ParisError
from paris_protocol.net.store import write_atomic

VERSION: Final = 1
LOCK, SOCKET, POINTER = "agent.lock", "agent.sock", "agent.sock.path"
LONGEST_PATH: Final = 100
LINE_LIMIT: Final = 1 << 20

Verb = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


class FolderLock:
    """Holds a state folder for this process; the system lets go of it when the process dies."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._handle: int | None = None

    def __enter__(self) -> Self:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise ParisError("state.in-use", f"process {owner}" if owner else "") from error
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._handle = handle
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def owner_of(folder: Path) -> int | None:
    """Process id of the agent that holds a folder, or None when nobody does."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.read(handle, 32).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    else:
        return None
    finally:
        os.close(handle)


class Server:
    """The agent's end of the socket; holds the folder's lock while it is made."""

    def __init__(self, folder: Path, verbs: Mapping[str, Verb]) -> None:
        self._folder = folder
        self._verbs = verbs
        self._short: Path | None = None
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()
        self._answering = 0

    async def start(self) -> None:
        """Listen, in place of whatever a killed agent left behind."""
        path = self._folder / SOCKET
        _remove_old(self._folder)
        if len(str(path).encode()) > LONGEST_PATH:
            self._short = Path(tempfile.mkdtemp(prefix="paris-"))
            path = self._short / SOCKET
            write_atomic(self._folder / POINTER, str(path).encode(), 0o600)
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, path, limit=LINE_LIMIT)
        finally:
            os.umask(mask)

    async def close(self) -> None:
        """Stop listening and remove the socket; idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for _ in range(200):  # whoever was asking hears the answer yet
                if not self._answering:
                    break
                await asyncio.sleep(0.01)
            for link in list(self._links):
                await _close(link)
            _remove_old(self._folder)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError, ValueError):
            while line := await reader.readline():
                self._answering += 1
                try:
                    answer = await self._answer(line)
                    writer.write(json.dumps({"v": VERSION, **answer}).encode() + b"\n")
                    await writer.drain()
                finally:
                    self._answering -= 1
        self._links.discard(writer)
        await _close(writer)

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or request.get("v") != VERSION:
                raise ParisError("usage", f"the control interface speaks version {VERSION}")
            verb = self._verbs.get(str(request.get("verb")))
            if verb is None:
                raise ParisError("usage", f"no verb {str(request.get('verb'))[:40]!r}")
            return {"ok": True, **await verb(request)}
        except ParisError as error:
            return {"ok": False, **error.as_json()}
        except (ValueError, RecursionError) as error:
            return {"ok": False, **ParisError("usage", str(error)[:100]).as_json()}


def ask(folder: Path, verb: str, *, timeout: float = 60.0, **arguments: Any) -> dict[str, Any]:
    """Ask the agent of a folder; `agent.not-running` without one, else whatever it refuses."""
    path = folder / SOCKET
    if (folder / POINTER).exists():
        path = Path((folder / POINTER).read_text("utf-8"))
    request = json.dumps({"v": VERSION, "verb": verb, **arguments}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(timeout)
            link.connect(str(path))
            link.sendall(request)
            with link.makefile("rb") as file:
                line = file.readline(LINE_LIMIT)
    except OSError as error:
        raise ParisError("agent.not-running", str(folder)) from error
    if not line:
        raise ParisError("agent.not-running", "it ended while it was asked")
    answer: dict[str, Any] = json.loads(line)
    if answer.get("ok") is not True:
        code = str(answer.get("code"))
        raise ParisError(code if code in REASONS else "internal", str(answer.get("message")))
    return answer


async def _close(link: asyncio.StreamWriter) -> None:
    link.close()
    with suppress(ConnectionError):
        await link.wait_closed()


def _remove_old(folder: Path) -> None:
    (folder / SOCKET).unlink(missing_ok=True)
    pointer = folder / POINTER
    with suppress(OSError, ValueError):
        old = Path(pointer.read_text("utf-8"))
        if old.name == SOCKET and old.parent.name.startswith("paris-"):
            shutil.rmtree(old.parent, ignore_errors=True)
    pointer.unlink(missing_ok=True)
