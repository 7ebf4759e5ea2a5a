"""Receipts: what became of one's own contributions, provable against the signed log.

`refresh` asks the coordinator and keeps its answers in the journal; `check` needs nobody: the
contribution is ours, the verdict is signed by a key of the network, and every statement's inclusion
proof leads to the root of a checkpoint that such a key signed. Else `log.proof` or `record.*`::

    await refresh(kit)
    for receipt in journal.receipts(): check(receipt, network, our_key_id, keys)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from paris_node.jobs import Kit
from paris_node.journal import Journal, Receipt
from paris_protocol.canonical import canonical
from paris_protocol.envelope import unseal
from paris_protocol.errors import ParisError
from paris_protocol.log import Checkpoint, leaf_hash, origin, verify_inclusion
from paris_protocol.records import Contribution, Verdict

KEYS = "coordinator_keys"
_GONE = ("not-found", "unit.unknown")


async def refresh(kit: Kit) -> None:
    """Ask after every contribution whose story is not over, and keep the answers."""
    for receipt in kit.journal.receipts():
        if settled(receipt):
            continue
        try:
            answer = await kit.control.get(f"contributions/{receipt.contribution}")
            if answer.get("verdict") is not None:
                proof = await kit.control.get(f"receipts/{receipt.contribution}")
                answer = {**answer, "receipt": proof}
        except ParisError as error:
            if error.code in _GONE:
                continue
            raise
        state = str(answer.get("state", receipt.state))
        known = Receipt(receipt.contribution, kit.clock(), state, answer)
        if known.body != receipt.body:
            await remember_keys(kit)
            kit.journal.keep_receipt(known)
            _tell(kit, receipt, known)


def _tell(kit: Kit, before: Receipt, now: Receipt) -> None:
    for name in ("code", "merge"):
        if now.body.get(name) is not None and before.body.get(name) is None:
            extra = {"contribution": now.contribution, name: now.body[name]}
            kit.log.info("contribution.%s", "judged" if name == "code" else "merged", extra=extra)


def settled(receipt: Receipt) -> bool:
    """Whether nothing about a contribution can change any more."""
    return receipt.body.get("accepted") is False or receipt.body.get("merge") is not None


async def remember_keys(kit: Kit) -> None:
    """Keep the coordinator's keys of the verified policy, for checks without a connection."""
    policy = await kit.control.policy()
    keys = known_keys(kit.journal) | {kit.genesis.root_key, *policy.record.coordinator_keys}
    if keys != known_keys(kit.journal):
        kit.journal.set_fact(KEYS, json.dumps(sorted(keys)))


def known_keys(journal: Journal) -> set[str]:
    """Every key of the network that a verified policy has named to this node."""
    return set(json.loads(journal.fact(KEYS) or "[]"))


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


def summary(receipt: Receipt) -> dict[str, Any]:
    """What is known of a contribution without proving it."""
    body = receipt.body
    names = ("expert", "round", "unit", "accepted", "code", "merge", "log_index")
    facts = {name: body.get(name) for name in names}
    return {"contribution": receipt.contribution, "state": receipt.state, **facts}


def line(row: dict[str, Any]) -> str:
    """A summary (with the result of its check, if it was made) as one line of text."""
    if row["accepted"] is None:
        text = row["state"]
    else:
        text = "accepted" if row["accepted"] else f"refused ({row['code']})"
    if row["merge"] is not None:
        text += f", merged in {row['merge'][:12]}"
    if "proof" in row:
        sound = "message" not in row["proof"]
        text += ", proof holds" if sound else f", PROOF FAILS: {row['proof']['message']}"
    where = f"expert {row['expert']} round {row['round']}" if row["expert"] is not None else ""
    return f"{row['contribution'][:12]}  {where:18}  {text}"
