"""What updates left out, kept until a later unit of the same expert has made up for it.

A sparse update leaves most of what was learnt behind. The rest is committed to beside the update,
stays on this disk, and the coordinator lets the node's next unit of that expert begin with the one
of its last accepted update, which it names by its root::

    keep(folder, expert=0, unit=ID, root=ROOT, path=work / "residual.safetensors")
    held(folder)                                       # roots, told with the next lease
    path_of(folder, ROOT)                              # None once it is gone

Of the accepted ones the newest is kept for each expert, of the others those that are not judged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from paris_protocol.net.store import disk_errors

FOLDER: Final = "residuals"


class Kept(NamedTuple):
    """One residual: of which expert, left by which unit, with which root."""

    expert: int
    unit: str
    root: str
    path: Path


def keep(folder: Path, *, expert: int, unit: str, root: str, path: Path) -> None:
    """Take a residual over from a unit's work folder; again does no harm."""
    target = folder / FOLDER / f"{expert}.{unit}.{root}.safetensors"
    if path.exists():
        with disk_errors(target):
            target.parent.mkdir(exist_ok=True)
            path.replace(target)


def kept(folder: Path) -> list[Kept]:
    """All residuals, the oldest first."""
    found = sorted((folder / FOLDER).glob("*.safetensors"), key=lambda one: one.stat().st_mtime_ns)
    parts = [(path.name.split("."), path) for path in found]
    return [Kept(int(name[0]), name[1], name[2], path) for name, path in parts if len(name) == 4]


def held(folder: Path) -> list[str]:
    """The roots of all residuals."""
    return [one.root for one in kept(folder)]


def path_of(folder: Path, root: str | None) -> Path | None:
    """Where the residual with this root stands."""
    return next((one.path for one in kept(folder) if one.root == root), None)


def prune(folder: Path, accepted: Callable[[str], bool | None]) -> None:
    """Remove what nobody can ask for: `accepted` says what became of a unit, None if not judged."""
    newest: dict[int, str] = {}
    for one in kept(folder):
        if accepted(one.unit):
            newest[one.expert] = one.unit
    for one in kept(folder):
        verdict = accepted(one.unit)
        if verdict is False or (verdict and newest[one.expert] != one.unit):
            one.path.unlink(missing_ok=True)
