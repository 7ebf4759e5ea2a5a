"""Files that ship with the package: the demo's recipes, codec, word table, checkpoint and judge.

Made by `paris_models.initial`; read-only::

    path = asset("demo.toml")
"""

from __future__ import annotations

from pathlib import Path


def asset(name: str) -> Path:
    """The path of a shipped file; `FileNotFoundError` when there is none of that name."""
    path = Path(__file__).parent / name
    if not path.is_file():
        raise FileNotFoundError(f"no asset named {name}")
    return path
