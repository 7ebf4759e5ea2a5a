"""`paris-coordinator`: prepare, init, serve, status, merge, release, lift; trust: `cli_trust`.

Bodies import what they need when they are called, so that `--help` is quick. Refusals end in one
sentence, what to do about it, and the exit code of the catalogue::

    paris-coordinator prepare demo.toml clips --out prepared
    paris-coordinator init prepared --state state
    paris-coordinator serve --state state
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from paris_coordinator import cli_trust
from paris_coordinator.cli_common import STATE, JsonOption, StateOption, leave_order, show

if TYPE_CHECKING:
    from paris_protocol.errors import ParisError

app = typer.Typer(
    name="paris-coordinator",
    help="Run a Paris network: prepare its data, found it, serve it, release what it learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file (docs/recipe.md).")],
    clips: Annotated[Path, typer.Argument(help="A folder of videos with captions.")],
    out: Annotated[Path, typer.Option("--out", help="Where the prepared folder goes.")],
    workers: Annotated[int, typer.Option(help="Processes that encode.", min=1)] = 1,
    engine: Annotated[
        str, typer.Option(help="local, or ray: workers on a Ray cluster (RAY_ADDRESS).")
    ] = "local",
    allow_unlicensed: Annotated[
        bool, typer.Option("--allow-unlicensed", help="Take clips without a licence too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a folder of captioned videos into latents, clusters, shards and held-out clips."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paris_coordinator.prepare import prepare as run

    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        if engine not in ("local", "ray"):
            raise typer.BadParameter("local or ray", param_hint="--engine")
        report = run(
            recipe, clips, out, progress,
            workers=workers, engine="ray" if engine == "ray" else "local",
            allow_unlicensed=allow_unlicensed,
        )["report"]  # fmt: skip
    skipped = ", ".join(f"{count} × {code}" for code, count in report["skipped"].items())
    lines = f"{report['clips']} clips of {report['videos']} videos in {out}"
    show(report, as_json, lines + (f"\nskipped: {skipped} (see skipped.json)" if skipped else ""))


@app.command()
def init(
    prepared: Annotated[Path, typer.Argument(help="The folder that `prepare` made.")],
    state: StateOption = STATE,
    address: Annotated[str, typer.Option(help="The host name in the invite.")] = "127.0.0.1",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port of the interface.", min=1, max=65534)] = 8420,
    swarm_port: Annotated[
        int | None, typer.Option(help="The port for peers.", show_default="port + 1")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The network's name.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML with fields of the first policy that differ.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file: one prompt a line for the sample clips.")
    ] = None,
    samples_every: Annotated[
        int, typer.Option(help="Seconds between sample clips while training runs; 0 for none.")
    ] = 900,
    root_key: Annotated[
        Path | None,
        typer.Option(
            help="The root key's file, made if there is none: it signs genesis and policies, and "
            "can be taken away. Without it the coordinator's key is the root key."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Found a network on a prepared folder: sign genesis and policy, print the invite."""
    import time
    import tomllib

    from paris_coordinator.genesis import Setup
    from paris_coordinator.genesis import init as run
    from paris_protocol.errors import ParisError

    try:
        overrides = {} if policy is None else tomllib.loads(policy.read_text("utf-8"))
        lines = [] if prompts is None else prompts.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ParisError("recipe.invalid", str(error)) from error
    setup = Setup(
        address=address,
        host=host,
        port=port,
        swarm_port=swarm_port,
        name=name,
        overrides=overrides,
        prompts=tuple(line.strip() for line in lines if line.strip()),
        samples_every=samples_every,
        root_key=root_key,
    )
    now = int(time.time())  # noqa: TID251 - the command line owns a clock
    invite = run(prepared, state, setup, now)
    facts = {"invite": str(invite), "network": invite.network, "url": invite.url}
    show(facts, as_json, f"{invite}")


@app.command()
def serve(
    state: StateOption = STATE,
    host: Annotated[str | None, typer.Option(help="Listen here instead.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen on this port instead.")] = None,
    no_swarm: Annotated[bool, typer.Option("--no-swarm", help="Without the peer network.")] = False,
    until_released: Annotated[
        bool, typer.Option("--until-released", help="End when the finished network is released.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of the verifier.", min=1)] = 1,
    cert: Annotated[Path | None, typer.Option(help="TLS certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="TLS key (PEM).")] = None,
) -> None:
    """Serve the network: leases, intake, verification, merges, router, releases, pages."""
    import asyncio
    import logging

    from paris_coordinator.app import Options
    from paris_coordinator.app import serve as run
    from paris_coordinator.config import State

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    options = Options(host, port, not no_swarm, until_released, threads, cert, key)
    asyncio.run(run(State(state), options))


@app.command()
def status(state: StateOption = STATE, as_json: JsonOption = False) -> None:
    """Show experts, rounds, volunteers and releases, read from the ledger."""
    from paris_coordinator.reading import status as read
    from paris_coordinator.reading import status_text

    facts = read(state)
    show(facts, as_json, status_text(facts))


@app.command()
def merge(
    recompute: Annotated[str, typer.Option(help="The merge's id, or the beginning of it.")],
    state: StateOption = STATE,
    blobs: Annotated[
        list[str] | None, typer.Option(help="Folder or address of inputs; may be repeated.")
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="Folder or address of a log, instead of a state folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Repeat a merge or revert from its published inputs and compare the roots."""
    from paris_coordinator import reading
    from paris_protocol.errors import ParisError

    if log is None:
        facts = reading.recompute(state, recompute, blobs or ())
    else:
        facts = reading.recompute_logged(log, recompute, blobs or ())
    show(facts, as_json, reading.recompute_text(facts))
    if not facts["same"]:
        raise ParisError("check.failed", "the merge is not what was signed")


@app.command()
def release(state: StateOption = STATE) -> None:
    """Order a release of the current heads; needs the operator's key in the state folder."""
    leave_order(state, "release")


@app.command()
def lift(
    node: Annotated[str, typer.Argument(help="The node's key id, ed25519:…")],
    state: StateOption = STATE,
) -> None:
    """Order the end of a node's quarantine; needs the operator's key in the state folder."""
    from paris_protocol.keys import public_key

    public_key(node)
    leave_order(state, "lift", node)


cli_trust.add(app)


def main() -> None:
    """Run the command line; refusals become one sentence and their exit code."""
    from paris_protocol.errors import ParisError

    try:
        app()
    except ParisError as error:
        _end(error)
    except OSError as error:
        _end(ParisError("disk.full" if error.errno in (28, 122) else "internal", str(error)))


def _end(error: ParisError) -> NoReturn:
    print(f"{error.sentence}\n{error.reason.fix} [{error.code}]", file=sys.stderr)
    sys.exit(error.reason.exit)


if __name__ == "__main__":
    main()
