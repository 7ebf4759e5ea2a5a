"""A hostile volunteer, for demos and tests: the real node, which lies in what it hands in.

One attack per unit, in order, each committed to as consistently as the attacker can. Lies about the
result: `sign-flip`, `inflate` (tenfold), `noise` (random, with the norms of honest work), `copy`
(another node's update of the same round, fetched from the public interface and disguised), `tamper`
(bytes that are not what was signed). Lies about the training, which only a replay sees (see
`paris_node.hostile_trainer`): `skip-steps`, `reorder`, `rate`, `half-batch`, `own-data`,
`extrapolate`. And `refuse-opening` keeps its states to itself, `lying-auditor` says the opposite of
what it finds about others. It awaits the verdict on a lie about training; after the last attack it
works honestly. A revoked key ends it, like any node. What it did stands in STATE/attacks.jsonl::

    python -m paris_node.hostile join INVITE --yes --state DIR --attacks sign-flip,copy
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp

from paris_node import cli, receipts
from paris_node.jobs import Hear, Jobs
from paris_node.journal import Challenged
from paris_node.kit import Kit
from paris_node.openings import Openings
from paris_node.training import TrainerProcess
from paris_protocol.envelope import Sealed, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.log import TILE, Checkpoint, bundle_path, origin, parse_bundle
from paris_protocol.net.fetch import fetch_blob
from paris_protocol.records import (
    Assignment,
    AuditReport,
    BlobRef,
    Contribution,
    Genesis,
    UpdateCodec,
)

FORGED: Final = ("sign-flip", "inflate", "noise", "copy", "tamper")
TRAINED: Final = ("skip-steps", "reorder", "rate", "half-batch", "own-data", "extrapolate")
REFUSE, LIE = "refuse-opening", "lying-auditor"
ATTACKS: Final = (*FORGED, *TRAINED, REFUSE, LIE)
TRAINER: Final = "paris_node.hostile_trainer"
NOTE: Final = "attack"
HONEST: Final = "honest"
INFLATION: Final = 10.0
DISGUISE: Final = 1e-3
COPY_WAIT: Final = 60.0
LOG: Final = "attacks.jsonl"


class Hostile(Jobs):
    """Honest in every phase but one: what it signs after training."""

    def __init__(self, kit: Kit, attacks: tuple[str, ...]) -> None:
        super().__init__(kit)
        self.attacks = attacks
        self.seen: dict[str, Sealed[Any]] = {}
        """Statements of the log that were read already."""

    async def ask(self) -> str:
        """No new unit before a lie that only a replay sees is judged: it may be the key's last."""
        if self._waits():
            await receipts.refresh(self.kit)
        if self._waits():
            raise ParisError("work.none", "the last one is not judged yet", retry_after=1.0)
        return await super().ask()

    def _waits(self) -> bool:
        lies = {one["contribution"] for one in self.past() if one["attack"] not in FORGED}
        return any(
            one.contribution in lies and one.body.get("accepted") is None and one.state != "closed"
            for one in self.kit.journal.receipts()
        )

    async def train(self, unit: str, hear: Hear) -> None:
        """Train, lie, and write down which lie it was."""
        if self.assignment(unit).kind == "audit":
            await super().train(unit, hear)
            return
        note = self.kit.folder / "work" / unit / NOTE
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self._next(), "utf-8")
        await super().train(unit, hear)
        letter, attack = self._letter(unit, "contribution"), note.read_text("utf-8")
        if attack == HONEST or any(one["contribution"] == letter.id for one in self.past()):
            return
        line = {"attack": attack, "contribution": letter.id, "unit": unit}
        with (self.kit.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "at": round(self.kit.clock(), 3)}) + "\n")
        self.kit.log.info("hostile.%s", attack, extra={"unit": unit})

    def _next(self) -> str:
        """The first attack on a unit that was not made yet."""
        done = {one["attack"] for one in self.past()} | {LIE}
        return next((attack for attack in self.attacks if attack not in done), HONEST)

    async def craft(
        self, unit: str, assignment: Assignment, result: dict[str, Any]
    ) -> dict[str, Any]:
        """The result with this unit's lie in it, if it is one about the result."""
        work, victim = self.kit.folder / "work" / unit, None
        attack = (work / NOTE).read_text("utf-8")
        if attack == "copy":
            victim = await self._victim(assignment)
            if victim is None:  # nobody to copy from: that lie waits for the next unit
                (work / NOTE).write_text(HONEST, "utf-8")
                return result
        if attack not in FORGED:
            return result
        shapes = await asyncio.to_thread(_shapes, self.kit.genesis)
        return await asyncio.to_thread(
            forge, attack, result, work, victim, assignment.update_codec, shapes
        )

    async def report(self, unit: str, hear: Hear) -> AuditReport:
        """What an audit finds, or the opposite."""
        found = await super().report(unit, hear)
        if LIE not in self.attacks or not found.segments:
            return found
        lies = [one.model_copy(update={"passed": not found.passed}) for one in found.segments]
        return found.model_copy(update={"passed": not found.passed, "segments": tuple(lies)})

    def openings(self) -> Openings:
        """Answers to challenges, but for the units that keep silent."""
        return Silent(self)

    def past(self) -> list[dict[str, Any]]:
        """The attacks so far."""
        path = self.kit.folder / LOG
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    # ------------------------------------------------------------ stealing

    async def _victim(self, assignment: Assignment) -> Path | None:
        """Another node's update for the same head, as soon as there is one; None after a while."""
        for _ in range(int(COPY_WAIT)):
            try:
                await self._read_log()
                for ref in self._candidates(assignment):
                    return await fetch_blob(
                        ref, self.kit.store, None, self.kit.control, patience=5.0
                    )
            except (ParisError, aiohttp.ClientError) as error:
                self.kit.log.info("hostile.waits", extra={"detail": str(error)})
            await asyncio.sleep(1.0)
        return None

    def _candidates(self, assignment: Assignment) -> list[BlobRef]:
        found = []
        for sealed in self.seen.values():
            record = sealed.record
            if not isinstance(record, Contribution) or sealed.signer == self.kit.key.id:
                continue
            task = self.seen.get(record.assignment)
            if task is not None and isinstance(task.record, Assignment):
                same = (task.record.expert, task.record.parent)
                if same == (assignment.expert, assignment.parent):
                    found.append(record.update.blob)
        return found

    async def _read_log(self) -> None:
        """Take in the public log's new statements."""
        kit = self.kit
        keys = {kit.genesis.root_key, *(await kit.control.policy()).record.coordinator_keys}
        url = f"{kit.settings.invite.url}/log/"
        async with aiohttp.ClientSession() as session:
            async with session.get(url + "checkpoint") as answer:
                note = await answer.text()
            size = Checkpoint.open(note, origin(kit.network), keys).size
            for n in range(-(-size // TILE)):
                width = min(TILE, size - n * TILE)
                async with session.get(url + bundle_path(n, width)) as answer:
                    answer.raise_for_status()
                    entries = parse_bundle(await answer.read(), width)
                for entry in entries:
                    if entry.hex() not in self.seen:
                        raw = await kit.control.statement(entry.hex())
                        self.seen[entry.hex()] = unseal_any(raw, kit.network)


class Silent(Openings):
    """Lays open what a node must, except where the lie is to refuse it."""

    def __init__(self, jobs: Hostile) -> None:
        super().__init__(jobs.kit)
        self.jobs = jobs

    async def answer(self, one: Challenged) -> None:
        """See `Openings`."""
        refused = {line["unit"] for line in self.jobs.past() if line["attack"] == REFUSE}
        if one.unit in refused:
            raise ParisError("network.down", "it keeps its states to itself")
        await super().answer(one)


def forge(
    attack: str,
    result: dict[str, Any],
    work: Path,
    victim: Path | None,
    codec: UpdateCodec,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Write the forged update of an attack; the result that names it (and its true root).

    What is forged is the decoded update, which then crosses the line as the assignment asks.
    """
    import torch

    from paris_models import checkpoint, codecs
    from paris_protocol.tensors import tensor_root

    honest = Path(result["update"])
    wire = checkpoint.load_tensors(victim or honest)
    update = codecs.decode(wire, _codec_of(wire), shapes)  # a victim's may be another
    random = torch.Generator().manual_seed(int(result["update_root"][:15], 16))

    def noise(like: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=random)
        scaled: torch.Tensor = drawn * (like.norm() / drawn.norm().clamp_min(1e-12))
        return scaled

    if attack == "sign-flip":
        forged = {name: -tensor for name, tensor in update.items()}
    elif attack == "inflate":
        forged = {name: tensor * INFLATION for name, tensor in update.items()}
    elif attack == "noise":
        forged = {name: noise(tensor) for name, tensor in update.items()}
    elif attack == "copy":
        forged = {name: tensor + DISGUISE * noise(tensor) for name, tensor in update.items()}
    elif attack != "tamper":
        raise ParisError("usage", f"no attack {attack!r}; there are {', '.join(FORGED)}")
    if attack == "tamper":
        sent = dict(wire)
        name = max(sent, key=lambda one: sent[one].numel())
        sent[name] = sent[name].clone()
        sent[name].view(-1)[0] += 1
    else:
        sent = codecs.encode(codec, forged)
    path = work / "forged.safetensors"
    checkpoint.save_tensors(sent, path)
    root = tensor_root(checkpoint.raw_items(sent))
    # A tamperer signs the honest root and hands in other bytes.
    told = result["update_root"] if attack == "tamper" else root
    return {**result, "update": str(path), "update_root": told}


def _shapes(genesis: Genesis) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the network's experts."""
    from paris_models.config import ExpertConfig
    from paris_models.expert import parameter_shapes

    return parameter_shapes(ExpertConfig.from_record(genesis.expert))


def _codec_of(wire: Mapping[str, Any]) -> UpdateCodec:
    """The codec that an update's file says it has."""
    from paris_models.codecs import codec_of

    found = codec_of(wire)
    if found != "dense":
        return found
    return "dense-bf16" if "bfloat16" in str(next(iter(wire.values())).dtype) else "dense-f32"


def _attacks(arguments: list[str]) -> tuple[str, ...]:
    """Take `--attacks a,b,c` out of the command line."""
    if "--attacks" not in arguments:
        return ATTACKS
    place = arguments.index("--attacks")
    names = arguments[place + 1].split(",") if place + 1 < len(arguments) else [""]
    del arguments[place : place + 2]
    if unknown := set(names) - set(ATTACKS):
        sys.exit(f"no such attack: {', '.join(sorted(unknown))}")
    return tuple(names)


def main() -> None:
    """The real command with other jobs and another trainer."""
    attacks = _attacks(sys.argv)

    def hostile(kit: Kit) -> Hostile:
        kit.trainer = TrainerProcess(kit.folder / "logs" / "trainer.log", TRAINER)
        return Hostile(kit, attacks)

    cli.main(hostile)


if __name__ == "__main__":
    main()
