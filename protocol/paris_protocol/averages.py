"""The running average of an expert's heads, where the recipe has an `ema`: what a release holds.

A published merge of s steps (those of its inputs together) names the average after it, and the
share β^s that the average before it keeps. A revert begins the average anew at its head, and so
does the initial checkpoint: what was taken out must not live on in it. A merge whose average or
share is not the one that follows is refused (`merge.lineage`)::

    kept_share(0.999, 240).hex()                  # what `Merge.decay` must be
    released(head, steps).root                    # the tensors that a release of this head holds
"""

from __future__ import annotations

from collections.abc import Mapping

from paris_protocol.errors import ParisError
from paris_protocol.records import Head, Merge, Revert, TensorFile


def kept_share(decay: float, steps: int) -> float:
    """β^s in float64 by squaring and multiplying from the lowest bit of s up.

    No library's power, whose last bit is not everywhere the same. Refused (`merge.lineage`): a
    decay outside [0, 1) and numbers of steps below 1.
    """
    if not 0 <= decay < 1:
        raise ParisError("merge.lineage", "the decay of an average lies in [0, 1)")
    if steps < 1:
        raise ParisError("merge.lineage", "an average of a merge without steps")
    share, power = 1.0, decay
    while steps:
        if steps & 1:
            share *= power
        power *= power
        steps >>= 1
    return share


def check_average(merge: Merge, ema: float, steps: int) -> None:
    """That a merge of so many steps names an average and its share exactly when it has to.

    `ema` is the recipe's; 0 is a network without averages. What is not published has none.
    """
    wanted = kept_share(ema, steps).hex() if ema and merge.published else None
    if (merge.average is not None, merge.decay) != (wanted is not None, wanted):
        detail = f"round {merge.round} of expert {merge.expert} names another average's share"
        raise ParisError("merge.lineage", detail)


def released(head: Head, steps: Mapping[str, Merge | Revert]) -> TensorFile:
    """What a release holds of a head: the average of the merge that made it, or its weights.

    `steps` are merges and reverts by statement id, among them the one that made the head.
    """
    step = steps.get(head.merge or "")
    average = step.average if isinstance(step, Merge) else None
    return head.weights if average is None else average
