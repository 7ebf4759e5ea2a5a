"""The control socket and the folder's lock."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from paris_node import control
from paris_node.control import FolderLock, Server, ask, owner_of
from paris_protocol.errors import ParisError


async def echo(request: Mapping[str, Any]) -> dict[str, Any]:
    return {"said": request.get("word")}


async def refuse(request: Mapping[str, Any]) -> dict[str, Any]:
    raise ParisError("work.none", "by script")


def served(folder: Path, *calls: dict[str, Any]) -> list[dict[str, Any] | ParisError]:
    async def play() -> list[dict[str, Any] | ParisError]:
        server = Server(folder, {"echo": echo, "refuse": refuse})
        await server.start()
        answers: list[dict[str, Any] | ParisError] = []
        for call in calls:
            try:
                answers.append(await asyncio.to_thread(ask, folder, **call))
            except ParisError as error:
                answers.append(error)
        await server.close()
        return answers

    return asyncio.run(play())


def test_verbs_are_answered_and_refusals_are_the_catalogue_s(tmp_path: Path) -> None:
    said, refused, unknown = served(
        tmp_path, {"verb": "echo", "word": "hm"}, {"verb": "refuse"}, {"verb": "nothing"}
    )
    assert isinstance(said, dict) and (said["said"], said["v"]) == ("hm", 1)
    assert isinstance(refused, ParisError) and refused.code == "work.none"
    assert isinstance(unknown, ParisError) and unknown.code == "usage"
    assert not (tmp_path / control.SOCKET).exists()


@pytest.mark.parametrize(
    "line", [b"no json\n", b"[]\n", b'{"verb":"echo"}\n', b'{"v":2,"verb":"echo"}\n']
)
def test_other_lines_are_refused_and_the_next_one_is_heard(tmp_path: Path, line: bytes) -> None:
    def speak() -> list[dict[str, Any]]:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10)
            link.connect(str(tmp_path / control.SOCKET))
            link.sendall(line + b'{"v":1,"verb":"echo","word":"a"}\n')
            with link.makefile("rb") as file:
                return [json.loads(file.readline()) for _ in range(2)]

    async def play() -> list[dict[str, Any]]:
        server = Server(tmp_path, {"echo": echo})
        await server.start()
        mode = (tmp_path / control.SOCKET).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        answers = await asyncio.to_thread(speak)
        await server.close()
        return answers

    refused, heard = asyncio.run(play())
    assert (refused["ok"], refused["code"]) == (False, "usage")
    assert heard["said"] == "a"


def test_a_path_too_long_for_a_socket_works(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 15) / ("longer" * 10)
    folder.mkdir(parents=True)
    assert len(str(folder / control.SOCKET)) > 108
    [said] = served(folder, {"verb": "echo", "word": "far"})
    assert isinstance(said, dict) and said["said"] == "far"
    assert not (folder / control.POINTER).exists()


def test_a_socket_left_by_a_killed_agent_is_replaced(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / control.SOCKET))
    stale.close()
    with pytest.raises(ParisError) as refused:
        ask(tmp_path, "echo")
    assert refused.value.code == "agent.not-running"
    [said] = served(tmp_path, {"verb": "echo", "word": "new"})
    assert isinstance(said, dict) and said["said"] == "new"


def test_one_agent_per_folder_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from paris_node.control import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == b"held\n"
    assert owner_of(tmp_path) == child.pid
    with pytest.raises(ParisError) as refused, FolderLock(tmp_path):
        pass
    assert refused.value.code == "state.in-use" and str(child.pid) in refused.value.detail
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    with FolderLock(tmp_path):
        pass
    assert owner_of(tmp_path) is None
