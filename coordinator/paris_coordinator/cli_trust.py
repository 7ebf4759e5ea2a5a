"""The verbs of `paris-coordinator` that belong to trust: inspect, audit, revoke, withdraw, log.

They are added to the one command of `paris_coordinator.cli`; nothing heavy is imported before a
verb runs. Verbs that other files hold are added at the end::

    paris-coordinator inspect 3f2a --state state
    paris-coordinator audit 3f2a --segments all
    paris-coordinator revoke ed25519:… --dry-run
    paris-coordinator log --check
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_coordinator.cli_common import STATE, JsonOption, StateOption, leave_order, show
from paris_coordinator.cli_policy import policy

Contribution = Annotated[str, typer.Argument(help="Its id, or the beginning of it.")]


def add(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    for verb in (inspect, audit, calibrate, revoke, withdraw, log, policy):
        app.command()(verb)


def inspect(
    what: Annotated[str, typer.Argument(help="A contribution's id, or the beginning; or a file.")],
    parent: Annotated[
        str | None,
        typer.Option(help="Measure WHAT, an update file, against this head: an expert's number, "
                     "or the beginning of a head's root or merge."),
    ] = None,
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show all numbers of all layers beside the cohort's: of a contribution, or of a loose file."""
    from paris_coordinator import inspecting

    if parent is None:
        facts = inspecting.inspect(state, what)
        show(facts, as_json, inspecting.inspect_text(facts))
    else:
        facts = inspecting.inspect_file(state, Path(what), parent)
        show(facts, as_json, inspecting.file_text(facts))


def audit(
    contribution: Contribution,
    segments: Annotated[str, typer.Option(help='"all", or numbers such as 0,3,5.')] = "all",
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """Replay a contribution from the state folder, and compare it with what was committed."""
    from paris_coordinator.examining import examine, examine_text
    from paris_protocol.errors import ParisError

    try:
        places = None if segments == "all" else [int(part) for part in segments.split(",")]
    except ValueError:
        raise ParisError("usage", f"--segments {segments}") from None
    facts = examine(state, contribution, places)
    show(facts, as_json, examine_text(facts))
    if facts["passed"] is False:
        raise ParisError("check.failed", "the replay is not what was committed")


def calibrate(
    state: Annotated[Path | None, typer.Option(help="A coordinator's state folder.")] = None,
    prepared: Annotated[Path | None, typer.Option(help="Or a prepared folder.")] = None,
    pairs: Annotated[int, typer.Option(help="Segments measured under each kernel.", min=1)] = 4,
    steps: Annotated[
        list[int] | None, typer.Option(help="Steps of a segment; may be repeated.", min=1)
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16.")] = None,
    plan: Annotated[str, typer.Option(help="The training plan, such as lora-32-nf4.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    results: Annotated[
        list[Path] | None, typer.Option(help="What another machine measured; may be repeated.")
    ] = None,
    measure_only: Annotated[
        bool, typer.Option("--measure-only", help="Write this machine's results to OUT.")
    ] = False,
    factor: Annotated[
        float | None, typer.Option(help="Safety factor over the worst pair; else by dtype.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure honest replays on other kernels; the tolerances for a recipe or a policy."""
    from paris_coordinator.calibration import calibrated, of_prepared, of_state
    from paris_protocol.errors import ParisError
    from paris_protocol.net.store import write_atomic

    if (state is None) == (prepared is None):
        raise ParisError("usage", "name one network: --state DIR or --prepared DIR")
    if measure_only and out is None:
        raise ParisError("usage", "--measure-only needs --out FILE")
    source = of_state(state) if state is not None else of_prepared(prepared or Path())
    facts, text, file = calibrated(
        source.under(plan), pairs=pairs, steps=steps, dtypes=dtype, device=device,
        others=results or (), measure_only=measure_only, factor=factor,
    )  # fmt: skip
    if out is not None:
        write_atomic(out, file.encode())
    show(facts, as_json, text if out is not None else f"{text}\n\n{file}")


def revoke(
    node: Annotated[str, typer.Argument(help="The node's key id, ed25519:…")],
    reason: Annotated[str, typer.Option(help="A few words for the statement.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be taken back.")
    ] = False,
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """Order a key's revocation: its merged work that has not vested is taken out of the heads."""
    from paris_coordinator.revoking import consequences, consequences_text
    from paris_protocol.errors import ParisError

    facts = consequences(state, node)
    show(facts, as_json, consequences_text(facts))
    if dry_run:
        return
    if facts["revoked"]:
        raise ParisError("node.revoked", facts["revoked"])
    leave_order(state, "revoke", node, reason)


def withdraw(
    clip: Annotated[str, typer.Argument(help="A clip's file name, or its SHA-256 in hex.")],
    reason: Annotated[str, typer.Option(help="A few words for the statement.")] = "",
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """Order a clip out of training: its shards are leased no more, and its heads are named."""
    from paris_coordinator.withdrawing import check_reason, consequences, consequences_text

    check_reason(reason)
    facts = consequences(state, clip)
    show(facts, as_json, consequences_text(facts))
    for one in facts["clips"]:
        leave_order(state, "withdraw", one, reason)


def log(
    check: Annotated[
        bool, typer.Option("--check", help="Derive the whole log again and check every decision.")
    ] = False,
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """List the statements of the transparency log in order, or check all that follows from them."""
    if check:
        from paris_coordinator.checking import check_log, check_text
        from paris_coordinator.config import State

        folder = State(state)
        facts = check_log(folder.log, folder.settings().network)
        show(facts, as_json, check_text(facts))
        return
    from paris_coordinator.reading import log as read

    entries = read(state)
    text = "\n".join(f"{e['index']:6d}  {e['type']:17s} {e['id']}" for e in entries)
    show(entries, as_json, text)
