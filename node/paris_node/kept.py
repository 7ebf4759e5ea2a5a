"""Which training states a node keeps on disk until its contribution is judged. Pure.

Any committed state may be asked for. A state that was not kept is made again by training from the
nearest earlier one, which gives the same bits, so a small budget costs time and never an answer::

    kept_states(segments=24, room=6)                 # (4, 8, 12, 16, 20, 24)
    start_of(11, (4, 8, 12))                         # 8: train on from there; 0 is the parent

State 0 is the parent with a fresh optimiser; it is never written.
"""

from __future__ import annotations

from collections.abc import Iterable

MB = 1 << 20


def room_for(budget_mb: int, used: int, size: int) -> int:
    """How many states of `size` bytes fit into what `used` bytes leave of the budget."""
    return max(0, (budget_mb * MB - used) // max(1, size))


def kept_states(segments: int, room: int) -> tuple[int, ...]:
    """Places of the states to keep: at most `room`, evenly spaced, the last one among them."""
    if segments < 1 or room < 1:
        return ()
    stride = -(-segments // room)
    return tuple(range(segments, 0, -stride))[::-1]


def start_of(wanted: int, kept: Iterable[int]) -> int:
    """The nearest kept state from which `wanted` can be made again; 0, the parent, if none is."""
    return max((index for index in kept if index <= wanted), default=0)
