"""The witness's command where the coordinator answers badly; the rest is in `coordinator`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from paris_models.commands import witness
from paris_models.commands.witness import _PASSING, _hand_in
from paris_protocol.errors import ParisError


@pytest.fixture
def babbler() -> Iterator[str]:
    """The address of a server that answers one request with what is no HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"what was the question?\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(5)


def test_an_answer_that_is_no_http_may_be_better_at_the_next_look(babbler: str) -> None:
    with pytest.raises(ParisError) as refused:
        _hand_in(babbler, "a note")
    assert refused.value.code == "network.down" and refused.value.code in _PASSING


@pytest.mark.parametrize(("code", "raised"), [("log.witness", False), ("network.down", True)])
def test_only_an_unnamed_witness_ends_well_without_being_heard(code: str, raised: bool) -> None:
    class Refused(witness.Witness):
        def __init__(self) -> None: ...

        def hand_in(self) -> None:
            raise ParisError(code)

    told: list[str] = []
    if raised:
        with pytest.raises(ParisError):
            witness._tell_coordinator(Refused(), told.append)
    else:
        witness._tell_coordinator(Refused(), told.append)
    assert bool(told) is not raised
