"""A coordinator inside one process, for tests of whatever talks to one.

It verifies nothing of what is posted: `handlers` decide. Faults on request: while `down` is true,
every call is `network.down`::

    control = MemoryControl(genesis.raw, [policy.raw], index.raw)
    control.handlers["register"] = lambda raw: {"ok": True}
    ref = control.add_blob(b"some bytes")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from paris_protocol.blobs import Manifest
from paris_protocol.envelope import Sealed, open_genesis, statement_id, unseal
from paris_protocol.errors import ParisError
from paris_protocol.net.control import READ
from paris_protocol.records import BlobRef, Genesis, Index, Policy


class MemoryControl:
    """The double of `HttpControl`: genesis, policies (oldest first), index, blobs."""

    def __init__(
        self,
        genesis: bytes,
        policies: Iterable[bytes] = (),
        index: bytes = b"",
        expect: str | None = None,
    ) -> None:
        self.genesis = genesis
        self.policies = list(policies)
        self.index_raw = index
        self.network = expect if expect is not None else open_genesis(genesis).id
        self.down = False
        self.received = 0
        self.sent = 0
        self.asked: list[str] = []
        self.wanted: set[str] = set()
        self.handlers: dict[str, Callable[[bytes], dict[str, Any]]] = {}
        self.objects: dict[str, dict[str, Any]] = {}
        self.statements = {statement_id(raw): raw for raw in (genesis, *self.policies)}
        self._manifests: dict[str, Manifest] = {}
        self._pieces: dict[tuple[str, int], bytes] = {}

    # ------------------------------------------------------------ the test's side

    def add_blob(self, data: bytes) -> BlobRef:
        """Let the coordinator have a blob."""
        manifest = Manifest.build([data])
        self._manifests[manifest.id] = manifest
        for i in range(len(manifest.pieces)):
            offset, length = manifest.piece_range(i)
            self._pieces[manifest.id, i] = data[offset : offset + length]
        return manifest.ref

    def want(self, ref: BlobRef) -> None:
        """Let an upload of this blob be taken."""
        self.wanted.add(ref.id)

    def missing(self, ref: BlobRef) -> list[int]:
        """Pieces that the coordinator lacks; all of them while it lacks the manifest."""
        manifest = self._manifests.get(ref.id)
        count = len(manifest.pieces) if manifest is not None else -(-ref.size // (4 << 20))
        return [i for i in range(count) if (ref.id, i) not in self._pieces]

    def size(self, blob_id: str) -> int:
        """Bytes of a blob whose manifest is here."""
        return self._manifest(blob_id).size

    def blob(self, blob_id: str) -> bytes:
        """All bytes of a blob that is whole here."""
        count = len(self._manifest(blob_id).pieces)
        return b"".join(self._pieces[blob_id, i] for i in range(count))

    # ------------------------------------------------------------ the node's side

    async def hello(self) -> Sealed[Genesis]:
        """See `Control`."""
        self._call("genesis")
        return open_genesis(self.genesis, self.network)

    async def policy(self) -> Sealed[Policy]:
        """See `Control`."""
        self._call("policy")
        if not self.policies:
            raise ParisError("not-found", "policy")
        return unseal(self.policies[-1], Policy, self.network, None)

    async def index(self) -> Sealed[Index]:
        """See `Control`."""
        self._call("index")
        if not self.index_raw:
            raise ParisError("not-found", "index")
        keys = unseal(self.policies[-1], Policy, self.network, None).record.coordinator_keys
        return unseal(self.index_raw, Index, self.network, keys)

    async def statement(self, statement: str) -> bytes:
        """See `Control`."""
        self._call(f"statements/{statement}")
        if statement not in self.statements:
            raise ParisError("not-found", f"statement {statement[:12]}")
        return self.statements[statement]

    async def get(self, path: str) -> dict[str, Any]:
        """See `Control`."""
        self._call(path)
        if path not in self.objects:
            raise ParisError("not-found", path)
        return self.objects[path]

    async def post(self, verb: str, raw: bytes) -> dict[str, Any]:
        """See `Control`."""
        self._call(verb)
        if verb not in self.handlers:
            raise ParisError("not-found", verb)
        return self.handlers[verb](raw)

    async def manifest(self, ref: BlobRef) -> bytes:
        """See `Control`."""
        self._call(f"manifest {ref.id}")
        return Manifest.parse(self._manifest(ref.id).raw, ref).raw

    async def piece(self, ref: BlobRef, i: int, timeout: float = READ) -> bytes:
        """See `Control`."""
        self._call(f"piece {ref.id} {i}")
        if (ref.id, i) not in self._pieces:
            raise ParisError("blob.missing", f"piece {i} of {ref.id[:12]}")
        return self._pieces[ref.id, i]

    async def put_manifest(self, ref: BlobRef, raw: bytes) -> dict[str, Any]:
        """See `Control`."""
        self._call(f"put manifest {ref.id}")
        self._check_wanted(ref)
        self._manifests[ref.id] = Manifest.parse(raw, ref)
        return {"missing": len(self.missing(ref))}

    async def put_piece(self, ref: BlobRef, i: int, data: bytes) -> int:
        """See `Control`."""
        self._call(f"put piece {ref.id} {i}")
        self._check_wanted(ref)
        manifest = self._manifest(ref.id)
        if not 0 <= i < len(manifest.pieces):
            raise ParisError("blob.corrupt", f"there is no piece {i} of {ref.id[:12]}")
        manifest.check_piece(i, data)
        self._pieces[ref.id, i] = bytes(data)
        return len(self.missing(ref))

    async def close(self) -> None:
        """See `Control`."""

    def _call(self, what: str) -> None:
        self.asked.append(what)
        if self.down:
            raise ParisError("network.down", "switched off")

    def _manifest(self, blob_id: str) -> Manifest:
        if blob_id not in self._manifests:
            raise ParisError("blob.missing", f"manifest of {blob_id[:12]}")
        return self._manifests[blob_id]

    def _check_wanted(self, ref: BlobRef) -> None:
        if ref.id not in self.wanted:
            raise ParisError("blob.missing", f"nobody asked for {ref.id[:12]}")
