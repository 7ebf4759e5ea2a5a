"""The secret job: which clips judge a head, as digests under a salt; the clips stay where they are.

The set is what `held_out` draws for the head, in order. Salt and set follow from the operator's key
and the head, so the same job serves the commitment and, when the head is gone, the opening::

    secret({"job": "secret", "private": path, "secret": hex, "head": root, "clips": 256, …})
    # {"salt": hex, "clips": [digest, …], "root": hex}
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

from paris_coordinator.jobs.common import held_out
from paris_models.checkpoint import raw_bytes
from paris_models.shards import ClipTable
from paris_protocol.secretsets import set_root

Json = dict[str, Any]


def secret(job: Json) -> Json:
    """{"salt", "clips", "root"} of the head's set."""
    head = str(job["head"])
    drawn = held_out(
        Path(job["private"]), count=int(job["clips"]), secret=str(job["secret"]), salt=head
    )
    salt = hashlib.sha256(f"secret-set/{job['secret']}/{head}".encode()).hexdigest()
    clips = clip_digests(drawn.clips)
    return {"salt": salt, "clips": clips, "root": set_root(salt, clips)}


def clip_digests(table: ClipTable) -> list[str]:
    """SHA-256 (hex) of each clip: the shape of its latents, the latents, its encoded caption."""
    found = []
    for row in range(len(table)):
        caption = int(table.caption[row])
        clip = hashlib.sha256(b"paris/clip/1\0")
        clip.update(struct.pack("<4Q", *table.shape))
        for tensor in (table.latents[row], table.text_seq[caption], table.text_pooled[caption]):
            clip.update(raw_bytes(tensor.contiguous()))
        found.append(clip.hexdigest())
    return found
