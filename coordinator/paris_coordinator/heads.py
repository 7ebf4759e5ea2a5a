"""The shift's work on heads: merges of a round, and reverts of what a revocation took back.

The arithmetic and the test are the worker's; the scalars that really went in are signed here::

    heads = Heads(office, worker)
    await heads.merge(expert, contributions)
    await heads.revert(expert, revocation, contributions)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paris_coordinator.board import Work
from paris_coordinator.merging import Part, merge_shares
from paris_coordinator.office import Office
from paris_coordinator.verdicts import Jobs
from paris_protocol.averages import kept_share, released
from paris_protocol.canonical import real
from paris_protocol.errors import ParisError
from paris_protocol.records import Head, Merge, MergeInput, Revert, TensorFile

Json = dict[str, Any]


class Heads:
    """What becomes the next head of an expert."""

    def __init__(self, office: Office, jobs: Jobs) -> None:
        self.office, self._jobs = office, jobs

    async def merge(self, expert: int, contributions: tuple[str, ...]) -> Json:
        """Merges accepted contributions; which of them really went in, the job says."""
        office, desk = self.office, self.office.desk
        head = desk.experts[expert].head
        works = [desk.work_of(contribution) for contribution in contributions]
        asked = self._shares(works)
        out = self._out(f"expert{expert}-{head.round + 1}.{desk.experts[expert].attempt}")
        job = await asyncio.to_thread(self._job, "merge", "inputs", head, expert, asked, out)
        answer = await self._jobs.run(job)
        inputs = tuple(
            asked[place].model_copy(update={"weight": weight, "scale": scale})
            for place, weight, scale in answer["inputs"]
        )
        merge = await office.file(
            Merge(
                expert=expert,
                round=head.round,
                parent=head,
                inputs=inputs,
                result=await self._stored(out, answer["root"]),
                published=not answer["worse"],
                numbers=tuple((name, value) for name, value in answer["numbers"]),
                policy=desk.policy.number,
                at=office.now(),
                **({} if answer["worse"] else await self._average(head, inputs, out)),
            )
        )
        found = {"expert": expert, "round": head.round, "merge": merge.id}
        left = [contributions[place] for place in answer["left_out"]]
        return {**found, "published": merge.record.published, "left_out": left}

    def _shares(self, works: Sequence[Work]) -> tuple[MergeInput, ...]:
        """Inputs with their weights and scales; nodes in probation have a bounded part.

        While no node of the network is of standing everything is audited and all count fully.
        """
        desk = self.office.desk
        rules, standing = desk.policy.audit, set(desk.of_standing())
        parts = [
            Part(
                work.contribution or "",
                work.done.steps,
                _norm(work),
                trusted=not standing or work.record.node in standing,
            )
            for work in works
        ]
        cap = 1.0 if rules is None else real(rules.probation_weight)
        return tuple(
            MergeInput(
                contribution=share.contribution,
                update=work.done.update,
                weight=share.weight.hex(),
                scale=share.scale.hex(),
            )
            for work, share in zip(works, merge_shares(parts, cap), strict=True)
        )

    async def revert(self, expert: int, revocation: str, contributions: tuple[str, ...]) -> Json:
        """Takes contributions out of a head, by the scalars with which they were merged."""
        office, desk = self.office, self.office.desk
        head = desk.experts[expert].head
        removed = tuple(self._merged(contribution) for contribution in contributions)
        out = self._out(f"expert{expert}-{head.round}.{desk.experts[expert].attempt}-reverted")
        job = await asyncio.to_thread(self._job, "revert", "removed", head, expert, removed, out)
        answer = await self._jobs.run(job)
        revert = await office.file(
            Revert(
                expert=expert,
                revocation=revocation,
                parent=head,
                removed=removed,
                result=await self._stored(out, answer["root"]),
                numbers=tuple((name, value) for name, value in answer["numbers"]),
                policy=desk.policy.number,
                at=office.now(),
            )
        )
        return {"expert": expert, "revert": revert.id, "removed": list(contributions)}

    async def _average(self, head: Head, inputs: Sequence[MergeInput], out: Path) -> Json:
        """What a published merge into `out` says of the running average; nothing without an ema."""
        office, desk = self.office, self.office.desk
        ema = real(desk.genesis.recipe.ema)
        if not ema:
            return {}
        steps = sum(desk.work_of(part.contribution).done.steps for part in inputs)
        decay, file = kept_share(ema, steps).hex(), self._out(f"{out.stem}-average")
        answer = await self._jobs.run(
            {
                "job": "average",
                "genesis": str(office.state.genesis_file),
                "average": str(office.store.path(released(head, desk.merges).blob)),
                "head": str(out),
                "decay": decay,
                "out": str(file),
            }
        )
        return {"average": await self._stored(file, answer["root"]), "decay": decay}

    def _merged(self, contribution: str) -> MergeInput:
        """A contribution as it stands in its merge."""
        merge = self.office.desk.work_of(contribution).merge
        inputs = () if merge is None else self.office.desk.merges[merge].inputs
        return next(part for part in inputs if part.contribution == contribution)

    def _out(self, name: str) -> Path:
        """Where the next head is written; names never repeat, since attempts are counted."""
        return self.office.state.heads / f"{name}.safetensors"

    async def _stored(self, out: Path, root: str) -> TensorFile:
        blob = await asyncio.to_thread(self.office.store.add_file, out)
        return TensorFile(blob=blob, root=root)

    def _job(
        self,
        name: str,
        what: str,
        head: Head,
        expert: int,
        inputs: Sequence[MergeInput],
        out: Path,
    ) -> Json:
        office = self.office
        return {
            "job": name,
            "genesis": str(office.state.genesis_file),
            "parent": str(office.head_file(head)),
            what: [
                {
                    "path": str(office.store.path(part.update.blob)),
                    "weight": part.weight,
                    "scale": part.scale,
                }
                for part in inputs
            ],
            "out": str(out),
            "private": str(office.state.private_shard("validation", expert)),
            "policy": office.desk.policy.model_dump(mode="json"),
            "secret": office.secret("held-out"),
        }


def _norm(work: Work) -> float:
    """The norm of an accepted update, from the numbers of its verdict (L2)."""
    if work.judged is not None:
        for layer in work.judged.layers:
            for name, value in layer.numbers:
                if name == "norm":
                    return real(value)
    raise ParisError("internal", f"the verdict on {work.contribution} names no norm")
