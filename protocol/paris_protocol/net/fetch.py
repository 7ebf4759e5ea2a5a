"""Moving whole blobs: peers first, the coordinator when peers fail or stall; every piece verified.

What to ask of whom is decided by `transfer.Transfer`; this file moves the bytes. Fetching and
uploading resume where they were, piece by piece, after whatever interrupted them. `blob.missing`
when nobody could help for `patience` seconds; a full disk ends it at once::

    path = await fetch_blob(ref, store, swarm, control)
    await upload_blob(ref, store, control, missing=answer["missing"])
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from paris_protocol.blobs import PIECE, Manifest, manifest_limit
from paris_protocol.errors import ParisError
from paris_protocol.net.control import Control
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import Provider, Swarm
from paris_protocol.records import BlobRef
from paris_protocol.transfer import Ask, Transfer

COORDINATOR: Final = "coordinator"
PARALLEL: Final = 12
"""Pieces in flight for one blob, over all sources."""
FLOOR: Final = 128 << 10
"""Bytes per second below which a piece is asked of another source, even if something comes."""
LOOK_AGAIN: Final = 10.0
"""Seconds after which the swarm is asked anew for holders."""
LOOK_LIMIT: Final = 15.0
"""Seconds that one such question may take; a frozen peer costs a DHT lookup some of them."""

Progress = Callable[[int, int], None]


async def fetch_blob(
    ref: BlobRef,
    store: BlobStore,
    swarm: Swarm | None,
    control: Control,
    *,
    stall: float = 5.0,
    patience: float = 60.0,
    progress: Progress | None = None,
) -> Path:
    """The verified file of a blob, fetched if it is not here.

    A source that is silent for `stall` seconds is replaced; `patience` is the longest time in
    seconds without any progress. `progress(bytes here, bytes in all)` is called after each piece.
    """
    try:
        return await asyncio.to_thread(store.path, ref)
    except ParisError as error:
        if error.code not in ("blob.missing", "blob.corrupt"):
            raise
    fetching = _Fetching(ref, store, swarm, control, stall, patience, progress)
    await fetching.run()
    return await asyncio.to_thread(store.path, ref)


async def upload_blob(
    ref: BlobRef,
    store: BlobStore,
    control: Control,
    missing: Collection[int],
    progress: Progress | None = None,
) -> None:
    """Give the coordinator the pieces that it says it lacks, and no others.

    Interrupted, it is called again with the coordinator's new list; errors are the coordinator's.
    """
    if not missing and ref.size:
        return
    manifest = store.manifest(ref.id)
    await control.put_manifest(ref, manifest.raw)
    here = ref.size - sum(manifest.piece_range(i)[1] for i in missing)
    for i in sorted(missing):
        data = await asyncio.to_thread(store.read_piece, ref.id, i)
        left = await control.put_piece(ref, i, data)
        here += len(data)
        if progress is not None:
            progress(here, ref.size)
        if left == 0:  # the rest came another way
            return


def _is_ours(error: ParisError) -> bool:
    """Whether the trouble is this machine's, so that another source would not help."""
    return error.code.startswith("disk.")


