"""The control plane as a volunteer sees it: HTTPS to the coordinator, outbound only.

`Control` is the interface, `HttpControl` the real client, `memory.MemoryControl` its double. Every
refusal of the coordinator becomes the same `ParisError` here, with its `retry_after`. Refused:
plain http beyond loopback, redirects and HTML (`network.not-paris`), answers larger than their type
allows, a clock that is more than five minutes off (`network.clock`). Nothing is retried here: the
caller knows what waiting costs::

    async with HttpControl(invite.url, invite.network) as control:
        genesis = await control.hello()
        await control.post("register", sealed.raw)
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp

from paris_protocol.authority import check_next
from paris_protocol.blobs import PIECE, Manifest, manifest_limit
from paris_protocol.envelope import KINDS, Sealed, open_genesis, statement_id, unseal
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.invite import check_url, is_loopback
from paris_protocol.records import BlobRef, Genesis, Index, Policy

CLOCK_LIMIT: Final = 300.0
"""Seconds that the two clocks may differ."""
READ: Final = 20.0
"""Longest silence in seconds while an answer is awaited or read."""
LEAST_RATE: Final = 16 << 10
"""Bytes per second below which a transfer counts as stalled."""
_JSON_LIMIT: Final = 8 << 20
_STATEMENT_LIMIT: Final = 2 * max(kind.MAX_BYTES for kind in KINDS.values())
_GATEWAY: Final = frozenset({502, 503, 504})
T = TypeVar("T")


class Control(Protocol):
    """What a node asks of the coordinator; counts the bytes of bodies in and out."""

    received: int
    sent: int

    async def hello(self) -> Sealed[Genesis]:
        """The genesis of the network, verified; checks the clock."""

    async def policy(self) -> Sealed[Policy]:
        """The current policy, verified by its chain back to the root key."""

    async def index(self) -> Sealed[Index]:
        """The signed index, verified against the current policy's keys; checks the clock."""

    async def statement(self, statement: str) -> bytes:
        """The envelope of a statement by its id; the caller unseals it."""

    async def get(self, path: str) -> dict[str, Any]:
        """A JSON object, such as `contributions/<id>` or `receipts/<id>`."""

    async def post(self, verb: str, raw: bytes) -> dict[str, Any]:
        """Hand in an envelope: register, lease, beat, commitments, contributions."""

    async def manifest(self, ref: BlobRef) -> bytes:
        """The manifest that `ref` names, verified."""

    async def piece(self, ref: BlobRef, i: int, timeout: float = READ) -> bytes:
        """The bytes of piece `i`, not verified yet; `timeout` is the longest silence."""

    async def put_manifest(self, ref: BlobRef, raw: bytes) -> dict[str, Any]:
        """Upload a manifest, so that pieces may follow."""

    async def put_piece(self, ref: BlobRef, i: int, data: bytes) -> int:
        """Upload a piece; returns how many are still missing there."""

    async def close(self) -> None:
        """Let go of connections; idempotent."""


def refusal(status: int, body: bytes, retry_after: float | None = None) -> ParisError:
    """The error that an answer with an error status means."""
    try:
        value = json.loads(body)
        code, message = value["code"], str(value["message"])
        after = value.get("retry_after")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if status in _GATEWAY:
            return ParisError("network.down", f"status {status}", retry_after=retry_after)
        if status == 429:
            return ParisError("network.rate", retry_after=retry_after)
        return ParisError("network.not-paris", f"status {status}")
    if not isinstance(code, str) or code not in REASONS:
        return ParisError("network.not-paris", f"{str(code)[:60]}: {message[:200]}")
    text = REASONS[code].text
    detail = message.removeprefix(text).strip().removeprefix("(").removesuffix(")")
    wait = float(after) if isinstance(after, int | float) and 0 <= after <= 86400 else retry_after
    return ParisError(code, detail[:500], retry_after=wait)


