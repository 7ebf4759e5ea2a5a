"""What a unit holds of this disk, and until when: work folder, kept states, claims on blobs.

A contribution may be audited until it is judged, so its parent, shards and kept states stay until
then, or until nobody will ask any more (`KEPT_FOR`). A unit that was lost lets go of all at once::

    order = await order_of(kit, unit)                 # for the trainer, its files verified
    await tidy(kit, unit)                             # after the hand-in
    await let_go(kit, but=unit_in_hand)               # after each look at the receipts
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paris_node import residuals
from paris_node.journal import Receipt
from paris_node.leases import named_plan, needed_blobs, opened_blobs
from paris_node.machine import look
from paris_node.planning import swap_for
from paris_protocol.envelope import unseal
from paris_protocol.errors import ParisError
from paris_protocol.net.fetch import fetch_blob
from paris_protocol.records import Assignment, BlobRef, Opening

if TYPE_CHECKING:
    from paris_node.kit import Kit

KEPT_FOR: Final = 14 * 86400.0
"""Seconds after a hand-in for which a verdict, and so an audit, is awaited."""
STATES: Final = "states"
DEVICE: Final = "device"
"""Fact in the journal: on which kind of device the last unit is trained."""


def assignment_of(kit: Kit, unit: str) -> Assignment:
    """The journalled assignment of a unit; it was verified when it was taken."""
    raw = kit.journal.unit(unit)
    if raw is None:
        raise ParisError("unit.unknown", f"{unit[:12]} is not in the journal")
    return unseal(raw, Assignment, kit.network, None).record


async def order_of(kit: Kit, unit: str) -> dict[str, Any]:
    """What the trainer must know of a unit. Its files are verified, and fetched where they lack.

    A unit that was begun on a GPU waits for one: `gpu.unavailable`.
    """
    assignment, plan = assignment_of(kit, unit), named_plan(assignment_of(kit, unit))
    wanted, swap = device_of(kit, unit), 0
    if wanted == "cuda":
        _, facts = await asyncio.to_thread(look, kit.machine, wanted, kit.folder)
        swap = swap_for(plan, kit.genesis, assignment.steps, facts)
    paths = [
        str(await fetch_blob(ref, kit.store, kit.swarm, kit.control))
        for ref in needed_blobs(assignment)
    ]
    work = kit.folder / "work" / unit
    work.mkdir(parents=True, exist_ok=True)
    rest = residuals.path_of(kit.folder, assignment.residual)
    return {
        "unit": unit,
        "assignment": assignment.model_dump(mode="json"),
        "genesis": str(kit.folder / "genesis.json"),
        "network": kit.network,
        "work": str(work),
        "parent": paths[0],
        "shards": paths[1 : 1 + len(assignment.shards)],
        "opened": paths[1 + len(assignment.shards) :],
        "device": wanted,
        "swap": swap,
        "residual": None if rest is None else str(rest),
        "save_every": kit.settings.save_every,
        "states_mb": min(kit.settings.states_mb, kit.machine.disk_mb(kit.folder) // 2),
        "states_used": states_used(kit.folder, but=unit),
    }


def device_of(kit: Kit, unit: str) -> str:
    """Where a unit is trained: on the GPU that it was begun on, else as the owner says."""
    known = json.loads(kit.journal.fact(DEVICE) or "{}")
    begun_on_gpu = known.get("unit") == unit and known.get("kind") == "cuda"
    return "cuda" if begun_on_gpu else kit.settings.device


def states_used(folder: Path, but: str | None = None) -> int:
    """Bytes of the states that all units (`but` one) keep."""
    files = (folder / "work").glob(f"*/{STATES}/*.safetensors")
    return sum(path.stat().st_size for path in files if path.parent.parent.name != but)


async def tidy(kit: Kit, unit: str) -> None:
    """After a unit's end: keep what an audit may ask for, if it was handed in; else nothing."""
    for letter in kit.journal.letters(unit):
        if letter.blob:
            kit.store.unpin(letter.blob)
    if not _may_be_audited(kit, unit):
        await _release(kit, unit)
        return
    for path in (kit.folder / "work" / unit).glob("*"):
        if path.is_file():
            path.unlink(missing_ok=True)


async def let_go(kit: Kit, but: str | None) -> None:
    """Release every unit that nobody will ask about any more, except the one in hand."""
    for work in list((kit.folder / "work").glob("*")):
        if work.name != but and not _may_be_audited(kit, work.name):
            await _release(kit, work.name)

    def accepted(unit: str) -> bool | None:
        if unit == but or _may_be_audited(kit, unit):
            return None
        receipt = receipt_of(kit, unit)
        return receipt is not None and receipt.body.get("accepted") is True

    residuals.prune(kit.folder, accepted)


def _may_be_audited(kit: Kit, unit: str) -> bool:
    receipt = receipt_of(kit, unit)
    if receipt is None or receipt.body.get("accepted") is not None or receipt.state == "closed":
        return False
    return kit.clock() - receipt.at < KEPT_FOR


def receipt_of(kit: Kit, unit: str) -> Receipt | None:
    """The receipt of a unit's contribution, if it was handed in."""
    ours = {one.id for one in kit.journal.letters(unit) if one.kind == "contribution"}
    found = (one for one in kit.journal.receipts() if one.contribution in ours)
    return next(found, None)


def laid_open(kit: Kit, unit: str, state: str | None = None) -> list[BlobRef]:
    """Blobs of a unit's states that were laid open for its challenges, all or those in a state."""
    raws = [one.opening for one in kit.journal.challenges(state) if one.unit == unit]
    openings = [unseal(raw, Opening, kit.network, {kit.key.id}).record for raw in raws if raw]
    return [each.file.blob for opening in openings for each in opening.states]


async def _release(kit: Kit, unit: str) -> None:
    """Remove the work folder and the claims on blobs that no other unit has."""
    if kit.journal.unit(unit) is not None:
        others = [path.name for path in (kit.folder / "work").glob("*") if path.name != unit]
        known = [one for one in others if kit.journal.unit(one) is not None]
        wanted = {ref.id for one in known for ref in needed_blobs(assignment_of(kit, one))}
        assignment = assignment_of(kit, unit)
        for ref in needed_blobs(assignment):
            if ref.id not in wanted:
                kit.store.unpin(ref.id)
        for ref in (*opened_blobs(assignment), *laid_open(kit, unit)):
            kit.store.remove(ref)
    await asyncio.to_thread(shutil.rmtree, kit.folder / "work" / unit, ignore_errors=True)
