"""The loop in small with volunteers of several plans: LoRA factors beside sparse updates.

What is asserted comes from the public log and from what an owner sees of a node, nothing else.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loop.promises import check_promises, retrain, root_of
from loop.tiny import TinyNetwork
from paris_models.commands.evidence import Evidence
from paris_models.commands.fleet import resolve
from paris_node.view import NEEDS_OWNER
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import REASONS
from paris_protocol.net.store import BlobStore
from paris_protocol.records import Assignment, Commitment, Contribution

ADAPTERS, SPARSE = ("lora-16-bf16", "lora-int16"), ("float32", "topk-32")
TAKES = """
update_codec = "topk-32"
plans = [{plan = "lora-16-bf16", dtype = "bfloat16", update_codec = "lora-int16", rate = "4"}]
"""

ROUNDED, OWN = ("adafactor", "topk-64"), ("float32", "int8")
TAKES_ROUNDED = """
update_codec = "int8"
plans = [{plan = "adafactor", dtype = "bfloat16", update_codec = "topk-64", rate = "1"}]
"""

Work = tuple[str, Assignment, Commitment, Contribution, str]
"""An accepted contribution's id, its lease, commitment and record, and the node."""


@contextmanager
def network(folder: Path, **how: Any) -> Iterator[TinyNetwork]:
    """A tiny network that serves."""
    net = TinyNetwork(folder, swarm=False, **how)
    try:
        net.serve()
        yield net
    finally:
        net.close()


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of ours to its end."""
    return subprocess.run(resolve(list(command)), capture_output=True, text=True, check=False)


def accepted(evidence: Evidence) -> list[Work]:
    """What was accepted, in the order of its leases."""
    leases, handed_in = evidence.assignments(), evidence.contributions()
    commitments = {
        sealed.id: sealed.record for sealed in evidence.statements.get(Commitment.TYPE, [])
    }
    found = []
    for id in (one.id for one in evidence.judged() if one.accepted):
        record, node = handed_in[id]
        lease, committed = leases[record.assignment], commitments[record.commitment]
        found.append((id, lease, committed, record, node))
    return sorted(found, key=lambda one: (one[1].round, one[1].issued))


def check_residuals(net: TinyNetwork, works: list[Work]) -> int:
    """Units trained again from the log alone, each with what the one before it left out.

    Returns how many began with a residual. Nobody uploads what was left out: whoever trains the
    units in order has it.
    """
    genesis = open_genesis((net.state / "genesis.json").read_bytes(), net.network).record
    store, rests = BlobStore(net.state / "store"), dict[str, dict[str, torch.Tensor]]()
    owner: dict[str, tuple[str, int]] = {}
    for _, lease, commitment, record, node in works:
        begun = lease.residual
        if begun is not None:
            assert owner[begun] == (node, lease.expert), "another's residual, or of another expert"
        again = retrain(genesis, store, lease, None if begun is None else rests[begun])
        assert again.update == record.update.root
        assert again.states == commitment.states
        left = None if again.rest is None else root_of(again.rest)
        assert left == commitment.residual
        if left is not None and again.rest is not None:
            rests[left], owner[left] = again.rest, (node, lease.expert)
    carried = [lease.residual for _, lease, *_ in works if lease.residual is not None]
    assert len(carried) == len(set(carried)), "a residual was made up for twice"
    return len(carried)


def check_release(net: TinyNetwork) -> None:
    """The release and the log hold for whoever repeats every merge and every decision."""
    release = max((net.state / "releases").iterdir(), key=lambda path: path.name)
    blobs = str(net.state / "store")
    run = call(
        "paris", "verify", str(release), "--network", net.network, "--recompute", "--blobs", blobs
    )
    assert run.returncode == 0, run.stderr
    run = call("paris-coordinator", "log", "--check", "--state", str(net.state))
    assert run.returncode == 0, run.stderr


def followed(net: TinyNetwork, name: str) -> dict[str, int]:
    """Heads that a volunteer made from merges, and what it paid for them."""
    found: dict[str, int] = net.node(name).status()["followed"]
    return found


@pytest.mark.slow
def test_factors_and_sparse_updates_with_their_residuals_make_one_network(tmp_path: Path) -> None:
    with network(tmp_path, clips=96, steps=8, rounds=3, policy=TAKES) as net:
        refused = net.join("foreign", "--plan", "adafactor")
        sparse, adapters = net.join("sparse"), net.join("adapters", "--plan", ADAPTERS[0])
        assert refused.process.wait(60) == REASONS["machine.plan"].exit
        said = refused.log.read_text()
        assert said.count(REASONS["machine.plan"].text) == 1 and "adafactor" in said
        assert not (tmp_path / "foreign").exists(), "nothing is enrolled"
        net.wait_finished(240)
        net.until(lambda: None not in (sparse.process.poll(), adapters.process.poll()), 60, "ends")
        assert (sparse.process.returncode, adapters.process.returncode) == (0, 0)
        evidence = net.evidence()
        works = accepted(evidence)
        assert len(works) == len(evidence.judged()) == 12, json.dumps(evidence.updates())
        assert {(one.plan, one.update_codec) for _, one, *_ in works} == {ADAPTERS, SPARSE}
        assert all(
            judged.audited and judged.numbers["L4 exact"] == 1 for judged in evidence.judged()
        )
        check_promises(net, recompute=0)
        assert check_residuals(net, works) >= 1
        plans = {id: lease.plan for id, lease, *_ in works}
        mixed = [
            {plans[one.contribution] for one in merge.inputs} for _, merge in evidence.merges()
        ]
        assert {ADAPTERS[0], SPARSE[0]} in mixed, "no merge of both"
        for name in ("sparse", "adapters"):
            paid = followed(net, name)
            assert paid["heads"] >= 2 and paid["bytes"] * 4 < paid["instead_of"], paid
        check_release(net)


@pytest.mark.slow
def test_a_plan_that_is_taken_no_more_is_said_and_the_network_goes_on(tmp_path: Path) -> None:
    how = {"steps": 8, "rounds": 4, "commit_every": 8, "policy": TAKES_ROUNDED}
    with network(tmp_path, **how) as net:
        net.join("rounded", "--plan", ROUNDED[0])
        net.join("own")

        def carried() -> bool:
            works = accepted(net.evidence())
            return any(one.plan == ROUNDED[0] and one.residual for _, one, *_ in works)

        net.until(carried, 240, "a unit that makes up for what an earlier one left out")
        assert net.server is not None
        net.server.process.terminate()
        net.server.process.wait(60)
        net.fleet.finished(net.server)
        run = call("paris-coordinator", "policy", "--state", str(net.state), "--set", "plans=[]")
        assert run.returncode == 0, run.stderr
        net.serve()
        net.until(lambda: net.node("rounded").status()["why"] == "machine.plan", 120, "its reason")
        state = str(tmp_path / "rounded")
        assert call("paris-node", "status", "--state", state).returncode == NEEDS_OWNER
        net.wait_finished(240)
        evidence = net.evidence()
        works = accepted(evidence)
        assert len(works) == len(evidence.judged()) == 16, json.dumps(evidence.updates())
        assert {(one.plan, one.update_codec) for _, one, *_ in works} == {ROUNDED, OWN}
        assert {one.plan for _, one, *_ in works if one.policy > 1} == {OWN[0]}
        check_promises(net, recompute=0)
        assert check_residuals(net, works) >= 1
        check_release(net)
