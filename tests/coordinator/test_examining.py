"""`audit` on demand: real training is replayed from the assignment alone, or from opened states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from paris_coordinator import examining
from paris_coordinator.board import Work
from paris_coordinator.worker import perform
from paris_protocol.errors import ParisError
from paris_protocol.records import BlobRef
from tinynet import TinyNet, Unit, hexed


class Store:
    """The files of a tiny network by blob id."""

    def __init__(self, net: TinyNet, unit: Unit) -> None:
        self.files = {net.head.weights.blob.id: net.head_file}
        for k, cluster in enumerate(net.genesis.record.clusters):
            for i, shard in enumerate(cluster.shards):
                self.files[shard.file.blob.id] = net.shard(k, i)
        self.files[unit.contribution.update.blob.id] = unit.update

    def has(self, ref: BlobRef) -> bool:
        return ref.id in self.files

    def path(self, ref: BlobRef) -> Any:
        return self.files[ref.id]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def honest(net: TinyNet) -> Unit:
    return net.unit(0, 0)


def numerics(net: TinyNet) -> str:
    job = {"job": "numerics", "genesis": str(net.folder / "genesis.json"), "dtype": "float32",
           "threads": 1, "kernels": "reference"}  # fmt: skip
    return str(perform(job)["result"]["numerics"])


def examined(net: TinyNet, unit: Unit, places: list[int], own: str | None) -> dict[str, Any]:
    state = cast(Any, SimpleNamespace(genesis_file=net.folder / "genesis.json"))
    result = unit.contribution.model_copy(update={"numerics": own})
    work = Work(
        hexed("w"), unit.assignment, 0, committed=unit.commitment, contribution=hexed("c"),
        handed_in=result,
    )  # fmt: skip
    store = cast(Any, Store(net, unit))
    found = examining._from_assignment(state, store, work, places)
    for segment in found["segments"]:
        segment["steps"] = [0, 1]
    facts = {"contribution": hexed("c"), "node": unit.assignment.node, **found}
    facts["text"] = examining.examine_text(facts)
    return facts


def test_honest_training_is_found_equal_bit_for_bit(net: TinyNet, honest: Unit) -> None:
    facts = examined(net, honest, [0, 1, 2], numerics(net))
    assert facts["passed"] is True
    assert [segment["passed"] for segment in facts["segments"]] == [True] * 3
    assert facts["rho"] == "0"
    assert facts["text"].count("equal bits") == 4


def test_the_first_wrong_segment_is_named_and_what_follows_is_not_judged(
    net: TinyNet, honest: Unit
) -> None:
    states = list(honest.commitment.states)
    states[2] = hexed("another state")
    cheat = Unit(
        honest.assignment,
        honest.commitment.model_copy(update={"states": tuple(states)}),
        honest.contribution,
        honest.update,
    )
    own = numerics(net)
    facts = examined(net, cheat, [0, 1, 2], own)
    assert facts["passed"] is False
    assert facts["code"] == "audit.mismatch"
    assert [(s["index"], s["passed"]) for s in facts["segments"]] == [(0, True), (1, False)]
    assert "NOT what was committed" in facts["text"]
    elsewhere = examined(net, cheat, [1], "f" * 64)  # another class of machine: no conclusion
    assert elsewhere["passed"] is None
    assert "No conclusion" in elsewhere["text"]


def test_opened_states_are_used_while_they_are_kept(net: TinyNet, honest: Unit) -> None:
    ref = BlobRef(id=hexed("state"), size=1)
    opened = SimpleNamespace(index=1, file=SimpleNamespace(blob=ref))
    audit = SimpleNamespace(opening=SimpleNamespace(states=[opened]))
    desk = cast(Any, SimpleNamespace(audits={hexed("c"): audit}))
    work = Work(hexed("w"), honest.assignment, 0, contribution=hexed("c"))
    store = Store(net, honest)
    kept = cast(Any, store)
    assert examining._kept_states(desk, kept, work, [1]) is None  # deleted after the verdict
    store.files[ref.id] = net.head_file
    assert examining._kept_states(desk, kept, work, [1]) == [[1, str(net.head_file)]]
    assert examining._kept_states(desk, kept, work, [0]) is None  # needs no opening
    assert examining._kept_states(desk, kept, work, [1, 2]) is None  # not all are here


def test_nothing_committed_is_said(net: TinyNet, honest: Unit) -> None:
    work = Work(hexed("w"), honest.assignment, 0, handed_in=honest.contribution)
    state = cast(Any, SimpleNamespace(genesis_file=net.folder / "genesis.json"))
    with pytest.raises(ParisError) as refusal:
        examining._from_assignment(state, cast(Any, Store(net, honest)), work, [0])
    assert refusal.value.code == "commitment.missing"
