"""What a key's revocation would take back, before anybody orders it: `revoke --dry-run`.

Only read, never written. A key that never registered is refused (`not-found`)::

    consequences(Path("state"), "ed25519:…")["contributions"]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paris_coordinator.config import State
from paris_coordinator.reading import open_desk
from paris_protocol.errors import ParisError
from paris_protocol.keys import public_key

Json = dict[str, Any]


def consequences(folder: Path, node: str) -> Json:
    """Contributions that would leave with their merges, heads that would change, open work."""
    public_key(node)
    desk = open_desk(State(folder))
    if node not in desk.nodes:
        raise ParisError("not-found", f"node {node[:24]}")
    works = [desk.work_of(contribution) for contribution in desk.unvested(node)]
    return {
        "node": node,
        "revoked": desk.nodes[node].revoked,
        "standing": desk.nodes[node].standing,
        "contributions": [
            {
                "contribution": work.contribution,
                "expert": work.record.expert,
                "round": work.record.round,
                "merge": work.merge,
                **_scalars(desk.merges[work.merge or ""], work.contribution),
            }
            for work in works
        ],
        "heads": [
            {"expert": index, "head": desk.experts[index].head.weights.root}
            for index in sorted({work.record.expert for work in works})
        ],
        "open": [
            id
            for id in desk.nodes[node].works
            if desk.works[id].state in ("open", "uploading", "queued", "auditing", "accepted")
        ],
        "vested": [
            desk.works[id].contribution
            for id in desk.nodes[node].works
            if desk.works[id].state == "merged" and desk.works[id] not in works
        ],
    }


def _scalars(merge: Any, contribution: str | None) -> Json:
    part = next(part for part in merge.inputs if part.contribution == contribution)
    return {"weight": float.fromhex(part.weight), "scale": float.fromhex(part.scale)}


def consequences_text(facts: Json) -> str:
    """The same for people."""
    lines = [f"node {facts['node']}, {facts['standing']} replay-verified contributions in a row"]
    if facts["revoked"]:
        lines.append(f"revoked already by {facts['revoked']}")
    for one in facts["contributions"]:
        lines.append(
            f"leaves   {one['contribution'][:16]}  expert {one['expert']}, round {one['round']}, "
            f"weight {one['weight']:.4g} in merge {one['merge'][:16]}"
        )
    lines += [
        f"changes  head {one['head'][:16]} of expert {one['expert']}" for one in facts["heads"]
    ]
    lines += [f"closes   assignment {id[:16]}" for id in facts["open"]]
    lines.append(f"stays    {len(facts['vested'])} merged contributions that have vested")
    return "\n".join(lines)
