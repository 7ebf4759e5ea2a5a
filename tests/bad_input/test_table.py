"""The table in `README.md` is true: its tests exist, and no code of its areas is without a case."""

from __future__ import annotations

import re
from pathlib import Path

from paris_protocol.errors import REASONS

HERE = Path(__file__).parent
TABLE = (HERE / "README.md").read_text("utf-8")
AREAS = ("clip", "caption.", "state.", "port.", "release.", "prompt.", "disk.full")


def test_every_test_of_the_table_exists() -> None:
    named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", TABLE)
    assert len(named) > 60
    for file, test in named:
        text = (HERE.parent / file).read_text("utf-8")
        assert f"def {test}(" in text, f"{file} has no {test}"


def test_no_code_of_these_areas_is_without_a_case() -> None:
    wanted = {code for code in REASONS if code.startswith(AREAS)}
    assert {code for code in wanted if f"`{code}`" not in TABLE} == set()
