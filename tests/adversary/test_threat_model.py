"""docs/threat-model.md keeps its word: every row names tests, and every test named is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
ROWS = [
    line.strip("|").split("|")
    for line in TEXT.partition("## Hostile bytes")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| attack ")
]


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_defence_test_and_figure() -> None:
    assert len(ROWS) >= 25
    for row in ROWS:
        attack, who, defence, tests, measured = (cell.strip() for cell in row)
        assert all((attack, who, defence, measured)), attack
        assert any(name for _, name in NAMED.findall(tests)), f"no test for: {attack}"


def test_every_named_test_exists() -> None:
    known: dict[str, set[str]] = {}
    for file, name in NAMED.findall(TEXT):
        path = ROOT / file
        assert path.is_file(), file
        names = known.setdefault(file, functions(path))
        assert not name or name in names, f"{file}::{name}"


def test_every_test_of_an_attack_stands_in_a_row() -> None:
    named = {(file, name) for file, name in NAMED.findall(TEXT)}
    for path in sorted((ROOT / "tests" / "adversary").glob("test_*.py")):
        file = f"tests/adversary/{path.name}"
        if path.name != Path(__file__).name:
            assert any(one == file for one, _ in named), file


def test_what_stays_uncovered_is_said() -> None:
    uncovered = TEXT.partition("## What stays uncovered")[2]
    assert len(re.findall(r"^\d+\. \*\*", uncovered, re.MULTILINE)) >= 8
