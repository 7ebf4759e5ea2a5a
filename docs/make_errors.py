"""Write docs/errors.md from the one catalogue of reasons: `python docs/make_errors.py`."""

from __future__ import annotations

from pathlib import Path

from paris_protocol.errors import REASONS

PAGE = Path(__file__).with_name("errors.md")
EXITS = (
    (0, "done"), (1, "a check failed (verify, evaluate, doctor)"), (2, "usage"),
    (20, "input refused"), (23, "wrong network"), (24, "state in use, or of a newer version"),
    (30, "GPU unavailable"), (31, "disk full"), (40, "network"), (50, "internal"),
)  # fmt: skip
HEAD = """# Every way Paris says no

One sentence, what to do, one code; the same in the three programs, their logs and the web pages.
This page is written by `python docs/make_errors.py` from `protocol/paris_protocol/errors.py`.

## Exit codes of `paris`, `paris-node` and `paris-coordinator`

| exit | meaning |
|--:|---|
"""
STATES = """
`paris-node status` alone answers with the node's state instead: 0 working, 10 paused by its owner,
11 paused by a limit, 12 waiting for work, 20 needs its owner, 21 version too old, 22 quarantined,
30 GPU unavailable, 31 disk full, 40 network, 50 internal error.

## Reasons

Over HTTP a refusal is `{"code", "message", "fix", "retry_after"}` with the status given here.

| code | what it says | what to do | exit | HTTP |
|---|---|---|--:|--:|
"""


def page() -> str:
    """The whole of errors.md."""
    exits = "".join(f"| {code} | {meaning} |\n" for code, meaning in EXITS)
    rows = "".join(
        f"| `{r.code}` | {cell(r.text)} | {cell(r.fix)} | {r.exit} | {r.http} |\n"
        for r in REASONS.values()
    )
    return HEAD + exits + STATES + rows


def cell(text: str) -> str:
    """Text of one table cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
