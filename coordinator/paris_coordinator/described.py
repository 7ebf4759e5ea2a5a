"""What `prepare` writes down: `prepared.json` with its report, and where every clip comes from.

`private/provenance.jsonl` has a line for each clip, held-out ones too, so it stays with the
coordinator: `{"clip", "name", "source", "licence", "caption", "bucket", "file"}`. `clip` is the
SHA-256 (hex) of the clip's latents as they stand in the file, so anybody who has a shard can name
its clips::

    described = describe(recipe, inputs, tools, clusters, dealt)
    lines = provenance("shards/cluster0/shard1.safetensors", shard, table, items)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from paris_coordinator.captions import Item, Skip
from paris_coordinator.dealing import Dealt, Table
from paris_coordinator.encoding import Order, Row, Words
from paris_coordinator.recipe import Recipe
from paris_coordinator.tools import CODEC_FILE, TEXT_FILE, Tools
from paris_models.checkpoint import raw_bytes
from paris_models.clusters import Clusters
from paris_models.codec import PatchPCA
from paris_models.shards import ClipTable
from paris_models.text import HashedWords, collisions
from paris_models.video import VideoError, read_clip
from paris_protocol.canonical import decimal

FORMAT = 1


def describe(
    recipe: Recipe, inputs: str, tools: Tools, clusters: Clusters, dealt: Sequence[Dealt]
) -> dict[str, Any]:
    """`prepared.json` without its report."""
    total = sum(cluster.clips for cluster in dealt)
    small = tools.small_tensors()
    described = recipe.records() | {"format": FORMAT, "inputs": inputs}
    described["codec"] = {
        "kind": recipe.codec.kind,
        "source": recipe.codec.source,
        "fingerprint": tools.codec.fingerprint,
        "channels": tools.codec.channels,
        **dict(zip(("frames", "height", "width"), _latent(recipe, tools, 0)[1:], strict=True)),
        "path": CODEC_FILE if CODEC_FILE in small else None,
    }
    described["text"] = {
        "kind": recipe.text.kind,
        "source": recipe.text.source,
        "fingerprint": tools.text.fingerprint,
        "length": tools.text.length,
        "dim": tools.text.dim,
        "pooled_dim": tools.text.pooled_dim,
        "path": TEXT_FILE if TEXT_FILE in small else None,
    }
    described["features"] = recipe.features.kind
    described["encoders"] = dict(tools.prints)
    described["buckets"] = [
        {
            "geometry": shape.model_dump(),
            "latent": list(_latent(recipe, tools, bucket)),
            "batch": recipe.batches[bucket],
        }
        for bucket, shape in enumerate(recipe.shapes)
        if bucket
    ]
    described["initial"] = {"path": "initial.safetensors"}
    described["clusters"] = [
        {
            "index": cluster.index,
            "clips": cluster.training,
            "prior": decimal(cluster.clips / total),
            "centroid": [decimal(float(x)) for x in clusters.centroids[cluster.index]],
            **_files(cluster),
        }
        for cluster in dealt
    ]
    return described


def _latent(recipe: Recipe, tools: Tools, bucket: int) -> tuple[int, int, int, int]:
    shape = recipe.shapes[bucket]
    grid = tools.codec.latent_grid(shape.frames, shape.height, shape.width)
    return tools.codec.channels, *grid


def _files(cluster: Dealt) -> dict[str, Any]:
    entries = [
        {"path": path, "clips": len(table.rows), "bucket": table.bucket}
        for path, table in cluster.files().items()
    ]
    held = [{"path": entry["path"], "clips": entry["clips"]} for entry in entries[:2]]
    return {"validation": held[0], "audit": held[1], "shards": entries[2:]}


def metadata(recipe: Recipe, tools: Tools, bucket: int) -> dict[str, str]:
    """What a shard says of itself: who made it of what (F5); `check_encoders` compares."""
    shape = recipe.shapes[bucket]
    return {
        **tools.prints,
        "codec.kind": recipe.codec.kind,
        "codec.scale": "applied",
        "codec.tiling": "none",
        "codec.dtype": "float32",
        "text.kind": recipe.text.kind,
        "text.store": recipe.text.store,
        "features.kind": recipe.features.kind,
        "bucket": str(bucket),
        "geometry": f"{shape.frames}×{shape.height}×{shape.width} at {shape.fps}",
    }


def provenance(
    path: str, table: Table, clips: ClipTable, items: Sequence[Item]
) -> Iterator[dict[str, Any]]:
    """A line for each clip of a file."""
    for row, latents in zip(table.rows, clips.latents, strict=True):
        item = items[row.item]
        yield {
            "clip": hashlib.sha256(raw_bytes(latents)).hexdigest(),
            "name": item.name,
            "source": item.source,
            "licence": item.licence,
            "caption": item.caption,
            "bucket": table.bucket,
            "file": path,
        }


def report(
    order: Order,
    rows: Sequence[Row],
    skips: Sequence[Skip],
    prepared: dict[str, Any],
    tools: Tools,
    words: Words,
) -> dict[str, Any]:
    """What people want to know about a prepared folder."""
    recipe, items = order.recipe, order.items
    captions = {order.captions[row.caption] for row in rows}
    same = collisions(captions) if isinstance(tools.text, HashedWords) else []
    own = [row for row in rows if row.bucket == 0]
    sizes = Counter(row.bucket for row in rows)
    return {
        "videos": len(items),
        "clips": len(rows),
        "skipped": _counted(skip.code for skip in skips),
        "clusters": [
            {
                "training": cluster["clips"],
                "validation": cluster["validation"]["clips"],
                "audit": cluster["audit"]["clips"],
                "prior": cluster["prior"],
            }
            for cluster in prepared["clusters"]
        ],
        "buckets": [
            {"size": f"{s.frames}×{s.height}×{s.width}", "clips": sizes[bucket]}
            for bucket, s in enumerate(recipe.shapes)
        ],
        "licences": _counted(items[row.item].licence or "none stated" for row in rows),
        "captions": len(captions),
        "text": {"store": recipe.text.store, "lost": decimal(words.lost, 4)},
        "collisions": [list(group) for group in same],
        "psnr_db": _round_trip(recipe, [items[r.item] for r in own[:: -(-len(own) // 64)]], tools),
    }


def _counted(names: Iterator[str] | Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _round_trip(recipe: Recipe, items: Sequence[Item], tools: Tools) -> str | None:
    """What the small codec keeps of some clips, as PSNR in dB; large ones are not decoded here."""
    if not isinstance(tools.codec, PatchPCA):
        return None
    try:
        clips = torch.stack([read_clip(item.read(), recipe.geometry) for item in items])
    except (VideoError, OSError):  # changed since it was encoded
        return None
    again = tools.codec.decode(tools.codec.encode(clips))
    error = (again.float() - clips.float()).square().mean() / 255**2
    return decimal(float(-10 * error.clamp(min=1e-12).log10()), 4)
