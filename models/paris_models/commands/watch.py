"""What the demo can see of a running network: the coordinator's public API and a node's status.

Nothing here is trusted further than a look at a clock is; facts of the report come from the log::

    coordinator = Coordinator(port, network)
    coordinator.answers() and not coordinator.finished()
    NodeView(state).training()
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from paris_models.commands.fleet import resolve
from paris_protocol.envelope import unseal
from paris_protocol.records import Index


@dataclass(frozen=True)
class Coordinator:
    """A coordinator on this machine's loopback address."""

    port: int
    network: str

    def get(self, path: str) -> bytes | None:
        """The body of a page, or None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                body: bytes = answer.read()
                return body
        except (OSError, HTTPException):
            return None

    def answers(self) -> bool:
        """Whether it serves."""
        return self.get("/healthz") is not None

    def index(self) -> Index | None:
        """The signed index."""
        raw = self.get("/v1/index")
        return None if raw is None else unseal(raw, Index, self.network, None).record

    def finished(self) -> bool:
        """Whether all rounds are merged and the release stands."""
        index = self.index()
        return index is not None and index.finished and index.release is not None

    def merges(self) -> int:
        """Published merges so far, over all experts."""
        index = self.index()
        return 0 if index is None else sum(head.round for head in index.heads)


@dataclass(frozen=True)
class NodeView:
    """A node by its state folder, asked through its own command."""

    state: Path

    def status(self) -> dict[str, Any]:
        """`paris-node status --json`; {} when it has nothing to say."""
        command = resolve(["paris-node", "status", "--json", "--state", str(self.state)])
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            found: dict[str, Any] = json.loads(run.stdout)
        except (subprocess.TimeoutExpired, json.JSONDecodeError):
            return {}
        return found

    def training(self) -> bool:
        """Whether it is in the middle of a unit."""
        found = self.status()
        step, steps = int(found.get("step") or 0), int(found.get("steps") or 0)
        return found.get("state") == "training" and 0 < step < steps
