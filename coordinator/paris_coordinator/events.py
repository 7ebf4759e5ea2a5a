"""What the desk is told and what it answers: events (facts, then questions) and effects.

Facts are what the ledger keeps; questions change nothing; effects are what the office and the loop
carry out. All are plain immutable tuples, and this module refuses nothing::

    desk.handle(Filed(sealed.id, sealed.signer, sealed.record), now)   # a fact: []
    desk.handle(LeaseAsked(node, request), now)                        # a question: [Grant(draft)]
    desk.handle(Tick(), now)                                           # a question: [Verify("…")]
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from paris_protocol.records import Assignment, LeaseRequest, Statement

# ---------------------------------------------------------------- events: facts, then questions


class Filed(NamedTuple):
    """A signed statement, its id and its signer; the signature was checked at the door."""

    id: str
    signer: str
    record: Statement


class Uploaded(NamedTuple):
    """All bytes of a contribution's update are here and verified."""

    contribution: str


class Trained(NamedTuple):
    """The router was trained; its report as JSON text."""

    report: str


class Sampled(NamedTuple):
    """Sample clips were made from these heads."""

    roots: tuple[str, ...]
    files: tuple[str, ...]


class Ordered(NamedTuple):
    """The operator's order: a release of the current heads, or the end of a quarantine."""

    order: Literal["release", "lift"]
    subject: str


class LeaseAsked(NamedTuple):
    """A node asks for work."""

    node: str
    request: LeaseRequest


class Tick(NamedTuple):
    """What is due now? `samples_every`: seconds between sample clips of running training."""

    samples_every: int = 0


Fact = Filed | Uploaded | Trained | Sampled | Ordered
Event = Fact | LeaseAsked | Tick

# ---------------------------------------------------------------- effects


class Grant(NamedTuple):
    """Sign this draft, file it, send it."""

    draft: Assignment


class Again(NamedTuple):
    """Send the open assignment once more."""

    assignment: str


class Finished(NamedTuple):
    """All experts have their planned merges."""


class Verify(NamedTuple):
    """Judge this contribution."""

    contribution: str


class RunMerge(NamedTuple):
    """Merge these contributions, in this order, into the expert's head."""

    expert: int
    contributions: tuple[str, ...]


class RunRouter(NamedTuple):
    """Train the router."""


class RunSamples(NamedTuple):
    """Make sample clips of the current heads."""

    roots: tuple[str, ...]


class RunRelease(NamedTuple):
    """Assemble and sign a release of the current heads."""


class Publish(NamedTuple):
    """Give a release of the ledger its folder; only the loop knows that it has none yet."""

    release: str


Effect = (
    Grant | Again | Finished | Verify | RunMerge | RunRouter | RunSamples | RunRelease | Publish
)
