"""The coordinator's working day: carries out what the desk says is due, one job at a time.

What is due is a function of the ledger, so a shift that was killed at any moment is simply begun
again: a job's result counts when its statement is in the ledger, and not before. Jobs that fail are
tried again later, ever less often, and do not hold up the others::

    shift = Shift(office, worker, note)
    while await shift.step(): ...
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from paris_coordinator import release
from paris_coordinator.events import (
    Ask,
    Call,
    CommitSecret,
    Conclude,
    Dismiss,
    Effect,
    OpenSecret,
    Publish,
    Replay,
    Revoke,
    RunCanary,
    RunMerge,
    RunRelease,
    RunRevert,
    RunRouter,
    RunSamples,
    RunScan,
    Sampled,
    Scanned,
    Tick,
    Trained,
    Verify,
    Withdraw,
)
from paris_coordinator.heads import Heads
from paris_coordinator.office import Office
from paris_coordinator.verdicts import Jobs, Verdicts
from paris_coordinator.withdrawals import usable
from paris_coordinator.withdrawing import withdraw
from paris_protocol.canonical import canonical
from paris_protocol.errors import ParisError
from paris_protocol.records import Head, Release

Json = dict[str, Any]
Note = Callable[[str, Json], None]
"""Told about every job: what it was, and its facts (with `seconds`)."""

FIRST_WAIT = 5.0
LONGEST_WAIT = 600.0
TRIES = 4
READY = 300.0
"""Seconds in which a worker on a sound machine has loaded its libraries."""
INCURABLE = frozenset({"internal", "tensor.header", "tensor.values"})
"""Failures that a contribution's own file may cause; other troubles are the coordinator's."""
LOG = logging.getLogger("paris.shift")


class Trouble(NamedTuple):
    """An effect that failed: how often, the last wait in seconds, and when to try again."""

    tries: int = 0
    wait: float = 0.0
    until: float = 0.0


class Shift:
    """One coordinator's loop of work."""

    def __init__(self, office: Office, jobs: Jobs, note: Note) -> None:
        self.office, self._jobs, self._note = office, jobs, note
        self.verdicts, self.heads = Verdicts(office, jobs), Heads(office, jobs)
        self._later: dict[Effect, Trouble] = {}
        self._samples_every = office.state.settings().samples_every
        self._since = office.now()

    def due(self) -> list[Effect]:
        """Everything that waits to be done, most urgent first."""
        tick = Tick(self._samples_every)
        effects = self.office.desk.handle(tick, self.office.now())
        return [*self._unpublished(), *map(self._asked_again, effects)]

    def _asked_again(self, effect: Effect) -> Effect:
        """A challenge that ran out before this coordinator was there to be answered is repeated."""
        if isinstance(effect, Conclude):
            audit = self.office.desk.audits[effect.contribution]
            asked = audit.challenge
            if asked and asked.deadline < self._since and audit.unanswered(self.office.now()):
                return Ask(effect.contribution, 2)
        return effect

    async def step(self) -> bool:
        """Carries out the most urgent thing that may be tried now; False when there is none."""
        now = time.monotonic()
        for effect in self.due():
            if self._later.get(effect, Trouble()).until <= now:
                facts = await self._try(effect)
                seconds = round(time.monotonic() - now, 3)
                self._note(type(effect).__name__.lower(), {**facts, "seconds": seconds})
                return True
        return False

    async def _try(self, effect: Effect) -> Json:
        """One attempt; what fails is put off, and a contribution that cannot be judged refused."""
        ours = False
        try:
            facts = await self._do(effect)
        except ParisError as error:
            code, detail = error.code, error.detail
        except Exception as error:
            LOG.exception("%s", effect)
            code, detail = "internal", f"{type(error).__name__}: {error}"
            ours = isinstance(error, OSError)  # such as no file handle left: nobody's update did it
        else:
            self._later.pop(effect, None)
            return facts
        trouble = self._later.get(effect, Trouble())
        wait = min(LONGEST_WAIT, 2 * trouble.wait or FIRST_WAIT)
        self._later[effect] = Trouble(trouble.tries + 1, wait, time.monotonic() + wait)
        hopeless = code in INCURABLE and not ours and trouble.tries + 1 >= TRIES
        if isinstance(effect, Verify | Replay) and hopeless and await self._able():
            await self.verdicts.refuse(effect.contribution, code)
        if isinstance(effect, RunCanary) and code == "internal" and trouble.tries + 1 >= TRIES:
            await self.verdicts.give_up_canary(effect.assignment)
        return {"error": code, "detail": detail[:500], "again_in": wait}

    async def _able(self) -> bool:
        """Whether the worker can judge at all; if not, no contribution is to blame."""
        try:
            await self._jobs.run({"job": "ready"}, timeout=READY)
        except (ParisError, OSError):
            return False
        return True

    async def _do(self, effect: Effect) -> Json:
        match effect:
            case RunMerge(expert, contributions):
                return await self.heads.merge(expert, contributions)
            case RunRevert(expert, revocation, contributions):
                return await self.heads.revert(expert, revocation, contributions)
            case RunRouter():
                return await self._router()
            case RunSamples(roots):
                return await self._samples(roots)
            case RunScan(roots):
                return await self._scan(roots)
            case RunRelease():
                return await self._release()
            case Publish(release_id):
                return await self._publish(release_id)
            case _:
                return await self._judge(effect)

    async def _judge(self, effect: Effect) -> Json:
        match effect:
            case Verify(contribution):
                return await self.verdicts.verify(contribution)
            case Ask(contribution, attempt):
                return await self.verdicts.ask(contribution, attempt)
            case Call(contribution):
                return await self.verdicts.call(contribution)
            case Replay(contribution):
                return await self.verdicts.replay(contribution)
            case RunCanary(assignment):
                return await self.verdicts.canary(assignment)
            case Conclude(contribution):
                return await self.verdicts.conclude(contribution)
            case Dismiss(contribution):
                return await self.verdicts.dismiss(contribution)
            case Revoke(node):
                return await self.verdicts.revoke(node)
            case Withdraw(clip):
                return await withdraw(self.office, clip)
            case CommitSecret(expert):
                return await self.verdicts.commit_secret(expert)
            case OpenSecret(id):
                return await self.verdicts.open_secret(id)
        raise AssertionError(effect)

    # ------------------------------------------------------------ router, samples, release

    def _seed(self, purpose: str) -> str:
        return hashlib.sha256(f"{self.office.network}/{purpose}".encode()).hexdigest()

    async def _router(self) -> Json:
        office = self.office
        answer = await self._jobs.run(await asyncio.to_thread(self._router_job))
        await office.tell(Trained(json.dumps(answer["report"], sort_keys=True)))
        return {"report": answer["report"]}

    def _router_job(self) -> Json:
        office, clusters = self.office, self.office.genesis.record.clusters
        return {
            "job": "router",
            "genesis": str(office.state.genesis_file),
            "shards": self._shards(),
            "private": [
                [cluster.index, str(office.state.private_shard("validation", cluster.index))]
                for cluster in clusters
            ],
            "out": str(office.state.router),
            "seed": self._seed("router"),
        }

    def _shards(self) -> list[list[Any]]:
        """Expert and file of every shard that was not withdrawn."""
        office = self.office
        return [
            [cluster.index, str(office.store.path(shard.file.blob))]
            for cluster in office.genesis.record.clusters
            for shard in usable(office.desk, cluster.shards)
        ]

    def _models_job(self, name: str, heads: tuple[Head, ...]) -> Json:
        """What samples and bundle have in common."""
        office, genesis = self.office, self.office.genesis.record
        codec, text, router = genesis.codec.file, genesis.text.file, office.state.router
        return {
            "job": name,
            "genesis": str(office.state.genesis_file),
            "heads": [str(office.released_file(head)) for head in heads],
            "router": str(router) if router.exists() else None,
            "codec": codec and str(office.store.path(codec.blob)),
            "text": text and str(office.store.path(text.blob)),
        }

    async def _samples(self, roots: tuple[str, ...]) -> Json:
        office = self.office
        prompts = office.state.settings().prompts
        files: tuple[str, ...] = ()
        if prompts:
            heads = tuple(expert.head for expert in office.desk.experts)
            job = await asyncio.to_thread(self._models_job, "samples", heads)
            job |= {"prompts": list(prompts), "out": str(office.state.samples)}
            answer = await self._jobs.run(job | {"seed": self._seed("samples")})
            files = tuple(str(Path(file).name) for file in answer["files"])
        await office.tell(Sampled(roots, files))
        return {"files": len(files)}

    async def _scan(self, roots: tuple[str, ...]) -> Json:
        """Searches the heads for words that have learned too much."""
        report = await self._jobs.run(await asyncio.to_thread(self._scan_job))
        await self.office.tell(Scanned(roots, json.dumps(report, sort_keys=True)))
        return report

    def _scan_job(self) -> Json:
        office = self.office
        heads = tuple(expert.head for expert in office.desk.experts)
        initial = str(office.store.path(office.genesis.record.initial.blob))
        return self._models_job("scan", heads) | {
            "before": [initial for _ in heads],
            "shards": self._shards(),
            "prompts": list(office.state.settings().prompts),
            "seed": self._seed("scan"),
        }

    async def _release(self) -> Json:
        office, desk = self.office, self.office.desk
        heads = tuple(expert.head for expert in desk.experts)
        number = len(desk.releases) + 1
        models, folder = office.state.releases / ".models", self._draft(number)
        job = await asyncio.to_thread(self._models_job, "bundle", heads)
        answer = await self._jobs.run(job | {"out": str(models)})
        source = release.ReleaseSource(
            genesis=office.genesis,
            policies=[office.policies[n] for n in sorted(office.policies)],
            heads=heads,
            lineage=[office.sealed(id) for id in office.lineage(heads)],
            models=models,
            router_root=answer["router_root"],
            router_report=json.loads(desk.router or "{}"),
            scan=json.loads(desk.scanned.report) if desk.scanned else {},
            number=number,
            previous=next(reversed(desk.releases), None),
            at=office.now(),
        )
        record = await asyncio.to_thread(release.draft, source, folder)
        sealed = await office.file(record)
        await asyncio.to_thread(shutil.rmtree, models, True)
        return {"number": number, "release": sealed.id}

    def _draft(self, number: int) -> Path:
        return self.office.state.releases / f".draft-{number}"

    def _unpublished(self) -> list[Effect]:
        """Releases of the ledger without a folder: just signed, or a kill came in between."""
        releases, folder = self.office.desk.releases, self.office.state.releases
        return [Publish(id) for id, r in releases.items() if not (folder / str(r.number)).exists()]

    async def _publish(self, id: str) -> Json:
        """Gives a signed release its proof and its folder."""
        office, record = self.office, self.office.desk.releases[id]
        lineage = office.lineage(self._released(record))
        proof = canonical(await office.proof(id, list(lineage)))
        draft, folder = self._draft(record.number), office.state.releases / str(record.number)
        await asyncio.to_thread(release.publish, draft, office.sealed(id), proof, folder)
        return {"number": record.number, "folder": str(folder)}

    def _released(self, record: Release) -> list[Head]:
        """The heads that a release was made of."""
        heads = []
        for expert in record.experts:
            if expert.merge is not None:
                heads.append(self.office.desk.head_of(expert.merge))
        return heads
