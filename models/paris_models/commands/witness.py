"""`paris witness`: follow a network's log, check that it only grows, and cosign what was checked.

A witness keeps the last checkpoint that it believed and refuses every log that does not continue
it; its cosignature (C2SP cosignature/v1) says so, with the time. The coordinator gets it, and
`--out` writes the cosigned checkpoint for whoever wants to serve it. A split view or a rollback
ends the command with both checkpoints kept as evidence::

    run_witness("paris://train.example.org/3f…", Path("witness.key"), Path("state"), once=True)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from paris_protocol.errors import REASONS, ParisError
from paris_protocol.invite import Invite, parse_network
from paris_protocol.keys import PrivateKey, load_key, save_key
from paris_protocol.log import MAX_NOTE, origin
from paris_protocol.net.logs import CHECKPOINT, LogMemory, LogPlace, follow
from paris_protocol.net.store import write_atomic
from paris_protocol.witness import cosign, cosigner_key, without_cosignatures, witness_name

EVERY: Final = 10.0
"""Seconds between two looks at the log."""
AGAIN: Final = 300
"""Seconds after which a checkpoint that did not change is cosigned anew, with the new time."""
TIMEOUT: Final = 30.0
_PASSING: Final = frozenset({"network.down", "log.stale", "log.witness", "not-found"})
"""What may be over at the next look."""


def run_witness(
    log: str,
    key_file: Path,
    state: Path,
    *,
    network: str | None = None,
    name: str | None = None,
    out: Path | None = None,
    once: bool = False,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Follows and cosigns until it is stopped, or once; the facts of the last cosignature.

    `log` is an invite, the address of a log's files or a folder with them; `network` its id, which
    an invite names and a folder's checkpoint claims. Raises the `log.*` code of what is wrong.
    """
    place, network, desk = _where(log, network)
    if not key_file.exists():
        save_key(key_file, PrivateKey.generate())
    witness = Witness(place, network, load_key(key_file), LogMemory(state), name, desk)
    tell(f"witness {witness.key.id} {cosigner_key(witness.name, witness.key.id)}")
    while True:
        try:
            facts = witness.look(int(time.time()))
            if facts is not None:
                tell(f"cosigned {facts['size']} statements, {facts['root']}")
                if out is not None:
                    write_atomic(out, witness.note.encode())
                _tell_coordinator(witness, tell)
        except ParisError as error:
            if once or error.code not in _PASSING:
                raise
            tell(f"{error.sentence} [{error.code}]")
        if once:
            return facts or {}
        time.sleep(EVERY)


def _tell_coordinator(witness: Witness, tell: Callable[[str], None]) -> None:
    """Whom the policy does not name may witness all the same: it is only not handed on."""
    try:
        witness.hand_in()
    except ParisError as error:
        if error.code != "log.witness":
            raise
        tell(f"{error.sentence} [{error.code}]")


class Witness:
    """One witness of one log; `desk` is the coordinator's address, if there is one to tell."""

    def __init__(
        self,
        place: LogPlace,
        network: str,
        key: PrivateKey,
        memory: LogMemory,
        name: str | None = None,
        desk: str | None = None,
    ) -> None:
        self.place, self.network, self.key, self.memory = place, network, key, memory
        self.name, self.desk = name or witness_name(key.id), desk
        if self.name == origin(network) or any(c in self.name for c in "+ \n\t"):
            raise ParisError("usage", f"{self.name} is no name for a witness")
        self.note = ""
        self._cosigned = (0, 0)

    def look(self, now: int) -> dict[str, Any] | None:
        """Checks the log and cosigns what is new; None if nothing is. `now` in unix seconds.

        The checkpoint is remembered durably before it is signed.
        """
        found = follow(self.place, self.network, self.memory, now)
        size, at = self._cosigned
        if found.checkpoint.size == size and now - at < AGAIN:
            return None
        bare = without_cosignatures(found.note, ())
        self.note = bare + cosign(bare, self.name, self.key, now)
        self._cosigned = (found.checkpoint.size, now)
        return {
            "network": self.network,
            "witness": self.key.id,
            "name": self.name,
            "size": found.checkpoint.size,
            "root": found.checkpoint.root.hex(),
            "at": now,
        }

    def hand_in(self) -> None:
        """Gives the coordinator the cosigned checkpoint; after a refusal the next look is anew."""
        if self.desk is not None:
            try:
                _hand_in(self.desk, self.note)
            except ParisError:
                self._cosigned = (0, 0)
                raise


def _where(log: str, network: str | None) -> tuple[LogPlace, str, str | None]:
    """Where the log is, which network it should be of, and who takes the cosignatures."""
    if log.startswith("paris://"):
        invite = parse_network(log)
        if not isinstance(invite, Invite) or network not in (None, invite.network):
            raise ParisError("network.invite", log)
        return LogPlace(f"{invite.url}/log"), invite.network, invite.url
    place = LogPlace(log)
    if network is None:
        first = place.read(CHECKPOINT, MAX_NOTE).decode("utf-8", "replace").partition("\n")[0]
        network = first.rpartition("/")[2]
        if first != origin(network):
            raise ParisError("log.checkpoint", "its first line names no network")
    web = log.lower().startswith(("http://", "https://")) and log.rstrip("/").endswith("/log")
    return place, network, log.rstrip("/").removesuffix("/log") if web else None


def _hand_in(desk: str, note: str) -> None:
    """Gives the cosigned checkpoint to the coordinator; its refusal is raised here."""
    url = f"{desk}/v1/cosignatures"
    request = Request(url, data=note.encode(), method="POST")  # noqa: S310 - https, or loopback
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
            answer.read(1 << 16)
    except HTTPError as error:
        try:
            value = json.loads(error.read(1 << 16))
            code, detail = str(value["code"]), str(value["message"])[:300]
        except (ValueError, KeyError, TypeError):
            code, detail = "network.down", f"{url}: {error.code}"
        raise ParisError(code if code in REASONS else "network.not-paris", detail) from error
    except (URLError, HTTPException, OSError) as error:
        raise ParisError("network.down", f"{url}: {error}") from error
