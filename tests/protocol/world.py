"""A small network that exists as statements only: two experts, two nodes, rounds, a release."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from paris_protocol.averages import kept_share, released
from paris_protocol.canonical import real, sha256_hex
from paris_protocol.envelope import SELF, Sealed, seal
from paris_protocol.evidence import lineage_statements
from paris_protocol.keys import PrivateKey
from paris_protocol.lineage import committed_steps
from paris_protocol.log import Checkpoint, Tree, bundles, leaf_hash, origin
from paris_protocol.records import (
    Assignment,
    BlobRef,
    Cluster,
    Codec,
    Commitment,
    Contribution,
    ExpertSpec,
    Genesis,
    Geometry,
    Head,
    Index,
    Margins,
    Merge,
    MergeInput,
    Policy,
    Rate,
    Recipe,
    Release,
    ReleasedExpert,
    ReleaseFile,
    RoundPlan,
    RouterSpec,
    Sampler,
    Shard,
    TensorFile,
    Text,
    Verdict,
)
from paris_protocol.release import (
    Verified,
    is_provenance,
    proof_file,
    provenance_files,
    verify_release,
)
from paris_protocol.tensors import states_root


def seed(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def key(name: str) -> PrivateKey:
    return PrivateKey.from_seed(seed(name))


def hexed(name: str) -> str:
    return seed(name).hex()


def tensor_file(name: str) -> TensorFile:
    return TensorFile(blob=BlobRef(id=hexed(name), size=1000), root=hexed(f"root of {name}"))


ROOT, COORDINATOR, OTHER = key("root"), key("coordinator"), key("other coordinator")
NODES = (key("ada"), key("bob"))
STEPS, BATCH, EVERY = 30, 4, 8


def cluster(index: int) -> Cluster:
    shards = (Shard(file=tensor_file(f"shard {index}.{i}"), clips=8) for i in range(2))
    return Cluster(index=index, clips=16, prior="0.5", centroid=("0.5",), shards=tuple(shards))


def genesis_record(ema: str = "0") -> Genesis:
    return Genesis(
        name="test", created=1_700_000_000, root_key=ROOT.id,
        geometry=Geometry(frames=5, height=16, width=16, fps=8),
        codec=Codec(
            kind="patch-pca", source="here", fingerprint=hexed("codec"), channels=4, frames=2,
            height=4, width=4,
        ),
        text=Text(
            kind="hashed-words", source="here", fingerprint=hexed("text"), length=8, dim=8,
            pooled_dim=8,
        ),
        features="none",
        expert=ExpertSpec(
            patch=1, in_channels=4, out_channels=4, double_blocks=1, single_blocks=1, heads=1,
            head_dim=16, rope_axes=(4, 6, 6), text_dim=8, pooled_dim=8,
        ),
        initial=tensor_file("initial"),
        recipe=Recipe(
            objective="velocity", sigma_min="0", t_mean="0", t_std="1", t_shift="1",
            null_text="0.1", batch=BATCH, optimiser="adamw", lr="1e-3", matrix_lr="0.02",
            beta1="0.9", beta2="0.99", eps="1e-8", weight_decay="0", momentum="0.95",
            clip_norm="1", ema=ema,
        ),
        router=RouterSpec(width=8, blocks=1, heads=1, batch=8, steps=10, lr="1e-3"),
        sampler=Sampler(steps=4, shift="1", guidance="1.5", top_k=1),
        clusters=(cluster(0), cluster(1)),
        licences=(),
    )  # fmt: skip


def policy_record(number: int, previous: str | None, keys: tuple[str, ...]) -> Policy:
    return Policy(
        number=number, previous=previous, since=1_700_000_000, coordinator_keys=keys,
        addresses=("http://127.0.0.1:1",), bootstraps=(),
        plan=RoundPlan(
            units=2, steps=STEPS, rounds=2, schedule="slice", floor="0.02", warmup="0.03",
            close_after=60,
        ),
        margins=Margins(
            damage=("0.01",), merge_damage="0.01", standard_errors="3", clips=16,
            norm_high="3", norm_low="0.2", copy_cosine="0.9", noise_cosine="0", source="test",
        ),
        dtype="float32", threads=1, kernels="reference", update_codec="dense-f32",
        commit_every=EVERY, soft_deadline=60, hard_deadline=120, refusals_to_quarantine=3,
        min_version="0.1.0",
    )  # fmt: skip


class World:
    """Makes signed statements in an order that can be true; `log` holds them."""

    def __init__(self, ema: str = "0") -> None:
        self.genesis = seal(genesis_record(ema), ROOT, SELF)
        self.network = self.genesis.id
        first = seal(policy_record(1, None, (OTHER.id,)), ROOT, self.network)
        second = seal(policy_record(2, first.id, (COORDINATOR.id,)), ROOT, self.network)
        self.policies = [first, second]
        self.log: list[Sealed[Any]] = [self.genesis, first, second]
        self.heads = [Head(round=0, weights=tensor_file("initial")) for _ in range(2)]

    def put(self, record: Any, signer: PrivateKey) -> Sealed[Any]:
        sealed = seal(record, signer, self.network)
        self.log.append(sealed)
        return sealed

    def assignment(self, expert: int, unit: int, /, **changes: Any) -> Assignment:
        head = self.heads[expert]
        made = Assignment(
            kind="train", plan="float32", node=NODES[unit].id, expert=expert, round=head.round,
            unit=unit, parent=head, shards=(cluster(expert).shards[unit],),
            seed=hexed(f"seed {expert} {unit} {len(self.log)}"), steps=STEPS, batch=BATCH,
            rate=Rate(start="1", end="0.5", shape="cosine", warmup=1), optimiser_state="fresh",
            dtype="float32", threads=1, kernels="reference", update_codec="dense-f32",
            commit_every=EVERY, policy=2, issued=1_700_000_000, soft_deadline=1_700_000_060,
            hard_deadline=1_700_000_120,
        )  # fmt: skip
        return made.model_copy(update=changes)

    def unit(
        self, expert: int, unit: int, /, **changes: Any
    ) -> tuple[Sealed[Assignment], Sealed[Commitment], Sealed[Contribution]]:
        assignment = self.put(self.assignment(expert, unit, **changes), COORDINATOR)
        states = tuple(hexed(f"{assignment.id} {s}") for s in committed_steps(STEPS, EVERY))
        update = tensor_file(f"update of {assignment.id}")
        commitment = self.put(
            Commitment(
                assignment=assignment.id, states=states, states_root=states_root(states),
                update_root=update.root, steps=STEPS,
            ),
            NODES[unit],
        )  # fmt: skip
        contribution = self.put(
            Contribution(
                assignment=assignment.id, commitment=commitment.id, update=update, steps=STEPS,
                samples=STEPS * BATCH, loss="0.5", seconds=3,
            ),
            NODES[unit],
        )  # fmt: skip
        return assignment, commitment, contribution

    def judge(self, expert: int, unit: int, /, accepted: bool = True, **changes: Any) -> Any:
        assignment, _, contribution = self.unit(expert, unit, **changes)
        self.put(
            Verdict(
                contribution=contribution.id, assignment=assignment.id, node=assignment.record.node,
                expert=expert, round=assignment.record.round, accepted=accepted,
                code="" if accepted else "loss.damage", layers=(), policy=2, at=1_700_000_100,
            ),
            COORDINATOR,
        )  # fmt: skip
        return contribution, assignment

    def merge_record(self, expert: int, contributions: list[Any], /, **changes: Any) -> Merge:
        head = self.heads[expert]
        steps = sum(each.record.steps for each in contributions)
        ema, published = real(self.genesis.record.recipe.ema), changes.get("published", True)
        averaged = {
            "average": tensor_file(f"average {expert} {len(self.log)}"),
            "decay": kept_share(ema, steps).hex(),
        }
        made = Merge(
            expert=expert, round=head.round, parent=head,
            inputs=tuple(
                MergeInput(
                    contribution=each.id, update=each.record.update,
                    weight=(1 / len(contributions)).hex(), scale=(1.0).hex(),
                )
                for each in contributions
            ),
            result=tensor_file(f"head {expert} {len(self.log)}"), published=True, numbers=(),
            policy=2, at=1_700_000_200,
        )  # fmt: skip
        return made.model_copy(update=(averaged if ema and published else {}) | changes)

    def merge(self, expert: int, published: bool = True) -> Sealed[Merge]:
        judged = [self.judge(expert, unit)[0] for unit in range(2)]
        merge = self.put(self.merge_record(expert, judged, published=published), COORDINATOR)
        if published:
            self.heads[expert] = Head(
                round=merge.record.round + 1, weights=merge.record.result, merge=merge.id
            )
        return merge

    def accepted(self) -> dict[str, tuple[Contribution, Assignment]]:
        by_id = {each.id: each.record for each in self.log}
        return {
            each.id: (each.record, by_id[each.record.assignment])
            for each in self.log
            if isinstance(each.record, Contribution)
        }

    def lived(self) -> World:
        """Two rounds for expert 0 (the first one repeated), one for expert 1, a refusal."""
        self.merge(0, published=False)
        self.merge(0)
        self.judge(1, 0, accepted=False)
        self.merge(1)
        self.merge(0)
        return self

    def release(
        self,
        *,
        signer: PrivateKey = COORDINATOR,
        lineage: list[Sealed[Any]] | None = None,
        **changes: Any,
    ) -> dict[str, bytes]:
        """The files of a release folder of the present heads."""
        chosen = lineage_statements(self.heads, self.log) if lineage is None else lineage
        merges = {each.id: each.record for each in chosen if isinstance(each.record, Merge)}
        files = {
            "model_index.json": b"{}",
            "expert_0/config.json": b"{}",
            "expert_0/diffusion_pytorch_model.safetensors": b"weights of expert 0",
            "README.md": b"# A release\n",
            **provenance_files(self.genesis, self.policies, chosen),
        }
        record = Release(
            number=1, previous=None,
            files=tuple(
                ReleaseFile(path=path, sha256=sha256_hex(data), size=len(data))
                for path, data in sorted(files.items())
            ),
            experts=tuple(
                ReleasedExpert(expert=i, merge=head.merge, root=released(head, merges).root)
                for i, head in enumerate(self.heads)
            ),
            router_root=hexed("router"), at=1_700_000_300,
        )  # fmt: skip
        release = self.put(record.model_copy(update=changes), signer)
        files["release.json"] = release.raw
        files["proof.json"] = self.proof([*self.policies, *chosen, release])
        return files

    def proof(self, statements: list[Sealed[Any]], signer: PrivateKey = COORDINATOR) -> bytes:
        tree = Tree(leaf_hash(bytes.fromhex(each.id)) for each in self.log)
        ids = [each.id for each in self.log]
        note = Checkpoint(origin(self.network), tree.size, tree.root()).sign(signer)
        indices = {each.id: ids.index(each.id) for each in statements}
        return proof_file(note, tree, tree.size, indices)


def log_files(
    world: World, size: int | None = None, *, signer: PrivateKey = COORDINATOR, **changes: Any
) -> dict[str, bytes]:
    """The files of the world's log over its first `size` statements, with a signed index."""
    entries = world.log[:size]
    ids = [bytes.fromhex(each.id) for each in entries]
    tree = Tree(map(leaf_hash, ids))
    note = Checkpoint(origin(world.network), tree.size, tree.root()).sign(signer)
    releases = [each.id for each in entries if isinstance(each.record, Release)]
    record = Index(
        policy=world.policies[-1].id, heads=tuple(world.heads), log_size=tree.size,
        release=releases[-1] if releases else None, log_root=tree.root().hex(), finished=False,
        at=1_700_001_000,
    ).model_copy(update=changes)  # fmt: skip
    return {
        "checkpoint": note.encode(),
        "index.json": seal(record, signer, world.network).raw,
        **dict(tree.tiles()),
        **dict(bundles(ids)),
        **{f"statements/{each.id}.json": each.raw for each in entries},
    }


def put_files(folder: Path, files: dict[str, bytes]) -> Path:
    """The files below `folder`, which holds nothing else then."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def check(files: dict[str, bytes], network: str | None = None) -> Verified:
    """Verify a folder given as path → bytes."""
    facts = {path: (sha256_hex(data), len(data)) for path, data in files.items()}
    provenance = {path: data for path, data in files.items() if is_provenance(path)}
    return verify_release(facts, provenance, network)
