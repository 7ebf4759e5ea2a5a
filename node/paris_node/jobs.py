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
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from paris_node import residuals
from paris_node.audits import replay
from paris_node.following import follow
from paris_node.journal import Letter, Receipt
from paris_node.kit import BOOTSTRAPS, Kit
from paris_node.leases import check_lease, named_plan, needed_blobs, version_tuple
from paris_node.openings import Openings
from paris_node.planning import room_for_unit
from paris_node.ready import Ready
from paris_node.upkeep import DEVICE, assignment_of, order_of, tidy
from paris_node.volunteer import Phase
from paris_protocol.canonical import canonical, decimal
from paris_protocol.envelope import Sealed, seal, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import peer_id
from paris_protocol.net.fetch import fetch_blob, upload_blob
from paris_protocol.records import (
    Assignment,
    AuditReport,
    BlobRef,
    Commitment,
    Contribution,
    LeaseRequest,
    Registration,
    TensorFile,
)

HEADROOM_MB: Final = 64
REPORT: Final = "audit-report"
TAKEN: Final = frozenset({"queued", "judged"})
"""States of a contribution in which the coordinator has everything."""
_HOPELESS: Final = ("unit.", "structure.", "commitment.", "record.", "tensor.", "audit.")
_HOPELESS_CODES: Final = frozenset({"machine.too-small", "node.quarantined", "node.revoked"})
_CURABLE: Final = frozenset({"record.signer"})
"""A coordinator that was set back may have forgotten this node: it registers again."""

Hear = Callable[[int], None]


def is_final(phase: Phase, code: str) -> bool:
    """Whether a failure with this code means that the unit in hand can no longer count."""
    if phase in (Phase.IDLE, Phase.ACK) or code in _CURABLE:
        return False
    return code.startswith(_HOPELESS) or code in _HOPELESS_CODES


class NetworkOver(Exception):
    """The coordinator says that the network has all it planned."""


