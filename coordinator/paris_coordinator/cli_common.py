"""What the verbs of `paris-coordinator` share: the state folder, the choice of JSON, orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from paris_coordinator.orders import OrderName

StateOption = Annotated[Path, typer.Option("--state", help="The coordinator's state folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STATE = Path("paris-state")


def show(value: Any, as_json: bool, text: str) -> None:
    """Facts for programs, or the sentence for people."""
    print(json.dumps(value, indent=1, sort_keys=True) if as_json else text)


def leave_order(folder: Path, order: OrderName, subject: str = "", reason: str = "") -> None:
    """Leaves an order of the operator's in the state folder, and says so (not among the facts)."""
    import sys
    import time

    from paris_coordinator.config import State
    from paris_coordinator.orders import Order, give_order

    state = State(folder)
    state.settings()  # says so when there is no network here
    now = int(time.time())  # noqa: TID251 - the command line owns a clock
    give_order(state, state.key(), Order(order, subject, reason), now)
    told = "The order is left for the coordinator; it takes it within a second of running."
    print(told, file=sys.stderr)
