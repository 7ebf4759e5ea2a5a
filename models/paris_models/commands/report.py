"""The report of a run: report.json after a shipped schema, report.html that opens anywhere, sheets.

`write_report(data, out)` takes one dict and writes both files. report.html holds its own style and
charts and names pictures and videos by relative path; it loads nothing from any host and runs no
script. A report that does not follow the schema is refused (`internal`) and nothing is written::

    contact_sheet([Row("a red ball moves left", real=a, before=b, after=c)], out / "samples.png")
    write_report(data, out)

`data` holds:

    report          the fields of report.json, exactly as report.schema.json lists them
    timeline        [{"process", "kind", "start", "end", "label"}] in seconds since the start; end
                    None: to the end; kind "alive" is a lane's ground; "stage", "train", "verify",
                    "merge", "router", "release" are bars; "kill", "restart" (end = start) are marks
    curves          {expert: [{"round", "loss", "se", "n"}]}, held-out loss after so many merges
    attacks         [{"attack", "contribution", "layer", "code", "sentence", "caught", "detail"}];
                    with caught false, layer is the one that would catch it; detail: L4's numbers
    sheets          [{"title", "png"}], paths relative to `out`
    videos          [{"title", "file"}], paths relative to `out`
    where_time_went {what: seconds}
    notes           sentences: what is a stand-in, what was not measured

All keys but `report` may be absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from paris_models import charts
from paris_protocol.errors import ParisError

HERE: Final = Path(__file__).resolve().parent
GATE: Final = "all factors right"
"""Name of the gate whose limit the quality chart draws."""
UNTRAINED: Final = "untrained sample"
"""What every picture is called until the quality gate passes."""

GREY: Final = (118, 124, 132)
"""Text on a transparent sheet: it reads on a light and on a dark page."""
TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,), "array": (list, tuple), "string": (str,), "boolean": (bool,),
    "integer": (int,), "number": (int, float), "null": (type(None),),
}  # fmt: skip


def write_report(data: Mapping[str, Any], out: Path) -> Path:
    """Write out/report.json and out/report.html, each whole or not at all; returns the latter.

    Raises ParisError("internal") naming the field that breaks the schema, ParisError("disk.full").
    """
    report = data["report"]
    schema = json.loads((HERE / "report.schema.json").read_text(encoding="utf-8"))
    if faults := list(faults_of(report, schema, schema)):
        raise ParisError("internal", "report.json: " + "; ".join(faults[:3]))
    page = render(data)
    _write(out / "report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    _write(out / "report.html", page)
    return out / "report.html"


def faults_of(
    value: Any, schema: Mapping[str, Any], whole: Mapping[str, Any], at: str = "report"
) -> Iterator[str]:
    """What breaks the schema; the part of JSON Schema that report.schema.json uses."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} is {value!r}, not one of {schema['enum']}"
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(_is(value, name) for name in names):
        yield f"{at} is {type(value).__name__}, not {' or '.join(names)}"
        return
    if isinstance(value, Mapping):
        yield from (f"{at} lacks {key!r}" for key in schema.get("required", ()) if key not in value)
        for key, item in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            yield from faults_of(item, below, whole, f"{at}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from faults_of(item, schema.get("items", {}), whole, f"{at}[{i}]")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name]) and value == value  # NaN is no number


def render(data: Mapping[str, Any]) -> str:
    """The page; every text is escaped by the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters.update(
        size=charts.size, duration=charts.duration, number=charts.number, share=share
    )
    report = data["report"]
    curves = {
        int(k): charts.loss_chart(points, f"expert {k}", colour=int(k))
        for k, points in sorted(data.get("curves", {}).items(), key=lambda item: int(item[0]))
        if points
    }
    seconds, moved = data.get("where_time_went") or report["seconds"], report["bytes"]
    return jinja.get_template("report_template.html").render(
        r=report,
        honest=report["contributions"]["honest"],
        hostile=report["contributions"]["hostile"],
        passed=report["quality"]["gate_passed"],
        whole=report["seconds"].get("all", sum(report["seconds"].values())),
        untrained=UNTRAINED,
        curves=curves,
        timeline=charts.timeline(data.get("timeline", [])),
        kinds=kinds_of(data.get("timeline", [])),
        quality=quality_chart(report),
        moved=charts.bars(moved, told(moved, charts.size), "bytes moved"),
        time=charts.bars(seconds, told(seconds, charts.duration), "where the time went"),
        attacks=data.get("attacks", []),
        sheets=data.get("sheets", []),
        videos=data.get("videos", []),
        notes=data.get("notes", []),
    )


def quality_chart(report: Mapping[str, Any]) -> str:
    """Share of prompts with all factors right: frozen frame, initial, trained, with the gate."""
    quality = report["quality"]
    if not quality["n"]:
        return ""
    found = {
        "frozen real frame": quality["frozen_frame"],
        "initial checkpoint": quality["initial"],
        "trained by volunteers": quality,
        "real clips": quality.get("real"),
    }
    values = {
        name: score["all_right"]
        for name, score in found.items()
        if score and score["all_right"] is not None
    }
    limits = [gate["limit"] for gate in report["gates"] if gate["name"] == GATE]
    return charts.bars(
        values, told(values, share), "share of prompts with all factors right",
        limits[0] if limits and values else None,
    )  # fmt: skip


def kinds_of(spans: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of a timeline in the order in which they first appear, for its legend."""
    return list(dict.fromkeys(str(span["kind"]) for span in spans if span["kind"] != "alive"))


def told(values: Mapping[str, float], by: Any) -> dict[str, str]:
    """Each value as text."""
    return {name: by(value) for name, value in values.items()}


def share(value: float | None) -> str:
    """A share as .986 → 98.6 %; – where it was not measured."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        if error.errno in (28, 122):
            raise ParisError("disk.full", str(path)) from error
        raise


# ---------------------------------------------------------------- sheets


@dataclass(frozen=True)
class Row:
    """One prompt of a sheet: clips as uint8 arrays or tensors (3, F, H, W), or None."""

    caption: str
    real: Any
    before: Any
    after: Any


def contact_sheet(
    rows: Sequence[Row], path: Path, *, frames: int = 5, height: int = 48, label: str = ""
) -> Path:
    """Draw real / before / after strips of each prompt, up to three prompts in a row, as a PNG.

    frames: how many of a clip's frames are shown, evenly taken, first and last included; height:
    pixels of a shown frame (small clips are enlarged without smoothing); label: written above, such
    as `UNTRAINED` until the gate passes. Raises ValueError without rows.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("a sheet needs at least one row")
    font = ImageFont.load_default(13)
    names = ("real", "before", "after")
    shape = next(clip.shape for row in rows for clip in (row.real, row.after) if clip is not None)
    wide = round(height * shape[3] / shape[2])
    gap, margin, gutter, head = 3, 16, 56, 22
    block_w = gutter + frames * (wide + gap)
    block_h = head + len(names) * (height + gap) + 16
    columns = min(3, len(rows))
    above = 24 if label else 0
    sheet = Image.new(
        "RGBA",
        (
            2 * margin + columns * block_w + (columns - 1) * margin,
            margin + above + -(-len(rows) // columns) * block_h,
        ),
        (0, 0, 0, 0),
    )
    draw = ImageDraw.Draw(sheet)
    if label:
        draw.text((margin, 10), label, fill=(190, 90, 40), font=font)
    for i, row in enumerate(rows):
        x = margin + (i % columns) * (block_w + margin)
        y = margin // 2 + above + (i // columns) * block_h
        draw.text((x + gutter, y + 3), charts.clip(row.caption, 60), fill=GREY, font=font)
        for j, name in enumerate(names):
            top = y + head + j * (height + gap)
            draw.text((x, top + height // 2 - 8), name, fill=GREY, font=font)
            clip = getattr(row, name)
            for k, frame in enumerate(_frames(clip, frames)):
                picture = Image.fromarray(frame).resize((wide, height), Image.Resampling.NEAREST)
                sheet.paste(picture, (x + gutter + k * (wide + gap), top))
    sheet.save(path)
    return path


def _frames(clip: Any, count: int) -> list[Any]:
    """Evenly taken frames (H, W, 3) of a clip (3, F, H, W), contiguous for Pillow."""
    import numpy as np

    if clip is None:
        return []
    array = np.asarray(clip)
    last = array.shape[1] - 1
    taken = sorted({round(last * i / max(1, count - 1)) for i in range(count)})
    return [np.ascontiguousarray(array[:, i].transpose(1, 2, 0)) for i in taken]
