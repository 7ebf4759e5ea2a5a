"""`log`: durable appends a second, and the time to verify a proof of a log of ten million leaves.

An append is what the coordinator does with a stranger's statement: envelope and signature checked,
committed to the ledger (fsync), projected to tiles and entries under a signed checkpoint. The clock
stops when the checkpoint holds them all. Beside it: one commit and one checkpoint for each.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.table import Row, conditions, middle, row
from paris_coordinator.ledger import STATEMENT, Entry, Envelope, Ledger
from paris_coordinator.pen import Pen
from paris_coordinator.projector import Projector
from paris_protocol.envelope import seal, unseal
from paris_protocol.keys import PrivateKey
from paris_protocol.log import (
    Subtrees,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)
from paris_protocol.records import Commitment

NETWORK = "ab" * 32
KEYS = [PrivateKey.from_seed(hashlib.sha256(b"node %d" % i).digest()) for i in range(64)]
COORDINATOR = PrivateKey.from_seed(b"c" * 32)
STATES = 11
LEAVES = 10_000_000


def statements(count: int) -> list[bytes]:
    """Signed commitments of a unit with ten segments, by 64 nodes."""
    made = []
    for i in range(count):
        states = tuple(hashlib.sha256(b"%d %d" % (i, j)).hexdigest() for j in range(STATES))
        record = Commitment(
            assignment=hashlib.sha256(b"%d" % i).hexdigest(),
            states=states,
            states_root=states[0],
            update_root=states[1],
            steps=50,
        )
        made.append(seal(record, KEYS[i % len(KEYS)], NETWORK).raw)
    return made


def entry(raw: bytes) -> Entry:
    """What is written of a stranger's statement, once it was checked."""
    sealed = unseal(raw, Commitment, NETWORK, lambda signer: signer.startswith("ed25519:"))
    return Entry(0, STATEMENT, Envelope(sealed.id, Commitment.TYPE, sealed.signer, raw))


async def many(folder: Path, raws: list[bytes]) -> float:
    """Seconds for all of them, arriving as fast as they are checked."""
    ledger = Ledger(folder / "ledger.sqlite")
    log = Projector(folder / "log", NETWORK, COORDINATOR)
    pen = Pen(ledger, lambda: None)
    begin = time.perf_counter()
    projecting: asyncio.Task[bool] | None = None
    waiting = []
    for i, raw in enumerate(raws):
        waiting.append(asyncio.create_task(pen.write(entry(raw))))
        if i % 32 == 31:
            await asyncio.sleep(0)
        if projecting is None or projecting.done():
            projecting = asyncio.create_task(asyncio.to_thread(log.catch_up, ledger.logged))
    await asyncio.gather(*waiting)
    if projecting is not None:
        await projecting
    await asyncio.to_thread(log.catch_up, ledger.logged)
    seconds = time.perf_counter() - begin
    assert log.size == len(raws)
    ledger.close()
    return seconds


def one_by_one(folder: Path, raws: list[bytes]) -> float:
    """Seconds with a commit and a checkpoint for each."""
    ledger = Ledger(folder / "ledger.sqlite")
    log = Projector(folder / "log", NETWORK, COORDINATOR)
    begin = time.perf_counter()
    for raw in raws:
        ledger.append([entry(raw)])
        log.catch_up(ledger.logged)
    seconds = time.perf_counter() - begin
    ledger.close()
    return seconds


class Alike(Subtrees):
    """A tree of any size whose leaves but one are alike, so that a subtree's root is cheap."""

    def __init__(self, size: int, odd: int) -> None:
        self._size, self._odd = size, odd
        self._roots = [leaf_hash(b"alike")]
        while len(self._roots) <= size.bit_length():
            self._roots.append(node_hash(self._roots[-1], self._roots[-1]))

    @property
    def size(self) -> int:
        """See `Subtrees`."""
        return self._size

    def subtree(self, level: int, index: int) -> bytes:
        """See `Subtrees`."""
        if self._odd >> level != index:
            return self._roots[level]
        if level == 0:
            return leaf_hash(b"odd")
        return node_hash(self.subtree(level - 1, 2 * index), self.subtree(level - 1, 2 * index + 1))


def proofs(n: int) -> list[float]:
    """Milliseconds to verify an inclusion and a consistency proof, each time both."""
    taken = []
    for i in range(n):
        odd, old = LEAVES * (2 * i + 1) // (2 * n), LEAVES * (i + 1) // (n + 1)
        tree = Alike(LEAVES, odd)
        root, before = tree.root(), tree.root(old)
        path, link = tree.inclusion(odd), tree.consistency(old)
        begin = time.perf_counter()
        found = verify_inclusion(leaf_hash(b"odd"), odd, LEAVES, path, root)
        continued = verify_consistency(old, LEAVES, link, before, root)
        taken.append(1e3 * (time.perf_counter() - begin))
        assert found
        assert continued
    return taken


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Rows `log.appends` and `log.proof`."""
    count, single, times = (2_000, 50, 1) if quick else (20_000, 500, 3)
    raws = statements(count)
    rates, alone = [], []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            rates.append(count / asyncio.run(many(Path(folder), raws)))
        with tempfile.TemporaryDirectory() as folder:
            alone.append(single / one_by_one(Path(folder), raws[:single]))
    ours, spread = middle(rates)
    taken, wide = middle(proofs(5 if quick else 50))
    rows = [
        row(
            "log.appends",
            "statements a second: checked, durable in the ledger, under a signed checkpoint",
            ours=ours,
            spread=spread,
            better="higher",
            unit="1/s",
            n=times,
            alternative=middle(alone)[0],
            alternative_name="one commit and checkpoint each",
        ),
        row(
            "log.proof",
            "an inclusion and a consistency proof in a log of ten million leaves, verified",
            ours=taken,
            spread=wide,
            better="lower",
            unit="ms",
            n=5 if quick else 50,
        ),
    ]
    size = len(raws[0])
    return conditions(statements=count, statement_bytes=size, limit_per_s=2000, limit_ms=5), rows
