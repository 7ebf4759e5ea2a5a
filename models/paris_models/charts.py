"""Charts as inline SVG, drawn from numbers: no script, no picture library, no host.

Numbers in, text out, for the demo's report and the coordinator's pages. Colours are the page's CSS
classes, so a chart follows its dark and light scheme and needs no inline style; every mark has a
`<title>`, every chart an `aria-label`, and all text is escaped::

    svg = loss_chart([{"round": 0, "loss": 0.21, "se": 0.002}, …], "expert 0", colour=0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

COLOURS: Final = 8
"""Distinct series colours; a page defines the classes c0 … c7, each of which sets --series."""
STEPS: Final = (1.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Steps of a time axis, in seconds."""


def loss_chart(points: Sequence[Mapping[str, Any]], label: str, *, colour: int = 0) -> str:
    """Held-out loss over merges with error bars of one standard error.

    points: {"round", "loss", "se"} in order of rounds. Returns "" when there are none.
    """
    if not points:
        return ""
    width, height, left, right, top, bottom = 340.0, 198.0, 50.0, 12.0, 12.0, 38.0
    low = min(float(p["loss"]) - float(p.get("se", 0)) for p in points)
    high = max(float(p["loss"]) + float(p.get("se", 0)) for p in points)
    ticks = nice_ticks(low, high, 4)
    low, high = ticks[0], ticks[-1]
    places = max(0, -math.floor(math.log10(ticks[1] - ticks[0])))
    last = max(float(p["round"]) for p in points) or 1.0

    def x(turn: float) -> float:
        return left + (width - left - right) * turn / last

    def y(loss: float) -> float:
        return height - bottom - (height - top - bottom) * (loss - low) / ((high - low) or 1.0)

    body = []
    for tick in ticks:
        body.append(_line(left, y(tick), width - right, y(tick), "grid"))
        body.append(_text(left - 7, y(tick) + 4, f"{tick:.{places}f}", "end"))
    every = max(1, math.ceil(last / 8))
    for turn in range(0, int(last) + 1, every):
        body.append(_text(x(turn), height - bottom + 16, str(turn), "middle"))
    body.append(_text((left + width - right) / 2, height - 5, "merges", "middle"))
    path = " ".join(f"{x(float(p['round'])):.1f},{y(float(p['loss'])):.1f}" for p in points)
    body.append(f'<polyline class="curve" points="{path}"/>')
    for p in points:
        px, loss, se = x(float(p["round"])), float(p["loss"]), float(p.get("se", 0))
        top_y, low_y = y(loss + se), y(loss - se)
        body.append(_line(px, top_y, px, low_y, "error"))
        body += [_line(px - 4, end, px + 4, end, "error") for end in (top_y, low_y)]
        told = f"after {p['round']} merges: {loss:.4f} ± {se:.4f}"
        body.append(
            f'<circle class="dot" cx="{px:.1f}" cy="{y(loss):.1f}" r="2.6">'
            f"<title>{escape(told)}</title></circle>"
        )
    kind = f"loss c{colour % COLOURS}"
    return _svg(width, height, f"held-out loss of {label} over merges", body, kind)


