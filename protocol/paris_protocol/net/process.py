"""The network process as its parent sees it: a `Swarm` that a child carries out.

The child (`python -m paris_protocol.net.dht`) is spawned, never forked, and is the only place that
loads hivemind. It is restarted whenever it or its libp2p daemon dies, and it ends with its parent,
because its stdin does. Pieces come through files in the spool folder, words through JSON lines.
While the child is away, nobody has anything: `providers` is empty, fetching is `blob.missing`::

    swarm = NetworkProcess(store, key, network, bootstraps=policy.bootstraps)
    await swarm.start()
    await swarm.announce([ref.id])
    await swarm.close()
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import paris_protocol
from paris_protocol.blobs import Manifest
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.net.frames import MANIFEST
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import IDLE, Provider, SwarmStatus
from paris_protocol.records import BlobRef

ANYWHERE: Final = ("/ip4/0.0.0.0/tcp/0",)
LOOPBACK: Final = ("/ip4/127.0.0.1/tcp/0",)
_LINE: Final = 8 << 20
_CALL: Final = 30.0
_LONGEST_PAUSE: Final = 30.0
_QUIET: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HIVEMIND_LOGLEVEL": "ERROR",
    "GOLOG_LOG_LEVEL": "error",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
}


class NetworkProcess:
    """The swarm over libp2p. `interval` is the seconds between rounds of calling the bootstraps.

    `host_maddrs` are where it listens (TCP), `log` takes what the child prints (none by default).
    """

    def __init__(
        self,
        store: BlobStore,
        key: PrivateKey,
        network: str,
        *,
        bootstraps: Sequence[str] = (),
        host_maddrs: Sequence[str] = ANYWHERE,
        interval: float = 30.0,
        log: Path | None = None,
    ) -> None:
        self.store = store
        self.spool = store.folder / "spool"
        self.log = log
        self.child: asyncio.subprocess.Process | None = None
        self._config = {
            "seed": key.seed.hex(),
            "network": network,
            "store": str(store.folder.absolute()),
            "spool": str(self.spool.absolute()),
            "host_maddrs": list(host_maddrs),
            "bootstraps": list(bootstraps),
            "interval": interval,
        }
        self._announced: set[str] = set()
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._last = SwarmStatus(alive=False)
        self._restarts = 0
        self._detail = ""

    async def start(self) -> None:
        """Start the child and look after it; returns at once (the child needs some seconds)."""
        if self._supervisor is None:
            self.spool.mkdir(parents=True, exist_ok=True)
            self._supervisor = asyncio.create_task(self._supervise())

    async def ready(self, timeout: float = 60.0) -> SwarmStatus:
        """Wait until the child is up; `network.down` when it does not come up in time."""
        try:
            await asyncio.wait_for(self._ready.wait(), timeout)
        except TimeoutError:
            raise ParisError("network.down", f"network process: {self._detail}") from None
        return await self.status()

    async def close(self) -> None:
        """See `Swarm`."""
        self._stop.set()
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        if self._ready.is_set() and self.child is not None and self.child.stdin is not None:
            self.child.stdin.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(supervisor), 5.0)
        supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await supervisor

    # ------------------------------------------------------------ the swarm

    async def announce(self, blob_ids: Collection[str]) -> None:
        """See `Swarm`; remembered across restarts of the child."""
        fresh = sorted(set(blob_ids) - self._announced)
        self._announced.update(fresh)
        if fresh and self._ready.is_set():
            with suppress(ParisError):  # it is repeated by the child, or after its restart
                await self._call("announce", blobs=fresh)

    async def providers(self, blob_id: str) -> list[Provider]:
        """See `Swarm`."""
        try:
            found = await self._call("providers", blob=blob_id)
        except ParisError:
            return []
        return [Provider(entry["peer"], tuple(entry["addresses"])) for entry in found]

    async def fetch_manifest(self, provider: Provider, ref: BlobRef, idle: float = IDLE) -> bytes:
        """See `Swarm`."""
        return Manifest.parse(await self._fetch(provider, ref, MANIFEST, idle), ref).raw

    async def fetch_piece(
        self, provider: Provider, ref: BlobRef, i: int, idle: float = IDLE
    ) -> bytes:
        """See `Swarm`."""
        manifest = self.store.manifest(ref.id)
        data = await self._fetch(provider, ref, i, idle)
        manifest.check_piece(i, data)
        return data

    async def status(self) -> SwarmStatus:
        """See `Swarm`."""
        try:
            facts = await self._call("status")
        except ParisError as error:
            detail = self._detail or error.detail
            return SwarmStatus(alive=False, restarts=self._restarts, detail=detail)
        return self._status(facts)

    # ------------------------------------------------------------ inside

    def _status(self, facts: dict[str, Any]) -> SwarmStatus:
        plain = {name: facts[name] for name in SwarmStatus.__slots__ if name in facts}
        plain["addresses"] = tuple(plain["addresses"])
        return SwarmStatus(**{**plain, "alive": True, "restarts": self._restarts})

    async def _fetch(self, provider: Provider, ref: BlobRef, index: int, idle: float) -> bytes:
        # Connecting, opening and reading may each be silent for `idle` seconds.
        name = await self._call(
            "fetch",
            3 * idle + 600.0,
            peer=provider.peer,
            addresses=list(provider.addresses),
            ref={"id": ref.id, "size": ref.size},
            index=index,
            idle=idle,
        )
        path = self.spool / Path(name).name
        try:
            return await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise ParisError("blob.missing", f"spool: {error}") from error
        finally:
            path.unlink(missing_ok=True)

    async def _call(self, op: str, timeout: float = _CALL, **fields: Any) -> Any:
        """One request to the child; its refusal, or `blob.missing` when it is not there."""
        child = self.child
        if not self._ready.is_set() or child is None or child.stdin is None:
            raise ParisError("blob.missing", "the network process is not up")
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            child.stdin.write(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
            await child.stdin.drain()
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise ParisError("blob.missing", f"{op}: no answer in {timeout:.0f} s") from None
        except OSError as error:
            raise ParisError("blob.missing", "the network process died") from error
        finally:
            self._calls.pop(number, None)

    async def _supervise(self) -> None:
        pause, loop = 0.5, asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await self._live()
            except (OSError, ValueError) as error:
                self._detail = str(error)
            pause = 0.5 if loop.time() - began > 60 else min(2 * pause, _LONGEST_PAUSE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
                return
            self._restarts += 1

    async def _live(self) -> None:
        """One life of the child, from its start to its end."""
        root = str(Path(paris_protocol.__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        errors = self.log.open("ab") if self.log is not None else None
        try:
            self.child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "paris_protocol.net.dht"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors if errors is not None else asyncio.subprocess.DEVNULL,
                env={**os.environ, **_QUIET, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C reaches the parent, which ends the child
                limit=_LINE,
            )
        finally:
            if errors is not None:
                errors.close()
        child = self.child
        assert child.stdin is not None
        watch = asyncio.create_task(self._watch(child))
        try:
            child.stdin.write(json.dumps(self._config).encode() + b"\n")
            await self._read(child)
        finally:
            watch.cancel()
            self._ready.clear()
            for answer in self._calls.values():
                if not answer.done():
                    answer.set_exception(ParisError("blob.missing", "the network process died"))
            await _end(child)

    async def _read(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        while line := await child.stdout.readline():
            message = json.loads(line)
            if message.get("event") == "ready":
                self._detail = ""
                self._ready.set()
                if self._announced:
                    again = {"id": 0, "op": "announce", "blobs": sorted(self._announced)}
                    assert child.stdin is not None
                    child.stdin.write(json.dumps(again).encode() + b"\n")
            elif "event" in message:
                self._detail = str(message.get("detail", ""))
            else:
                self._deliver(message)

    def _deliver(self, message: dict[str, Any]) -> None:
        answer = self._calls.get(message["id"])
        if answer is None or answer.done():
            late = message.get("ok")
            if isinstance(late, str):  # a piece that nobody waits for any more
                (self.spool / Path(late).name).unlink(missing_ok=True)
        elif "ok" in message:
            answer.set_result(message["ok"])
        else:
            code = message.get("code")
            known = code if isinstance(code, str) and code in REASONS else "blob.missing"
            answer.set_exception(ParisError(known, str(message.get("detail", ""))))

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """A child that lives but does not answer is replaced."""
        while True:
            await asyncio.sleep(_CALL)
            if self._ready.is_set():
                try:
                    await self._call("status", 2 * _CALL)
                except ParisError:
                    child.kill()
                    return


async def _end(child: asyncio.subprocess.Process) -> None:
    """See the child off: it ends by itself when it cannot speak to us, or it is killed."""
    assert child.stdin is not None
    child.stdin.close()
    try:
        await asyncio.wait_for(child.wait(), 2.0)
    except TimeoutError:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
