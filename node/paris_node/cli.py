"""The command `paris-node`, for people who lend a computer to a network.

Every verb imports what it needs when it is chosen, so that `--help` stays quick. An error ends in
one sentence, what to do, and the catalogue's exit code; `status` alone exits with state codes::

    paris-node join paris://train.example.org/3f… --yes
    paris-node why
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from paris_protocol.errors import USAGE, ParisError

if TYPE_CHECKING:
    from paris_node.jobs import Jobs
    from paris_node.kit import Kit

app = typer.Typer(
    name="paris-node",
    help="Give idle computing time to a Paris network; the owner comes first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

State = Annotated[
    Path | None, typer.Option("--state", help="State folder [~/.local/share/paris/node].")
]
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Network = Annotated[str, typer.Argument(help="Invite paris://HOST[:PORT]/ID or a genesis file.")]
UntilFinished = Annotated[
    bool, typer.Option("--until-finished", help="Exit when the network has all it planned.")
]
NoSwarm = Annotated[bool, typer.Option("--no-swarm", help="Use the coordinator only, no peers.")]

_make_jobs: Callable[[Kit], Jobs] | None = None
"""What `run` builds its jobs with; the hostile double sets another."""


# ---------------------------------------------------------------- joining and running


@app.command()
def join(
    network: Network,
    state: State = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and end.")] = False,
    name: Annotated[str | None, typer.Option(help="Shown on the coordinator's pages.")] = None,
    no_swarm: NoSwarm = False,
    until_finished: UntilFinished = False,
    plan: Annotated[
        str | None, typer.Option(help="Training plan (docs/plans.md) [the best that fits].")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of node.toml.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Enrol this machine in a network (again does no harm), then run in the foreground."""
    import asyncio

    from paris_node import enrol
    from paris_node.config import parse_changes
    from paris_node.control import owner_of
    from paris_node.machine import RealMachine

    folder = _folder(state)
    if not dry_run and (owner := owner_of(folder)) is not None:
        raise ParisError("state.in-use", f"process {owner}")
    changes = parse_changes([*(set_ or []), *([] if plan is None else [f"plan={plan}"])])
    if name is not None:
        changes["name"] = name
    if no_swarm:
        changes["swarm"] = False
    found = asyncio.run(enrol.find(network, None if yes else _confirm_id))
    enrol.check_folder(folder, found.genesis.id)
    settings = enrol.settings_for(folder, changes)
    would = enrol.plan_of(found, settings, folder, RealMachine())
    if as_json:
        print(json.dumps(would, indent=2))
    else:
        print("\n".join(enrol.plan_lines(would)), flush=True)
    if dry_run:
        return
    if not would["fits"]:
        raise ParisError("machine.too-small", would["short"] or "see the plan above")
    if not yes and not _confirm("Continue?", default=True):
        print("Nothing was changed.")
        raise typer.Exit(USAGE)
    enrol.enrol(folder, found, settings)
    _run(folder, until_finished=until_finished, quiet=as_json)


@app.command()
def run(
    state: State = None, no_swarm: NoSwarm = False, until_finished: UntilFinished = False
) -> None:
    """Run an enrolled node in the foreground: what services start."""
    _run(_folder(state), until_finished=until_finished, swarm=not no_swarm)


