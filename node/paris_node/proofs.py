"""Receipts proved against the signed log, with nobody's help.

The contribution is ours, the verdict is signed by a key of the network, and every statement's
inclusion proof leads to the root of a checkpoint that such a key signed; else `log.proof` or
`record.*`. The audit draw is repeated: neither side could choose it (`audit.draw`)::

    for receipt in journal.receipts():
        check(receipt, network, our_key_id, keys)
        check_audit(receipt, journal)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from paris_node.config import load_settings
from paris_node.journal import Journal, Receipt
from paris_node.receipts import POLICY, known_keys, summary
from paris_protocol.audit import check_draw, segments_of
from paris_protocol.canonical import canonical
from paris_protocol.envelope import unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import load_key
from paris_protocol.log import Checkpoint, leaf_hash, origin, verify_inclusion
from paris_protocol.net.logs import LogMemory, LogPlace, follow
from paris_protocol.records import Assignment, Contribution, Policy, Verdict


def rows(folder: Path, now: int, *, verify: bool) -> list[dict[str, Any]]:
    """The receipts of a state folder as plain facts; with `verify` each has its `proof`.

    A proof that does not hold stands there as an error with its `message`. `state.missing` without
    a journal, `log.rollback` or `log.split` when the log is not what this node saw before.
    """
    journal = Journal.read(folder / "journal.sqlite")
    if journal is None:
        raise ParisError("state.missing", str(folder))
    try:
        node, network = load_key(folder / "key").id, str(journal.fact("network"))
        keys, found = known_keys(journal), []
        root_at = _roots(folder, network, now) if verify else None
        for receipt in journal.receipts():
            row = summary(receipt)
            if verify and receipt.body.get("verdict") is not None:
                try:
                    proof = check(receipt, network, node, keys)
                    row["proof"] = {**proof, "draw": check_audit(receipt, journal, root_at)}
                except ParisError as error:
                    row["proof"] = error.as_json()
            found.append(row)
        return found
    finally:
        journal.close()


def _roots(folder: Path, network: str, now: int) -> Callable[[int], str] | None:
    """The log's root at a size, from the log as it is served; None while it is out of reach."""
    place = LogPlace(f"{load_settings(folder).invite.url}/log")
    try:
        found = follow(place, network, LogMemory(folder / "log"), now)
    except ParisError as error:
        if error.code in ("log.rollback", "log.split"):
            raise
        return None
    return lambda size: found.reader.root(size).hex()


def check(receipt: Receipt, network: str, node: str, keys: Collection[str]) -> dict[str, Any]:
    """Prove a judged contribution; the facts that hold. Raises on the first thing that does not."""
    body = receipt.body.get("receipt")
    if not isinstance(body, dict):
        raise ParisError("log.proof", "there is no proof yet")
    ours = unseal(canonical(body.get("contribution")), Contribution, network, {node})
    verdict = unseal(canonical(body.get("verdict")), Verdict, network, keys)
    if ours.id != receipt.contribution or verdict.record.contribution != ours.id:
        raise ParisError("log.proof", "the receipt is another contribution's")
    checkpoint = Checkpoint.open(str(body.get("checkpoint")), origin(network), keys)
    wanted = [ours.id, verdict.id, ours.record.assignment, ours.record.commitment]
    if body.get("merge") is not None:
        wanted.append(str(body["merge"]))
    for statement in wanted:
        _included(statement, body, checkpoint)
    return {
        "contribution": ours.id,
        "accepted": verdict.record.accepted,
        "code": verdict.record.code,
        "merge": body.get("merge"),
        "log_size": checkpoint.size,
    }


def check_audit(
    receipt: Receipt, journal: Journal, root_at: Callable[[int], str] | None = None
) -> dict[str, Any] | None:
    """Repeat the audit draw of a judged contribution; None where nothing was drawn.

    The commitment must be the leaf that the draw names, the secret the next value of the policy's
    chain, and rate and segments must follow (`audit.draw`). `root_at` gives the log's root at a
    size; without it the root is taken as stated.
    """
    body = receipt.body.get("receipt")
    if not isinstance(body, dict):
        return None
    network = str(journal.fact("network"))
    verdict = unseal(canonical(body.get("verdict")), Verdict, network, None).record
    draw, raw = verdict.audit, journal.unit(verdict.assignment)
    if draw is None or raw is None:
        return None
    assignment = unseal(raw, Assignment, network, None).record
    policy = journal.fact(f"{POLICY}{assignment.policy}")
    if policy is None:
        raise ParisError("audit.draw", f"policy {assignment.policy} was not kept")
    rules = unseal(policy.encode(), Policy, network, None).record.audit
    if rules is None:
        raise ParisError("audit.draw", "the policy has no audits")
    ours = unseal(canonical(body.get("contribution")), Contribution, network, None).record
    if body.get("indices", {}).get(ours.commitment) != draw.size - 1:
        raise ParisError("audit.draw", "the seed is not of the moment of the commitment")
    root = draw.root if root_at is None else root_at(draw.size)
    check_draw(draw, rules, segments_of(assignment), root=root, standing=draw.standing)
    return {
        "number": draw.number,
        "audited": draw.audited,
        "segments": list(draw.segments),
        "standing": draw.standing,
        "root": "stated" if root_at is None else "checked",
    }


def _included(statement: str, body: dict[str, Any], checkpoint: Checkpoint) -> None:
    try:
        index = body["indices"][statement]
        proof = [bytes.fromhex(part) for part in body["proofs"][statement]]
        leaf = leaf_hash(bytes.fromhex(statement))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ParisError("log.proof", f"no proof of {statement[:12]}") from error
    sound = isinstance(index, int) and not isinstance(index, bool)
    if not sound or not verify_inclusion(leaf, index, checkpoint.size, proof, checkpoint.root):
        raise ParisError("log.proof", f"{statement[:12]} is not in the log")
