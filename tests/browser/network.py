"""A network in memory for the pages: real desk, real records, hostile names, no file but state."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from paris_coordinator.config import State
from paris_coordinator.desk import Desk
from paris_coordinator.events import Filed, Grant, LeaseAsked, Sampled, Uploaded
from paris_coordinator.ledger import Person
from paris_protocol import records
from paris_protocol.envelope import Sealed

HOSTILE = '<script>document.title="pwned"</script><img src=x onerror=alert(1)>\u202e\x07'
NOW = 1_700_000_000


def digest(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()


def key(name: str) -> str:
    return "ed25519:" + digest("key", name)


def file(*words: object) -> records.TensorFile:
    blob = records.BlobRef(id=digest("blob", *words), size=1_300_000)
    return records.TensorFile(blob=blob, root=digest("root", *words))


def genesis() -> records.Genesis:
    clusters = tuple(
        records.Cluster(
            index=k,
            clips=800,
            prior="0.5",
            centroid=("0",),
            shards=tuple(records.Shard(file=file("shard", k, i), clips=200) for i in range(4)),
        )
        for k in range(2)
    )
    text = dict(source="words", fingerprint=digest("t"), length=6, dim=64, pooled_dim=64)
    return records.Genesis(
        name=HOSTILE,
        created=NOW,
        root_key=key("root"),
        geometry=records.Geometry(frames=9, height=24, width=24, fps=8),
        codec=records.Codec(
            kind="patch-pca", source="own", fingerprint=digest("c"), channels=32, frames=3,
            height=4, width=4,
        ),
        text=records.Text(kind="hashed-words", **text),
        features="pixel statistics",
        expert=records.ExpertSpec(
            patch=1, in_channels=32, out_channels=32, double_blocks=1, single_blocks=2, heads=4,
            head_dim=16, rope_axes=(4, 6, 6), text_dim=64, pooled_dim=64,
        ),
        initial=file("initial"),
        recipe=records.Recipe(
            objective="x0", sigma_min="0", t_mean="0.8", t_std="1", t_shift="1", null_text="0.1",
            batch=96, optimiser="muon", lr="0.003", matrix_lr="0.03", beta1="0.9", beta2="0.99",
            eps="1e-8", weight_decay="0", momentum="0.95", clip_norm="1",
        ),
        router=records.RouterSpec(width=32, blocks=2, heads=2, batch=64, steps=200, lr="0.004"),
        sampler=records.Sampler(steps=20, shift="2", guidance="1.5", top_k=1),
        clusters=clusters,
        licences=(records.Licence(part=HOSTILE, name="own", url="javascript:alert(1)"),),
    )  # fmt: skip


def policy() -> records.Policy:
    return records.Policy(
        number=1,
        previous=None,
        since=NOW,
        coordinator_keys=(key("root"),),
        addresses=(),
        bootstraps=(),
        plan=records.RoundPlan(
            units=2, steps=120, rounds=6, schedule="slice", floor="0.02", warmup="0.03",
            close_after=600,
        ),
        margins=records.Margins(
            damage=("0.01",), merge_damage="0.005", standard_errors="2", clips=128,
            norm_high="3", norm_low="0.2", copy_cosine="0.98", noise_cosine="0.02", source="test",
        ),
        dtype="float32", threads=1, kernels="reference", update_codec="dense-f32",
        commit_every=30, soft_deadline=600, hard_deadline=1200, refusals_to_quarantine=3,
        min_version="0.1.0",
    )  # fmt: skip


class NoLog:
    """Every statement stands at index 7."""

    size = 42

    def index_of(self, statement: str) -> int | None:
        return 7


@dataclass
class Network:
    """What the pages read, and the steps by which a test makes it."""

    state: State
    desk: Desk
    genesis: Sealed[records.Genesis]
    network: str = digest("network")
    people: dict[str, Person] = field(default_factory=dict)
    presence: dict[str, tuple[int, records.Beat]] = field(default_factory=dict)
    log: NoLog = field(default_factory=NoLog)
    clock: int = NOW

    def now(self) -> int:
        return self.clock

    def join(self, name: str, shown: str) -> str:
        node = key(name)
        record = records.Registration(node=node, peer_id="12D3", version="0.1.0", at=self.clock)
        self.file(record, node)
        self.people[node] = Person(node, shown, shown, self.clock)
        beat = records.Beat(at=self.clock, assignment=None, step=17, state=shown[:40])
        self.presence[node] = (self.clock, beat)
        return node

    def file(self, record: records.Statement, signer: str) -> str:
        id = digest(record.model_dump_json(), signer)
        self.desk.handle(Filed(id, signer, record), self.clock)
        return id

    def unit(self, node: str, *, code: str = "accepted") -> str:
        """A whole unit of a node, judged; returns the contribution's id."""
        request = records.LeaseRequest(
            at=self.clock, version="0.1.0", name="", device="", memory_mb=16000, disk_mb=90000
        )
        [grant] = self.desk.handle(LeaseAsked(node, request), self.clock)
        assert isinstance(grant, Grant)
        self.clock += 5
        lease = grant.draft
        assignment = self.file(lease, key("root"))
        update = file("update", assignment)
        commitment = self.file(
            records.Commitment(
                assignment=assignment, states=(digest(1),), states_root=digest(2),
                update_root=update.root, steps=120,
            ),
            node,
        )  # fmt: skip
        contribution = self.file(
            records.Contribution(
                assignment=assignment, commitment=commitment, update=update, steps=120,
                samples=11520, loss="0.1941", seconds=31,
            ),
            node,
        )  # fmt: skip
        self.desk.handle(Uploaded(contribution), self.clock)
        self.clock += 25
        good = code == "accepted"
        layers = [
            records.Layer(layer="L0", passed=True, code="", numbers=(("steps", "120"),)),
            records.Layer(layer="L1", passed=True, code="", numbers=(("states", "5"),)),
            records.Layer(layer="L2", passed=True, code="", numbers=(("relative", "0.0213"),)),
            records.Layer(
                layer="L3", passed=good, code="" if good else code,
                numbers=(("n", "64"), ("margin", "0.02"), ("bucket", "-1" if good else "1")),
            ),
        ]  # fmt: skip
        verdict = records.Verdict(
            contribution=contribution, assignment=assignment, node=node, expert=lease.expert,
            round=lease.round, accepted=good, code=code, layers=tuple(layers), policy=1,
            at=self.clock,
        )  # fmt: skip
        self.file(verdict, key("root"))
        return contribution

    def merge(self, k: int, *, published: bool = True) -> str:
        expert = self.desk.experts[k]
        inputs = tuple(
            records.MergeInput(
                contribution=unit.accepted,
                update=self.desk.work_of(unit.accepted).done.update,
                weight=(0.5).hex(),
                scale=(1.0).hex(),
            )
            for unit in expert.units
            if unit.accepted
        )
        before = 0.236 - 0.005 * expert.round - 0.01 * k
        numbers = (
            ("before", f"{before:.4f}"), ("after", f"{before - 0.005:.4f}"), ("delta", "-0.005"),
            ("se", "0.0009"), ("n", "128"),
        )  # fmt: skip
        record = records.Merge(
            expert=k, round=expert.round, parent=expert.head, inputs=inputs,
            result=file("head", k, expert.round, published), published=published,
            numbers=numbers, policy=1, at=self.clock,
        )  # fmt: skip
        return self.file(record, key("root"))


def make_network(folder: Path) -> Network:
    """Two experts after some merges, a refused sign flip, two honest volunteers, one hostile."""
    state = State(folder)
    state.make()
    settings = {"version": 1, "network": digest("network"), "prompts": ["a red ball moves left"]}
    state.settings_file.write_text(json.dumps(settings))
    record = genesis()
    sealed = Sealed(record, b"{}", digest("network"), key("root"))
    network = Network(state, Desk(digest("network"), record, policy(), digest("policy")), sealed)
    first, second = network.join("one", "Ada's attic"), network.join("two", "lab-7")
    bad = network.join("bad", HOSTILE)
    for _ in range(3):
        network.unit(bad, code="loss.damage") if _ < 2 else None
        for node in (first, second, first, second):
            network.unit(node)
        for k in range(2):
            network.merge(k, published=not (_ == 2 and k == 1))
    network.desk.handle(
        Sampled(tuple(network.desk.roots), ("sample-0.mp4", "sample-1.mp4")), network.clock
    )
    network.clock += 400
    for node in (first, bad):
        network.presence[node] = (network.clock, network.presence[node][1])
    return network