class HttpControl:
    """The coordinator over HTTP(S); `network` pins the id, None accepts what `hello` shows.

    `clock` gives unix seconds; `received` and `sent` count the bytes of bodies. Use it inside one
    event loop; `close` it, or use `async with`.
    """

    def __init__(
        self,
        url: str,
        network: str | None,
        *,
        clock: Callable[[], float] = time.time,  # noqa: TID251 - this is an edge
        read: float = READ,
    ) -> None:
        self.url = check_url(url)
        self.network = network
        self.clock = clock
        self.read = read
        self._genesis: Sealed[Genesis] | None = None
        self._policy: Sealed[Policy] | None = None
        self._session: aiohttp.ClientSession | None = None
        self.received = 0
        self.sent = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See `Control`."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # ------------------------------------------------------------ statements

    async def hello(self) -> Sealed[Genesis]:
        """See `Control`."""
        raw = await self._ask("GET", "/v1/genesis", limit=2 * Genesis.MAX_BYTES, clock=True)
        self._genesis = _opened(lambda: open_genesis(raw, self.network))
        self.network = self._genesis.id
        return self._genesis

    async def policy(self) -> Sealed[Policy]:
        """See `Control`."""
        genesis = self._genesis or await self.hello()
        root, before = genesis.record.root_key, self._policy
        chain = [await self._one_policy("/v1/policy", genesis.id)]
        while chain[-1].signer != root and (before is None or chain[-1].id != before.id):
            number, previous = chain[-1].record.number - 1, chain[-1].record.previous
            if number < 0 or previous is None:
                raise ParisError("record.signer", "no policy of the root key")
            chain.append(await self._one_policy(f"/v1/policy/{number}", genesis.id))
            if (chain[-1].record.number, chain[-1].id) != (number, previous):
                raise ParisError("record.signer", f"policy {number} is not the one that was named")
        for older, newer in zip(chain[1:], chain, strict=False):
            check_next(genesis, older, newer)
        if before is not None and chain[0].record.number < before.record.number:
            raise ParisError("record.signer", "an older policy than before is shown")
        self._policy = chain[0]
        return chain[0]

    async def index(self) -> Sealed[Index]:
        """See `Control`."""
        raw = await self._ask("GET", "/v1/index", limit=2 * Index.MAX_BYTES, clock=True)
        policy = self._policy or await self.policy()
        try:
            return self._unseal_index(raw, policy)
        except ParisError as error:
            if error.code != "record.signer":
                raise
        return self._unseal_index(raw, await self.policy())  # the keys may have changed

    async def statement(self, statement: str) -> bytes:
        """See `Control`."""
        raw = await self._ask("GET", f"/v1/statements/{statement}", limit=_STATEMENT_LIMIT)
        if _opened(lambda: statement_id(raw)) != statement:
            raise ParisError("blob.corrupt", f"statement {statement[:12]}")
        return raw

    async def get(self, path: str) -> dict[str, Any]:
        """See `Control`."""
        return _object(await self._ask("GET", f"/v1/{path}"))

    async def post(self, verb: str, raw: bytes) -> dict[str, Any]:
        """See `Control`."""
        return _object(await self._ask("POST", f"/v1/{verb}", raw))

    # ------------------------------------------------------------ blobs

    async def manifest(self, ref: BlobRef) -> bytes:
        """See `Control`."""
        path = f"/v1/blobs/{ref.id}/manifest"
        return Manifest.parse(await self._ask("GET", path, limit=manifest_limit(ref.size)), ref).raw

    async def piece(self, ref: BlobRef, i: int, timeout: float = READ) -> bytes:
        """See `Control`."""
        start = i * PIECE
        length = min(PIECE, ref.size - start)
        if i < 0 or length <= 0:
            raise ParisError("blob.missing", f"piece {i} of {ref.id[:12]}")
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        return await self._ask(
            "GET", f"/v1/blobs/{ref.id}", headers=headers, limit=length, read=timeout, window=start
        )

    async def put_manifest(self, ref: BlobRef, raw: bytes) -> dict[str, Any]:
        """See `Control`."""
        headers = {"X-Paris-Size": str(ref.size)}
        path = f"/v1/blobs/{ref.id}/manifest"
        return _object(await self._ask("PUT", path, raw, headers=headers))

    async def put_piece(self, ref: BlobRef, i: int, data: bytes) -> int:
        """See `Control`."""
        answer = _object(await self._ask("PUT", f"/v1/blobs/{ref.id}/pieces/{i}", data))
        missing = answer.get("missing")
        if not isinstance(missing, int):
            raise ParisError("network.not-paris", "an upload is answered by what is missing")
        return missing

    # ------------------------------------------------------------ inside

    async def _one_policy(self, path: str, network: str) -> Sealed[Policy]:
        raw = await self._ask("GET", path, limit=2 * Policy.MAX_BYTES)
        return _opened(lambda: unseal(raw, Policy, network, None))

    def _unseal_index(self, raw: bytes, policy: Sealed[Policy]) -> Sealed[Index]:
        assert self.network is not None
        return unseal(raw, Index, self.network, policy.record.coordinator_keys)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            host = urlsplit(self.url).hostname or ""
            # A proxy of the environment is for the way out, not for this machine itself.
            self._session = aiohttp.ClientSession(trust_env=not is_loopback(host))
        return self._session

    async def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        limit: int = _JSON_LIMIT,
        read: float | None = None,
        clock: bool = False,
        window: int | None = None,
    ) -> bytes:
        """One request; the body of a good answer, or the `ParisError` that the answer means."""
        silence = read if read is not None else self.read
        slowest = (limit + len(body or b"")) / LEAST_RATE
        timeout = aiohttp.ClientTimeout(
            total=silence + slowest, connect=min(10.0, silence), sock_read=silence
        )
        try:
            async with self._client().request(
                method,
                self.url + path,
                data=io.BytesIO(body) if body is not None else None,
                headers={"Accept": "application/json", **(headers or {})},
                timeout=timeout,
                allow_redirects=False,
            ) as answer:
                self.sent += len(body or b"")
                data = await self._read(answer, limit, clock, window)
                self.received += len(data)
                return data
        except aiohttp.ClientConnectorCertificateError as error:
            raise ParisError("network.not-paris", f"certificate of {self.url}") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
            raise ParisError("network.down", f"{self.url}: {_short(error)}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise ParisError("network.not-paris", f"{self.url}: {_short(error)}") from error

    async def _read(
        self, answer: aiohttp.ClientResponse, limit: int, clock: bool, window: int | None
    ) -> bytes:
        kind = answer.content_type
        ok = answer.status in (200, 206) if window is not None else answer.status == 200
        if not ok:
            after = answer.headers.get("Retry-After", "")
            wait = float(after) if after.isascii() and after.isdigit() else None
            raise refusal(answer.status, await _body(answer, 1 << 16, cut=True), wait)
        if kind == "text/html":
            raise ParisError("network.not-paris", f"{self.url} answers with a web page")
        if clock:
            self._check_clock(answer.headers.get("Date"))
        if window and answer.status == 200:  # no Range there: skip to the piece
            await _skip(answer, window)
        return await _body(answer, limit, cut=window is not None)

    def _check_clock(self, date: str | None) -> None:
        try:
            there = parsedate_to_datetime(date or "").timestamp()
        except (ValueError, TypeError):
            return
        ahead = self.clock() - there
        if abs(ahead) > CLOCK_LIMIT:
            side = "ahead of" if ahead > 0 else "behind"
            raise ParisError("network.clock", f"{abs(ahead):.0f} s {side} the coordinator")


def _opened(open_it: Callable[[], T]) -> T:
    """What is no envelope at all did not come from a coordinator."""
    try:
        return open_it()
    except ParisError as error:
        if error.code == "record.malformed":
            raise ParisError("network.not-paris", error.detail) from error
        raise


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ParisError("network.not-paris", "the answer is not JSON") from error
    if not isinstance(value, dict):
        raise ParisError("network.not-paris", "the answer is not a JSON object")
    return value


async def _body(answer: aiohttp.ClientResponse, limit: int, *, cut: bool) -> bytes:
    """Read at most `limit` bytes; beyond, stop there (`cut`) or refuse."""
    data = bytearray()
    async for chunk in answer.content.iter_any():
        data += chunk
        if len(data) > limit:
            if cut:
                return bytes(data[:limit])
            raise ParisError("blob.too-large", f"more than {limit} bytes from {answer.url.path}")
    return bytes(data)


async def _skip(answer: aiohttp.ClientResponse, count: int) -> None:
    while count > 0:
        chunk = await answer.content.read(min(count, 1 << 20))
        if not chunk:
            return
        count -= len(chunk)


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:200]
