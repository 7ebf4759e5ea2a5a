"""What the verbs of `paris-coordinator` share: the state folder, the choice of JSON, printing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

StateOption = Annotated[Path, typer.Option("--state", help="The coordinator's state folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STATE = Path("paris-state")


def show(value: Any, as_json: bool, text: str) -> None:
    """Facts for programs, or the sentence for people."""
    print(json.dumps(value, indent=1, sort_keys=True) if as_json else text)
