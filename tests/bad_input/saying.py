"""What a refusal looks like from outside, and folders compared before and after it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paris_protocol.errors import REASONS, ParisError


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    exit: int
    out: str
    err: str


def refused(said: Said, code: str) -> None:
    """One sentence, what to do about it, the catalogue's exit code, and no traceback."""
    reason = REASONS[code]
    everything = said.out + said.err
    assert said.exit == reason.exit, said
    assert said.err.count(reason.text) == 1, said
    assert reason.fix in said.err, said
    assert "Traceback" not in everything, said


def code_of(call: Callable[[], Any]) -> str:
    """The catalogue code with which a call is refused."""
    with pytest.raises(ParisError) as caught:
        call()
    assert caught.value.sentence.startswith(caught.value.reason.text)
    return caught.value.code


def tree(folder: Path, ignore: Collection[str] = ()) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder by relative path: mode and bytes; folders by their mode alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in ignore and not path.is_socket():
            data = path.read_bytes() if path.is_file() else b""
            found[name] = (path.lstat().st_mode, data)
    return found


class FullDisk:
    """From the n-th call on, everything that would take room on the disk is refused.

    `calls` counts them, so that a test can go through all moments at which a disk may be full.
    """

    NAMES = ("write", "fsync", "sendfile", "link", "mkdir")

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls = at, 0
        for name in self.NAMES:
            patch.setattr(os, name, self._limited(getattr(os, name)))
        patch.setattr(os, "open", self._opened(os.open))

    def _take(self) -> None:
        self.calls += 1
        if self.calls >= self.at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _limited(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            self._take()
            return real(*words, **more)

        return call

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, flags: int, *words: Any, **more: Any) -> Any:
            if flags & os.O_CREAT:
                self._take()
            return real(path, flags, *words, **more)

        return call


def every_moment(patch: pytest.MonkeyPatch, play: Callable[[int], None]) -> int:
    """Plays with a disk that is full at the first, second, … write, until it goes through.

    `play(n)` must make its own fresh folder. Every earlier play must be refused with `disk.full`;
    the number of moments that were tried is returned.
    """
    for at in range(1, 500):
        with patch.context() as inner:
            disk = FullDisk(inner, at)
            try:
                play(at)
            except ParisError as error:
                assert error.code == "disk.full", (at, error)
                continue
            assert disk.calls < at
            return at - 1
    raise AssertionError("it never goes through")
