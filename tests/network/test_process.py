"""The network process dies with its parent, comes back by itself, and lets only pointers pass."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from contracts.control_contract import coordinator
from contracts.swarm_contract import fresh, until
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.net.control import Control
from paris_protocol.net.fetch import fetch_blob
from paris_protocol.net.process import LOOPBACK, NetworkProcess
from paris_protocol.net.store import BlobStore
from protocol.world import World

NETWORK = "6b" * 32
ROOT = str(Path(__file__).parents[2] / "protocol")

PARENT = """
import asyncio, sys
from pathlib import Path
from paris_protocol.keys import PrivateKey
from paris_protocol.net.process import LOOPBACK, NetworkProcess
from paris_protocol.net.store import BlobStore
async def main():
    store = BlobStore(Path(sys.argv[1]))
    swarm = NetworkProcess(store, PrivateKey.generate(), "6b" * 32, host_maddrs=LOOPBACK)
    await swarm.start()
    await swarm.ready()
    print(swarm.child.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def gone(pids: list[int], limit: float = 10.0) -> bool:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_kill_9_of_the_parent_leaves_no_orphans(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        child = int(parent.stdout.readline())
        daemons = [process.pid for process in psutil.Process(child).children(recursive=True)]
        assert len(daemons) == 1
        parent.send_signal(signal.SIGKILL)
    assert gone([child, *daemons])


def test_the_light_side_stays_light() -> None:
    code = (
        "import sys, paris_protocol.net.process, paris_protocol.net.fetch; "
        "assert not {'hivemind', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ROOT})


@pytest.mark.slow
def test_the_child_loads_no_models() -> None:
    code = (
        "import sys, paris_protocol.net.dht; "
        "assert not {'diffusers', 'transformers', 'paris_models'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ROOT})


def test_the_validator_lets_only_signed_bounded_pointers_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hivemind.dht.routing import DHTID
        from hivemind.dht.validation import DHTRecord
        from hivemind.utils import MSGPackSerializer
        from hivemind.utils.timed_storage import get_dht_time

        from paris_protocol.net.dht import PointerValidator
    from paris_protocol.net.pointers import MAX_RECORD, pack, shard_key, unpack

    ours = PointerValidator(PrivateKey.generate(), NETWORK)
    theirs = PointerValidator(PrivateKey.generate(), NETWORK)
    key = DHTID.generate(source=shard_key(NETWORK, "ab")).to_bytes()
    other = DHTID.generate(source=shard_key(NETWORK, "ac")).to_bytes()
    foreign = DHTID.generate(source=shard_key("7c" * 32, "ab")).to_bytes()
    value = MSGPackSerializer.dumps(pack(["ab" * 32], ["/ip4/127.0.0.1/tcp/1"]))

    def record(
        key: bytes = key, tag: str = ours.tag, value: bytes = value, ttl: float = 600,
        signer: Any = ours,
    ) -> Any:  # fmt: skip
        plain = DHTRecord(key, MSGPackSerializer.dumps(tag), value, get_dht_time() + ttl)
        return DHTRecord(key, plain.subkey, signer.sign_value(plain), plain.expiration_time)

    good = record()
    assert ours.validate(good) and theirs.validate(good)
    assert ours.strip_value(good) == value
    pointer = unpack(MSGPackSerializer.loads(good.subkey), MSGPackSerializer.loads(value))
    assert pointer is not None and pointer.blobs == {bytes.fromhex("ab" * 32)}

    def changed(**fields: Any) -> Any:
        plain = {
            name: getattr(good, name) for name in ("key", "subkey", "value", "expiration_time")
        }
        return DHTRecord(**{**plain, **fields})

    room = MAX_RECORD - PointerValidator.EXTRA
    other_value = {"blobs": b"", "addresses": ["x" * (room - 23)]}
    longest = MSGPackSerializer.dumps(other_value)
    assert len(longest) == room and theirs.validate(record(value=longest))
    refused = {
        "too long": record(value=longest + b"x"),
        "not decodable": record(value=b"\xc1"),  # would fail every look-up of its key
        "no pointer": record(value=MSGPackSerializer.dumps([1])),
        "another subkey of the same owner": record(tag=ours.tag + "2"),
        "too lasting": record(ttl=1000),
        "foreign key": record(key=foreign),
        "theft": record(signer=theirs),
        "forged": changed(value=theirs.sign_value(record(tag=theirs.tag, value=value))),
        "unsigned": changed(value=value),
        "no owner": changed(subkey=MSGPackSerializer.dumps("me")),
        "no subkey": changed(subkey=None),
        "two owners": record(tag=ours.tag + theirs.tag),
        "replayed under another key": changed(key=other),
        "made to last": changed(expiration_time=good.expiration_time + 10),
        "flipped": changed(value=bytes([good.value[0] ^ 1]) + good.value[1:]),
        "short": changed(value=b"E1"),
    }
    assert [name for name, each in refused.items() if theirs.validate(each)] == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Net:
    """Some members on this machine; the first is everybody's bootstrap, on a port that stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.keys = [PrivateKey.generate() for _ in range(3)]
        self.roots: list[str] = []
        self.members: list[NetworkProcess] = []

    async def up(self, i: int) -> NetworkProcess:
        hosts = [f"/ip4/127.0.0.1/tcp/{self.port}"] if i == 0 else list(LOOPBACK)
        member = NetworkProcess(
            BlobStore(self.folder / str(i)), self.keys[i], NETWORK, bootstraps=self.roots,
            host_maddrs=hosts, interval=2.0, log=self.folder / f"{i}.log",
        )  # fmt: skip
        self.members.append(member)
        await member.start()
        status = await member.ready()
        if i == 0:
            self.roots = [f"{hosts[0]}/p2p/{status.peer}"]
        return member

    def run(self, body: Callable[[], Any]) -> None:
        async def main() -> None:
            try:
                await body()
            finally:
                await asyncio.gather(*(member.close() for member in self.members))

        asyncio.run(main())


def daemon_of(member: NetworkProcess) -> int:
    assert member.child is not None
    (daemon,) = psutil.Process(member.child.pid).children(recursive=True)
    return int(daemon.pid)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["daemon", "child"])
def test_what_dies_is_restarted_and_announces_again(tmp_path: Path, victim: str) -> None:
    net = Net(tmp_path)

    async def body() -> None:
        first, second = await net.up(0), await net.up(1)
        ref = second.store.add_bytes(fresh("again"))
        await second.announce([ref.id])
        assert await until(lambda: first.providers(ref.id))
        assert second.child is not None
        daemon, child = daemon_of(second), second.child.pid
        os.kill(daemon if victim == "daemon" else child, signal.SIGKILL)
        assert await asyncio.to_thread(gone, [daemon, child])

        async def back() -> bool:
            status = await second.status()
            return status.alive and status.restarts == 1 and status.announced == 1

        await until(back, 60)

        async def answers() -> bool:
            for provider in await first.providers(ref.id):
                with suppress(ParisError):  # the old address, or libp2p's dial back-off
                    return bool(await first.fetch_manifest(provider, ref))
            return False

        assert await until(answers, 60)

    net.run(body)


@pytest.mark.slow
def test_a_bootstrap_that_returns_is_rejoined(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def body() -> None:
        first, second = await net.up(0), await net.up(1)
        ref = second.store.add_bytes(fresh("rejoin"))
        await second.announce([ref.id])
        assert await until(lambda: first.providers(ref.id))
        await first.close()

        async def alone() -> bool:
            return (await second.status()).bootstraps == 0

        await until(alone, 60)
        again = await net.up(0)
        assert await until(lambda: again.providers(ref.id), 60)

    net.run(body)


@pytest.mark.slow
def test_without_the_bootstrap_members_find_each_other_again(tmp_path: Path) -> None:
    net = Net(tmp_path)
    data = fresh("known")

    async def body() -> None:
        first, second, third = await net.up(0), await net.up(1), await net.up(2)
        ref = second.store.add_bytes(data)
        await second.announce([ref.id])
        assert await until(lambda: third.providers(ref.id))  # and is remembered

        async def noted() -> bool:
            path = third.spool / "peers.json"
            return path.exists() and b"/tcp/" in path.read_bytes()

        await until(noted)
        await first.close()
        await third.close()
        again = await net.up(2)
        assert await until(lambda: again.providers(ref.id), 60)
        nobody: Control = Nobody()
        path = await fetch_blob(ref, again.store, again, nobody)
        assert path.read_bytes() == data

    net.run(body)


@pytest.mark.slow
def test_a_frozen_source_is_replaced_in_seconds(tmp_path: Path) -> None:
    net = Net(tmp_path)
    data = fresh("frozen", 24 << 20)

    async def body() -> None:
        first, second, third = await net.up(0), await net.up(1), await net.up(2)
        for member in (first, second):
            ref = member.store.add_bytes(data)
            await member.announce([ref.id])

        async def both() -> bool:
            return len(await third.providers(ref.id)) == 2

        await until(both)
        frozen = daemon_of(second)
        os.kill(frozen, signal.SIGSTOP)
        try:
            began = time.monotonic()
            there = coordinator(World())  # it does not have the blob
            path = await fetch_blob(ref, third.store, third, there, stall=3.0)
            assert path.read_bytes() == data
            assert time.monotonic() - began < 20
        finally:
            os.kill(frozen, signal.SIGCONT)

    net.run(body)


def test_sockets_of_dead_daemons_are_removed() -> None:
    from paris_protocol.net.daemon_files import remove_dead_sockets

    dead = Path(f"/tmp/hivemind-test-dead-{os.getpid()}.sock")
    live = Path(f"/tmp/hivemind-test-live-{os.getpid()}.sock")
    with socket.socket(socket.AF_UNIX) as kept:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(dead))
        kept.bind(str(live))
        kept.listen()
        try:
            remove_dead_sockets()
            assert live.exists() and not dead.exists()
        finally:
            live.unlink()
            dead.unlink(missing_ok=True)


class Nobody:
    """A coordinator that must not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.mark.slow
def test_a_child_that_cannot_start_does_no_harm(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        net = Net(tmp_path)
        net.port = int(taken.getsockname()[1])

        async def body() -> None:
            member = NetworkProcess(
                BlobStore(tmp_path / "x"), net.keys[0], NETWORK,
                host_maddrs=[f"/ip4/127.0.0.1/tcp/{net.port}"],
            )  # fmt: skip
            net.members.append(member)
            await member.start()

            async def failed() -> bool:
                return "listen" in (await member.status()).detail

            await until(failed, 60)
            assert await member.providers("0" * 64) == []
            assert not (await member.status()).alive

        net.run(body)


def test_odd_bootstraps_and_addresses_are_left_out() -> None:
    from paris_protocol.net.pointers import bootstraps, dialable

    peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    good = f"/dns4/train.example.org/tcp/4001/p2p/{peer}"
    odd = [
        "",
        "http://x",
        f"/ip4/1.2.3.4/udp/1/quic-v1/p2p/{peer}",
        "/ip4/1.2.3.4/tcp/1",
    ]
    assert bootstraps([*odd, good]) == [(peer, ["/dns4/train.example.org/tcp/4001"])]
    assert dialable([None, 3, "/unix/tmp/x", "/ip4/1.2.3.4/tcp/1", odd[2]]) == [
        "/ip4/1.2.3.4/tcp/1"
    ]
    assert len(dialable(["/ip4/1.2.3.4/tcp/1"] * 50)) == 8
