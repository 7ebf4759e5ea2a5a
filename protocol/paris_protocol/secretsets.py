"""Secret held-out sets: committed before they judge, opened when they have retired. Pure.

A commitment is the RFC 6962 root over SHA-256(salt || clip digest) in order: it tells nothing about
the clips while the salt is secret. The opening names the salt, the clips' digests (never the clips)
and every mean difference of losses that the set gave, so that anybody can compare the verdicts that
were published as buckets with the numbers behind them::

    root = set_root(salt, digests)
    check_opening(committed, opened)               # secret.set when they are not one set
    check_scores(opened, subjects)                 # … or when a judged contribution is missing
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from paris_protocol.errors import ParisError
from paris_protocol.records import SecretSet, SecretSetOpened
from paris_protocol.tensors import states_root


def set_root(salt: str, clips: Sequence[str]) -> str:
    """Root (hex) over the salted digests of a set's clips, all in hex."""
    start = bytes.fromhex(salt)
    return states_root([hashlib.sha256(start + bytes.fromhex(c)).hexdigest() for c in clips])


def check_opening(committed: SecretSet, opened: SecretSetOpened) -> None:
    """That the opened clips are the committed ones, each once; else `secret.set`."""
    if len(opened.clips) != committed.clips:
        raise ParisError("secret.set", f"{len(opened.clips)} of {committed.clips} clips")
    if set_root(opened.salt, opened.clips) != committed.root:
        raise ParisError("secret.set", f"set {committed.number} of expert {committed.expert}")
    if opened.at < committed.at:
        raise ParisError("secret.set", "opened before it was committed")


def check_scores(opened: SecretSetOpened, judged: Collection[str]) -> None:
    """That the opening names each contribution and merge that the set judged once, no others."""
    named = [subject for subject, _, _ in opened.scores]
    if len(set(named)) != len(named):
        raise ParisError("secret.set", "a score stands there twice")
    missing, foreign = set(judged) - set(named), set(named) - set(judged)
    if missing or foreign:
        one = min(missing or foreign)
        what = "has no score" if missing else "was not judged by this set"
        raise ParisError("secret.set", f"{one[:16]} {what}")
