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
import time
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
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Repeat every merge and compare the bits.")
    ] = False,
    blobs: Annotated[
        list[str] | None,
        typer.Option(help="Folder or address of the merges' inputs; may be repeated."),
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="Folder or address of the log: check every audit draw.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell where the released weights came from.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a release offline: every byte, signatures, lineage back to genesis, log proofs."""
    from paris_models.commands.verify import Wanted, refusal_of, run, sentence

    wanted = Wanted(recompute, tuple(blobs or ()), log, explain)
    with _refusals(as_json):
        if blobs and not recompute:
            raise ParisError("usage", "--blobs belongs to --recompute")
        now = int(time.time())
        facts = run(release, network, wanted, now, lambda label: _bar(label, as_json))
        error = refusal_of(facts)
        _show(facts | (error.as_json() if error else {}), as_json, sentence(facts))
        if error is not None:
            if not as_json:
                _complain(error, as_json)
            raise typer.Exit(error.reason.exit)


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="A release folder, or the address of a mirror.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    network: Annotated[str | None, typer.Option(help="The network's id or invite.")] = None,
    older: Annotated[
        bool, typer.Option("--older", help="Take it even if a newer release was seen.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a release, resumable, verified as it arrives; --out appears whole or not at all."""
    from paris_models.commands.pull import run_pull

    with _refusals(as_json):
        facts = run_pull(source, out, network, _bar("fetching", as_json), older=older)
        _show(
            facts,
            as_json,
            f"{facts['out']}: release {facts['number']}, {facts['bytes']} bytes, verified",
        )


@app.command()
def witness(
    log: Annotated[str, typer.Argument(help="An invite, a log's address, or a folder with it.")],
    key: Annotated[Path, typer.Option(help="The witness' key file; made if there is none.")],
    state: Annotated[Path, typer.Option(help="Where the last seen checkpoint is kept.")],
    network: Annotated[
        str | None, typer.Option(help="The network's id, without an invite.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The witness' name, such as its host.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the cosigned checkpoint here.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Follow a network's log, check that it only grows, and cosign its checkpoints."""
    from paris_models.commands.witness import run_witness

    with _refusals(as_json):
        facts = run_witness(
            log,
            key,
            state,
            network=network,
            name=name,
            out=out,
            once=once,
            tell=lambda line: print(line, file=sys.stderr if as_json else sys.stdout),
        )
        if as_json:
            _show(facts, True, "")


@app.command("import-weights")
def import_weights(
    source: Annotated[Path, typer.Argument(help="A single file, or a folder of diffusers.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .safetensors for recipes, or a folder to make.")
    ],
    origin: Annotated[str | None, typer.Option(help="Where the weights come from.")] = None,
    condition: Annotated[
        bool, typer.Option(help="Add columns for a given first frame, as zeros.")
    ] = True,
    rope: Annotated[
        str | None, typer.Option(help="Rotary order: interleaved or half-split.")
    ] = None,
    trust_rope: Annotated[
        bool, typer.Option("--trust-rope", help="Even where the weights seem to say otherwise.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; recipes take float32.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn FLUX.1 or Open-Sora weights into an initial expert; docs/weights.md."""
    from paris_models.commands.convert import run_import, sentence

    with _refusals(as_json):
        bar = _bar("converting", as_json)
        facts = run_import(
            source,
            out,
            origin,
            rope,
            dtype,
            trust_rope=trust_rope,
            condition=condition,
            progress=bar,
        )
        _show(facts, as_json, sentence(facts))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="An expert: its folder, or its tensor file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to make.")],
    kind: Annotated[
        str, typer.Option("--as", help="bfl, comfyui, open-sora or diffusers.")
    ] = "bfl",
    origin: Annotated[
        str | None, typer.Option(help="What the expert started from, if its file does not say.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an expert as other programs read it, with the licences that bind it."""
    from paris_models.commands.convert import run_export, sentence

    with _refusals(as_json):
        bar = _bar("converting", as_json)
        facts = run_export(source, out, kind, origin, dtype, progress=bar)
        _show(facts, as_json, sentence(facts))


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
