"""What must hold of a network's public log, whatever was killed on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from loop.tiny import TinyNetwork
from paris_models import lean
from paris_models.checkpoint import load_tensors, raw_items
from paris_models.commands.evidence import Evidence
from paris_models.config import ExpertConfig, RecipeConfig, UnitConfig
from paris_models.plans import plan_of
from paris_models.replay import train_whole
from paris_models.shards import read_shards
from paris_protocol.draws import check_draws
from paris_protocol.envelope import open_genesis, unseal_any
from paris_protocol.net.logs import LogPlace, read_log
from paris_protocol.net.store import BlobStore
from paris_protocol.records import Assignment, Commitment, Genesis, Policy
from paris_protocol.streams import unit_key
from paris_protocol.tensors import tensor_root


def check_promises(net: TinyNetwork, recompute: int = 2) -> None:
    """Nothing accepted lost, nothing counted twice, no half-applied step, one head per expert.

    Everything that was drawn for an audit was replayed with equal bits, and every draw is the only
    one possible.

    `recompute` contributions are trained again from their assignments alone, never interrupted:
    they must have the same tensor roots, committed states included.
    """
    evidence = net.evidence()
    judged = evidence.judged()
    accepted = [verdict.id for verdict in judged if verdict.accepted]
    merges = [merge for _, merge in evidence.merges() if merge.published]
    merged = Counter(each.contribution for merge in merges for each in merge.inputs)
    assert set(accepted) == set(merged), (
        "an accepted contribution was lost, or one was merged unaccepted"
    )
    assert all(count == 1 for count in merged.values()), "a contribution was counted twice"
    assert len(accepted) == len(set(accepted)), "a contribution was judged twice"
    leases = evidence.assignments()
    handed_in = evidence.contributions()
    per_lease = Counter(record.assignment for record, _ in handed_in.values())
    assert all(count == 1 for count in per_lease.values()), "two results for one assignment"
    for expert in {merge.expert for merge in merges}:
        line = sorted(
            (merge for merge in merges if merge.expert == expert), key=lambda merge: merge.round
        )
        assert [merge.round for merge in line] == list(range(len(line))), (
            "a lineage with a gap or a fork"
        )
        for before, after in pairwise(line):
            assert after.parent.weights == before.result
    draws = check_audits(net, evidence)
    assert draws["waiting"] == [] or not net.view.finished()
    genesis = open_genesis((net.state / "genesis.json").read_bytes(), net.network).record
    store = BlobStore(net.state / "store")
    commitments = {sealed.id: sealed.record for sealed in evidence.statements[Commitment.TYPE]}
    for id in accepted[:recompute] + accepted[len(accepted) - recompute :]:
        contribution = handed_in[id][0]
        again = retrain(genesis, store, leases[contribution.assignment], None)
        assert again.update == contribution.update.root, (
            "the update is not what uninterrupted training gives"
        )
        assert again.states == commitments[contribution.commitment].states, (
            "a committed state differs"
        )


def check_audits(net: TinyNetwork, evidence: Evidence) -> dict[str, Any]:
    """All draws of the log, repeated; honest work is replayed with equal bits."""
    place = LogPlace(net.state / "log")
    ids = read_log(place, net.network).reader.entries()
    statements = [unseal_any(place.statement(id), net.network) for id in ids]
    policies = {
        sealed.record.number: sealed.record
        for sealed in statements
        if isinstance(sealed.record, Policy)
    }
    for judged in evidence.judged():
        if judged.audited and judged.accepted:
            numbers = judged.numbers
            assert numbers["L4 segments"] >= 1 and numbers["L4 rho"] == 0
            assert numbers["L4 exact"] == 1, "two processes of one machine are of one class"
    return check_draws(statements, policies)


@dataclass(frozen=True)
class Retrained:
    """A unit trained again: roots of its update and committed states, and what it left out."""

    update: str
    states: tuple[str, ...]
    rest: dict[str, torch.Tensor] | None


def retrain(
    genesis: Genesis, store: BlobStore, lease: Assignment, begun: Mapping[str, torch.Tensor] | None
) -> Retrained:
    """What training the unit in one go gives; `begun` is the residual that it begins with."""
    torch.set_num_threads(lease.threads)
    config, recipe = (
        ExpertConfig.from_record(genesis.expert),
        RecipeConfig.from_record(genesis.recipe),
    )
    plan, codec = plan_of(lease.plan), lease.update_codec
    parent = load_tensors(store.path(lease.parent.weights.blob))
    clips = read_shards([store.path(shard.file.blob) for shard in lease.shards])
    unit = UnitConfig.from_record(lease, unit_key(lease.seed))
    start = parent if begun is None else lean.start_of(parent, begun)
    state, roots = train_whole(config, recipe, unit, clips, start, root_of, plan=plan)
    last = lean.state_tensors(state)
    update = lean.update_of(plan, parent, last, codec, begun)
    rest = lean.rest_of(plan, parent, last, update, codec, begun)
    return Retrained(root_of(update), tuple(roots), rest)


def root_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Merkle root of tensors."""
    return tensor_root(raw_items(tensors))
