"""Documents that are made from code are current, and what documents name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from paris_protocol import errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("installers/*.md")])


def load(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_errors_page_is_current() -> None:
    maker = load("make_errors")
    assert maker.PAGE.read_text() == maker.page(), "run: python docs/make_errors.py"
    exits = {code for code, _ in maker.EXITS}
    assert {reason.exit for reason in errors.REASONS.values()} <= exits


def test_architecture_page_names_every_file() -> None:
    maker = load("make_files")
    old = maker.PAGE.read_text()
    assert old == maker.page(old), "run: python docs/make_files.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_in_backquotes_exist(path: Path) -> None:
    """Names with a slash and an ending are paths of the repository or below the page."""
    folders = "protocol|models|coordinator|node|docs|tests|installers|linux|macos|windows|docker"
    pattern = rf"`((?:{folders})/[\w./*-]+\.\w+)`"
    for name in re.findall(pattern, path.read_text()):
        assert any(list(base.glob(name)) for base in (ROOT, path.parent)), f"{path.name}: {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_tests_exist(path: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text()):
        assert (ROOT / file).exists(), f"{path.name} names {file}"
        found = re.search(rf"^\s*(?:async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
        assert found, f"{path.name} names {file}::{name}"


def test_every_piece_of_the_paper_is_ticked_with_a_test_or_not_yet_there() -> None:
    """docs/paper.md: F1 to F26 in order, once each."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "paper.md").read_text().splitlines()
        if re.match(r"\| F\d", line)
    ]
    assert [row[0] for row in rows] == [f"F{number}" for number in range(1, 27)]
    for number, what, state, proof in rows:
        assert what and proof, number
        assert state in ("ticked", "not yet"), number
        shown = re.findall(r"`tests/[\w/]+\.py::test_\w+`", proof)
        assert bool(shown) == (state == "ticked"), number
