"""Everything in Paris that reads a stranger's bytes, as one table for the fuzzing.

A `Parser` has valid examples, a way to spoil them that knows their structure, and `read`, which
may return anything or refuse with a `ParisError`; every other exception is a bug. Where a stranger
has a key of his own, his statements are signed after they were spoiled, so that the damage gets
past the signature::

    parser = PARSERS["envelope"]
    try_bytes(parser, raw)          # returns, or raises AssertionError with what went wrong
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz import logs, updates, wire
from fuzz import statements as said
from fuzz.mutate import damaged, spoil_json
from paris_protocol.canonical import parse
from paris_protocol.errors import ParisError
from paris_protocol.log import (
    parse_bundle,
)
from paris_protocol.memory import read_seen
from paris_protocol.net import frames
from paris_protocol.net.control import refusal

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Parser:
    """One reader of foreign bytes: name, valid examples, how to spoil them, how to read them."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes], object]
    spoil: Callable[[Random, list[bytes]], bytes] = lambda random, seeds: damaged(
        random, random.choice(seeds), seeds
    )
    refuses: tuple[type[Exception], ...] = (ParisError,)
    sound: int | None = None
    """How many of the examples must be taken; None for all of them."""
    megabytes: int = 64
    """The most memory that reading an example of a megabyte or less may take."""
    cpu: float = 2.0
    """The most CPU seconds that it may take."""


def manifests() -> list[bytes]:
    """Manifests of the vectors that are not large."""
    texts = [each["manifest"] for each in said.vectors("blobs")["blobs"]]
    return [text.encode() for text in texts if len(text) < 9999]


def read_bundle(raw: bytes) -> object:
    """An entry bundle; the width that is asked for stands in front."""
    return parse_bundle(raw[1:], raw[0] if raw else 0)


BROKEN = (ParisError, frames.Broken)
PARSERS = {
    each.name: each
    for each in (
        Parser("canonical", logs.proofs, parse, spoil_json),
        Parser("envelope", said.statements, said.read_statement, said.spoil_statement),
        Parser("merge", said.statements, said.read_merge, said.spoil_merge, sound=0),
        Parser("unit", said.units, said.read_unit, said.spoil_unit),
        Parser("draw", said.draws, said.read_draw, spoil_json),
        Parser("history", said.histories, said.read_history, said.spoil_history),
        Parser("lease", said.leases, said.read_lease, said.spoil_lease),
        Parser("checkpoint", logs.notes, logs.read_note),
        Parser("cosignature", logs.cosigned, logs.read_cosigned),
        Parser("tiles", logs.mirrors, logs.read_log, spoil_json),
        Parser("memory", logs.memories, read_seen, spoil_json),
        Parser("bundle", logs.bundles, read_bundle),
        Parser("proof", logs.proofs, logs.read_proof, spoil_json),
        Parser("release", logs.folders, logs.read_folder, logs.spoil_folder),
        Parser("safetensors", wire.headers, wire.read_header, wire.spoil_header),
        Parser("manifest", manifests, wire.read_manifest, spoil_json),
        Parser("frame-answer", wire.answers, wire.read_answer, refuses=BROKEN, sound=1),
        Parser("frame-request", wire.requests, wire.read_request),
        Parser("pointer", wire.records, wire.read_pointer, spoil_json),
        Parser("words", wire.words, wire.read_words),
        Parser(
            "update",
            updates.update_files,
            updates.read_update,
            updates.spoil_update,
            refuses=(ParisError, ValueError),
        ),
        Parser("refusal", wire.refusals, lambda raw: refusal(400, raw, None), spoil_json),
    )
}


def try_bytes(parser: Parser, raw: bytes) -> bool:
    """Whether the parser took the bytes; False if it refused them as it may."""
    try:
        parser.read(raw)
    except parser.refuses:
        return False
    return True