@app.command()
def start(state: State = None, until_finished: UntilFinished = False) -> None:
    """Run an enrolled node in the background."""
    import subprocess
    import time

    from paris_node.config import load_settings
    from paris_node.control import ask, owner_of

    folder = _folder(state)
    load_settings(folder)
    if (owner := owner_of(folder)) is not None:
        print(f"It is running already, as process {owner}.")
        return
    (folder / "logs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "paris_node.cli", "run", "--state", str(folder)]
    with (folder / "logs" / "start.log").open("ab") as log:
        child = subprocess.Popen(
            [*command, *(["--until-finished"] if until_finished else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    for _ in range(300):
        if child.poll() is not None:
            raise ParisError("agent.not-running", "it ended at once; see logs/start.log")
        try:
            ask(folder, "status")
        except ParisError:
            time.sleep(0.1)
        else:
            print(f"Started as process {child.pid}.")
            return
    raise ParisError("agent.not-running", "it does not answer yet")


@app.command()
def stop(state: State = None, as_json: Json = False) -> None:
    """Save what is running and end the node."""
    import time

    from paris_node.control import owner_of

    folder = _folder(state)
    _tell(folder, "stop", as_json, "Stopping.")
    for _ in range(600):
        if owner_of(folder) is None:
            return
        time.sleep(0.1)
    raise ParisError("internal", "the node did not end within a minute")


@app.command()
def pause(state: State = None, as_json: Json = False) -> None:
    """Save, and give the memory back at once; stays so until `resume`."""
    _tell(_folder(state), "pause", as_json, "Paused; the memory is free.")


@app.command()
def resume(state: State = None, as_json: Json = False) -> None:
    """Go on where it was paused."""
    _tell(_folder(state), "resume", as_json, "Going on.")


@app.command()
def finish(state: State = None, as_json: Json = False) -> None:
    """End the unit in hand, hand it in, and take no more."""
    _tell(_folder(state), "finish", as_json, "The unit in hand is the last one.")


# ---------------------------------------------------------------- looking


@app.command()
def status(state: State = None, as_json: Json = False) -> None:
    """What the node is doing; the exit code is the state (0 working, 10 paused, 12 waiting …)."""
    from paris_node import view

    now = _view(_folder(state))
    print(view.as_json(now) if as_json else "\n".join(view.lines(now)))
    raise typer.Exit(now["code"])


@app.command()
def why(state: State = None, as_json: Json = False) -> None:
    """The one reason why it is, or is not, working."""
    now = _view(_folder(state))
    facts = {"version": now["version"], "why": now["why"], "text": now["text"], "fix": now["fix"]}
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"{now['text']}\n  what to do: {now['fix']}\n  code: {now['why']}")


@app.command()
def fit(
    network: Annotated[str | None, typer.Argument(help="Invite or genesis file.")] = None,
    state: State = None,
    every: Annotated[bool, typer.Option("--all", help="Every size and training plan.")] = False,
    up: Annotated[float, typer.Option(help="Mbit/s of the line up.")] = 20.0,
    down: Annotated[float, typer.Option(help="Mbit/s of the line down.")] = 100.0,
    tflops: Annotated[float | None, typer.Option(help="Measured TFLOP/s of a step.")] = None,
    as_json: Json = False,
) -> None:
    """Which training plan fits this machine, its cost, and why not a better one."""
    from paris_node.cli_fit import show
    from paris_node.fit import Links

    links = Links(up, down)
    show(_folder(state), network, every=every, as_json=as_json, links=links, tflops=tflops)


@app.command()
def doctor(state: State = None, as_json: Json = False) -> None:
    """Look for whatever could keep the node from working; exit code 1 if something does."""
    from paris_node.doctor import examine
    from paris_node.machine import RealMachine

    checks = examine(_folder(state), RealMachine())
    if as_json:
        facts = [check.as_json() for check in checks]
        print(json.dumps({"version": 1, "checks": facts}, indent=2))
    for check in [] if as_json else checks:
        print(f" {'OK  ' if check.ok else 'FAIL'} {check.name:12} {check.detail}")
        if check.fix:
            print(f"      fix: {check.fix}")
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@app.command()
def logs(
    state: State = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", help="How many.")] = 50,
    as_json: Json = False,
) -> None:
    """The node's log."""
    import time

    from paris_node.logs import human, tail

    folder = _folder(state)
    path = folder / "logs" / "node.log"
    if not path.exists():
        raise ParisError("state.missing", str(folder))
    for line in tail(folder, lines):
        print(line if as_json else human(line))
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)
        while follow:
            new = file.readline()
            if not new:
                time.sleep(0.3)
            elif new.endswith("\n"):
                print(new.rstrip("\n") if as_json else human(new), flush=True)


@app.command()
def receipts(
    state: State = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every proof.")] = False,
    as_json: Json = False,
) -> None:
    """What became of your contributions; --verify proves it against the signed log."""
    import time
    from contextlib import suppress

    from paris_node.control import ask
    from paris_node.proofs import rows
    from paris_node.receipts import line

    folder = _folder(state)
    with suppress(ParisError):
        ask(folder, "receipts")
    found = rows(folder, int(time.time()), verify=verify)  # noqa: TID251 - this is an edge
    if as_json:
        print(json.dumps({"version": 1, "receipts": found}, indent=2))
    for row in [] if as_json else found:
        print(line(row))
    raise typer.Exit(1 if any("message" in row.get("proof", {}) for row in found) else 0)


# ---------------------------------------------------------------- inside


def _folder(state: Path | None) -> Path:
    from paris_node.config import default_state

    return (state or default_state()).absolute()


def _confirm_id(network: str) -> bool:
    print(f"The address answers as network\n  {network}")
    return _confirm("Is that the id you were given?", default=False)


def _confirm(question: str, *, default: bool) -> bool:
    """Ask once; no terminal to answer on means no."""
    try:
        return typer.confirm(question, default=default)
    except typer.Abort:
        return False


def _view(folder: Path) -> dict[str, Any]:
    from paris_node.control import ask
    from paris_node.view import offline

    try:
        return ask(folder, "status")
    except ParisError as error:
        if error.code != "agent.not-running":
            raise
    return offline(folder)


def _tell(folder: Path, verb: str, as_json: bool, text: str) -> None:
    from paris_node.control import ask

    answer = ask(folder, verb)
    print(json.dumps({"version": 1, **answer}) if as_json else text)


def _run(folder: Path, *, until_finished: bool, swarm: bool = True, quiet: bool = False) -> None:
    import asyncio

    from paris_node import logs
    from paris_node.app import run_agent
    from paris_node.jobs import Jobs

    if not quiet:
        logs.to_screen()
    make = _make_jobs or Jobs
    asyncio.run(run_agent(folder, until_finished=until_finished, swarm=swarm, make_jobs=make))


def _complain(error: ParisError) -> int:
    if "--json" in sys.argv:
        print(json.dumps(error.as_json()))
    print(
        f"{error.sentence}\n  what to do: {error.reason.fix}\n  code: {error.code}", file=sys.stderr
    )
    return error.reason.exit


def main(make_jobs: Callable[[Kit], Jobs] | None = None) -> NoReturn:
    """Run the command; every ending has one exit code of the catalogue."""
    global _make_jobs
    _make_jobs = make_jobs
    code: object = 0
    try:
        app()
    except SystemExit as ended:
        code = ended.code
    except ParisError as error:
        code = _complain(error)
    except OSError as error:
        full = error.errno in (28, 122)
        code = _complain(ParisError("disk.full" if full else "internal", str(error)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends with a sentence and a code
        code = _complain(ParisError("internal", f"{type(error).__name__}: {error}"))
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
