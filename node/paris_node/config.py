"""`node.toml`: what the owner chose when joining, and the numbers that pace a node.

The file is small, written once by `join` and meant to be edited. Refused with `state.corrupt`:
unknown names, values of another type, training plans that there are not::

    network = "paris://train.example.org:443/3f…"
    name = "kitchen"
    swarm = true
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from paris_models.plans import PLANS
from paris_protocol.errors import ParisError
from paris_protocol.invite import Invite, check_url, parse_network
from paris_protocol.net.store import write_atomic

FILE: Final = "node.toml"
AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class Settings:
    """The fields of node.toml; times in seconds."""

    network: str
    """The invite; its id pins the network."""
    name: str = ""
    """Shown on the coordinator's pages; empty for none. It can be erased there, unlike the key."""
    swarm: bool = True
    """Exchange pieces with other volunteers, who then see this machine's address."""
    listen: tuple[str, ...] = ()
    """Multiaddresses for peers to connect to; empty means any interface, any port."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    plan: str = AUTO
    """Training plan: `auto` takes the best that fits, a name of docs/plans.md that one alone."""
    retry: float = 15.0
    retry_cap: float = 60.0
    beat: float = 120.0
    save_every: float = 240.0
    save_grace: float = 5.0
    """How long a save may take at a pause before the trainer is ended without it."""
    quota_mb: int = 0
    """Limit of the blob store; 0 leaves it to the free disk."""
    states_mb: int = 2048
    """Disk for states that an audit may ask for; what is not kept is trained again when it does."""

    @property
    def invite(self) -> Invite:
        """The invite, parsed; `network.invite` when somebody broke it."""
        invite = parse_network(self.network)
        if not isinstance(invite, Invite):
            raise ParisError("network.invite", self.network[:80])
        check_url(invite.url)
        return invite

    def save(self, folder: Path) -> None:
        """Write node.toml, whole or not at all."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in asdict(self).items()]
        write_atomic(folder / FILE, ("\n".join(lines) + "\n").encode(), 0o600)


def load_settings(folder: Path) -> Settings:
    """Read node.toml of a state folder; `state.missing` without one."""
    path = folder / FILE
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ParisError("state.missing", str(folder)) from error
    except (ValueError, OSError) as error:
        raise ParisError("state.corrupt", f"{FILE}: {error}") from error
    settings = {key: _checked(key, value) for key, value in values.items()}
    if "network" not in settings:
        raise ParisError("state.corrupt", f"{FILE} names no network")
    return Settings(**settings)


def _checked(key: str, value: Any) -> Any:
    """A value of node.toml in the type of its field; `state.corrupt` if it has another."""
    kinds = {field.name: field.type for field in fields(Settings)}
    if key not in kinds:
        raise ParisError("state.corrupt", f"{FILE} has an unknown field {key[:40]!r}")
    kind = str(kinds[key])
    if kind == "float" and type(value) in (int, float):
        return float(value)
    if kind.startswith("tuple") and isinstance(value, list):
        return tuple(str(one) for one in value)
    if key == "plan" and value not in (AUTO, *PLANS):
        names = ", ".join((AUTO, *PLANS))
        raise ParisError("state.corrupt", f"{FILE}: there is no plan {str(value)[:40]!r}: {names}")
    if type(value).__name__ != kind:
        raise ParisError("state.corrupt", f"{FILE}: {key} has the wrong type")
    return value


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts of the command line as fields; `usage` for what node.toml does not know."""
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except ValueError:
            parsed = value
        if not equals or key == "network":
            raise ParisError("usage", f"--set {text[:80]}")
        try:
            changes[key] = _checked(key, parsed)
        except ParisError as error:
            raise ParisError("usage", error.detail) from error
    return changes


def default_state() -> Path:
    """Where the state stands unless --state says otherwise: ~/.local/share/paris/node."""
    return Path.home() / ".local" / "share" / "paris" / "node"
