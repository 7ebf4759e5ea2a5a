"""Whatever a stranger sends, a Paris program answers or refuses by name: it never breaks.

Every parser of `fuzz.parsers` gets its valid examples, which it must take, and spoiled ones, for
which only a refusal of the catalogue may come out, within seconds and megabytes. A failure is kept
as a corpus file when PARIS_FUZZ_SAVE is set (hypothesis leaves the smallest one), and corpus files
are replayed for ever. PARIS_FUZZ_EXAMPLES says how many examples each parser gets, and
PARIS_FUZZ_SECONDS how long the slow walk takes.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from itertools import count
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import statements as said
from fuzz.mutate import ALIKE
from fuzz.parsers import CORPUS, PARSERS, Parser, try_bytes
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.records import Merge
from protocol.world import COORDINATOR

EXAMPLES = int(os.environ.get("PARIS_FUZZ_EXAMPLES", "120"))
WALK = float(os.environ.get("PARIS_FUZZ_SECONDS", "10"))
"""CPU seconds that each parser is walked in the slow suite."""
SAVE = "PARIS_FUZZ_SAVE" in os.environ
LARGE = 1 << 20
FILES = sorted(path for path in CORPUS.rglob("*.bin"))


def attempt(parser: Parser, raw: bytes) -> bool:
    """Read the bytes within the parser's seconds; keep them if anything goes wrong."""
    begun = time.process_time()
    try:
        taken = try_bytes(parser, raw)
        spent = time.process_time() - begun
        assert spent < parser.cpu, f"{spent:.2f} s for {len(raw)} bytes"
    except BaseException:
        if SAVE:
            folder = CORPUS / parser.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "found.bin").write_bytes(raw)
        raise
    return taken


@pytest.mark.parametrize("name", PARSERS)
def test_valid_examples_are_taken(name: str) -> None:
    parser = PARSERS[name]
    examples = parser.seeds()
    assert all(attempt(parser, raw) for raw in examples[: parser.sound])


@pytest.mark.parametrize("name", PARSERS)
def test_only_named_refusals_come_out(name: str) -> None:
    parser = PARSERS[name]
    seeds = parser.seeds()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def spoil(random: Random) -> None:
        attempt(parser, parser.spoil(random, seeds))

    spoil()


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_a_longer_walk(name: str) -> None:
    parser = PARSERS[name]
    seeds = parser.seeds()
    end = time.process_time() + WALK
    for number in count():
        if time.process_time() > end:
            break
        raw = parser.spoil(Random(f"{name} {number}"), seeds)
        try:
            attempt(parser, raw)
        except Exception as error:
            raise AssertionError(f"example {number} of {name}: {raw[:200]!r}") from error


@pytest.mark.parametrize("name", PARSERS)
def test_memory_stays_bounded(name: str) -> None:
    parser = PARSERS[name]
    seeds = parser.seeds()
    for number in range(12):
        raw = parser.spoil(Random(f"memory {name} {number}"), seeds)
        tracemalloc.start()
        try:
            try_bytes(parser, raw)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(raw) > LARGE or peak < parser.megabytes << 20, f"{peak >> 20} MB, {raw[:80]!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_once_broke_a_parser_is_refused(path: Path) -> None:
    attempt(PARSERS[path.parent.name], path.read_bytes())


def test_scalars_that_are_no_numbers_are_refused_by_name() -> None:
    """The one that a corpus file cannot keep: it must fit the present lineage in all else."""
    world = said.world()
    merge = next(each.record for each in world.log if isinstance(each.record, Merge))
    for scalar in ALIKE[0][1]:
        for field in ("weight", "scale"):
            part = merge.inputs[0].model_copy(update={field: scalar})
            record = merge.model_copy(update={"inputs": (part, *merge.inputs[1:])})
            raw = seal(record, COORDINATOR, world.network).raw
            with pytest.raises(ParisError) as caught:
                said.read_merge(raw)
            assert caught.value.code == "merge.lineage", (scalar, caught.value.sentence)
    assert said.read_merge(seal(merge, COORDINATOR, world.network).raw) is not None
