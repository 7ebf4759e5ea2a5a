"""`paris generate`: a prompt, a release, an MP4.

The tensor files pass the strict gate before a library opens them. Refused: no release folder, an
empty prompt, one that is longer than the text encoder reads (`release.none`, `prompt.*`)::

    run_generate(Path("release"), "a red ball moves left", Path("ball.mp4"), seed=7)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from paris_protocol.errors import ParisError
from paris_protocol.gate import check_header, header_length

Progress = Callable[[int, int], None] | None

LONGEST = 4096
"""Characters of a prompt; no text encoder that Paris names reads more."""


def run_generate(
    release: Path,
    prompt: str,
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    top_k: int | None = None,
    scale: int = 8,
    progress: Progress = None,
) -> dict[str, Any]:
    """Write the video to `out`, whole or not at all; facts about it."""
    prompt = checked_prompt(prompt)
    if not (release / "release.json").is_file():
        raise ParisError("release.none", str(release))
    if not out.parent.is_dir():
        raise ParisError("usage", f"there is no folder {out.parent}")
    check_tensor_files(release)

    from paris_models.releases import generate, load_release
    from paris_models.video import write_mp4

    try:
        loaded = load_release(release)
        text = encoded(loaded.text, prompt)
        clip = generate(
            loaded,
            text,
            seed=seed,
            steps=steps,
            guidance=guidance,
            top_k=top_k,
            progress=progress,
        )[0]
    except OSError as error:
        if error.errno in (28, 122):
            raise
        raise ParisError("release.missing", str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ParisError("release.file", str(error)) from error
    frames, height, width, fps = loaded.settings.clip
    write_mp4(out, clip, fps, scale=scale)
    return {
        "out": str(out), "prompt": prompt, "seed": seed, "frames": frames, "fps": fps,
        "size": f"{width * scale}×{height * scale}",
    }  # fmt: skip


def checked_prompt(prompt: str) -> str:
    """The prompt without surrounding white space; refuses nothing and far too much."""
    if not prompt.strip():
        raise ParisError("prompt.empty")
    if len(prompt) > LONGEST:
        raise ParisError("prompt.too-long", f"{len(prompt)} characters")
    if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ParisError("usage", "the prompt is not UTF-8 text")
    return prompt.strip()


def encoded(encoder: Any, prompt: str) -> Any:
    """The prompt's encodings; refuses one of which the encoder would read only a part."""
    try:
        return encoder.encode([prompt])
    except ValueError as error:
        raise ParisError("prompt.too-long", str(error)) from error


def check_tensor_files(folder: Path) -> None:
    """The strict gate on every tensor file of a folder: `tensor.header` names the file."""
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            try:
                first = file.read(8)
                check_header(first + file.read(header_length(first, size)), size)
            except ParisError as error:
                name = path.relative_to(folder).as_posix()
                raise ParisError(error.code, f"{name}: {error.detail}") from error
