"""The operator's orders to a running coordinator: signed files in the state folder.

Whoever gives an order needs the operator's key. An order is taken once; one that is not signed by
the key is thrown away and changes nothing::

    give_order(state, key, "lift", node, now)
    take_orders(state, key)      # [("lift", node)]
"""

from __future__ import annotations

import json
from typing import Literal

from paris_coordinator.config import State
from paris_protocol.canonical import canonical, sha256_hex
from paris_protocol.keys import PrivateKey, verify
from paris_protocol.net.store import write_atomic

OrderName = Literal["release", "lift"]


def _signed_text(network: str, order: str, subject: str, at: int) -> bytes:
    return canonical(["paris/order/1", network, order, subject, at])


def give_order(state: State, key: PrivateKey, order: OrderName, subject: str, at: int) -> None:
    """Leaves an order for the coordinator, which takes it within a second or when it starts."""
    text = _signed_text(state.settings().network, order, subject, at)
    value = {"order": order, "subject": subject, "at": at, "signature": key.sign(text).hex()}
    write_atomic(state.orders / f"{at}-{sha256_hex(text)[:16]}.json", canonical(value), 0o600)


def take_orders(state: State, key: PrivateKey) -> list[tuple[OrderName, str]]:
    """All orders that wait, oldest first; their files are gone afterwards."""
    found: list[tuple[OrderName, str]] = []
    for path in sorted(state.orders.glob("*.json")):
        try:
            value = json.loads(path.read_bytes())
            order, subject, at = value["order"], value["subject"], value["at"]
            text = _signed_text(state.settings().network, order, subject, at)
            signed = verify(key.id, bytes.fromhex(value["signature"]), text)
        except (ValueError, KeyError, TypeError):
            signed = False
        path.unlink(missing_ok=True)
        if signed and order in ("release", "lift"):
            found.append((order, subject))
    return found
