"""Appends statements through pen, ledger and projector, and dies at the N-th step on the disk.

`python crash_target.py FOLDER N` tells (in FOLDER/acknowledged, fsync'd) what was acknowledged, and
ends by os._exit at write, fsync, rename or unlink number N of the process: nothing that Python
would do on its way out happens.
"""

import asyncio
import hashlib
import os
import sys
from pathlib import Path

from paris_coordinator.ledger import STATEMENT, Entry, Envelope, Ledger
from paris_coordinator.pen import Pen
from paris_coordinator.projector import Projector
from paris_protocol.keys import PrivateKey

NETWORK = "a" * 64
KEY = PrivateKey.from_seed(b"k" * 32)
COUNT = 300


def statement(number):
    id = hashlib.sha256(b"%d" % number).hexdigest()
    return Envelope(id, "registration", "ed25519:x", b'{"id":"%s"}' % id.encode())


def die_at(step):
    """Every step on the disk counts, and the ledger's commits; at `step` the process is gone."""
    left = [step]

    def counted(real):
        def act(*given, **more):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return real(*given, **more)

        return act

    Ledger.append = counted(Ledger.append)

    for name in ("write", "fsync", "replace", "rename", "mkdir", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


async def main(folder, step):
    ledger = Ledger(folder / "ledger.sqlite")
    log = Projector(folder / "log", NETWORK, KEY)
    pen = Pen(ledger, lambda: None)
    told = (folder / "acknowledged").open("ab", buffering=0)
    known = set(ledger.statement_ids(frozenset({"registration"})))
    die_at(step)
    log.catch_up(ledger.logged)

    async def one(number):
        envelope = statement(number)
        await pen.write(Entry(number, STATEMENT, envelope))
        told.write(envelope.id.encode() + b"\n")

    numbers = [n for n in range(COUNT) if statement(n).id not in known]
    for begin in range(0, len(numbers), 40):
        await asyncio.gather(*(one(number) for number in numbers[begin : begin + 40]))
        await asyncio.to_thread(log.catch_up, ledger.logged)
    ledger.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
