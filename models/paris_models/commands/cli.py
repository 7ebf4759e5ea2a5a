"""The `paris` command: for whoever wants the videos, or wants to check where they came from.

Verbs are loaded when they are called, so that `paris --help` needs neither torch nor diffusers.
Failures print one sentence and what to do, and end with the exit code of the catalogue::

    paris verify RELEASE
    paris generate RELEASE "a red ball moves left" -o ball.mp4
    paris demo --smoke --out demo
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from paris_protocol.errors import REASONS, ParisError

app = typer.Typer(
    name="paris",
    help="Watch, check and make video with what a Paris network trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


@contextmanager
def _refusals(as_json: bool) -> Iterator[None]:
    """Turn every refusal into its sentence on stderr and its exit code."""
    try:
        yield
    except ParisError as error:
        _complain(error, as_json)
        raise typer.Exit(error.reason.exit) from None
    except OSError as error:
        full = error.errno in (28, 122)
        refusal = ParisError("disk.full" if full else "internal", str(error))
        _complain(refusal, as_json)
        raise typer.Exit(refusal.reason.exit) from None


def _complain(error: ParisError, as_json: bool) -> None:
    if as_json:
        print(json.dumps(error.as_json(), ensure_ascii=False))
    print(f"paris: {error.sentence}", file=sys.stderr)
    print(f"       {error.reason.fix}  [{error.code}]", file=sys.stderr)


def _show(facts: dict[str, Any], as_json: bool, sentence: str) -> None:
    print(json.dumps(facts, ensure_ascii=False, indent=1) if as_json else sentence)


def _bar(label: str, as_json: bool) -> Callable[[int, int], None] | None:
    """A progress callback (done, total) for people; None where nobody watches."""
    if as_json or not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        share = done / total if total else 1.0
        filled = int(30 * share)
        print(f"\r{label} [{'=' * filled:<30}] {share:4.0%}", end=end, file=sys.stderr, flush=True)

    return show


@app.command()
def generate(
    release: Annotated[Path, typer.Argument(help="A release folder.")],
    prompt: Annotated[str, typer.Argument(help="What the video shall show.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The MP4 to write.")] = Path("out.mp4"),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same video.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Euler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, max=100.0)] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts per step.")] = None,
    scale: Annotated[int, typer.Option(min=1, max=64, help="Enlarge each pixel so often.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Make a video from a prompt, with the experts and the router of a release."""
    from paris_models.commands.generate import run_generate

    with _refusals(as_json):
        facts = run_generate(
            release,
            prompt,
            out,
            seed=seed,
            steps=steps,
            guidance=guidance,
            top_k=top_k,
            scale=scale,
            progress=_bar("denoising", as_json),
        )
        _show(facts, as_json, f"{facts['out']}: {facts['frames']} frames, {facts['size']} pixels")


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(help="A release folder.")],
    network: Annotated[
        str | None, typer.Option(help="The network's id or invite; without it the folder's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a release offline: every byte, signatures, lineage back to genesis, log proofs."""
    from paris_models.commands.verify import run_verify

    with _refusals(as_json):
        facts = run_verify(release, network, progress=_bar("hashing", as_json))
        sentence = (
            f"verified: release {facts['number']} of network {facts['network']}\n"
            f"{facts['files']} files, {facts['experts']} experts, every head descends from genesis."
        )
        if network is None:
            sentence += "\nThe network id is the folder's own claim; compare it with your invite."
        _show(facts, as_json, sentence)


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="A release folder, or the address of a mirror.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    network: Annotated[str | None, typer.Option(help="The network's id or invite.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a release, resumable, verified as it arrives; --out appears whole or not at all."""
    from paris_models.commands.pull import run_pull

    with _refusals(as_json):
        facts = run_pull(source, out, network, progress=_bar("fetching", as_json))
        _show(
            facts,
            as_json,
            f"{facts['out']}: release {facts['number']}, {facts['bytes']} bytes, verified",
        )


@app.command()
def demo(
    smoke: Annotated[bool, typer.Option("--smoke", help="The short form.")] = False,
    clips: Annotated[Path | None, typer.Option(help="A folder of captioned videos.")] = None,
    out: Annotated[Path, typer.Option(help="The folder to fill.")] = Path("demo"),
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Make the initial checkpoint anew.")
    ] = False,
) -> None:
    """Run a whole network on this machine: volunteers, a hostile one, kills, release, report."""
    from paris_models.commands.demo import run_demo

    with _refusals(False):
        code = run_demo(smoke=smoke, clips=clips, out=out, from_scratch=from_scratch)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the `paris` program."""
    try:
        app()
    except Exception as error:
        reason = REASONS["internal"]
        print(f"paris: {reason.text} ({type(error).__name__}: {error})", file=sys.stderr)
        print(f"       {reason.fix}  [{reason.code}]", file=sys.stderr)
        raise SystemExit(reason.exit) from error


if __name__ == "__main__":
    main()
