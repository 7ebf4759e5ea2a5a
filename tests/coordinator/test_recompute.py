"""`paris-coordinator merge --recompute` without a state folder: a mirrored log and blobs alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paris_coordinator import cli
from paris_protocol.records import Merge
from protocol.world import COORDINATOR, NODES, World, log_files, put_files
from tinyline import Line, hexed


@pytest.fixture
def line(tmp_path: Path) -> Line:
    (tmp_path / "line").mkdir()
    return Line(tmp_path / "line", tmp_path / "blobs").lived()


def logged(line: Line, folder: Path, signer: Any = COORDINATOR, **changes: Any) -> tuple[Path, str]:
    """A log with the line's first merge, signed; its folder and the merge's id."""
    world = World()
    merge = line.steps[hexed("merge 1")].model_copy(update=changes)
    assert isinstance(merge, Merge)
    sealed = world.put(merge, signer)
    return put_files(folder, log_files(world)), sealed.id


def run(capsys: Any, monkeypatch: Any, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["paris-coordinator", "merge", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def test_a_logged_merge_comes_out_the_same(
    line: Line, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    log, id = logged(line, tmp_path / "log")
    words = ["--recompute", id[:8], "--log", str(log), "--blobs", str(line.blobs), "--json"]
    code, out, _ = run(capsys, monkeypatch, *words)
    facts = json.loads(out)
    assert (code, facts["same"], facts["merge"]) == (0, True, id)


def test_another_result_is_refused(
    line: Line, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    other = line.steps[hexed("merge 2")].result
    log, id = logged(line, tmp_path / "log", result=other)
    words = ["--recompute", id, "--log", str(log), "--blobs", str(line.blobs)]
    code, out, errors = run(capsys, monkeypatch, *words)
    assert (code, "[check.failed]" in errors) == (1, True)
    assert other.root in out


def test_what_is_gone_is_named(line: Line, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    log, id = logged(line, tmp_path / "log")
    line.drop(line.updates[0])
    words = ["--recompute", id, "--log", str(log), "--blobs", str(line.blobs)]
    code, out, errors = run(capsys, monkeypatch, *words)
    assert (code, "[merge.input-gone]" in errors, out) == (1, True, "")
    assert line.updates[0].blob.id in errors
    assert run(capsys, monkeypatch, *words[:4])[0] == 1


def test_a_strangers_merge_is_refused(
    line: Line, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    log, id = logged(line, tmp_path / "log", signer=NODES[0])
    words = ["--recompute", id, "--log", str(log), "--blobs", str(line.blobs)]
    code, _, errors = run(capsys, monkeypatch, *words)
    assert (code, "[record.signer]" in errors) == (20, True)
