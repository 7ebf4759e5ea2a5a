"""The page of a cluster: its clips, size, prior, licences and withdrawn shards; and its pictures.

Pictures come from public shards, decoded by the network's codec where that is the small one; others
show captions only. They are made at the first request, by a worker process, one cluster at a time,
and kept; a withdrawal makes others. Of the table of origins, which is the operator's, the page
shows captions of training clips and how many have which licence, and nothing of held-out clips::

    cluster_page(source, 0)["pictures"]     # [{"number": 0, "caption": "a red ball moves left"}, …]
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from paris_coordinator.config import State
from paris_coordinator.web import views
from paris_coordinator.web.views import PageSource
from paris_coordinator.withdrawals import usable
from paris_coordinator.withdrawing import listed, origins
from paris_coordinator.worker import Worker
from paris_protocol.canonical import digest
from paris_protocol.errors import ParisError
from paris_protocol.net.store import BlobStore
from paris_protocol.records import Cluster, Shard

Json = dict[str, Any]

SHOWN: Final = 24
"""Clips on a page."""
LONGEST: Final = 120.0
"""Seconds in which the pictures of a cluster are made on any machine."""


class Studio:
    """Makes the pictures of a cluster, each once; what failed is not tried again."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._failed: set[Path] = set()

    async def folder(self, source: PageSource, index: int) -> Path:
        """The folder with the cluster's pictures; `not-found` where there can be none."""
        cluster = cluster_of(source, index)
        place = _place(source, cluster)
        async with self._one_at_a_time:
            if not place.is_dir() and place not in self._failed:
                await self._make(source, cluster, place)
        if not place.is_dir():
            raise ParisError("not-found", f"pictures of cluster {index}")
        return place

    async def _make(self, source: PageSource, cluster: Cluster, place: Path) -> None:
        codec, shards = source.genesis.record.codec, usable(source.desk, cluster.shards)
        if not _decodes(source) or codec.file is None or not shards:
            raise ParisError("not-found", f"pictures of cluster {cluster.index}")
        for old in place.parent.glob(f"{cluster.index}-*"):
            shutil.rmtree(old, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        worker = Worker()
        try:
            store = BlobStore(source.state.store)
            files = [await asyncio.to_thread(store.path, s.file.blob) for s in _first(shards)]
            job: Json = {"job": "pictures", "count": SHOWN, "out": str(place)}
            job |= {"codec": str(store.path(codec.file.blob)), "shards": [str(f) for f in files]}
            await worker.run(job, LONGEST)
        except (ParisError, OSError):
            self._failed.add(place)
        finally:
            await worker.close()


STUDIO: Final[web.AppKey[Studio]] = web.AppKey("studio", Studio)


def cluster_of(source: PageSource, index: int) -> Cluster:
    """The cluster of this number, or `not-found`."""
    clusters = source.genesis.record.clusters
    if index >= len(clusters):
        raise ParisError("not-found", f"cluster {index}")
    return clusters[index]


def cluster_page(source: PageSource, index: int) -> Json:
    """What the page of a cluster shows."""
    cluster, desk = cluster_of(source, index), source.desk
    shards, own = usable(desk, cluster.shards), {s.file.blob.id for s in cluster.shards}
    facts = _known(source.state).get(index, {"licences": [], "captions": {}})
    captions: list[str] = [
        caption for s in shards for caption in facts["captions"].get(s.file.blob.id, ())
    ]
    total = sum(shard.clips for shard in shards)
    shown = min(SHOWN, total) if _decodes(source) else min(SHOWN, len(captions))
    captions += [""] * (shown - len(captions))
    return {
        **views.frame(source),
        "cluster": cluster,
        "clips": total,
        "shards": shards,
        "decodes": _decodes(source),
        "pictures": [{"number": n, "caption": captions[n]} for n in range(shown)],
        "licences": facts["licences"],
        "withdrawn": [one for one in listed(desk) if own & set(one["shards"])],
    }


def _first(shards: list[Shard]) -> list[Shard]:
    """As many shards as the shown clips need."""
    found, clips = [], 0
    for shard in shards:
        if clips >= SHOWN:
            break
        found.append(shard)
        clips += shard.clips
    return found


def _decodes(source: PageSource) -> bool:
    codec = source.genesis.record.codec
    return codec.kind == "patch-pca" and codec.file is not None


def _place(source: PageSource, cluster: Cluster) -> Path:
    """Its name follows from the shards, so that none that was withdrawn is shown."""
    shards = [shard.file.blob.id for shard in usable(source.desk, cluster.shards)]
    name = f"{cluster.index}-{digest(['paris/pictures/1', *shards])[:16]}"
    return source.state.folder / "pictures" / name


def _known(state: State) -> dict[int, Json]:
    """Licences and first captions of the training clips of each cluster."""
    try:
        changed = state.origins_file.stat().st_mtime_ns
    except FileNotFoundError:
        return {}
    return _summary(state.folder, changed)


@lru_cache(maxsize=4)
def _summary(folder: Path, changed: int) -> dict[int, Json]:
    """One reading of the table; `changed` makes another after another `init`."""
    state = State(folder)
    where = {
        shard.file.blob.id: cluster.index
        for cluster in state.genesis().record.clusters
        for shard in cluster.shards
    }
    licences: dict[int, Counter[str]] = {}
    captions: dict[int, dict[str, list[str]]] = {}
    for line in origins(state):
        index = where.get(line["shard"] or "")
        if index is None:
            continue
        licences.setdefault(index, Counter())[line["licence"] or "none stated"] += 1
        first = captions.setdefault(index, {}).setdefault(line["shard"], [])
        if len(first) < SHOWN:
            first.append(line.get("caption", ""))
    return {
        index: {"licences": sorted(counts.items()), "captions": captions[index]}
        for index, counts in licences.items()
    }
