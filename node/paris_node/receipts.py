"""Receipts: what became of one's own contributions, as the coordinator tells it.

Answers are kept in the journal together with the proof that `paris_node.proofs` checks::

    if await refresh(kit):                            # something new was said
        for receipt in kit.journal.receipts():
            print(line(summary(receipt)))
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from paris_node.journal import Journal, Receipt
from paris_node.kit import Kit
from paris_protocol.errors import ParisError

KEYS = "coordinator_keys"
POLICY = "policy."
_GONE = ("not-found", "unit.unknown")


async def refresh(kit: Kit) -> bool:
    """Ask after every contribution whose story is not over, and keep the answers; True if any."""
    news = False
    for receipt in kit.journal.receipts():
        if settled(receipt):
            continue
        try:
            answer = await kit.control.get(f"contributions/{receipt.contribution}")
            if receipt.body.get("merge") is not None and answer.items() <= receipt.body.items():
                continue  # merged, and not vested yet
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
            news = True
    return news


def _tell(kit: Kit, before: Receipt, now: Receipt) -> None:
    for name in ("code", "merge"):
        if now.body.get(name) is not None and before.body.get(name) is None:
            extra = {"contribution": now.contribution, name: now.body[name]}
            kit.log.info("contribution.%s", "judged" if name == "code" else "merged", extra=extra)


def settled(receipt: Receipt) -> bool:
    """Whether nothing about a contribution can change any more: refused, vested or taken back."""
    body = receipt.body
    merged = body.get("merge") is not None and body.get("vested") is not False
    return body.get("accepted") is False or merged or body.get("outcome") == "revoked"


async def remember_keys(kit: Kit) -> None:
    """Keep the verified policy and its keys, for checks without a connection."""
    policy = await kit.control.policy()
    name = f"{POLICY}{policy.record.number}"
    if kit.journal.fact(name) is None:
        kit.journal.set_fact(name, policy.raw.decode())
    keys = known_keys(kit.journal) | {kit.genesis.root_key, *policy.record.coordinator_keys}
    if keys != known_keys(kit.journal):
        kit.journal.set_fact(KEYS, json.dumps(sorted(keys)))


def known_keys(journal: Journal) -> set[str]:
    """Every key of the network that a verified policy has named to this node."""
    return set(json.loads(journal.fact(KEYS) or "[]"))


def replayed(verdict: Any) -> dict[str, str]:
    """The numbers of layer L4 in a verdict's envelope; empty without a replay."""
    try:
        payload = json.loads(base64.b64decode(verdict["payload"]))
        layers = {one["layer"]: one for one in payload["predicate"]["layers"]}
        return {str(name): str(value) for name, value in layers["L4"]["numbers"]}
    except (TypeError, KeyError, ValueError):
        return {}


def summary(receipt: Receipt) -> dict[str, Any]:
    """What is known of a contribution without proving it."""
    body = receipt.body
    names = ("expert", "round", "unit", "accepted", "code", "merge", "log_index")
    facts = {name: body.get(name) for name in names}
    facts |= {"replay": replayed(body.get("verdict")), "vested": body.get("vested")}
    facts["revoked"] = body.get("outcome") == "revoked"
    return {"contribution": receipt.contribution, "state": receipt.state, **facts}


def line(row: dict[str, Any]) -> str:
    """A summary (with the result of its check, if it was made) as one line of text."""
    if row["accepted"] is None:
        text = row["state"]
    else:
        text = "accepted" if row["accepted"] else f"refused ({row['code']})"
    if row["replay"]:
        text += f", {told(row['replay'])}"
    if row["merge"] is not None:
        text += f", merged in {row['merge'][:12]}"
    if row["revoked"]:
        text += ", taken back with its key"
    elif row["vested"] is not None:
        text += ", vested" if row["vested"] else ", not vested yet"
    if "proof" in row:
        sound = "message" not in row["proof"]
        text += ", proof holds" if sound else f", PROOF FAILS: {row['proof']['message']}"
    where = f"expert {row['expert']} round {row['round']}" if row["expert"] is not None else ""
    return f"{row['contribution'][:12]}  {where:18}  {text}"


def told(numbers: Mapping[str, str]) -> str:
    """What a replay found, in words."""
    count = numbers.get("segments", "0")
    if count == "0":
        return "audit proved nothing"
    text = f"audited: {count} segment{'' if count == '1' else 's'}"
    if numbers.get("exact") == "1":
        return f"{text}, equal bits" if float(numbers.get("rho", "0")) == 0 else f"{text}, others"
    return f"{text}, rho {numbers.get('rho', '?')} (limit {numbers.get('limit', '?')})"
