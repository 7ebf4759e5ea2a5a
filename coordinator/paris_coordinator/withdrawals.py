"""What a clip's withdrawal touches: work on its shards, and heads that were trained on them. Pure.

A clip cannot be taken out of a shard that was published under its digest, so the whole shard is
withdrawn: it is leased no more, and what was trained on it and is in no head yet does not count.
Heads stay as they are and are named. It refuses nothing::

    spoiled(board, assignment)        # a clip of its shards was withdrawn
    touched(board, ["3f2a…"])         # ("9c41…",): published merges of work on these shards
"""

from __future__ import annotations

from collections.abc import Collection

from paris_coordinator.board import Board
from paris_protocol.records import Assignment, Merge, Shard


def is_on(record: Assignment, shards: Collection[str]) -> bool:
    """Whether the assignment has one of these shards (ids of their blobs)."""
    return any(shard.file.blob.id in shards for shard in record.shards)


def spoiled(board: Board, record: Assignment) -> bool:
    """Whether a clip of the assignment's shards was withdrawn."""
    return is_on(record, board.withdrawn)


def touched(board: Board, shards: Collection[str]) -> tuple[str, ...]:
    """Published merges of work that was trained on one of these shards, in order."""
    return tuple(id for id, merge in board.merges.items() if _made_of(board, merge, shards))


def _made_of(board: Board, merge: Merge, shards: Collection[str]) -> bool:
    works = (board.work_of(part.contribution) for part in merge.inputs)
    return merge.published and any(is_on(work.record, shards) for work in works)


def usable(board: Board, shards: Collection[Shard]) -> list[Shard]:
    """Those of the shards of which no clip was withdrawn."""
    return [shard for shard in shards if shard.file.blob.id not in board.withdrawn]
