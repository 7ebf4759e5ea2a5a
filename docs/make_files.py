"""Write the one-line-per-file part of docs/architecture.md: `python docs/make_files.py`.

Each line is the first line of the file's own docstring, so that it cannot say anything else.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: written by docs/make_files.py -->\n", "<!-- end of files -->\n"
PACKAGES = (
    "protocol/paris_protocol",
    "models/paris_models",
    "coordinator/paris_coordinator",
    "node/paris_node",
    "benchmarks",
)


def table() -> str:
    """All files of the packages, by folder."""
    parts = []
    for package in PACKAGES:
        parts.append(f"\n### {package}\n\n| file | what it is |\n|---|---|\n")
        for path in sorted((ROOT / package).rglob("*.py"), key=order):
            if told := first_line(path):
                parts.append(f"| `{path.relative_to(ROOT / package)}` | {told} |\n")
    return "".join(parts) + "\n"


def order(path: Path) -> tuple[int, str]:
    """A folder's own files before those of its sub-folders."""
    return len(path.parts), str(path)


def first_line(path: Path) -> str:
    """The first line of a file's docstring; nothing for an empty file."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return told.splitlines()[0].replace("|", "\\|") if told else ""


def page(old: str) -> str:
    """The page with its table made anew; raises ValueError when the marks are gone."""
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
