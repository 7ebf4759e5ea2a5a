"""The network process: a hivemind DHT node and its libp2p daemon, for pointers and pieces.

Run by `process.py` as `python -m paris_protocol.net.dht`; nothing else imports this file. It reads
JSON lines from stdin (first its configuration, then requests) and answers on stdout; when stdin
ends, it ends. The DHT holds signed pointers only (who says that it has which blobs, at most 16 KB,
for at most 15 minutes); unsigned, foreign, oversized and long-lived records are refused::

    {"seed": "…", "network": "…", "store": "…", "spool": "…", "host_maddrs": [], "bootstraps": []}
    {"id": 1, "op": "providers", "blob": "1f2e…"}
    {"id": 1, "ok": [{"peer": "12D3KooW…", "addresses": ["/ip4/127.0.0.1/tcp/4001"]}]}

Limit: all holders of one blob share one DHT key, which holds some ten thousand pointers.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import get_dht_time

from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, verify
from paris_protocol.net import frames, pointers
from paris_protocol.net.daemon_files import KnownPeers, remove_dead_sockets, write_identity
from paris_protocol.net.store import BlobStore, disk_errors
from paris_protocol.records import BlobRef

TTL: Final = 600.0
UPLOADS: Final = 8
"""Pieces that are served at the same time; beyond, the answer is `BUSY`."""
IDLE: Final = 15.0
DAEMON_DIED: Final = 3
_PROVIDERS: Final = 32


class PointerValidator(RecordValidatorBase):
    """Lets pass signed subkeys of known keys, of bounded size and lifetime, and nothing else.

    The owner stands in the subkey as `[ed25519:…]`, because a validator sees the key hashed only.
    A value ends with a 64-byte signature and the version of this format.
    """

    DOMAIN: Final = b"paris-dht-record-v1\0"
    TAIL: Final = b"E1"
    EXTRA: Final = 66

    def __init__(self, key: PrivateKey, network: str) -> None:
        self._key = key
        self.tag = f"[{key.id}]"
        names = pointers.shard_keys(network)
        self._allowed = {DHTID.generate(source=name).to_bytes() for name in names}

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record may be stored, passed on or believed."""
        owner = pointers.owner(record.subkey or b"")
        if owner is None or record.key not in self._allowed:
            return False
        size = len(record.value)
        if not self.EXTRA <= size <= pointers.MAX_RECORD or record.value[-2:] != self.TAIL:
            return False
        if record.expiration_time > get_dht_time() + pointers.MAX_TTL:
            return False
        signature, value = record.value[-self.EXTRA : -2], record.value[: -self.EXTRA]
        # One subkey for each key, and a value of ours: one that hivemind cannot decode would fail
        # every look-up of its DHT key, for everybody.
        tag = f"[{owner}]"
        try:
            if record.subkey != MSGPackSerializer.dumps(tag):
                return False
            if not verify(owner, signature, self._signed(record, value)):
                return False
            return pointers.unpack(tag, MSGPackSerializer.loads(value)) is not None
        except Exception:  # noqa: BLE001 - a stranger's bytes may make the decoder raise anything
            return False

    def sign_value(self, record: DHTRecord) -> bytes:
        """Our own records get our signature; others stay as they are and will be refused."""
        value: bytes = record.value
        if self.tag.encode("ascii") not in (record.subkey or b""):
            return value
        return value + self._key.sign(self._signed(record, value)) + self.TAIL

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value without signature and version."""
        value: bytes = record.value[: -self.EXTRA]
        return value

    def _signed(self, record: DHTRecord, value: bytes) -> bytes:
        parts = [record.key, record.subkey, value, record.expiration_time]
        return self.DOMAIN + bytes(MSGPackSerializer.dumps(parts))


async def start_daemon(host_maddrs: Sequence[str], identity: Path, attempts: int = 4) -> P2P:
    """Start p2pd on TCP, without bootstrap peers: a dead one could delay or stop the start.

    TCP only, since its QUIC ends transfers short without an error. No relay and no port mapping:
    nothing on the owner's router is changed.
    """
    for attempt in itertools.count(1):
        try:
            return await P2P.create(
                host_maddrs=list(host_maddrs),
                identity_path=str(identity),
                check_if_identity_free=False,
                startup_timeout=30.0,
                nat_port_map=False,
                auto_nat=False,
                use_relay=False,
            )
        except P2PDaemonError:
            if attempt == attempts:
                raise
            await asyncio.sleep(0.25 * 2**attempt)
    raise AssertionError


class Peer:
    """One member of the swarm: announces, looks up, serves and fetches."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.key = PrivateKey.from_seed(bytes.fromhex(config["seed"]))
        self.network: str = config["network"]
        self.store = BlobStore(Path(config["store"]))
        self.spool = Path(config["spool"])
        self.host_maddrs: list[str] = config["host_maddrs"]
        self.bootstraps = pointers.bootstraps(config["bootstraps"])
        self.interval = float(config["interval"])
        self.validator = PointerValidator(self.key, self.network)
        self.announced: set[str] = set()
        self.addresses: list[str] = []
        self.answering = 0
        self.received = 0
        self.sent = 0
        self._uploads = 0
        self._files = itertools.count()
        self.known = KnownPeers(self.spool / "peers.json")
        self.p2p: Any = None
        self.node: Any = None

    async def start(self) -> None:
        """Start the daemon and the DHT node; raises P2PDaemonError when it does not come up."""
        remove_dead_sockets()
        self.spool.mkdir(parents=True, exist_ok=True)
        for leftover in self.spool.glob("piece-*"):
            leftover.unlink(missing_ok=True)
        write_identity(self.spool / "identity", self.key)
        self.p2p = await start_daemon(self.host_maddrs, self.spool / "identity")
        self.node = await DHTNode.create(p2p=self.p2p, record_validator=self.validator)
        await self.p2p.add_binary_stream_handler(frames.PROTOCOL, self._serve)
        visible = await self.p2p.get_visible_maddrs(latest=True)
        plain = [str(address).split("/p2p/")[0] for address in visible]
        self.addresses = pointers.dialable(plain)

    async def keep_up(self) -> None:
        """Stay in the swarm: a restarted bootstrap is never rejoined by itself."""
        told = float("-inf")
        loop = asyncio.get_running_loop()
        while True:
            before, self.answering = self.answering, await self.bootstrap()
            if self.answering > before or loop.time() - told > TTL / 3:
                await self._tell({blob[:2] for blob in self.announced})
                told = loop.time()
            self.known.save()
            await asyncio.sleep(self.interval)

    async def bootstrap(self) -> int:
        """Connect to the bootstraps and to peers known from before; how many answered."""
        peers = {**dict(self.known.latest()), **dict(self.bootstraps)}
        answers = await asyncio.gather(*(self._ping(peer, peers[peer]) for peer in peers))
        if any(answers) and not self.answering:
            await self.node.find_nearest_nodes([self.node.node_id])
        return sum(answers)

    async def _ping(self, peer: str, addresses: Sequence[str]) -> bool:
        if peer == str(self.p2p.peer_id):
            return False
        try:
            await self._connect(peer, addresses, 10.0)
            found = await self.node.protocol.call_ping(PeerID.from_base58(peer))
        except (P2PDaemonError, OSError, TimeoutError):
            return False  # refused, silent, or in p2pd's dial back-off of 5 s
        return found is not None

    async def _connect(self, peer: str, addresses: Sequence[str], limit: float) -> None:
        maddrs = [Multiaddr(text) for text in addresses]
        await asyncio.wait_for(self.p2p._client.connect(PeerID.from_base58(peer), maddrs), limit)

    # ------------------------------------------------------------ pointers

    async def announce(self, blob_ids: Collection[str]) -> None:
        """Tell now, and again before the pointers expire."""
        fresh = set(blob_ids) - self.announced
        self.announced |= fresh
        await self._tell({blob[:2] for blob in fresh})

    async def _tell(self, prefixes: Collection[str]) -> None:
        here = {blob for blob in self.announced if self._here(blob)}
        self.announced &= here
        keys, values = [], []
        for prefix in sorted(prefixes):
            if ids := [blob for blob in here if blob.startswith(prefix)]:
                keys.append(pointers.shard_key(self.network, prefix))
                values.append(pointers.pack(ids, self.addresses))
        if keys:
            subkeys = [self.validator.tag] * len(keys)
            expires = get_dht_time() + TTL
            await self.node.store_many(keys, values, expires, subkeys=subkeys)

    def _here(self, blob_id: str) -> bool:
        with suppress(ParisError):
            return bool(self.store.manifest(blob_id).id)
        return False

    async def providers(self, blob_id: str) -> list[dict[str, Any]]:
        """Who says that it holds the blob, in an order of our own, to spread the load."""
        key = pointers.shard_key(self.network, blob_id)
        found = await asyncio.wait_for(self.node.get(key, latest=True), 15.0)
        table = found.value if found is not None and isinstance(found.value, dict) else {}
        holders: list[dict[str, Any]] = []
        for subkey, entry in table.items():
            pointer = pointers.unpack(subkey, entry.value)
            if pointer is None or pointer.peer == str(self.p2p.peer_id):
                continue
            self.known.add(pointer.peer, pointer.addresses)
            if bytes.fromhex(blob_id) in pointer.blobs:
                holders.append({"peer": pointer.peer, "addresses": pointer.addresses})
        own = str(self.p2p.peer_id)
        holders.sort(key=lambda holder: hashlib.sha256(f"{own}{holder['peer']}".encode()).digest())
        return holders[:_PROVIDERS]

    # ------------------------------------------------------------ pieces

    async def _serve(
        self, _: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            if self._uploads >= UPLOADS:
                await frames.refuse(writer, IDLE)
                return
            self._uploads += 1
            try:
                self.sent += await frames.serve(reader, writer, self._look_up, IDLE)
            finally:
                self._uploads -= 1
        finally:
            writer.close()

    async def _look_up(self, blob_id: str, index: int) -> bytes | None:
        """Only what was announced is given away."""
        if blob_id not in self.announced:
            return None
        try:
            if index == frames.MANIFEST:
                return self.store.manifest(blob_id).raw
            return await asyncio.to_thread(self.store.read_piece, blob_id, index)
        except (ParisError, OSError):
            return None

    async def fetch(
        self, peer: str, addresses: list[str], blob: dict[str, Any], index: int, idle: float
    ) -> str:
        """Fetch a piece (or the manifest) into the spool folder; returns the file's name."""
        ref = BlobRef(id=blob["id"], size=blob["size"])
        if index == frames.MANIFEST:
            wanted = frames.Wanted.manifest(ref)
        else:
            wanted = frames.Wanted.piece(self.store.manifest(ref.id), index)
        writer = None
        try:
            await self._connect(peer, pointers.dialable(addresses), idle)
            opening = self.p2p.call_binary_stream_handler(PeerID.from_base58(peer), frames.PROTOCOL)
            _, reader, writer = await asyncio.wait_for(opening, idle)
            data = await frames.ask(reader, writer, wanted, idle)
        except frames.Corrupt as error:
            raise ParisError("blob.corrupt", f"from {peer}") from error
        except (frames.Broken, P2PDaemonError, OSError, TimeoutError, ValueError) as error:
            raise ParisError("blob.missing", f"{peer}: {error!r}"[:300]) from error
        finally:
            if writer is not None:
                writer.close()
        self.received += len(data)
        name = f"piece-{next(self._files)}"
        with disk_errors(self.spool):
            await asyncio.to_thread((self.spool / name).write_bytes, data)
        return name

    def status(self) -> dict[str, Any]:
        """Counts for the parent's `SwarmStatus`."""
        return {
            "peer": str(self.p2p.peer_id),
            "addresses": self.addresses,
            "known": len(self.node.protocol.routing_table.uid_to_peer_id),
            "bootstraps": self.answering,
            "announced": len(self.announced),
            "received": self.received,
            "sent": self.sent,
        }


# ---------------------------------------------------------------- the process


class Lines:
    """Answers to the parent: JSON lines on what was stdout before anything could print to it."""

    def __init__(self) -> None:
        self._handle = os.dup(1)
        os.dup2(2, 1)

    def tell(self, **message: Any) -> None:
        """One line; a parent that is gone is noticed at stdin."""
        with suppress(BrokenPipeError):
            os.write(self._handle, json.dumps(message).encode() + b"\n")


async def _answer(peer: Peer, lines: Lines, request: dict[str, Any]) -> None:
    operations: dict[str, Callable[[], Awaitable[Any]]] = {
        "announce": lambda: peer.announce(request["blobs"]),
        "providers": lambda: peer.providers(request["blob"]),
        "fetch": lambda: peer.fetch(
            request["peer"], request["addresses"], request["ref"], request["index"], request["idle"]
        ),
    }
    try:
        if request["op"] == "status":
            result: Any = peer.status()
        else:
            result = await operations[request["op"]]()
        lines.tell(id=request["id"], ok=result)
    except ParisError as error:
        lines.tell(id=request["id"], code=error.code, detail=error.detail)
    except Exception as error:  # noqa: BLE001 - whatever hivemind raises is this request's failure
        lines.tell(id=request["id"], code="network.down", detail=repr(error)[:300])


async def _run(lines: Lines) -> int:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader(limit=8 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    first = await stdin.readline()
    if not first:
        return 0
    peer = Peer(json.loads(first))
    line = asyncio.create_task(stdin.readline())
    starting = asyncio.create_task(peer.start())
    await asyncio.wait({line, starting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # the parent went away; it says nothing before we are ready
        return 0
    try:
        starting.result()
    except (P2PDaemonError, OSError) as error:
        lines.tell(event="failed", detail=str(error)[:500])
        return DAEMON_DIED
    lines.tell(event="ready", **peer.status())
    daemon = asyncio.create_task(peer.p2p._child.wait())
    upkeep = asyncio.create_task(peer.keep_up())
    tasks = {daemon, upkeep}
    try:
        while True:
            await asyncio.wait({line, daemon, upkeep}, return_when=asyncio.FIRST_COMPLETED)
            if daemon.done() or upkeep.done():  # P2P.is_alive stays true when p2pd dies
                lines.tell(event="failed", detail="the libp2p daemon ended")
                return DAEMON_DIED
            if not line.result():
                return 0
            task = asyncio.create_task(_answer(peer, lines, json.loads(line.result())))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            line = asyncio.create_task(stdin.readline())
    finally:
        peer.p2p._terminate()


def main() -> None:
    """Serve one parent until it is gone."""
    warnings.simplefilter("ignore")
    code = asyncio.run(_run(Lines()))
    os._exit(code)  # no teardown of what the imports brought along


if __name__ == "__main__":
    main()
