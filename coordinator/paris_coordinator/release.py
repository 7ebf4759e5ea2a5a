"""A release folder: experts, router and all the evidence, signed as one statement.

Three steps, because the signature must be in the log before the log can prove it, and because the
process that opens strangers' files never sees the key:

1. the worker's `bundle` job writes the models (experts, router, scheduler, codec, text);
2. `draft` puts them together with the texts and the lineage, and returns the unsigned `Release`;
3. the caller signs and logs it; `publish` adds signature and proof, checks the whole folder as
   `paris verify` does, and gives it its name.

Every byte is a function of its inputs, so a coordinator that was killed in between repeats the same
steps and gets the same digests. Nothing incomplete ever has the folder's name::

    bundle = await worker.run(bundle_job(state, heads, out=folder / "models"))
    release = draft(source, draft_folder)
    publish(draft_folder, seal(release, key, network), proof, releases / "1")
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paris_coordinator.cards import CardFacts, licences, model_card
from paris_protocol.averages import released
from paris_protocol.envelope import Sealed
from paris_protocol.errors import ParisError
from paris_protocol.net.folder import hash_file, verify_folder
from paris_protocol.records import (
    Genesis,
    Head,
    Merge,
    Policy,
    Release,
    ReleasedExpert,
    ReleaseFile,
    Revert,
)
from paris_protocol.release import PROOF, RELEASE, UNLISTED, provenance_files


@dataclass(frozen=True, slots=True)
class ReleaseSource:
    """What a release is made of.

    `models` is the folder that the `bundle` job wrote and `router_root` its answer; `lineage` is
    what `paris_protocol.evidence.lineage_statements` chose out of the log.
    """

    genesis: Sealed[Genesis]
    policies: Sequence[Sealed[Policy]]
    heads: Sequence[Head]
    lineage: Sequence[Sealed[Any]]
    models: Path
    router_root: str
    router_report: Mapping[str, object] = field(default_factory=dict)
    scan: Mapping[str, Any] = field(default_factory=dict)
    number: int = 1
    previous: str | None = None
    at: int = 0


def draft(source: ReleaseSource, folder: Path) -> Release:
    """Fill `folder` (made anew) with everything but signature and proof; the record to be signed.

    Raises ParisError("disk.full"); the half-filled folder is overwritten by the next attempt.
    """
    steps = _steps(source)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source.models, folder)
        written = provenance_files(source.genesis, source.policies, source.lineage)
        for name, data in written.items():
            _write(folder / name, data)
        _write(folder / "README.md", model_card(_facts(source)).encode())
        _write(folder / "LICENSES.md", licences(source.genesis.record).encode())
        files = list_files(folder)
        for path in [*folder.rglob("*"), folder]:  # what is signed must outlive a power cut
            _sync(path)
    except OSError as error:
        raise _disk(error) from error
    return Release(
        number=source.number,
        previous=source.previous,
        files=files,
        experts=tuple(
            ReleasedExpert(expert=index, merge=head.merge, root=released(head, steps).root)
            for index, head in enumerate(source.heads)
        ),
        router_root=source.router_root,
        at=source.at,
    )


def publish(draft_folder: Path, release: Sealed[Release], proof: bytes, folder: Path) -> Path:
    """Add signature and log proof, verify the whole, and rename it to `folder`.

    `proof` is the bytes of `paris_protocol.release.proof_file` for genesis, policies, lineage and
    this release.
    Raises the `release.*` code that `paris verify` would give; nothing is named `folder` then. A
    folder that is already there with the same statement stays as it is.
    """
    if (folder / RELEASE).exists() and (folder / RELEASE).read_bytes() == release.raw:
        shutil.rmtree(draft_folder, ignore_errors=True)
        return folder
    if list_files(draft_folder) != release.record.files:
        raise ParisError("release.file", "the draft is not what was signed")
    try:
        _write(draft_folder / RELEASE, release.raw)
        _write(draft_folder / PROOF, proof)
        _sync(draft_folder)
        verify_folder(draft_folder)
        draft_folder.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise _disk(error) from error
    return folder


def list_files(folder: Path) -> tuple[ReleaseFile, ...]:
    """Path, digest and size of every file that a release statement lists, sorted by path."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in UNLISTED:
            digest, size = hash_file(path)
            found.append(ReleaseFile(path=name, sha256=digest, size=size))
    return tuple(sorted(found, key=lambda entry: entry.path))


def _steps(source: ReleaseSource) -> dict[str, Merge | Revert]:
    """What made the heads, by statement id."""
    return {s.id: s.record for s in source.lineage if isinstance(s.record, Merge | Revert)}


def _facts(source: ReleaseSource) -> CardFacts:
    nodes = {s.record.node for s in source.lineage if s.record.TYPE == "verdict"}
    return CardFacts(
        network=source.genesis.id,
        genesis=source.genesis.record,
        number=source.number,
        heads=source.heads,
        steps=_steps(source),
        nodes=len(nodes),
        router=source.router_report,
        scan=source.scan,
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk(error: OSError) -> Exception:
    return ParisError("disk.full", str(error)) if error.errno in (28, 122) else error
