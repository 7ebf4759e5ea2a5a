"""The node's log: JSON lines in `logs/node.log`, the same events as text on the screen.

Ids and numbers only: no addresses, user names or paths of the owner's are written. The file is
rolled over at 4 MB, three old ones are kept::

    to_file(folder)
    logging.getLogger("paris.node").info("phase.training", extra={"unit": unit})
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

NAME: Final = "paris.node"
_PLAIN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event and whatever the caller added."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, object] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _PLAIN}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Text(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return human(JsonLines().format(record))


def to_file(folder: Path) -> None:
    """Send the node's events to the state folder, and to nowhere else yet."""
    path = folder / "logs" / "node.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=4 << 20, backupCount=3, encoding="utf-8")
    handler.setFormatter(JsonLines())
    logger = logging.getLogger(NAME)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


def to_screen() -> None:
    """Show the node's events on stderr, for a node in the foreground."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Text())
    logging.getLogger(NAME).addHandler(handler)


def human(line: str) -> str:
    """A log line as people read it: time, level, event, and the rest as key=value."""
    try:
        value = json.loads(line)
        at = datetime.fromtimestamp(value.pop("at"), UTC).astimezone().strftime("%H:%M:%S")
        level, event = value.pop("level"), value.pop("event")
    except (ValueError, KeyError, TypeError, AttributeError):
        return line.rstrip("\n")
    trace = value.pop("trace", "")
    words = [f"{key}={_short(one)}" for key, one in value.items() if one not in (None, "")]
    text = " ".join([at, f"{level.upper():7}", event, *words])
    return f"{text}\n{trace}" if trace else text


def tail(folder: Path, lines: int) -> Iterator[str]:
    """The last lines of the log."""
    path = folder / "logs" / "node.log"
    if path.is_file():
        yield from path.read_text("utf-8", "replace").splitlines()[-lines:]


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
