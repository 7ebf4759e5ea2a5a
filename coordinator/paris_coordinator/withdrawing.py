"""Taking a clip out of training: which shards hold it, what that stops, and the statement.

A clip is named by its file (all clips of a video at once) or by the SHA-256 of its latents as they
stand in the shard, 64 hex digits. Where `prepare` left a table of origins it is looked up there,
otherwise the shards themselves are read. What no training shard holds is refused with
`clip.unknown`, what is withdrawn already with `clip.withdrawn`; nothing changes then::

    facts = consequences(Path("state"), "sub/a.mp4")     # shards, units, heads; nothing is written
    await withdraw(office, clip)                         # files the signed Withdrawal
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paris_coordinator.board import Board
from paris_coordinator.config import State
from paris_coordinator.genesis import read_header
from paris_coordinator.reading import open_desk
from paris_coordinator.withdrawals import is_on, touched
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import Genesis, Withdrawal

if TYPE_CHECKING:
    from paris_coordinator.office import Office

Json = dict[str, Any]
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
UNFINISHED: Final = ("open", "uploading", "queued", "auditing", "accepted")
LONGEST: Final = 200
"""Characters of a reason, as the statement allows."""


class Found(NamedTuple):
    """A training clip: its digest and the blob of its shard."""

    clip: str
    shard: str


def origins(state: State) -> Iterator[Json]:
    """The lines of the table of origins: clip, name, source, licence, shard (null: held out)."""
    try:
        with state.origins_file.open(encoding="ascii") as file:
            yield from map(json.loads, file)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ParisError("state.corrupt", str(state.origins_file)) from error


def find(state: State, genesis: Genesis, name: str) -> list[Found]:
    """All training clips of that name or digest; `clip.unknown` when there is none."""
    lines = [line for line in origins(state) if name in (line["clip"], line["name"])]
    found = [Found(line["clip"], line["shard"]) for line in lines if line["shard"]]
    if lines and not found:
        raise ParisError("clip.unknown", "it is held out, so nothing is trained on it")
    if not found and DIGEST.fullmatch(name):
        found = [Found(name, shard) for shard in _holding(state, genesis, name)]
    if not found:
        raise ParisError("clip.unknown", name[:80])
    return found


def _holding(state: State, genesis: Genesis, clip: str) -> Iterator[str]:
    """The shards of the store with a clip of this digest; reads them all."""
    store = BlobStore(state.store)
    for shard in (shard for cluster in genesis.clusters for shard in cluster.shards):
        if clip in _digests(store.path(shard.file.blob)):
            yield shard.file.blob.id


def _digests(path: Path) -> set[str]:
    """The digests of a shard's clips; none in a file without latents."""
    header = read_header(path)
    if "latents" not in header.tensors:
        return set()
    _, shape, begin, end = header.tensors["latents"]
    size = (end - begin) // max(1, shape[0])
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as whole,
    ):
        start = header.data_start + begin
        rows = (slice(start + i * size, start + (i + 1) * size) for i in range(shape[0]))
        return {hashlib.sha256(whole[row]).hexdigest() for row in rows}


def consequences(folder: Path, name: str) -> Json:
    """What a withdrawal would stop and name; raises as the module says."""
    state = State(folder)
    desk = open_desk(state)
    found = find(state, desk.genesis, name)
    gone = {record.clip for record in desk.withdrawals.values()} | desk.withdrawing.keys()
    clips = sorted({one.clip for one in found} - gone)
    if not clips:
        raise ParisError("clip.withdrawn", name[:80])
    shards = sorted({one.shard for one in found if one.clip in clips})
    return {
        "clips": clips,
        "shards": shards,
        "experts": [
            cluster.index
            for cluster in desk.genesis.clusters
            if any(shard.file.blob.id in shards for shard in cluster.shards)
        ],
        "heads": list(touched(desk, shards)),
        "work": [
            work.id
            for work in desk.works.values()
            if work.state in UNFINISHED and is_on(work.record, shards)
        ],
    }


def consequences_text(facts: Json) -> str:
    """The same for people."""
    lines = [f"withdraws  clip {clip}" for clip in facts["clips"]]
    lines += [f"stops      leases of shard {shard[:16]}" for shard in facts["shards"]]
    lines += [f"refuses    the result of assignment {id[:16]}" for id in facts["work"]]
    lines += [f"names      merge {id[:16]}, which was trained on it" for id in facts["heads"]]
    return "\n".join(lines)


def check_reason(reason: str) -> None:
    """Refuses a reason that the statement cannot hold."""
    if len(reason) > LONGEST:
        raise ParisError("usage", f"--reason: at most {LONGEST} characters")


async def withdraw(office: Office, clip: str) -> Json:
    """Files the withdrawal of a clip that the operator ordered."""
    found = await asyncio.to_thread(find, office.state, office.genesis.record, clip)
    shards = tuple(dict.fromkeys(one.shard for one in found))
    record = Withdrawal(
        clip=clip,
        shards=shards,
        heads=touched(office.desk, shards),
        reason=office.desk.withdrawing[clip],
        at=office.now(),
    )
    sealed = await office.file(record)
    return {"clip": clip, "withdrawal": sealed.id, "shards": len(shards)}


def listed(desk: Board) -> list[Json]:
    """All withdrawals, oldest first, for status and pages."""
    return [
        {
            "id": id,
            "clip": record.clip,
            "shards": list(record.shards),
            "heads": list(record.heads),
            "reason": record.reason,
            "at": record.at,
        }
        for id, record in desk.withdrawals.items()
    ]
