"""Secret held-out sets of the experts: which one judges now, which have retired. Pure.

A set belongs to one head of one expert: `jobs.common.held_out` draws it from the cluster's private
clips by the operator's key and the head's root. It is committed in the log before the first verdict
on that head, judges the contributions to it and the merge that replaces it, and is opened when the
head has been replaced: so a set answers at most about as many questions as a round has units. The
pool of a cluster is finite and sets of different heads overlap; what that tells stands in
docs/trust.md. The shelf refuses what breaks this order (`secret.set`) and changes nothing::

    shelf.due([(0, head_root, True)])      # CommitSecret(0), later OpenSecret(set)
    shelf.committed(id, record, head_root)
    shelf.measured(contribution, "-0.0021", "0.0009"); shelf.judged(verdict, head_root)
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from paris_coordinator.events import CommitSecret, OpenSecret
from paris_protocol.errors import ParisError
from paris_protocol.records import Digest, Merge, SecretSet, SecretSetOpened, Verdict
from paris_protocol.secretsets import check_opening

Json = dict[str, Any]
Score = tuple[Digest, str, str]
"""A contribution or merge, the mean difference of losses, its standard error."""


@dataclass(slots=True)
class Kept:
    """A committed set: its statement, the head that it judges, its scores, its opening."""

    record: SecretSet
    head: str
    scores: dict[str, tuple[str, str]] = field(default_factory=dict)
    opening: str | None = None


class Shelf:
    """All secret sets of a network, in the order in which they were committed."""

    def __init__(self) -> None:
        self.sets: dict[str, Kept] = {}
        self._measured: dict[str, tuple[str, str]] = {}

    def current(self, expert: int, head: str) -> str | None:
        """The set that judges this head of an expert, or None while none is committed."""
        for id, kept in reversed(self.sets.items()):
            if kept.record.expert == expert and kept.head == head and kept.opening is None:
                return id
        return None

    def of(self, expert: int) -> list[str]:
        """An expert's sets, oldest first."""
        return [id for id, kept in self.sets.items() if kept.record.expert == expert]

    def judge_of(self, subject: str) -> str | None:
        """The set that a contribution or merge was measured on."""
        return next((id for id, kept in self.sets.items() if subject in kept.scores), None)

    def due(self, heads: Iterable[tuple[int, str, bool]]) -> Iterator[CommitSecret | OpenSecret]:
        """What is to be done, from (expert, root of its head, whether it is still trained)."""
        for expert, head, training in heads:
            current = self.current(expert, head) if training else None
            if training and current is None:
                yield CommitSecret(expert)
            for id in self.of(expert):
                if self.sets[id].opening is None and id != current:
                    yield OpenSecret(id)

    # ------------------------------------------------------------ facts

    def committed(self, id: str, record: SecretSet, head: str) -> None:
        """A set was committed for the expert's present head."""
        if record.number != len(self.of(record.expert)):
            raise ParisError("secret.set", f"number {record.number} is not the next one")
        if self.current(record.expert, head) is not None:
            raise ParisError("secret.set", "the head has a set already")
        self.sets[id] = Kept(record, head)

    def measured(self, contribution: str, delta: str, se: str) -> None:
        """A contribution's exact numbers, which count when its verdict is filed."""
        self._measured[contribution] = (delta, se)

    def judged(self, record: Verdict, head: str) -> None:
        """A contribution to this head has its verdict; the set has answered, if it was asked."""
        found = self._measured.pop(record.contribution, None)
        if found is not None:
            self._score(record.expert, head, record.contribution, found)

    def merged(self, id: str, record: Merge) -> None:
        """A merge was measured on the set of the head that it started from."""
        found = dict(record.numbers)
        if {"delta", "se"} <= found.keys():
            self._score(
                record.expert, record.parent.weights.root, id, (found["delta"], found["se"])
            )

    def _score(self, expert: int, head: str, subject: str, score: tuple[str, str]) -> None:
        current = self.current(expert, head)
        if current is not None:  # None: begun before sets were committed
            self.sets[current].scores[subject] = score

    def opened(self, id: str, record: SecretSetOpened) -> None:
        """A retired set was opened."""
        kept = self.sets.get(record.set)
        if kept is None or kept.opening is not None:
            raise ParisError("secret.set", "no such set, or it is open already")
        check_opening(kept.record, record)
        if record.scores != scores(kept):
            raise ParisError("secret.set", "the scores are not those that were measured")
        kept.opening = id


def scores(kept: Kept) -> tuple[Score, ...]:
    """The scores of a set as its opening lists them."""
    return tuple((subject, delta, se) for subject, (delta, se) in kept.scores.items())


# ---------------------------------------------------------------- the job and the statements


def operator_secret(seed: bytes, purpose: str) -> str:
    """A secret (hex) of the operator's key for one purpose, such as the held-out clips."""
    return hmac.new(seed, f"paris/{purpose}/1".encode(), hashlib.sha256).hexdigest()


def job(private: str, secret: str, head: str, clips: int) -> Json:
    """The worker's job that draws a head's set again: salt, digests of its clips, root."""
    return {"job": "secret", "private": private, "secret": secret, "head": head, "clips": clips}


def commitment(shelf: Shelf, expert: int, answer: Mapping[str, Any], now: int) -> SecretSet:
    """The statement that commits to the set of the job's answer."""
    return SecretSet(
        expert=expert,
        number=len(shelf.of(expert)),
        clips=len(answer["clips"]),
        root=answer["root"],
        at=now,
    )


def opening(shelf: Shelf, id: str, answer: Mapping[str, Any], now: int) -> SecretSetOpened:
    """The statement that opens a retired set; `secret.set` if the clips are not those committed.

    The job's `clips` must ask for as many as the set has: `shelf.sets[id].record.clips`.
    """
    record = SecretSetOpened(
        set=id,
        salt=answer["salt"],
        clips=tuple(answer["clips"]),
        scores=scores(shelf.sets[id]),
        at=now,
    )
    check_opening(shelf.sets[id].record, record)
    return record
