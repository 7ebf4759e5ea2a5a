"""Where a network is and which one is meant: `paris://HOST[:PORT]/ID`, or the path of a genesis.

The id pins the network, so whoever answers at the address cannot put another one in its place.
Refused: bare web addresses (`network.bare-url`), malformed invites (`network.invite`), and plain
http to any host but this machine's loopback (`network.plain-http`)::

    invite = parse_network("paris://train.example.org/" + "0" * 64)
    assert isinstance(invite, Invite) and invite.url == "https://train.example.org:443"
    assert parse_network("state/genesis.json") == "state/genesis.json"
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

from paris_protocol.errors import ParisError

DEFAULT_PORT: Final = 443
_INVITE: Final = re.compile(
    r"paris://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9][A-Za-z0-9.\-]{0,252})(?::([1-9][0-9]{0,4}))?"
    r"/([0-9a-f]{64})",
    re.ASCII,
)


def is_loopback(host: str) -> bool:
    """Whether a host (name or address, IPv6 with or without brackets) is this machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Invite:
    """Host (IPv6 without brackets), port, network id, and how to speak to the coordinator."""

    host: str
    port: int
    network: str
    scheme: Literal["http", "https"]

    @property
    def url(self) -> str:
        """The coordinator's address, without a slash at the end."""
        return f"{self.scheme}://{self._host}:{self.port}"

    def __str__(self) -> str:
        return f"paris://{self._host}:{self.port}/{self.network}"

    @property
    def _host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def make_invite(host: str, port: int, network: str) -> Invite:
    """The invite to a network; https unless the host is loopback."""
    bare = host.strip("[]")
    text = f"paris://{f'[{bare}]' if ':' in bare else bare}:{port}/{network}"
    made = parse_network(text)
    if not isinstance(made, Invite):
        raise ParisError("network.invite", text[:120])
    return made


def parse_network(text: str) -> Invite | str:
    """What NETWORK on a command line means: an `Invite`, or else the path of a genesis file."""
    if re.match(r"https?://", text, re.IGNORECASE):
        raise ParisError("network.bare-url", text[:120])
    if not text.lower().startswith("paris:"):
        if not text or "\0" in text:
            raise ParisError("network.invite", "nothing was named")
        return text
    match = _INVITE.fullmatch(text)
    if match is None:
        raise ParisError("network.invite", text[:120])
    host = match[1].strip("[]")
    port = int(match[2] or DEFAULT_PORT)
    if port > 65535 or (":" in host and not _is_address(host)):
        raise ParisError("network.invite", text[:120])
    return Invite(host, port, match[3], "http" if is_loopback(host) else "https")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_url(url: str) -> str:
    """A coordinator's address as a policy or an operator gives it; https, or http on loopback."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ParisError("network.invite", url[:120]) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ParisError("network.invite", url[:120])
    if parts.username or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise ParisError("network.invite", url[:120])
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ParisError("network.plain-http", url[:120])
    return url.rstrip("/")
