"""The agenda: what waits to be done, most urgent first, read off the board. Pure.

It is a function of the state and of `now` alone, so whatever a kill interrupted stands on it again.
It refuses nothing::

    list(due(board, now, samples_every=900))     # [Revoke(…), Ask(…), RunMerge(…), Verify(…), …]
"""

from __future__ import annotations

from collections.abc import Iterator

from paris_coordinator.auditing import next_step
from paris_coordinator.board import Board, Expert
from paris_coordinator.events import (
    Ask,
    Call,
    CommitSecret,
    Conclude,
    Dismiss,
    Effect,
    Replay,
    Revoke,
    RunCanary,
    RunMerge,
    RunRelease,
    RunRevert,
    RunRouter,
    RunSamples,
    RunScan,
    Verify,
    Withdraw,
)


def due(board: Board, now: int, samples_every: int) -> Iterator[Effect]:
    """All of it. What costs nothing comes first, then merges, reverts, replays and judgements."""
    for id, node in board.nodes.items():
        if node.condemned and node.revoked is None:
            yield Revoke(id)
    yield from (Withdraw(clip) for clip in board.withdrawing)
    yield from (Dismiss(contribution) for contribution in board.dismissed)
    steps = [_audit_step(board, contribution, now) for contribution in board.trials]
    yield from (step for step in steps if isinstance(step, Ask | Call | Conclude))
    for expert in board.experts:
        if inputs := _closable(board, expert, now):
            yield RunMerge(expert.index, inputs)
    yield from _reverts(board)
    yield from (step for step in steps if isinstance(step, Replay))
    yield from _judgements(board)
    yield from (step for step in steps if isinstance(step, RunCanary))
    if board.releasing():
        yield from _release_steps(board)
    elif samples_every and now - board.sampled_at >= samples_every:
        fresh = board.sampled is None or board.sampled.roots != board.roots
        if fresh and any(expert.round for expert in board.experts):
            yield RunSamples(board.roots)


def _audit_step(board: Board, contribution: str, now: int) -> Effect | None:
    audit = board.audits[contribution]
    match next_step(audit, now, board.policy.soft_deadline):
        case "ask":
            return Ask(contribution, 1 if audit.challenge is None else 2)
        case "call":
            return Call(contribution)
        case "replay":
            return Replay(contribution)
        case "canary":
            return RunCanary(board.contributions[contribution])
        case "conclude":
            return Conclude(contribution)
        case _:
            return None


def _judgements(board: Board) -> Iterator[Effect]:
    """Contributions to judge, each once the secret set of its head is committed.

    Networks without audit rules are older and judge by secret clips that nobody committed to.
    """
    if board.policy.audit is None:
        yield from (Verify(contribution) for contribution in board.queue)
        return
    waiting = {board.work_of(contribution).record.expert for contribution in board.queue}
    heads = [(e.index, e.head.weights.root, not board.ended(e)) for e in board.experts]
    lacking, in_use = set(), _sets_in_use(board)
    for effect in board.shelf.due(heads):
        if isinstance(effect, CommitSecret):
            lacking.add(effect.expert)
        elif effect.set in in_use:
            continue
        if not isinstance(effect, CommitSecret) or effect.expert in waiting:
            yield effect
    for contribution in board.queue:
        if board.work_of(contribution).record.expert not in lacking:
            yield Verify(contribution)


def _sets_in_use(board: Board) -> set[str | None]:
    """Sets that may have judged something whose verdict is still to come: not to be opened yet."""
    works = (board.work_of(id) for id in (*board.queue, *board.trials, *board.dismissed))
    heads = {(work.record.expert, work.record.parent.weights.root) for work in works}
    return {board.shelf.current(expert, head) for expert, head in heads}


def _release_steps(board: Board) -> Iterator[Effect]:
    """Router, samples, backdoor scan, release; a suspicious scan waits for the operator's order."""
    if board.router is None:
        yield RunRouter()
    elif board.sampled is None or board.sampled.roots != board.roots:
        yield RunSamples(board.roots)
    elif board.policy.audit is not None and not _scanned(board):
        yield RunScan(board.roots)
    elif board.ordered or not board.suspicious:
        yield RunRelease()


def _scanned(board: Board) -> bool:
    return board.scanned is not None and board.scanned.roots == board.roots


def _closable(board: Board, expert: Expert, now: int) -> tuple[str, ...]:
    """The contributions to merge when the round is over, by unit; else nothing.

    A round whose head is about to be reverted ends at once: what was accepted is merged first. One
    that is late waits for what has arrived, but not for units that were given out when it was late
    for as long again: else whoever keeps an audit under way could keep it open for ever.
    """
    accepted = tuple(unit.accepted for unit in expert.units if unit.accepted is not None)
    if not accepted or len(accepted) == sum(bool(unit.shards) for unit in expert.units):
        return accepted
    works = [board.works[id] for unit in expert.units for id in unit.works]
    states = {work.state for work in works}
    if any(index == expert.index for index, _ in board.reverting()):
        return () if "queued" in states else accepted
    period, opened = board.policy.plan.close_after, now if expert.opened is None else expert.opened
    waited = {work.state for work in works if work.record.issued - opened < 2 * period}
    late = expert.opened is not None and now - opened >= period
    return accepted if late and not waited & {"queued", "auditing"} else ()


def _reverts(board: Board) -> Iterator[Effect]:
    """Reverts of heads to which nothing accepted or queued waits to be added."""
    for (index, revocation), contributions in board.reverting().items():
        units = board.experts[index].units
        queued = any(board.works[id].state == "queued" for unit in units for id in unit.works)
        if not queued and all(unit.accepted is None for unit in units):
            yield RunRevert(index, revocation, contributions)