def timeline(spans: Sequence[Mapping[str, Any]]) -> str:
    """Lanes of processes over seconds: what each did and when, kills and restarts as marks.

    spans: {"process", "kind", "start", "end", "label"}; end None means until the last end.
    A kind "alive" is the lane's ground, a span without length is a mark.
    """
    if not spans:
        return ""
    lanes = list(dict.fromkeys(str(s["process"]) for s in spans))
    finish = max(float(s["end"] if s["end"] is not None else s["start"]) for s in spans) or 1.0
    lane, left, right, top, width = 28.0, 138.0, 16.0, 10.0, 1000.0
    height = top + lane * len(lanes) + 26
    step = next((s for s in STEPS if finish / s <= 10), 3600.0 * math.ceil(finish / 36000))
    ticks = [i * step for i in range(int(finish / step) + 1)]

    def x(seconds: float) -> float:
        return left + (width - left - right) * min(seconds, finish) / finish

    body = []
    for tick in ticks:
        body.append(_line(x(tick), top, x(tick), height - 22, "grid"))
        body.append(_text(x(tick), height - 6, duration(tick), "middle"))
    order = {"alive": 0}
    marks = []
    for span in sorted(spans, key=lambda s: order.get(str(s["kind"]), 1)):
        number_of = lanes.index(str(span["process"]))
        start = float(span["start"])
        end = float(span["end"]) if span["end"] is not None else finish
        kind = _word(str(span["kind"]))
        told = f"{span['process']}: {span['label']}, {duration(start)}"
        middle = top + lane * number_of + lane / 2
        if end <= start:
            marks.append(_mark(x(start), middle, kind, told))
            continue
        told += f" – {duration(end)}"
        half = 2.0 if kind == "alive" else 8.0
        body.append(
            f'<rect class="span {kind}" x="{x(start):.1f}" y="{middle - half:.1f}"'
            f' width="{max(1.0, x(end) - x(start)):.1f}" height="{2 * half:.1f}" rx="2">'
            f"<title>{escape(told)}</title></rect>"
        )
        if kind == "stage" and x(end) - x(start) > 8 * len(str(span["label"])):
            body.append(_text(x(start) + 6, middle + 4, str(span["label"]), "start", "inside"))
    names = [
        _text(left - 10, top + lane * i + lane / 2 + 4, clip(name, 20), "end")
        for i, name in enumerate(lanes)
    ]
    return _svg(width, height, "timeline of all processes", [*body, *marks, *names], "timeline")


def bars(
    values: Mapping[str, float], told: Mapping[str, str], label: str, line: float | None = None
) -> str:
    """Horizontal bars from 0; `told` is what stands at each bar's end; `line` marks a limit."""
    if not values:
        return ""
    row, left, right, width = 30.0, 190.0, 110.0, 720.0
    top = 20.0 if line is not None else 4.0
    most = max([*values.values(), line or 0.0]) or 1.0
    height = top + row * len(values) + 2

    def x(value: float) -> float:
        return left + (width - left - right) * max(0.0, value) / most

    body = []
    for i, (name, value) in enumerate(values.items()):
        middle = top + row * i + row / 2
        body.append(_text(left - 10, middle + 4, clip(name, 28), "end"))
        body.append(
            f'<rect class="bar b{i}" x="{left:.1f}" y="{middle - 9:.1f}" height="18" rx="2"'
            f' width="{max(1.5, x(value) - left):.1f}"><title>{escape(told[name])}</title></rect>'
        )
        body.append(_text(x(value) + 8, middle + 4, told[name], "start", "strong"))
    if line is not None:
        body.append(_line(x(line), top - 4, x(line), height - 2, "limit"))
        body.append(_text(x(line), 12, f"gate {number(line)}", "middle"))
    return _svg(width, height, label, body, "bars")


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that cover [low, high] in about so many steps of 1, 2 or 5 × 10ⁿ."""
    span = high - low
    if span < 1e-6 * max(abs(low), abs(high), 1e-3):  # as good as one value: give it some room
        span = max(0.1 * abs(low), 0.1 * abs(high), 1e-3)
        low, high = low - span / 2, high + span / 2
    raw = span / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as people read it: four significant digits at most."""
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as 48 s, 3:05 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(amount: float) -> str:
    """Bytes as 512 B, 1.4 MB or 2.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return ""


def clip(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _word(text: str) -> str:
    """A CSS class out of any text: letters only."""
    plain = text.lower().replace(" ", "-")
    return "".join(c for c in plain if c.isascii() and (c.isalpha() or c == "-"))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _mark(x: float, y: float, kind: str, told: str) -> str:
    """A kill is a cross, every other event a diamond."""
    if kind == "kill":
        shape = f'<path d="M{x - 6:.1f},{y - 6:.1f} l12,12 m0,-12 l-12,12"/>'
    else:
        shape = f'<path d="M{x:.1f},{y - 8:.1f} l6,8 l-6,8 l-6,-8 z"/>'
    return f'<g class="mark {kind}"><title>{escape(told)}</title>{shape}</g>'


def _svg(width: float, height: float, label: str, body: Sequence[str], kind: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
        f' aria-label="{escape(label)}">{"".join(body)}</svg>'
    )