class Jobs:
    """See the module; a subclass may change what `craft` hands in (the hostile double does)."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.ready = Ready(kit)

    def openings(self) -> Openings:
        """What answers the coordinator's challenges beside the jobs."""
        return Openings(self.kit)

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
        """Lease a unit and journal it; `work.none`, or `NetworkOver` when the network is done.

        A machine that could not train it is told before it asks (`paris_node.ready`).
        """
        kit = self.kit
        await self._register()
        policy = (await kit.control.policy()).record
        plans = await self.ready.plans(policy)
        await self.ready.prove(policy, plans)
        device = await asyncio.to_thread(kit.machine.device, kit.settings.device)
        shards = [s.file.blob for cluster in kit.genesis.clusters for s in cluster.shards]
        request = LeaseRequest(
            at=int(kit.clock()),
            version=kit.version,
            name=kit.settings.name,
            device=device.name[:200],
            memory_mb=device.memory_mb,
            disk_mb=kit.machine.disk_mb(kit.folder),
            cached=(*(r.id for r in shards if kit.store.has(r)), *residuals.held(kit.folder)),
            plans=plans,
        )
        answer = await kit.control.post("lease", seal(request, kit.key, kit.network).raw)
        if answer.get("finished") is True:
            raise NetworkOver
        if not isinstance(answer.get("assignment"), dict):
            raise ParisError("network.not-paris", "a lease is answered by an assignment")
        sealed = await self._opened(canonical(answer["assignment"]))
        check_lease(sealed.record, kit.key.id, kit.genesis)
        kit.journal.keep_unit(sealed.id, sealed.raw, kit.clock())
        kit.journal.set_fact(DEVICE, json.dumps({"unit": sealed.id, "kind": device.kind}))
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
        return assignment_of(self.kit, unit)

    # ------------------------------------------------------------ the phases of a unit

    async def admit(self, unit: str, hear: Hear) -> None:
        """Whether there is still time, memory and disk for this unit."""
        kit, assignment = self.kit, self.assignment(unit)
        if kit.clock() >= assignment.hard_deadline:
            raise ParisError("unit.closed", "its deadline has passed")
        lacking = sum(ref.size for ref in needed_blobs(assignment) if not kit.store.has(ref))
        own = room_for_unit(named_plan(assignment), kit.genesis, assignment)
        needed, room = ((lacking + own) >> 20) + HEADROOM_MB, kit.machine.disk_mb(kit.folder)
        if needed > room:
            raise ParisError("disk.full", f"a unit needs {needed} MB, {room} MB are free")
        (kit.folder / "work" / unit).mkdir(parents=True, exist_ok=True)

    async def fetch(self, unit: str, hear: Hear) -> None:
        """Bring parent head and shards into the store: peers first, the coordinator otherwise."""
        kit, assignment = self.kit, self.assignment(unit)
        if kit.clock() >= assignment.hard_deadline:
            raise ParisError("unit.closed", "its deadline has passed")
        refs, before = needed_blobs(assignment), 0
        await follow(kit, assignment.parent, hear)
        for ref in refs:
            kit.store.pin(ref.id)

            def count(here: int, _: int, before: int = before) -> None:
                hear(before + here)

            await fetch_blob(ref, kit.store, kit.swarm, kit.control, progress=count)
            before += ref.size
        await self.announce([ref.id for ref in refs])

    async def train(self, unit: str, hear: Hear) -> None:
        """Train all steps, or replay an audit's; sign what comes of it and put it in the outbox."""
        kit, assignment = self.kit, self.assignment(unit)
        if kit.journal.letters(unit):
            return
        if kit.clock() >= assignment.hard_deadline:
            raise ParisError("unit.closed", "its deadline has passed")
        if assignment.kind == "audit":
            report = seal(await self.report(unit, hear), kit.key, kit.network)
            kit.journal.post([Letter(report.id, REPORT, unit, report.raw, None, "waiting")])
            return

        def listen(report: Mapping[str, Any]) -> None:
            kit.loss = report.get("loss", kit.loss)
            if report["event"] in ("started", "saved"):
                kit.log.info("trainer.%s", report["event"], extra={"step": report["step"]})
            hear(int(report.get("step", 0)))

        try:
            result = await kit.trainer.train(await order_of(kit, unit), listen)
        except ParisError as error:
            if error.code == "machine.too-small":
                self.ready.ran_short(named_plan(assignment))
            if error.code == "gpu.unavailable":  # a process that lost its GPU never gets it back
                await kit.trainer.close()
            raise
        self._seal(unit, await self.craft(unit, assignment, result))

    async def report(self, unit: str, hear: Hear) -> AuditReport:
        """What an audit finds."""
        return await replay(self.kit, unit, hear)

    async def craft(
        self, unit: str, assignment: Assignment, result: dict[str, Any]
    ) -> dict[str, Any]:
        """What is handed in: the trainer's result as it is."""
        return result

    def _seal(self, unit: str, result: Mapping[str, Any]) -> None:
        kit, rest = self.kit, result.get("residual")
        if rest is not None:
            path = kit.folder / "work" / unit / "residual.safetensors"
            expert = self.assignment(unit).expert
            residuals.keep(kit.folder, expert=expert, unit=unit, root=rest, path=path)
        ref = kit.store.add_file(Path(result["update"]))
        kit.store.pin(ref.id)
        commitment = seal(
            Commitment(
                assignment=unit,
                states=tuple(result["states"]),
                states_root=result["states_root"],
                update_root=result["update_root"],
                steps=result["steps"],
                residual=rest,
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
                numerics=result.get("numerics"),
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
        if self.assignment(unit).kind == "audit":
            return
        letter = self._letter(unit, "commitment")
        await self._register()
        await self.kit.control.post("commitments", letter.envelope)

    async def hand_in(self, unit: str, hear: Hear) -> None:
        """Send the contribution and the pieces that lack there, until all of it is acknowledged."""
        kit = self.kit
        if self.assignment(unit).kind == "audit":
            await self._register()
            await kit.control.post("audits", self._letter(unit, REPORT).envelope)
            kit.journal.settle(unit, "acknowledged")
            return
        letter = self._letter(unit, "contribution")
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
        """Let go of a unit that is handed in or lost, but for what an audit may still ask for."""
        await tidy(self.kit, unit)

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
