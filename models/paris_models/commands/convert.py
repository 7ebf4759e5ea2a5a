"""`paris import-weights` and `paris export`: published weights in, experts out.

Every header passes the strict gate before a library opens the file. Refused: an output that is
there already, and whatever `paris_models.convert` cannot vouch for (`usage`, `weights.file`)::

    run_import(Path("FLUX.1-schnell"), Path("initial.safetensors"), "flux.1-schnell")
    run_export(Path("release/expert_0"), Path("expert.safetensors"), "comfyui", "flux.1-schnell")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from paris_protocol.errors import ParisError
from paris_protocol.gate import check_header, header_length

Progress = Callable[[int, int], None] | None
DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
KINDS: Final = ("bfl", "comfyui", "open-sora", "diffusers")
ORDERS: Final = ("interleaved", "half-split")


def run_import(
    source: Path,
    out: Path,
    origin: str | None = None,
    rope: str | None = None,
    dtype: str | None = None,
    *,
    trust_rope: bool = False,
    condition: bool = True,
    progress: Progress = None,
) -> dict[str, Any]:
    """An initial expert from published weights: a tensor file beside its recipe fragment, or a
    folder of diffusers where `out` does not end in `.safetensors`."""
    if rope not in (None, *ORDERS):
        raise ParisError("usage", f"--rope is one of {', '.join(ORDERS)}")
    said = {"origin": origin, "order": rope, "trust_order": trust_rope, "progress": progress}
    if out.suffix != ".safetensors":
        return _convert(source, out, ("diffusers", condition, dtype), said)
    fragment = out.with_suffix(".toml")
    _refuse_existing(fragment)
    facts = _convert(source, out, ("expert", condition, dtype), said)

    from paris_models.convert.origins import ORIGINS, recipe_fragment

    _write_text(fragment, recipe_fragment(ORIGINS[facts["origin"]], out.name))
    return facts | {"recipe_fragment": str(fragment)}


def run_export(
    source: Path,
    out: Path,
    kind: str = "bfl",
    origin: str | None = None,
    dtype: str | None = None,
    *,
    progress: Progress = None,
) -> dict[str, Any]:
    """An expert in another program's layout: one of `KINDS`."""
    if kind not in KINDS:
        raise ParisError("usage", f"--as is one of {', '.join(KINDS)}")
    if kind != "diffusers" and out.suffix != ".safetensors":
        raise ParisError("usage", f"the name of a {kind} file ends in .safetensors")
    return _convert(source, out, (kind, None, dtype), {"origin": origin, "progress": progress})


def sentence(facts: dict[str, Any]) -> str:
    """What was made, in one sentence, and the licences that go with it."""
    size = f"{facts['parameters']} parameters, {facts['bytes'] / 1e9:.2f} GB"
    licences = ", ".join(facts["licences"]) or "no licence binds it"
    return f"{facts['out']}: {size}, from {facts['origin']} ({licences})"


def _convert(
    source: Path, out: Path, wanted: tuple[str, bool | None, str | None], said: dict[str, Any]
) -> dict[str, Any]:
    """`said` are the keywords of `paris_models.convert.run.convert`."""
    kind, condition, dtype = wanted
    if dtype not in (None, *DTYPES):
        raise ParisError("usage", f"--dtype is one of {', '.join(DTYPES)}")
    if not source.exists():
        raise ParisError("usage", f"there is no {source}")
    if not out.absolute().parent.is_dir():
        raise ParisError("usage", f"there is no folder {out.parent}")
    _refuse_existing(out)

    from paris_models.convert.files import weight_paths
    from paris_models.convert.run import Target, convert

    try:
        for path in weight_paths(source):
            _gate(path)
        target = Target(kind, condition, DTYPES.get(dtype or ""))  # type: ignore[arg-type]
        return convert(source, out, target, **said)
    except ValueError as error:
        raise ParisError("weights.file", str(error)) from error


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ParisError("usage", f"{path} is there already")


def _gate(path: Path) -> None:
    """The strict gate; `tensor.header` names the file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            first = file.read(8)
            check_header(first + file.read(header_length(first, size)), size)
        except ParisError as error:
            raise ParisError(error.code, f"{path.name}: {error.detail}") from error


def _write_text(path: Path, text: str) -> None:
    """The text at `path`, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