class _Fetching:
    """One blob on its way."""

    def __init__(
        self,
        ref: BlobRef,
        store: BlobStore,
        swarm: Swarm | None,
        control: Control,
        stall: float,
        patience: float,
        progress: Progress | None,
    ) -> None:
        self.ref, self.store, self.swarm, self.control = ref, store, swarm, control
        self.stall, self.patience, self.progress = stall, patience, progress
        self.clock = asyncio.get_running_loop().time
        self.peers: dict[str, Provider] = {}
        self.moved = self.clock()
        self.trouble = "nobody has it"
        self.looked = asyncio.Event()
        self.writing: set[Ask] = set()

    async def run(self) -> None:
        """Manifest, then pieces, while the swarm is asked for holders beside it."""
        looking = asyncio.create_task(self._keep_looking())
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.looked.wait(), self.stall)
            manifest = await self._manifest()
            have = set(range(len(manifest.pieces))) - set(self.store.missing(self.ref))
            # Silence is noticed earlier, where the bytes are read; this limit is for drips.
            limit = self.stall + PIECE / FLOOR
            first = secrets.randbelow(max(1, len(manifest.pieces)))
            transfer = Transfer(manifest, have, fallback=COORDINATOR, stall=limit, first=first)
            await self._pieces(manifest, transfer)
        finally:
            looking.cancel()
        self.store.complete(self.ref)

    async def _keep_looking(self) -> None:
        while self.swarm is not None:
            with suppress(ParisError, TimeoutError):
                found = await asyncio.wait_for(self.swarm.providers(self.ref.id), LOOK_LIMIT)
                self.peers.update({provider.peer: provider for provider in found})
            self.looked.set()
            await asyncio.sleep(LOOK_AGAIN)
        self.looked.set()

    async def _manifest(self) -> Manifest:
        """From the store, else from a peer, else from the coordinator."""
        while True:
            try:
                return self._checked(self.store.manifest(self.ref.id))
            except ParisError as error:
                if error.code != "blob.missing":
                    raise
            raw = await self._manifest_of_anyone()
            if raw is not None:
                return await asyncio.to_thread(self.store.put_manifest, raw, self.ref)
            self._give_up()
            await asyncio.sleep(min(1.0, self.patience / 4))

    def _checked(self, manifest: Manifest) -> Manifest:
        if manifest.size != self.ref.size:
            raise ParisError("blob.corrupt", f"{self.ref.id[:12]} has {manifest.size} bytes")
        return manifest

    async def _manifest_of_anyone(self) -> bytes | None:
        limit = self.stall + manifest_limit(self.ref.size) / FLOOR
        for provider in [*list(self.peers.values())[:3], None]:
            try:
                if provider is None:
                    return await asyncio.wait_for(self.control.manifest(self.ref), limit)
                assert self.swarm is not None
                ask = self.swarm.fetch_manifest(provider, self.ref, self.stall)
                return await asyncio.wait_for(ask, limit)
            except ParisError as error:
                self.trouble = error.sentence
            except TimeoutError:
                self.trouble = "no answer"
        return None

    async def _pieces(self, manifest: Manifest, transfer: Transfer) -> None:
        flying: dict[asyncio.Task[None], Ask] = {}
        try:
            while not transfer.done:
                now = self.clock()
                for ask in transfer.stalled(now):
                    if ask in self.writing:  # a slow disk is not the source's fault
                        continue
                    self._drop(flying, ask)
                    transfer.failed(ask, now)
                while len(flying) < PARALLEL:
                    new = transfer.next(list(self.peers), now)
                    if new is None:
                        break
                    flying[asyncio.create_task(self._piece(new))] = new
                self._give_up()
                if self.swarm is None and transfer.hopeless([]):
                    raise ParisError("blob.corrupt", f"{self.ref.id[:12]}: {self.trouble}"[:500])
                wake = transfer.wake(list(self.peers), now)
                soon = min(1.0, wake - now) if wake is not None else 1.0
                await _first(flying, max(0.05, soon))
                self._land(flying, transfer, manifest)
        finally:
            for task in flying:
                task.cancel()

    def _land(
        self, flying: dict[asyncio.Task[None], Ask], transfer: Transfer, manifest: Manifest
    ) -> None:
        for task in [task for task in flying if task.done()]:
            ask = flying.pop(task)
            error = task.exception()
            if error is None:
                transfer.arrived(ask, self.clock())
                self.moved = self.clock()
                if self.progress is not None:
                    left = sum(manifest.piece_range(i)[1] for i in transfer.missing)
                    self.progress(manifest.size - left, manifest.size)
            elif isinstance(error, ParisError) and not _is_ours(error):
                self.trouble = error.sentence
                transfer.failed(ask, self.clock(), corrupt=error.code == "blob.corrupt")
            else:
                raise error

    async def _piece(self, ask: Ask) -> None:
        if ask.source == COORDINATOR:
            data = await self.control.piece(self.ref, ask.piece, self.stall)
        else:
            assert self.swarm is not None
            provider = self.peers[ask.source]
            data = await self.swarm.fetch_piece(provider, self.ref, ask.piece, self.stall)
        self.writing.add(ask)
        await asyncio.to_thread(self.store.put_piece, self.ref, ask.piece, data)

    @staticmethod
    def _drop(flying: dict[asyncio.Task[None], Ask], ask: Ask) -> None:
        for task in [task for task, other in flying.items() if other == ask]:
            del flying[task]
            task.cancel()

    def _give_up(self) -> None:
        if self.clock() - self.moved > self.patience:
            raise ParisError("blob.missing", f"{self.ref.id[:12]}: {self.trouble}"[:500])


async def _first(tasks: Collection[asyncio.Task[None]], timeout: float) -> None:
    """Wait until one of the tasks is done, or for `timeout` seconds."""
    if tasks:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    else:
        await asyncio.sleep(timeout)
