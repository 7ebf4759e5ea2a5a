"""`paris verify`: check a release folder offline, every byte of it.

Signatures from genesis to release, the digest of every file, the lineage of every expert, the log
proofs. Without `--network` the folder's own genesis is believed, and the answer says so::

    run_verify(Path("release"), "paris://train.example.org/…")["verified"]      # True, or it raises
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from paris_protocol.net.folder import named_network, verify_folder


def run_verify(
    release: Path, network: str | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Facts about a release that was found to be whole; otherwise the `release.*` refusal."""
    found = verify_folder(release, named_network(network), progress)
    record = found.release.record
    return {
        "verified": True,
        "network": found.network,
        "network_pinned": network is not None,
        "release": found.release.id,
        "number": record.number,
        "at": record.at,
        "files": len(record.files),
        "bytes": sum(entry.size for entry in record.files),
        "experts": len(record.experts),
        "merges": found.merges,
        "log_size": found.checkpoint.size,
    }
