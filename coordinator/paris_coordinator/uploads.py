"""Uploads: the blobs that open contributions and openings name, and nothing else.

Which blobs are awaited follows from the desk; pieces lie in the store. When the last one is here
the desk is told, so that a repeated request, a restart or two contributions that name the same
bytes all end in the same state. Blobs that nobody awaits are refused (`not-found`)::

    uploads.expect(contribution)
    await uploads.put_manifest(blob, size, raw); await uploads.put_piece(blob, 0, data)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from paris_coordinator.desk import Desk
from paris_coordinator.events import Fact, Opened, Uploaded
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import BlobRef

Json = dict[str, Any]
Tell = Callable[[Fact], Awaitable[None]]


class Uploads:
    """What is awaited, by blob; `desk` gives the desk of the moment."""

    def __init__(self, store: BlobStore, desk: Callable[[], Desk], tell: Tell) -> None:
        self._store, self._desk, self._tell = store, desk, tell
        self._named: dict[str, set[str]] = {}
        self.restart()

    def restart(self) -> None:
        """Reads off the desk what is awaited."""
        self._named.clear()
        for contribution in self._desk().contributions:
            self.expect(contribution)

    def expect(self, contribution: str) -> None:
        """Takes the blobs that this contribution awaits from now on."""
        for ref in self._awaited(contribution):
            self._named.setdefault(ref.id, set()).add(contribution)

    def _awaited(self, contribution: str) -> tuple[BlobRef, ...]:
        """The update of a contribution in upload, or the states that are being opened."""
        desk = self._desk()
        work = desk.work_of(contribution)
        if work.state == "uploading":
            return (work.done.update.blob,)
        return desk.audits[contribution].lacking if contribution in desk.trials else ()

    def expected(self, blob: str, size: int | None = None) -> BlobRef:
        """The blob as an open contribution or opening names it; nothing else may be uploaded.

        Whoever names another's blob with a wrong size must not stand in its way: the reference of
        `size` bytes is preferred.
        """
        refs = [
            ref
            for contribution in sorted(self._named.get(blob, ()))
            for ref in self._awaited(contribution)
            if ref.id == blob
        ]
        if not refs:
            raise ParisError("not-found", "no open contribution names this blob")
        return next((ref for ref in refs if ref.size == size), refs[0])

    async def put_manifest(self, blob: str, size: int | None, raw: bytes) -> Json:
        """The manifest of an expected blob."""
        ref = self.expected(blob, size)
        if size is not None and size != ref.size:
            raise ParisError("blob.corrupt", f"{size} bytes instead of {ref.size}")
        await asyncio.to_thread(self._store.put_manifest, raw, ref)
        await self.arrived(ref)
        return {"missing": len(self._store.missing(ref))}

    async def put_piece(self, blob: str, number: int, data: bytes) -> Json:
        """A piece of an expected blob; verified before it is written, durable when answered."""
        if self._whole(blob):
            return {"missing": 0}
        self.expected(blob)
        ref = self.expected(blob, self._store.manifest(blob).size)
        await asyncio.to_thread(self._store.put_piece, ref, number, data)
        await self.arrived(ref)
        return {"missing": len(self._store.missing(ref))}

    def _whole(self, blob: str) -> bool:
        """A repeated request for a named blob that is complete is no mistake."""
        if blob not in self._named:
            return False
        try:
            return self._store.has(BlobRef(id=blob, size=self._store.manifest(blob).size))
        except ParisError:
            return False  # not even its manifest is here

    async def arrived(self, ref: BlobRef) -> None:
        """Tells the desk of everything that is complete with this blob."""
        for contribution in sorted(self._named.get(ref.id, ())):
            awaited = self._awaited(contribution)
            if ref in awaited and all(self._store.has(one) for one in awaited):
                uploading = self._desk().work_of(contribution).state == "uploading"
                await self._tell(Uploaded(contribution) if uploading else Opened(contribution))

    async def resume(self) -> None:
        """After a restart: what arrived completely but was not yet noted."""
        for contributions in list(self._named.values()):
            for ref in [ref for one in sorted(contributions) for ref in self._awaited(one)]:
                await asyncio.to_thread(self._complete, ref)
                await self.arrived(ref)

    def _complete(self, ref: BlobRef) -> None:
        try:
            self._store.complete(ref)
        except ParisError:
            return  # its manifest has not arrived yet

    def lacking(self, contribution: str) -> list[str]:
        """Ids of the opened states' blobs that are not here whole."""
        refs = self._desk().audits[contribution].lacking
        return [ref.id for ref in refs if not self._store.has(ref)]

    def missing(self, contribution: str) -> dict[str, list[int]]:
        """The pieces that lack of each opened state's blob whose manifest is here."""
        found = {}
        for ref in self._desk().audits[contribution].lacking:
            if not self._store.has(ref):
                with suppress(ParisError):
                    found[ref.id] = self._store.missing(ref)
        return found
