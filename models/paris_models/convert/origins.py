"""Where initial weights come from, and the licences that travel with them.

Every converted file names its origin and its licences in its metadata; beside an initial checkpoint
stands a fragment for the recipe, ready to be pasted::

    check_origin("flux.1-schnell", guidance=True, condition=False)   # ValueError: that is -dev
    metadata(ORIGINS["flux.1-dev"])             # {"paris.origin": "flux.1-dev", "paris.licence": …}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Terms:
    """A licence that binds the weights: its name, its text, and regions that it leaves out."""

    name: str
    url: str
    regions_excluded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Published weights (or none): the name in recipes, what people call it, and its licences."""

    name: str
    title: str
    terms: tuple[Terms, ...]


APACHE: Final = Terms("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
FLUX_DEV: Final = Terms(
    "FLUX.1 [dev] Non-Commercial License",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)
HUNYUAN: Final = Terms(
    "Tencent Hunyuan Community License",
    "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE",
    ("European Union", "United Kingdom", "South Korea"),
)

ORIGINS: Final = {
    origin.name: origin
    for origin in (
        Origin("scratch", "fresh weights", ()),
        Origin("flux.1-schnell", "FLUX.1-schnell", (APACHE,)),
        Origin("flux.1-dev", "FLUX.1-dev", (FLUX_DEV,)),
        # Published under Apache-2.0, but trained from FLUX.1-dev on latents of HunyuanVideo's VAE,
        # and the licences of both bind what is derived from them.
        Origin("open-sora-v2", "Open-Sora 2.0", (APACHE, FLUX_DEV, HUNYUAN)),
    )
}


def check_origin(
    name: str | None, stated: str | None = None, *, guidance: bool, condition: bool
) -> Origin:
    """The origin of a file whose metadata say `stated`.

    Without metadata it is told from the file's guidance embedder or its own condition layer, else
    by `name`. Raises `ValueError` when it cannot be told, is unknown, or `name` is another one.
    """
    told = stated or ("open-sora-v2" if condition else "flux.1-dev" if guidance else None)
    if name is None and told is None:
        raise ValueError(f"say where the weights come from: one of {', '.join(ORIGINS)}")
    chosen = told if name is None else name
    if chosen not in ORIGINS:
        raise ValueError(f"the origin {chosen!r} is none of {', '.join(ORIGINS)}")
    if told is not None and chosen != told:
        part = "cond_in layer" if condition else "guidance embedder"
        why = "metadata say" if stated else f"{part} says"
        raise ValueError(f"the file's {why} that its origin is {told}, not {chosen}")
    return ORIGINS[chosen]


def metadata(origin: Origin) -> dict[str, str]:
    """What a file's metadata say of its origin and licences."""
    return {
        "paris.origin": origin.name,
        "paris.licence": "; ".join(terms.name for terms in origin.terms) or "none",
        "paris.licence_url": " ".join(terms.url for terms in origin.terms) or "none",
    }


def recipe_fragment(origin: Origin, file: str) -> str:
    """The `[initial]` and `[[licences]]` sections of a recipe that starts from `file`."""
    lines = ["[initial]", f"file = {_text(file)}", f"origin = {_text(origin.name)}"]
    for terms in origin.terms:
        lines += ["", "[[licences]]", f"part = {_text(f'initial checkpoint: {origin.title}')}"]
        lines += [f"name = {_text(terms.name)}", f"url = {_text(terms.url)}"]
        if terms.regions_excluded:
            lines.append(f"regions_excluded = {_text(list(terms.regions_excluded))}")
    return "\n".join(lines) + "\n"


def _text(value: str | list[str]) -> str:
    """A TOML string or list of strings: JSON's escapes are among TOML's."""
    return json.dumps(value, ensure_ascii=False)
