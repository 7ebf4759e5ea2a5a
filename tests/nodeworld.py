"""A coordinator and a trainer by script, for tests of the node without torch and without HTTP.

`Office` grants units one after the other, counts what is handed in, and refuses whatever the real
one would: a second result, a contribution before its commitment. `ScriptedTrainer` takes steps when
it is told to, and saves them in the work folder like the real one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paris_node.config import Settings
from paris_node.journal import Journal
from paris_node.kit import Kit
from paris_node.machine import FakeMachine
from paris_protocol.envelope import SELF, Sealed, seal, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey
from paris_protocol.net.memory import MemoryControl
from paris_protocol.net.store import BlobStore
from paris_protocol.records import (
    Assignment,
    AuditReport,
    Beat,
    BlobRef,
    Challenge,
    Cluster,
    Codec,
    Commitment,
    Contribution,
    ExpertSpec,
    Genesis,
    Geometry,
    Head,
    LeaseRequest,
    Licence,
    Margins,
    Opening,
    Policy,
    Rate,
    Recipe,
    RoundPlan,
    RouterSpec,
    Sampler,
    Shard,
    TensorFile,
    Text,
)
from paris_protocol.tensors import states_root

STEPS = 10
NOW = 1_800_000_000.0
Trainer = Any


def key(name: str) -> PrivateKey:
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


ROOT, NODE = key("root"), key("node")


def make_genesis(files: Mapping[str, BlobRef]) -> Sealed[Genesis]:
    """Two clusters with two shards each; the files are named in `Office`."""

    def tensor_file(name: str) -> TensorFile:
        return TensorFile(blob=files[name], root=digest(name))

    record = Genesis(
        name="small",
        created=1_700_000_000,
        root_key=ROOT.id,
        geometry=Geometry(frames=5, height=16, width=16, fps=8),
        codec=Codec(
            kind="patch-pca",
            source="t",
            fingerprint=digest("c"),
            channels=4,
            frames=2,
            height=4,
            width=4,
        ),
        text=Text(
            kind="hashed-words", source="t", fingerprint=digest("t"), length=5, dim=8, pooled_dim=8
        ),
        features="none",
        expert=ExpertSpec(
            patch=1,
            in_channels=4,
            out_channels=4,
            double_blocks=1,
            single_blocks=1,
            heads=1,
            head_dim=16,
            rope_axes=(4, 6, 6),
            text_dim=8,
            pooled_dim=8,
        ),
        initial=tensor_file("initial"),
        recipe=Recipe(
            objective="x0",
            sigma_min="0",
            t_mean="0",
            t_std="1",
            t_shift="1",
            null_text="0.1",
            batch=4,
            optimiser="muon",
            lr="1e-3",
            matrix_lr="0.02",
            beta1="0.9",
            beta2="0.99",
            eps="1e-8",
            weight_decay="0.01",
            momentum="0.95",
            clip_norm="1",
        ),
        router=RouterSpec(width=12, blocks=1, heads=2, batch=4, steps=3, lr="1e-3"),
        sampler=Sampler(steps=4, shift="1", guidance="1.5", top_k=1),
        clusters=tuple(
            Cluster(
                index=k,
                clips=8,
                prior="0.5",
                centroid=("0.5",),
                shards=tuple(Shard(file=tensor_file(f"shard{k}{i}"), clips=4) for i in range(2)),
            )
            for k in range(2)
        ),
        licences=(
            Licence(
                part="weights",
                name="Apache-2.0",
                url="https://apache.org",
                regions_excluded=("XX",),
            ),
        ),
    )
    return seal(record, ROOT, SELF)


def make_policy(network: str, **changes: Any) -> Sealed[Policy]:
    record = Policy(
        number=1,
        previous=None,
        since=1_700_000_000,
        coordinator_keys=(ROOT.id,),
        addresses=("http://127.0.0.1:1",),
        bootstraps=(),
        plan=RoundPlan(
            units=2,
            steps=STEPS,
            rounds=2,
            schedule="slice",
            floor="0.1",
            warmup="0",
            close_after=60,
        ),
        margins=Margins(
            damage=("0.02",),
            merge_damage="0.01",
            standard_errors="3",
            clips=4,
            norm_high="3",
            norm_low="0.2",
            copy_cosine="0.9",
            noise_cosine="0.02",
            source="test",
        ),
        dtype="float32",
        threads=1,
        kernels="reference",
        update_codec="dense-f32",
        commit_every=5,
        soft_deadline=60,
        hard_deadline=120,
        refusals_to_quarantine=3,
        min_version="0.1.0",
    )
    return seal(record.model_copy(update=changes), ROOT, network)


class Office:
    """`control` is the node's side; the counts are the test's."""

    def __init__(self, units: int = 3) -> None:
        self.units = units
        names = ["initial", *(f"shard{k}{i}" for k in range(2) for i in range(2))]
        draft = MemoryControl.__new__(MemoryControl)
        draft._manifests, draft._pieces = {}, {}
        files = {name: draft.add_blob(f"the bytes of {name}".encode() * 50) for name in names}
        self.genesis = make_genesis(files)
        self.network = self.genesis.id
        self.policy = make_policy(self.network)
        self.control = MemoryControl(self.genesis.raw, [self.policy.raw])
        self.control._manifests, self.control._pieces = draft._manifests, draft._pieces
        self.control.handlers = {
            "register": self.register,
            "lease": self.lease,
            "beat": self.beat,
            "commitments": self.commit,
            "contributions": self.contribute,
            "openings": self.open,
            "audits": self.audited,
        }
        self.nodes: set[str] = set()
        self.granted: list[Sealed[Assignment]] = []
        self.commitments: dict[str, str] = {}
        self.contributions: dict[str, Contribution] = {}
        self.accepted: list[str] = []
        self.leases: list[LeaseRequest] = []
        self.beats: list[Beat] = []
        self.judges = True
        """Accept at once; else `audits` asks for states first, and accepts when it has them."""
        self.audits = False
        self.judged: set[str] = set()
        self.asked: dict[str, list[dict[str, Any]]] = {}
        self.openings: list[Opening] = []
        self.reports: list[AuditReport] = []

    # ------------------------------------------------------------ verbs

    def register(self, raw: bytes) -> dict[str, Any]:
        from paris_protocol.records import Registration

        self.nodes.add(unseal(raw, Registration, self.network, None).signer)
        return {"ok": True}

    def lease(self, raw: bytes) -> dict[str, Any]:
        sealed = unseal(raw, LeaseRequest, self.network, self.nodes)
        self.leases.append(sealed.record)
        open_ones = [one for one in self.granted if one.id not in self.accepted]
        open_ones = [one for one in open_ones if one.record.node == sealed.signer]
        if not open_ones and len(self.granted) < self.units:
            self.granted.append(self.assignment(len(self.granted), sealed.signer))
            open_ones = self.granted[-1:]
        if not open_ones and not self.finished:
            raise ParisError("work.none", retry_after=0.01)
        if not open_ones:
            return {"finished": True}
        return {"assignment": json.loads(open_ones[0].raw)}

    def beat(self, raw: bytes) -> dict[str, Any]:
        self.beats.append(unseal(raw, Beat, self.network, self.nodes).record)
        challenges = [one for each in self.asked.values() for one in each]
        return {"ok": True, "finished": self.finished, "challenges": challenges}

    @property
    def finished(self) -> bool:
        waits = self.audits and len(self.judged) < self.units
        return len(self.accepted) >= self.units and not waits

    def commit(self, raw: bytes) -> dict[str, Any]:
        sealed = unseal(raw, Commitment, self.network, self.nodes)
        known = self.commitments.setdefault(sealed.record.assignment, sealed.id)
        if known != sealed.id:
            raise ParisError("unit.second-result")
        return {"ok": True, "id": sealed.id}

    def contribute(self, raw: bytes) -> dict[str, Any]:
        sealed = unseal(raw, Contribution, self.network, self.nodes)
        record = sealed.record
        if self.commitments.get(record.assignment) != record.commitment:
            raise ParisError("commitment.missing")
        self.contributions[sealed.id] = record
        ref = record.update.blob
        self.control.want(ref)
        missing = self.control.missing(ref)
        if not missing and record.assignment not in self.accepted:
            self.accepted.append(record.assignment)
            if self.judges:
                self.judge(sealed.id)
            elif self.audits:
                self.challenge(sealed.id, 1, 2)
        state = "uploading" if missing else "queued"
        unknown = ref.id not in self.control._manifests
        return {
            "id": sealed.id,
            "missing": [] if unknown else missing,
            "manifest_missing": unknown,
            "state": state,
        }

    def judge(self, contribution: str, accepted: bool = True) -> None:
        """Give a verdict, without a proof of it."""
        answer = {"state": "judged", "accepted": accepted, "code": "", "verdict": None}
        self.control.objects[f"contributions/{contribution}"] = {**answer, "merge": None}
        self.judged.add(contribution)

    def challenge(self, contribution: str, *states: int, **changes: Any) -> Sealed[Challenge]:
        """Ask for states with every answer to a beat."""
        record = Challenge(
            contribution=contribution,
            node=NODE.id,
            states=states,
            attempt=1,
            deadline=int(NOW) + 60,
            at=int(NOW),
        )
        author = changes.pop("author", ROOT)
        sealed = seal(record.model_copy(update=changes), author, self.network)
        self.asked.setdefault(contribution, []).append(json.loads(sealed.raw))
        return sealed

    def open(self, raw: bytes) -> dict[str, Any]:
        sealed = unseal(raw, Opening, self.network, self.nodes)
        self.openings.append(sealed.record)
        lacking, missing = [], {}
        for state in sealed.record.states:
            self.control.want(state.file.blob)
            if self.control.missing(state.file.blob):
                lacking.append(state.file.blob.id)
                missing[state.file.blob.id] = self.control.missing(state.file.blob)
        if not lacking and self.audits:
            contribution = sealed.record.contribution
            self.judge(contribution)
            self.asked.pop(contribution, None)
        state = "uploading" if lacking else "complete"
        return {"id": sealed.id, "state": state, "lacking": lacking, "missing": missing}

    def audited(self, raw: bytes) -> dict[str, Any]:
        sealed = unseal(raw, AuditReport, self.network, self.nodes)
        self.reports.append(sealed.record)
        if sealed.record.assignment not in self.accepted:
            self.accepted.append(str(sealed.record.assignment))
        return {"ok": True, "id": sealed.id}

    def assignment(self, number: int, node: str, **changes: Any) -> Sealed[Assignment]:
        genesis = self.genesis.record
        expert = number % 2
        record = Assignment(
            kind="train",
            plan="float32",
            node=node,
            expert=expert,
            round=0,
            unit=number,
            parent=Head(round=0, weights=genesis.initial),
            shards=genesis.clusters[expert].shards[:1],
            seed=digest(f"seed {number}"),
            steps=STEPS,
            batch=4,
            rate=Rate(start="1", end="0.1", shape="cosine", warmup=0),
            optimiser_state="fresh",
            dtype="float32",
            threads=1,
            kernels="reference",
            update_codec="dense-f32",
            commit_every=5,
            policy=1,
            issued=1_700_000_000,
            soft_deadline=4_000_000_000,
            hard_deadline=4_000_000_100,
        )
        return seal(record.model_copy(update=changes), ROOT, self.network)


class ScriptedTrainer:
    """Takes a step per tick of the event loop, unless `gate` is held; dies when `crash` says so."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.crash: Callable[[int], bool] = lambda step: False
        self.trained: list[tuple[str, int]] = []
        """(unit, step) of every step that was ever taken."""
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.opened: list[tuple[str, tuple[int, ...]]] = []
        self.replayed: list[dict[str, Any]] = []
        self.tested: list[tuple[str, tuple[str, ...]]] = []
        self.wrong: set[str] = set()
        """Cases of the numeric self-test that this machine fails."""
        self.pid: int | None = None
        self._unit: Path | None = None
        self._step = 0

    async def train(
        self, order: Mapping[str, Any], hear: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        self.pid, self._unit = 4711, Path(order["work"])
        done = self._unit / "result.json"
        if done.exists():
            return dict(json.loads(done.read_text()))
        saved = self._unit / "state"
        self._step = int(saved.read_text()) if saved.exists() else 0
        hear({"event": "started", "step": self._step})
        while self._step < order["assignment"]["steps"]:
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.crash(self._step):
                self.pid = None
                raise ParisError("trainer.failed", "by script")
            self._step += 1
            self.trained.append((order["unit"], self._step))
            if self._step % 5 == 0:
                saved.write_text(str(self._step))
                hear({"event": "saved", "step": self._step})
            hear({"event": "progress", "step": self._step, "loss": 0.5})
        update = self._unit / "update.safetensors"
        update.write_bytes(f"update of {order['unit']}".encode())
        states = [digest(f"{order['unit']} {step}") for step in (0, 5, 10)]
        facts = {
            "update": str(update),
            "update_root": digest(order["unit"]),
            "states": states,
            "states_root": states_root(states),
            "steps": self._step,
            "samples": self._step * 4,
            "loss": 0.5,
            "seconds": 1.0,
            "numerics": digest("here"),
        }
        done.write_text(json.dumps(facts))
        return facts

    async def test(self, device: str, cases: Sequence[str]) -> list[dict[str, Any]]:
        self.tested.append((device, tuple(cases)))
        return [{"case": one, "rho": 0.5, "passed": one not in self.wrong} for one in cases]

    async def open(self, order: Mapping[str, Any]) -> list[tuple[int, Path, str]]:
        self.opened.append((order["unit"], tuple(order["states"])))
        await self.open_gate.wait()
        self.pid = 4711
        folder = Path(order["work"]) / "opened"
        folder.mkdir(exist_ok=True)
        found = []
        for place in order["states"]:
            path = folder / f"{place}.safetensors"
            path.write_bytes(f"state {place} of {order['unit']}".encode())
            found.append((place, path, order["roots"][place]))
        return found

    async def replay(
        self, order: Mapping[str, Any], hear: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        opened = [Path(path).read_bytes() for _, path in order["states"]]
        self.replayed.append({**order, "bytes": opened})
        hear({"event": "progress", "step": 0})
        found = {"index": 0, "exact": True, "rho": 0.0, "tensor": 0.0, "passed": True}
        segments = [{**found, "limit": 0.0, "tensor_limit": 0.0}]
        return {"numerics": digest("here"), "segments": segments, "passed": True}

    async def pause(self, grace: float) -> int | None:
        saved = None
        if self._unit is not None and self._unit.exists() and self._step < STEPS:
            (self._unit / "state").write_text(str(self._step))
            saved = self._step
        await self.close()
        return saved

    async def close(self) -> None:
        self.pid = None


def make_kit(folder: Path, office: Office, trainer: Any = None, **more: Any) -> Kit:
    folder.mkdir(exist_ok=True)
    (folder / "genesis.json").write_bytes(office.genesis.raw)
    settings = Settings(network="", retry=0.01, retry_cap=0.02, beat=0.05, save_grace=1.0)
    return Kit(
        folder=folder,
        settings=settings,
        version="0.1.0",
        key=NODE,
        network=office.network,
        genesis=office.genesis.record,
        journal=Journal.open(folder / "journal.sqlite", office.network),
        store=BlobStore(folder / "store"),
        control=office.control,
        swarm=None,
        trainer=trainer or ScriptedTrainer(),
        machine=more.get("machine", FakeMachine()),
        clock=lambda: NOW,
        log=logging.getLogger("test"),
    )
