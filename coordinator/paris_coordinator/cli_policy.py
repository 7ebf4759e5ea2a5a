"""`paris-coordinator policy`: show the policy in force, or publish the next one.

The coordinator must be stopped; the root key is needed only while the command runs::

    paris-coordinator policy --state state
    paris-coordinator policy --root-key /media/stick/root.key --set soft_deadline=7200
    paris-coordinator policy --root-key /media/stick/root.key --rotate-to new.key
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paris_coordinator.cli_common import STATE, JsonOption, StateOption, show


def policy(
    state: StateOption = STATE,
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE, such as plan.steps=20.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--policy", help="TOML with the fields that differ.")
    ] = None,
    root_key: Annotated[
        Path | None, typer.Option(help="The root key's file; without it the coordinator signs.")
    ] = None,
    rotate_to: Annotated[
        Path | None, typer.Option(help="The file of the coordinator's new key; made if missing.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the policy in force, or publish the next one; only the root key may change keys."""
    import time
    import tomllib

    from paris_coordinator.config import State
    from paris_coordinator.policies import changes, publish
    from paris_coordinator.reading import open_desk
    from paris_protocol.errors import ParisError
    from paris_protocol.keys import load_key

    try:
        wanted: dict[str, Any] = {} if file is None else tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ParisError("recipe.invalid", str(error)) from error
    wanted |= changes(fields or ())
    if not wanted and rotate_to is None:
        facts = open_desk(State(state)).policy.model_dump(mode="json")
        show(facts, as_json, "\n".join(f"{name:20} {value}" for name, value in facts.items()))
        return
    signer = None if root_key is None else load_key(root_key)
    now = int(time.time())  # noqa: TID251 - the command line owns a clock
    sealed = publish(State(state), signer, wanted, now, rotate_to)
    number = sealed.record.number
    facts = {"policy": sealed.id, "number": number, "signer": sealed.signer}
    show(facts, as_json, f"policy {number} is in the log: {sealed.id}")
