"""report.json after its schema, report.html whole and safe, sheets and charts as drawn."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from PIL import Image

from browser.report_data import report_data
from paris_models import charts
from paris_models.commands import report
from paris_protocol.errors import ParisError

SCHEMA = json.loads((report.HERE / "report.schema.json").read_text())
HOSTILE = "<script>alert(1)</script>"


def test_the_schema_is_one_and_the_example_follows_it() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(report_data()["report"])


def test_both_files_are_written(tmp_path: Path) -> None:
    data = report_data()
    path = report.write_report(data, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == data["report"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert path == tmp_path / "report.html"


def test_only_the_report_itself_is_needed(tmp_path: Path) -> None:
    page = report.write_report({"report": report_data()["report"]}, tmp_path).read_text()
    assert "No attack was made" in page


BREAKS = [
    ("verified", "yes"), ("peak_pss_mb", None), ("merges", [{"expert": 0}]), ("loss", {"0": {}}),
    ("router_accuracy", math.nan),
    ("interruptions", [{"kind": "flood", "at": 1, "recovered_after_s": 2}]),
    ("contributions", {"honest": {"accepted": True, "refused": 0}}), ("versions", {"torch": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BREAKS)
def test_what_breaks_the_schema_is_refused_and_nothing_is_written(
    tmp_path: Path, field: str, value: object
) -> None:
    data = report_data()
    data["report"][field] = value
    with pytest.raises(ParisError, match=field):
        report.write_report(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", SCHEMA["required"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    data = report_data()
    del data["report"][field]
    with pytest.raises(ParisError, match=field):
        report.write_report(data, tmp_path)


def test_our_check_says_what_jsonschema_says() -> None:
    for field, value in BREAKS:
        if value is math.nan:
            continue
        broken = {**report_data()["report"], field: value}
        assert list(report.faults_of(broken, SCHEMA, SCHEMA))
        assert not Draft202012Validator(SCHEMA).is_valid(broken)


class Balanced(HTMLParser):
    open: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_names_no_host(tmp_path: Path) -> None:
    page = report.write_report(report_data(HOSTILE), tmp_path).read_text()
    reader = Balanced()
    reader.open = []
    reader.feed(page)
    assert reader.open == []
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;") >= 6
    assert not re.search(r"(https?:)?//[a-z]", page), "it must load nothing from any host"


def test_pictures_are_untrained_samples_until_the_gate_passes(tmp_path: Path) -> None:
    data = report_data()
    assert report.UNTRAINED not in report.render(data)
    data["report"]["quality"]["gate_passed"] = False
    assert report.render(data).count(f'warn">{report.UNTRAINED}<') == 3


def test_quality_that_was_not_measured_is_no_number() -> None:
    data = report_data()
    data["report"]["quality"].update(
        all_right=None, motion=None, fvd=None, n=0, initial=None, frozen_frame=None,
        gate_passed=False,
    )  # fmt: skip
    page = report.render(data)
    assert "<b>–</b>" in page
    assert "not measured in this run" in page
    assert not list(report.faults_of(data["report"], SCHEMA, SCHEMA))


def test_contact_sheet(tmp_path: Path) -> None:
    clip = np.zeros((3, 9, 24, 24), np.uint8)
    clip[0] = 200
    clip[1, 8] = 250
    rows = [report.Row(f"prompt {i}", clip, None, clip) for i in range(3)]
    with Image.open(report.contact_sheet(rows, tmp_path / "s.png", label="untrained sample")) as s:
        pixels = np.asarray(s.convert("RGBA"))
    red = (pixels == (200, 0, 0, 255)).all(-1).sum()
    last = (pixels == (200, 250, 0, 255)).all(-1).sum()
    assert red == 3 * 2 * 4 * 48 * 48, "four frames of two strips of three prompts"
    assert last == 3 * 2 * 48 * 48, "the last frame is shown"
    with pytest.raises(ValueError, match="at least one"):
        report.contact_sheet([], tmp_path / "x.png")


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers, st.integers(1, 12))
def test_ticks_cover_and_are_few(a: float, b: float, about: int) -> None:
    low, high = min(a, b), max(a, b)
    ticks = charts.nice_ticks(low, high, about)
    slack = 1e-6 * max(1, abs(low), abs(high))
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= about + 3
    assert ticks == sorted(set(ticks))


@given(st.lists(st.tuples(numbers, st.floats(0, 10)), min_size=1, max_size=20))
def test_every_point_lies_on_the_chart(points: list[tuple[float, float]]) -> None:
    rows = [{"round": i, "loss": loss, "se": se} for i, (loss, se) in enumerate(points)]
    svg = charts.loss_chart(rows, HOSTILE)
    assert HOSTILE not in svg
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1])  # type: ignore[index]
    found = [float(y) for y in re.findall(r' cy="([-\d.]+)"', svg)]
    assert len(found) == len(points)
    assert all(0 <= y <= height for y in found)


def test_charts_of_nothing_are_nothing() -> None:
    assert charts.loss_chart([], "x") == charts.timeline([]) == charts.bars({}, {}, "x") == ""


def test_how_values_read() -> None:
    assert [charts.duration(s) for s in (3, 185, 3723)] == ["3 s", "3:05", "1:02:03"]
    assert [charts.size(b) for b in (512, 1_430_000, 2.1e9)] == ["512 B", "1.4 MB", "2.1 GB"]
    assert report.share(0.9862) == "98.6 %"
    assert report.share(None) == "–"
