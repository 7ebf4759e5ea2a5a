"""The vectors of audits, cosignatures and rotations, which `make.py` writes with the others.

A value that stands for a name is `seed(name)`; everything here is made from such seeds::

    json.dumps(audits())
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from paris_protocol import audit, log, witness
from paris_protocol.keys import PrivateKey, rotation_text
from paris_protocol.records import AuditRules, Draw


def seed(name: str) -> bytes:
    """32 bytes that stand for a name."""
    return hashlib.sha256(f"paris/vector/{name}".encode()).digest()


def audits() -> dict[str, Any]:
    """A hash chain, and draws from it."""
    start, length = seed("chain"), 16
    rules = AuditRules(
        chain=audit.chain_head(start, length), chain_length=length, segments=2, rate="10",
        floor="0.05", probation=10, probation_weight="0.25", vesting=20, answer_within=3600,
        retry_within=3600, auditors=0, canary="0.01",
    )  # fmt: skip
    draws = []
    for number, segments, standing in (
        (0, 10, 0),
        (1, 1, 3),
        (2, 100, 40),
        (3, 100, 199),
        (9, 7, 5),
    ):
        draw = audit.make_draw(
            rules, segments, number=number, size=number + 5, root=seed(f"root {number}").hex(),
            secret=audit.chain_value(start, length, number), standing=standing,
        )  # fmt: skip
        draws.append({"segments": segments, "draw": draw.model_dump(mode="json")})
    nodes = [PrivateKey.from_seed(seed(f"auditor {i}")).id for i in range(5)]
    drawn = audit.draw_auditors(Draw.model_validate_json(json.dumps(draws[0]["draw"])), nodes, 3)
    return {
        "rules": rules.model_dump(mode="json"),
        "chain": [audit.chain_value(start, length, number) for number in range(length)],
        "draws": draws,
        "auditors": {"of_draw": 0, "nodes": nodes, "drawn": list(drawn)},
    }


def cosigned() -> dict[str, Any]:
    """A witness' line below a checkpoint, and a node's consent to a new key."""
    key, network = PrivateKey.from_seed(seed("witness")), seed("network").hex()
    name = log.origin(network)
    note = log.Checkpoint(name, 5, seed("root")).sign(PrivateKey.from_seed(seed("coordinator")))
    old, new = (PrivateKey.from_seed(seed(name)) for name in ("node", "other"))
    text = rotation_text(network, old.id, new.id, 1_700_000_000)
    return {
        "note": note,
        "key": witness.cosigner_key("witness.example/w1", key.id),
        "seed": key.seed.hex(),
        "time": 1_700_000_000,
        "line": witness.cosign(note, "witness.example/w1", key, 1_700_000_000),
        "rotation": {"text": text.decode(), "consent": new.sign(text).hex()},
    }
