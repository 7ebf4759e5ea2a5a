"""The operator's orders to a running coordinator: signed files in the state folder.

Whoever gives an order needs the operator's key. An order is taken once; one that is not signed by
the key is thrown away and changes nothing::

    give_order(state, key, Order("revoke", node, "stolen"), now)
    take_orders(state, key)      # [Order("revoke", node, "stolen")]
"""

from __future__ import annotations

import json
from typing import Final, Literal, NamedTuple, get_args

from paris_coordinator.config import State
from paris_protocol.canonical import canonical, sha256_hex
from paris_protocol.keys import PrivateKey, verify
from paris_protocol.net.store import write_atomic

OrderName = Literal["release", "lift", "revoke", "withdraw"]
NAMES: Final = get_args(OrderName)


class Order(NamedTuple):
    """What is to be done, to which node or clip (none for a release), and why."""

    order: OrderName
    subject: str = ""
    reason: str = ""


def _signed_text(network: str, order: Order, at: int) -> bytes:
    return canonical(["paris/order/2", network, *order, at])


def give_order(state: State, key: PrivateKey, order: Order, at: int) -> None:
    """Leaves an order for the coordinator, which takes it within a second or when it starts."""
    text = _signed_text(state.settings().network, order, at)
    value = {**order._asdict(), "at": at, "signature": key.sign(text).hex()}
    write_atomic(state.orders / f"{at}-{sha256_hex(text)[:16]}.json", canonical(value), 0o600)


def take_orders(state: State, key: PrivateKey) -> list[Order]:
    """All orders that wait, oldest first; their files are gone afterwards."""
    found: list[Order] = []
    for path in sorted(state.orders.glob("*.json")):
        try:
            value = json.loads(path.read_bytes())
            order = Order(value["order"], value["subject"], value["reason"])
            text = _signed_text(state.settings().network, order, value["at"])
            good = verify(key.id, bytes.fromhex(value["signature"]), text)
        except (ValueError, KeyError, TypeError):
            good = False
        path.unlink(missing_ok=True)
        if good and order.order in NAMES:
            found.append(order)
    return found
