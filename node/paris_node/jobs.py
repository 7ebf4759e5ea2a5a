"""The jobs of a volunteer's phases: ask, admit, fetch, train, commit, hand in, clear.

Each is a coroutine that may be cancelled or killed at any point and begun again; what is done stays
done. Nothing is believed that is not signed by the coordinator's current keys, and no lease that
would mix an expert with other clusters' shards is taken (`structure.lineage`)::

    jobs = Jobs(kit)
    unit = await jobs.ask()                            # the assignment's id, journalled
    await jobs.run(Phase.FETCHING, unit, hear)
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Final

from paris_node.config import Settings
from paris_node.fit import need_of_network
from paris_node.journal import Journal, Letter, Receipt
from paris_node.machine import Machine
from paris_node.training import TrainerProcess
from paris_node.volunteer import Phase
from paris_protocol.canonical import canonical, decimal
from paris_protocol.envelope import Sealed, seal, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, peer_id
from paris_protocol.net.control import Control
from paris_protocol.net.fetch import fetch_blob, upload_blob
from paris_protocol.net.store import BlobStore
from paris_protocol.net.swarm import Swarm
from paris_protocol.records import (
    Assignment,
    BlobRef,
    Commitment,
    Contribution,
    Genesis,
    LeaseRequest,
    Registration,
    TensorFile,
)

HEADROOM_MB: Final = 64
BOOTSTRAPS: Final = "bootstraps"
"""Fact in the journal: where the swarm is entered, as the last verified policy said."""
TAKEN: Final = frozenset({"queued", "judged"})
"""States of a contribution in which the coordinator has everything."""
_HOPELESS: Final = ("unit.", "structure.", "commitment.", "record.", "tensor.")
_CURABLE: Final = frozenset({"record.signer"})
"""A coordinator that was set back may have forgotten this node: it registers again."""

Hear = Callable[[int], None]


def is_final(phase: Phase, code: str) -> bool:
    """Whether a failure with this code means that the unit in hand can no longer count."""
    if phase in (Phase.IDLE, Phase.ACK) or code in _CURABLE:
        return False
    return code.startswith(_HOPELESS) or code in ("machine.too-small", "node.quarantined")


@dataclass
class Kit:
    """What the jobs work with; put together by `app`."""

    folder: Path
    settings: Settings
    version: str
    key: PrivateKey
    network: str
    genesis: Genesis
    journal: Journal
    store: BlobStore
    control: Control
    swarm: Swarm | None
    trainer: TrainerProcess
    machine: Machine
    clock: Callable[[], float]
    log: Logger
    join_swarm: Callable[[], Awaitable[None]] | None = None
    registered: bool = False
    loss: float | None = None


class NetworkOver(Exception):
    """The coordinator says that the network has all it planned."""


class Jobs:
    """See the module; a subclass may change what `craft` hands in (the hostile double does)."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    async def run(self, phase: Phase, unit: str, hear: Hear) -> None:
        """Do the job of a phase that has a unit; `hear` takes the steps or bytes done so far."""
        jobs: dict[Phase, Callable[[str, Hear], Awaitable[None]]] = {
            Phase.LEASED: self.admit,
            Phase.FETCHING: self.fetch,
            Phase.TRAINING: self.train,
            Phase.COMMIT: self.commit,
            Phase.OUTBOX: self.hand_in,
            Phase.ACK: self.clear,
        }
        await jobs[phase](unit, hear)

    # ------------------------------------------------------------ asking for work

    async def ask(self) -> str:
        """Lease a unit and journal it; `work.none`, or `NetworkOver` when the network is done."""
        kit = self.kit
        await self._register()
        device = await asyncio.to_thread(kit.machine.device, kit.settings.device)
        shards = [s.file.blob for cluster in kit.genesis.clusters for s in cluster.shards]
        request = LeaseRequest(
            at=int(kit.clock()),
            version=kit.version,
            name=kit.settings.name,
            device=device.name[:200],
            memory_mb=device.memory_mb,
            disk_mb=kit.machine.disk_mb(kit.folder),
            cached=tuple(ref.id for ref in shards if kit.store.has(ref)),
        )
        answer = await kit.control.post("lease", seal(request, kit.key, kit.network).raw)
        if answer.get("finished") is True:
            raise NetworkOver
        if not isinstance(answer.get("assignment"), dict):
            raise ParisError("network.not-paris", "a lease is answered by an assignment")
        sealed = await self._opened(canonical(answer["assignment"]))
        check_lease(sealed.record, kit.key.id, kit.genesis)
        kit.journal.keep_unit(sealed.id, sealed.raw, kit.clock())
        return sealed.id

    async def _register(self) -> None:
        kit = self.kit
        if kit.registered:
            return
        await kit.control.hello()
        policy = (await kit.control.policy()).record
        if version_tuple(kit.version) < version_tuple(policy.min_version):
            raise ParisError("network.version", f"{policy.min_version} or newer")
        record = Registration(
            node=kit.key.id, peer_id=peer_id(kit.key.id), version=kit.version, at=int(kit.clock())
        )
        await kit.control.post("register", seal(record, kit.key, kit.network).raw)
        kit.registered = True
        kit.journal.set_fact(BOOTSTRAPS, json.dumps(policy.bootstraps))
        if kit.join_swarm is not None:
            await kit.join_swarm()

    async def _opened(self, raw: bytes) -> Sealed[Assignment]:
        """An assignment signed by a coordinator key of the current policy."""
        keys = (await self.kit.control.policy()).record.coordinator_keys
        return unseal(raw, Assignment, self.kit.network, keys)

    def assignment(self, unit: str) -> Assignment:
        """The journalled assignment of a unit; it was verified when it was taken."""
        raw = self.kit.journal.unit(unit)
        if raw is None:
            raise ParisError("unit.unknown", f"{unit[:12]} is not in the journal")
        return unseal(raw, Assignment, self.kit.network, None).record

    # ------------------------------------------------------------ the phases of a unit

    async def admit(self, unit: str, hear: Hear) -> None:
        """Whether there is still time, memory and disk for this unit."""
        kit, assignment = self.kit, self.assignment(unit)
        if kit.clock() >= assignment.hard_deadline:
            raise ParisError("unit.closed", "its deadline has passed")
        need = need_of_network(kit.genesis)
        lacking = [ref.size for ref in needed_blobs(assignment) if not kit.store.has(ref)]
        room = kit.machine.disk_mb(kit.folder)
        if (sum(lacking) >> 20) + need.disk_mb - need.download_mb + HEADROOM_MB > room:
            raise ParisError("disk.full", f"a unit needs {need.disk_mb} MB, {room} MB are free")
        (kit.folder / "work" / unit).mkdir(parents=True, exist_ok=True)

    async def fetch(self, unit: str, hear: Hear) -> None:
        """Bring parent head and shards into the store: peers first, the coordinator otherwise."""
        kit, assignment = self.kit, self.assignment(unit)
        if kit.clock() >= assignment.hard_deadline:
            raise ParisError("unit.closed", "its deadline has passed")
        refs, before = needed_blobs(assignment), 0
        for ref in refs:
            kit.store.pin(ref.id)

            def count(here: int, _: int, before: int = before) -> None:
                hear(before + here)

            await fetch_blob(ref, kit.store, kit.swarm, kit.control, progress=count)
            before += ref.size
        await self.announce([ref.id for ref in refs])

    async def train(self, unit: str, hear: Hear) -> None:
        """Train all steps, then sign commitment and contribution and put them into the outbox."""
        kit, assignment = self.kit, self.assignment(unit)
        if kit.journal.letters(unit):
            return
        if kit.clock() >= assignment.hard_deadline:
            raise ParisError("unit.closed", "its deadline has passed")
        # Verified again, and fetched again where a file was damaged since.
        paths = [
            str(await fetch_blob(ref, kit.store, kit.swarm, kit.control))
            for ref in needed_blobs(assignment)
        ]
        work = kit.folder / "work" / unit
        work.mkdir(parents=True, exist_ok=True)

        def listen(report: Mapping[str, Any]) -> None:
            kit.loss = report.get("loss", kit.loss)
            if report["event"] in ("started", "saved"):
                kit.log.info("trainer.%s", report["event"], extra={"step": report["step"]})
            hear(int(report.get("step", 0)))

        order = {
            "unit": unit,
            "assignment": assignment.model_dump(mode="json"),
            "genesis": str(kit.folder / "genesis.json"),
            "network": kit.network,
            "work": str(work),
            "parent": paths[0],
            "shards": paths[1:],
            "device": kit.settings.device,
            "save_every": kit.settings.save_every,
        }
        result = await kit.trainer.train(order, listen)
        self._seal(unit, await self.craft(unit, assignment, result))

    async def craft(
        self, unit: str, assignment: Assignment, result: dict[str, Any]
    ) -> dict[str, Any]:
        """What is handed in: the trainer's result as it is."""
        return result

    def _seal(self, unit: str, result: Mapping[str, Any]) -> None:
        kit = self.kit
        ref = kit.store.add_file(Path(result["update"]))
        kit.store.pin(ref.id)
        commitment = seal(
            Commitment(
                assignment=unit,
                states=tuple(result["states"]),
                states_root=result["states_root"],
                update_root=result["update_root"],
                steps=result["steps"],
            ),
            kit.key,
            kit.network,
        )
        contribution = seal(
            Contribution(
                assignment=unit,
                commitment=commitment.id,
                update=TensorFile(blob=ref, root=result["update_root"]),
                steps=result["steps"],
                samples=result["samples"],
                loss=decimal(result["loss"]),
                seconds=int(result["seconds"]),
            ),
            kit.key,
            kit.network,
        )
        kit.journal.post(
            [
                Letter(commitment.id, "commitment", unit, commitment.raw, None, "waiting"),
                Letter(contribution.id, "contribution", unit, contribution.raw, ref.id, "waiting"),
            ]
        )

    async def commit(self, unit: str, hear: Hear) -> None:
        """Send the commitment; it must be logged before the result is handed in."""
        letter = self._letter(unit, "commitment")
        await self._register()
        await self.kit.control.post("commitments", letter.envelope)

    async def hand_in(self, unit: str, hear: Hear) -> None:
        """Send the contribution and the pieces that lack there, until all of it is acknowledged."""
        kit, letter = self.kit, self._letter(unit, "contribution")
        record = unseal(letter.envelope, Contribution, kit.network, {kit.key.id}).record
        await self._register()
        answer = await kit.control.post("contributions", letter.envelope)
        if answer.get("state") not in (*TAKEN, "closed"):
            await self._upload(record.update.blob, answer, hear)
            answer = await kit.control.post("contributions", letter.envelope)
        if answer.get("state") == "closed":
            raise ParisError("unit.closed", "it was handed in too late")
        if answer.get("state") not in TAKEN:
            raise ParisError("network.down", "the upload is not complete yet")
        kit.journal.keep_receipt(Receipt(letter.id, kit.clock(), str(answer["state"]), {}))
        kit.journal.settle(unit, "acknowledged")
        # Peers may have it now; before, a copier could have handed it in first.
        await self.announce([record.update.blob.id])

    async def _upload(self, ref: BlobRef, answer: Mapping[str, Any], hear: Hear) -> None:
        store, missing = self.kit.store, answer.get("missing")
        if answer.get("manifest_missing") is True or not isinstance(missing, list):
            missing = list(range(len(store.manifest(ref.id).pieces)))
        await upload_blob(ref, store, self.kit.control, missing, lambda here, _: hear(here))

    async def clear(self, unit: str, hear: Hear) -> None:
        """Let go of a unit that is handed in or lost: its work folder and its claims on blobs."""
        kit = self.kit
        for letter in kit.journal.letters(unit):
            if letter.blob:
                kit.store.unpin(letter.blob)
        raw = kit.journal.unit(unit)
        if raw is not None:
            for ref in needed_blobs(self.assignment(unit)):
                kit.store.unpin(ref.id)
        await asyncio.to_thread(shutil.rmtree, kit.folder / "work" / unit, ignore_errors=True)

    async def announce(self, blobs: list[str]) -> None:
        """Tell the peers what is here; without a swarm, or with a sick one, nothing is lost."""
        if self.kit.swarm is not None:
            try:
                await self.kit.swarm.announce(blobs)
            except (ParisError, OSError) as error:
                self.kit.log.warning("swarm.announce", extra={"detail": str(error)})

    def _letter(self, unit: str, kind: str) -> Letter:
        for letter in self.kit.journal.letters(unit):
            if letter.kind == kind:
                return letter
        raise ParisError("commitment.missing", f"no {kind} of {unit[:12]} in the outbox")


def needed_blobs(assignment: Assignment) -> list[BlobRef]:
    """The blobs of a unit: the parent head first, then the shards in their order."""
    return [assignment.parent.weights.blob, *(shard.file.blob for shard in assignment.shards)]


def check_lease(assignment: Assignment, node: str, genesis: Genesis) -> None:
    """Refuse a lease that is another node's, or that would break an expert's isolation."""
    if assignment.node != node:
        raise ParisError("unit.not-yours")
    clusters = {cluster.index: cluster for cluster in genesis.clusters}
    cluster = clusters.get(assignment.expert)
    if cluster is None or assignment.kind != "train" or assignment.steps < 1:
        raise ParisError("structure.lineage", "no unit of training for an expert of this network")
    if not assignment.shards or not set(assignment.shards) <= set(cluster.shards):
        raise ParisError("structure.lineage", "shards of another cluster")
    if assignment.parent.round == 0 and assignment.parent.weights != genesis.initial:
        raise ParisError("structure.lineage", "round 0 starts from the network's checkpoint")


def version_tuple(text: str) -> tuple[int, ...]:
    """`0.4.1rc1` → (0, 4, 1): the leading numbers of a version."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = ""
        for char in part:
            if not char.isdigit():
                break
            digits += char
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
