"""What NETWORK on a command line may be."""

from __future__ import annotations

import pytest

from paris_protocol.errors import ParisError
from paris_protocol.invite import Invite, check_url, make_invite, parse_network

ID = "ab" * 32


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("example.org", "https://example.org:443"),
        ("example.org:8443", "https://example.org:8443"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost:80", "http://localhost:80"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[2001:db8::1]", "https://[2001:db8::1]:443"),
        ("127.0.0.1.example.org", "https://127.0.0.1.example.org:443"),
    ],
)
def test_invites(host: str, url: str) -> None:
    invite = parse_network(f"paris://{host}/{ID}")
    assert isinstance(invite, Invite)
    assert (invite.url, invite.network) == (url, ID)
    assert parse_network(str(invite)) == invite
    assert make_invite(invite.host, invite.port, ID) == invite


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("https://example.org", "network.bare-url"),
        ("HTTP://example.org/" + ID, "network.bare-url"),
        ("", "network.invite"),
        ("paris://example.org", "network.invite"),
        ("paris:example.org/" + ID, "network.invite"),
        (f"PARIS://example.org/{ID}", "network.invite"),
        (f"paris://example.org/{ID}/", "network.invite"),
        (f"paris://example.org/{ID}\n", "network.invite"),
        (f"paris://example.org/{ID[:-1]}", "network.invite"),
        (f"paris://example.org/{ID.upper()}", "network.invite"),
        (f"paris://example.org:0/{ID}", "network.invite"),
        (f"paris://example.org:65536/{ID}", "network.invite"),
        (f"paris://user@example.org/{ID}", "network.invite"),
        (f"paris://[::zz]/{ID}", "network.invite"),
        (f"paris://example.org/x/{ID}", "network.invite"),
    ],
)
def test_what_is_no_invite_is_refused(text: str, code: str) -> None:
    with pytest.raises(ParisError) as caught:
        parse_network(text)
    assert caught.value.code == code


@pytest.mark.parametrize("path", ["genesis.json", "/a/b", "example.org", "C:\\x"])
def test_anything_else_is_a_path(path: str) -> None:
    assert parse_network(path) == path


def test_addresses() -> None:
    assert check_url("https://example.org/") == "https://example.org"
    assert check_url("http://[::1]:8") == "http://[::1]:8"
    for url, code in (
        ("http://example.org", "network.plain-http"),
        ("ftp://example.org", "network.invite"),
        ("https://", "network.invite"),
        ("https://a@example.org", "network.invite"),
        ("https://example.org/x", "network.invite"),
        ("https://example.org:99999", "network.invite"),
    ):
        with pytest.raises(ParisError) as caught:
            check_url(url)
        assert caught.value.code == code
