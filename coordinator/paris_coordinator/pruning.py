"""Which updates a coordinator need not keep any longer: `Policy.inputs_kept` after they were used.

Anybody can recompute a merge while its inputs are kept; the policy says for how long that is (for
ever if it is 0). What was refused is in no merge: it is kept for `APPEAL` at most, so that its node
can dispute the verdict, and so that garbage does not fill the disk. What may still have to be taken
out of a head stays in any case, and so does whatever the network serves besides: nobody gets a
shard deleted by naming it as an update. Pure but for `prune`::

    removed = prune(store, expendable(desk, now))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

from paris_coordinator.board import Board, Work
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import BlobRef, TensorFile

APPEAL: Final = 7 * 86400
"""Seconds for which a refused update is kept where inputs of merges are kept for ever."""


def expendable(board: Board, now: int) -> list[BlobRef]:
    """Updates whose time is over, each once; `now` in unix seconds."""
    needed = {part.blob.id for part in _served(board)}
    owed = _owed(board)
    old: dict[str, BlobRef] = {}
    for work in board.works.values():
        if work.handed_in is None:
            continue
        blob, decided = work.handed_in.update.blob, _decided(board, work)
        if work.contribution in owed or decided is None or now - decided < _patience(board, work):
            needed.add(blob.id)
        else:
            old[blob.id] = blob
    return [blob for id, blob in old.items() if id not in needed]


def _patience(board: Board, work: Work) -> float:
    """Seconds for which an update is kept after the last thing that was done with it."""
    if work.record.parent == board.experts[work.record.expert].head:
        return math.inf  # the copy test compares it with every later update to this head
    if board.policy.inputs_kept:
        return board.policy.inputs_kept
    return APPEAL if work.state in ("refused", "closed") else math.inf


def _served(board: Board) -> Iterator[TensorFile]:
    """What is no update: initial checkpoint, shards, codec, text, heads and averages, states."""
    genesis = board.genesis
    averages = (merge.average for merge in board.merges.values())
    for part in (genesis.initial, genesis.codec.file, genesis.text.file, *averages):
        if part is not None:
            yield part
    yield from (shard.file for cluster in genesis.clusters for shard in cluster.shards)
    yield from (merge.result for merge in board.merges.values())
    yield from (revert.result for revert in board.reverts.values())
    for opening in (board.audits[contribution].opening for contribution in board.trials):
        yield from (state.file for state in opening.states) if opening is not None else ()


def _owed(board: Board) -> set[str | None]:
    """Contributions that a revert may need: not vested, or revoked and still in their head."""
    owed: set[str | None] = {id for ids in board.reverting().values() for id in ids}
    for node in board.nodes:
        owed.update(board.unvested(node))
    return owed


def _decided(board: Board, work: Work) -> int | None:
    """When the last thing was done with an update, in unix seconds; None while it is in use."""
    times = [work.judged.at] if work.judged is not None else []
    if work.state == "closed" and not times:  # it never arrived whole, or nobody looked at it
        times.append(work.record.hard_deadline)
    if work.merge is not None:
        times.append(board.merges[work.merge].at)
    for revert in board.reverts.values():
        if any(part.contribution == work.contribution for part in revert.removed):
            times.append(revert.at)
    done = work.state in ("refused", "merged", "unpublished", "revoked", "closed")
    return max(times) if times and done else None


def prune(store: BlobStore, old: Iterable[BlobRef]) -> list[str]:
    """Removes them from the store, half of them or whole; the ids of those that were there."""
    removed = []
    for blob in old:
        with suppress(ParisError):
            store.manifest(blob.id)  # that of a part, too
            store.remove(blob)
            removed.append(blob.id)
    return removed
