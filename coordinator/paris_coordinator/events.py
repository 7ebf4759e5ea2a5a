"""What the desk is told and what it answers: events (facts, then questions) and effects.

Facts are what the ledger keeps; questions change nothing; effects are what the office and the loop
carry out. All are plain immutable tuples, and this module refuses nothing::

    desk.handle(Filed(sealed.id, sealed.signer, sealed.record), now)   # a fact: []
    desk.handle(LeaseAsked(node, request), now)                        # a question: [Grant(draft)]
    desk.handle(Tick(), now)                                           # a question: [Verify("…")]
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from paris_protocol.records import Assignment, Draw, Layer, LeaseRequest, Statement

# ---------------------------------------------------------------- events: facts, then questions


class Filed(NamedTuple):
    """A signed statement, its id and its signer; the signature was checked at the door."""

    id: str
    signer: str
    record: Statement


class Uploaded(NamedTuple):
    """All bytes of a contribution's update are here and verified."""

    contribution: str


class Measured(NamedTuple):
    """A contribution passed L0 to L3 and is audited or a canary, or both.

    `states`: places of the committed states that have to be laid open for the replay.
    """

    contribution: str
    layers: tuple[Layer, ...]
    draw: Draw
    states: tuple[int, ...]
    canary: bool


class Opened(NamedTuple):
    """All bytes of the states that a contribution's audit needs are here."""

    contribution: str


class Called(NamedTuple):
    """These nodes were drawn to audit a contribution; none: the coordinator replays it itself.

    `check`: it replays in any case, even if they agree.
    """

    contribution: str
    auditors: tuple[str, ...]
    check: bool = False


class Answered(NamedTuple):
    """What the coordinator itself got for an assignment: roots of its states and of its update."""

    assignment: str
    states: tuple[str, ...]
    update_root: str


class Trained(NamedTuple):
    """The router was trained; its report as JSON text."""

    report: str


class Sampled(NamedTuple):
    """Sample clips were made from these heads."""

    roots: tuple[str, ...]
    files: tuple[str, ...]


class Scored(NamedTuple):
    """The exact L3 numbers of a contribution; a verdict tells them in buckets only."""

    contribution: str
    delta: str
    se: str


class Scanned(NamedTuple):
    """These heads were searched for backdoors; the report as JSON text."""

    roots: tuple[str, ...]
    report: str


class Ordered(NamedTuple):
    """The operator's order: a release, a quarantine's end, the withdrawal of a key or of a clip."""

    order: Literal["release", "lift", "revoke", "withdraw"]
    subject: str
    reason: str = ""


class LeaseAsked(NamedTuple):
    """A node asks for work."""

    node: str
    request: LeaseRequest


class Tick(NamedTuple):
    """What is due now? `samples_every`: seconds between sample clips of running training."""

    samples_every: int = 0


Fact = (
    Filed
    | Uploaded
    | Measured
    | Opened
    | Called
    | Answered
    | Trained
    | Sampled
    | Scored
    | Scanned
    | Ordered
)
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


class Ask(NamedTuple):
    """Challenge the node to lay committed states open; the second attempt is the last."""

    contribution: str
    attempt: Literal[1, 2]


class Call(NamedTuple):
    """Draw the volunteers that audit this contribution."""

    contribution: str


class Replay(NamedTuple):
    """Replay the drawn segments of this contribution."""

    contribution: str


class RunCanary(NamedTuple):
    """Train this assignment, to know its answer."""

    assignment: str


class Conclude(NamedTuple):
    """Give the verdict on an audited contribution: nothing is missing any more."""

    contribution: str


class Dismiss(NamedTuple):
    """Give the verdict on a contribution that nobody needs any more."""

    contribution: str


class Revoke(NamedTuple):
    """Revoke this key."""

    node: str


class Withdraw(NamedTuple):
    """Take the shards of this clip out of training."""

    clip: str


class RunRevert(NamedTuple):
    """Take these merged contributions of a revoked key out of the expert's head."""

    expert: int
    revocation: str
    contributions: tuple[str, ...]


class RunMerge(NamedTuple):
    """Merge these contributions, in this order, into the expert's head."""

    expert: int
    contributions: tuple[str, ...]


class RunRouter(NamedTuple):
    """Train the router."""


class CommitSecret(NamedTuple):
    """Commit to the secret set that judges an expert's present head."""

    expert: int


class OpenSecret(NamedTuple):
    """Open a secret set whose head has been replaced."""

    set: str


class RunScan(NamedTuple):
    """Search these heads for backdoors."""

    roots: tuple[str, ...]


class RunSamples(NamedTuple):
    """Make sample clips of the current heads."""

    roots: tuple[str, ...]


class RunRelease(NamedTuple):
    """Assemble and sign a release of the current heads."""


class Publish(NamedTuple):
    """Give a release of the ledger its folder; only the loop knows that it has none yet."""

    release: str


Effect = (
    Grant
    | Again
    | Finished
    | Verify
    | Ask
    | Call
    | Replay
    | RunCanary
    | Conclude
    | Dismiss
    | Revoke
    | Withdraw
    | RunRevert
    | RunMerge
    | CommitSecret
    | OpenSecret
    | RunRouter
    | RunScan
    | RunSamples
    | RunRelease
    | Publish
)
