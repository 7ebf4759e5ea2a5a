"""Following a lineage: a head is made from its merges' inputs where an earlier one is at hand.

A merge names its parent and its inputs, and a node that has the parent (from its last unit, or the
network's checkpoint) fetches the inputs alone, which compressed are a fraction of a head. Several
merges are caught up with, as long as that is less than the head itself. What was signed decides:
the root and the blob's id of the head. Whatever is missing, damaged or other than that ends in the
full download, never in another head::

    saved = await follow(kit, assignment.parent, hear)          # True: the head is in the store
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paris_protocol.envelope import unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.net.fetch import fetch_blob
from paris_protocol.records import BlobRef, Head, Merge, MergeInput, Revert, TensorFile

if TYPE_CHECKING:
    from paris_node.journal import Journal
    from paris_node.kit import Kit

FACT: Final = "followed"
FAR: Final = 16
"""So many merges are caught up with at most."""
PATIENCE: Final = 10.0
"""Seconds without any progress after which an input counts as gone."""


@dataclass(frozen=True, slots=True)
class Step:
    """One merge or revert on the way to a head."""

    kind: str
    inputs: tuple[MergeInput, ...]
    result: TensorFile


async def follow(kit: Kit, head: Head, hear: Callable[[int], None]) -> bool:
    """Put a head into the store without downloading it; False if that is not possible or cheaper.

    Refuses only what another way would not mend either: a full disk.
    """
    if kit.store.has(head.weights.blob):
        return False
    try:
        way = await _way(kit, head)
        if way is None:
            return False
        parent, steps = way
        await _make(kit, head, parent, steps, hear)
    except (ParisError, OverflowError) as error:
        code = error.code if isinstance(error, ParisError) else "record.malformed"
        if code == "disk.full":
            raise
        kit.log.warning("head.not-followed", extra={"code": code, "detail": str(error)[:200]})
        return False
    return True


async def _way(kit: Kit, head: Head) -> tuple[BlobRef, list[Step]] | None:
    """The nearest earlier head that is here and the merges since, or None if it costs as much."""
    at, steps, seen = head, list[Step](), set[str]()
    while not kit.store.has(at.weights.blob):
        if at.merge is None or len(steps) >= FAR:
            return None
        record = unseal_any(await kit.control.statement(at.merge), kit.network).record
        if not isinstance(record, Merge | Revert) or record.result != at.weights:
            raise ParisError("blob.corrupt", "a statement that does not make this head")
        merge = isinstance(record, Merge)
        inputs = record.inputs if isinstance(record, Merge) else record.removed
        steps.append(Step("merge" if merge else "revert", inputs, record.result))
        lacking = {one.update.blob.id: one.update.blob for step in steps for one in step.inputs}
        cost = sum(ref.size for ref in lacking.values() if not kit.store.has(ref))
        if cost >= head.weights.blob.size or at.merge in seen:
            return None
        seen.add(at.merge)
        at = record.parent
    return at.weights.blob, steps[::-1]


async def _make(
    kit: Kit, head: Head, parent: BlobRef, steps: list[Step], hear: Callable[[int], None]
) -> None:
    """Fetch the inputs, let the trainer add them up, and take in what it made."""
    store, out = kit.store, kit.folder / "following.safetensors"
    inputs = {one.update.blob.id: one.update.blob for step in steps for one in step.inputs}
    fetched = [ref for ref in inputs.values() if not store.has(ref)]
    paths: dict[str, str] = {}
    before = 0
    try:
        for ref in inputs.values():

            def count(here: int, _: int, before: int = before) -> None:
                hear(before + here)

            path = await fetch_blob(
                ref, store, kit.swarm, kit.control, patience=PATIENCE, progress=count
            )
            paths[ref.id] = str(path)
            before += ref.size
        order = {
            "genesis": str(kit.folder / "genesis.json"), "network": kit.network,
            "parent": str(store.path(parent)), "out": str(out),
            "steps": [
                {"kind": step.kind, "root": step.result.root, "inputs": _rows(step, paths)}
                for step in steps
            ],
        }  # fmt: skip
        await kit.trainer.follow(order, lambda _: hear(before))
        made = await asyncio.to_thread(store.add_file, out)
        if made != head.weights.blob:
            store.remove(made)
            raise ParisError("blob.corrupt", "the merge gives another file than was signed")
    finally:
        out.unlink(missing_ok=True)
        for ref in fetched:
            store.remove(ref)
    paid = sum(ref.size for ref in fetched)
    _note(kit.journal, paid, head.weights.blob.size)
    about = {"merges": len(steps), "bytes": paid, "instead_of": head.weights.blob.size}
    kit.log.info("head.followed", extra=about)


def _rows(step: Step, paths: dict[str, str]) -> list[list[Any]]:
    """Path, weight and scale of each input; every bit of the scalars is what was signed."""
    return [
        [paths[one.update.blob.id], float.fromhex(one.weight), float.fromhex(one.scale)]
        for one in step.inputs
    ]


def _note(journal: Journal, paid: int, size: int) -> None:
    known = followed(journal)
    now = {
        "heads": known["heads"] + 1,
        "bytes": known["bytes"] + paid,
        "instead_of": known["instead_of"] + size,
    }
    journal.set_fact(FACT, json.dumps(now))


def followed(journal: Journal) -> dict[str, int]:
    """Heads that were made here, the bytes fetched for them, and what they would have been."""
    known = json.loads(journal.fact(FACT) or "{}")
    return {key: int(known.get(key, 0)) for key in ("heads", "bytes", "instead_of")}
