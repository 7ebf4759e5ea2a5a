"""What earlier units say about the next one: sizes to compare with, and what is still owed. Pure.

Sizes are compared within one kind of unit (`planning.kind`). A residual is what a topk update left
out: its node's next unit of the expert begins with it. Nothing is refused here::

    relative_norms(board, record)             # of the accepted work of the same round and kind
    residual(board, node, 0, "topk-32", request.cached)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from paris_coordinator.board import Board, Work
from paris_coordinator.judging import BLOCK
from paris_coordinator.planning import kind
from paris_models.codecs_layout import is_topk
from paris_protocol.canonical import real
from paris_protocol.records import Assignment

UNDECIDED: Final = ("open", "uploading", "queued", "auditing")
ACCEPTED: Final = ("accepted", "merged", "unpublished")
"""States of work that waits for its verdict, and of work that was accepted."""


def relative_norms(board: Board, like: Assignment) -> list[float]:
    """Relative norms (L2, `relative`) of its round's accepted work of its kind, in order."""
    return [
        real(value)
        for work in board.works.values()
        if work.judged is not None and _stands(work) and work.record.round == like.round
        if kind(work.record) == kind(like)
        for layer in work.judged.layers
        for name, value in layer.numbers
        if name == "relative"
    ]


def block_norms(board: Board, like: Assignment) -> dict[str, list[str]]:
    """L2's numbers per block of its expert's accepted work of its kind, by the block's name."""
    found: dict[str, list[str]] = {}
    for work in board.works.values():
        same = (work.record.expert, *kind(work.record)) == (like.expert, *kind(like))
        if work.judged is not None and _stands(work) and same:
            for layer in work.judged.layers:
                for name, value in layer.numbers:
                    if name.startswith(BLOCK):
                        found.setdefault(name.removeprefix(BLOCK), []).append(value)
    return found


def residual(
    board: Board, node: str, expert: int, codec: str, cached: Collection[str]
) -> str | None:
    """What the node's next unit of an expert begins with, under a codec that leaves much out.

    The root of what its last accepted update left out: if the node still has it, and none of its
    units that wait for a verdict, or were accepted, has made up for it already.
    """
    works = [board.works[id] for id in (board.nodes[node].works if node in board.nodes else ())]
    left, used = None, set()
    for work in works:
        if work.state in (*UNDECIDED, *ACCEPTED):
            used.add(work.record.residual)
        if work.record.expert == expert and work.committed is not None and _stands(work):
            left = work.committed.residual
    return left if is_topk(codec) and left in cached and left not in used else None


def _stands(work: Work) -> bool:
    """Accepted, and not taken back with its node's key."""
    return work.judged is not None and work.judged.accepted and work.revocation is None
