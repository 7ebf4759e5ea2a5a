"""The shift's work on contributions: measure, audit, judge, revoke.

Each method carries out one effect of the desk, asks the worker for what is heavy, and ends with a
statement or fact in the ledger; a kill before that costs a repetition. What follows from the
numbers is concluded by `judging` and `auditing`::

    verdicts = Verdicts(office, worker)
    await verdicts.verify(contribution)       # a verdict, or the beginning of an audit
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final, Literal, Protocol

from paris_coordinator import auditing, earlier, judging, secrets
from paris_coordinator.board import Board, Work
from paris_coordinator.events import Answered, Called, Measured, Scored
from paris_coordinator.office import Office
from paris_coordinator.planning import able, plan_name
from paris_coordinator.withdrawals import spoiled
from paris_protocol.audit import tolerance_for
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    AuditReport,
    AuditRules,
    Challenge,
    Draw,
    Layer,
    Policy,
    Revocation,
    Segment,
    Verdict,
)

Json = dict[str, Any]
REASON: Final = 200
"""Longest reason of a revocation, as the record allows it."""


class Jobs(Protocol):
    """Whoever runs the heavy work: `worker.Worker`, or a double in tests."""

    async def run(self, job: Json, timeout: float = 3600.0) -> Json:
        """The job's answer, or ParisError."""


class Verdicts:
    """From an uploaded contribution to its verdict."""

    def __init__(self, office: Office, jobs: Jobs) -> None:
        self.office, self._jobs = office, jobs
        self._numerics: dict[tuple[str, str, int, str, int], Json] = {}

    # ------------------------------------------------------------ L0 to L3

    async def verify(self, contribution: str) -> Json:
        """Measures a contribution: its verdict, or its audit where it was drawn or is a canary."""
        office = self.office
        work = office.desk.work_of(contribution)
        policy = office.policy(work.record.policy).record
        answer = await self._jobs.run(await asyncio.to_thread(self._verify_job, work, policy))
        layers = tuple(Layer.model_validate_json(json.dumps(layer)) for layer in answer["layers"])
        accepted, code = judging.decide(layers, policy, work.record.round)
        private = answer.get("private")
        scored = {"delta", "se"} <= (private or {}).keys()  # losses that are no numbers are not
        if private and scored and work.state == "queued":
            await office.tell(Scored(contribution, private["delta"], private["se"]))
        draw = await office.draw(work)
        if accepted and draw is not None and policy.audit is not None:
            exact, calibrated = await self._comparable(work, policy.audit)
            # What a unit began with is known here only where it is laid open.
            canary = exact and work.record.residual is None and office.is_canary(work)
            if work.state == "queued" and (draw.audited or canary):
                states = auditing.states_wanted(policy.audit, draw, work.record, exact, calibrated)
                await office.tell(Measured(contribution, layers, draw, states, canary))
                return {"contribution": contribution, "audited": draw.audited, "exact": exact}
        return await self.file(contribution, layers, accepted, code, draw)

    async def file(
        self,
        contribution: str,
        layers: tuple[Layer, ...],
        accepted: bool,
        code: str,
        draw: Draw | None,
        reports: tuple[str, ...] = (),
    ) -> Json:
        """Signs and files a verdict; its opened states are not needed any more."""
        office, work = self.office, self.office.desk.work_of(contribution)
        if work.verdict is not None or work.state not in ("queued", "auditing", "closed"):
            return {"contribution": contribution, "code": "unit.closed"}
        verdict = await office.file(
            Verdict(
                contribution=contribution,
                assignment=work.id,
                node=work.record.node,
                expert=work.record.expert,
                round=work.record.round,
                accepted=accepted,
                code=code,
                layers=layers,
                policy=work.record.policy,
                at=office.now(),
                audit=draw,
                reports=reports,
            )
        )
        await office.forget_states(contribution)
        return {"contribution": contribution, "verdict": verdict.id, "code": code}

    async def refuse(self, contribution: str, code: str) -> Json:
        """The verdict on a contribution that cannot be judged."""
        audit = self.office.desk.audits.get(contribution)
        if audit is not None:
            return await self.file(contribution, audit.measured.layers, False, code, audit.draw)
        draw = await self.office.draw(self.office.desk.work_of(contribution))
        return await self.file(contribution, (), False, code, draw)

    async def dismiss(self, contribution: str) -> Json:
        """The verdict on what nobody can use any more, for which reason: its draw is published."""
        desk = self.office.desk
        record = desk.work_of(contribution).record
        over = "unit.withdrawn" if spoiled(desk, record) else "unit.closed"
        revoked = desk.nodes[record.node].revoked
        return await self.refuse(contribution, "node.revoked" if revoked else over)

    def _verify_job(self, work: Work, policy: Policy) -> Json:
        office, record = self.office, work.record
        rivals = [
            {"id": rival.contribution, "node": rival.record.node, "path": self.update(rival)}
            for rival in comparable(office.desk, work)
            if office.store.has(rival.done.update.blob)
        ]
        before = office.desk.head_before(record.parent)
        return {
            "job": "verify",
            "genesis": str(office.state.genesis_file),
            "assignment": record.model_dump(mode="json"),
            "commitment": work.committed and work.committed.model_dump(mode="json"),
            "contribution": work.done.model_dump(mode="json"),
            "update": self.update(work),
            "parent": str(office.head_file(record.parent)),
            "previous": None if before is None else str(office.head_file(before)),
            "private": str(office.state.private_shard("validation", record.expert)),
            "others": rivals,
            "history": earlier.relative_norms(office.desk, record),
            "blocks": earlier.block_norms(office.desk, record),
            "policy": policy.model_dump(mode="json"),
            "secret": office.secret("held-out"),
        }

    def update(self, work: Work) -> str:
        """The file of a contribution's update."""
        return str(self.office.store.path(work.done.update.blob))

    async def _comparable(self, work: Work, rules: AuditRules) -> tuple[bool, bool]:
        """How a replay of this work can prove anything: by equal bits, within a tolerance.

        Bits are demanded where its node's class of machine and build is this one. A tolerance holds
        for one model under one training plan.
        """
        record, claimed = work.record, work.done.numerics
        if not rules.tolerances and (claimed is None or record.kernels != "reference"):
            return False, False
        own = await self._own_numerics(work)
        exact = record.kernels == "reference" and claimed == own["numerics"]
        limits = tolerance_for(rules, record.dtype, own["model"], record.commit_every)
        return exact, limits is not None

    async def _own_numerics(self, work: Work) -> Json:
        record = work.record
        key = (record.plan, record.dtype, record.threads, record.kernels, record.batch)
        if key not in self._numerics:
            job = {"job": "numerics", "genesis": str(self.office.state.genesis_file)}
            names = ("plan", "dtype", "threads", "kernels", "batch")
            answer = await self._jobs.run(job | dict(zip(names, key, strict=True)))
            self._numerics[key] = answer
        return self._numerics[key]

    # ------------------------------------------------------------ L4 and L5

    async def ask(self, contribution: str, attempt: Literal[1, 2]) -> Json:
        """Challenges the node to lay the states open."""
        office, audit = self.office, self.office.desk.audits[contribution]
        rules, now = audit.rules, office.now()
        challenge = await office.file(
            Challenge(
                contribution=contribution,
                node=office.desk.work_of(contribution).record.node,
                states=audit.measured.states,
                attempt=attempt,
                deadline=now + (rules.answer_within if attempt == 1 else rules.retry_within),
                at=now,
            )
        )
        return {"contribution": contribution, "challenge": challenge.id, "attempt": attempt}

    async def call(self, contribution: str) -> Json:
        """Draws the volunteers that audit a contribution."""
        office, audit = self.office, self.office.desk.audits[contribution]
        trainer = office.desk.keys_of(office.desk.work_of(contribution).record.node)
        plan = plan_name(office.desk.work_of(contribution).record)
        standing = [n for n in office.desk.of_standing() if plan in office.plans.get(n, able(()))]
        drawn = auditing.auditors_for(audit, trainer, standing, office.blocks)
        check = auditing.is_checked(office.seed, contribution, audit.rules.floor)
        await office.tell(Called(contribution, drawn, check))
        return {"contribution": contribution, "auditors": list(drawn)}

    async def replay(self, contribution: str) -> Json:
        """Replays the drawn segments here, and files what was found."""
        office, audit = self.office, self.office.desk.audits[contribution]
        work = office.desk.work_of(contribution)
        answer = await self._jobs.run(await asyncio.to_thread(self._replay_job, work))
        listed = tuple(Segment.model_validate_json(json.dumps(s)) for s in answer["segments"])
        report = await office.file(
            AuditReport(
                contribution=contribution,
                assignment=None,
                auditor=office.key.id,
                numerics=answer["numerics"],
                segments=listed,
                passed=answer["passed"],
                at=office.now(),
            )
        )
        found = {"contribution": contribution, "report": report.id, "code": answer["code"]}
        return found | {"segments": list(audit.draw.segments), "exact": answer["exact"]}

    def _training_job(self, name: str, work: Work) -> Json:
        """What replays and canaries have in common: all that training is a function of."""
        office, record = self.office, work.record
        return {
            "job": name,
            "genesis": str(office.state.genesis_file),
            "assignment": record.model_dump(mode="json"),
            "parent": str(office.head_file(record.parent)),
            "shards": [str(office.store.path(shard.file.blob)) for shard in record.shards],
        }

    def _replay_job(self, work: Work) -> Json:
        office, audit = self.office, self.office.desk.audits[work.contribution or ""]
        opened = audit.opening.states if audit.opening is not None else ()
        return self._training_job("replay", work) | {
            "commitment": work.committed and work.committed.model_dump(mode="json"),
            "numerics": work.done.numerics,
            "states": [[s.index, str(office.store.path(s.file.blob))] for s in opened],
            "segments": list(audit.draw.segments),
            "audit": audit.rules.model_dump(mode="json"),
        }

    async def canary(self, assignment: str) -> Json:
        """Trains an assignment here, to compare the node's answer with."""
        work = self.office.desk.works[assignment]
        job = await asyncio.to_thread(self._training_job, "answer", work)
        patience = max(3600.0, work.record.hard_deadline - work.record.issued)  # a node has as long
        answer = await self._jobs.run(job, timeout=patience)
        fact = Answered(assignment, tuple(answer["states"]), answer["update_root"])
        await self.office.tell(fact)
        return {"assignment": assignment}

    async def give_up_canary(self, assignment: str) -> None:
        """An answer that cannot be had here is not waited for: the coordinator's loss alone."""
        await self.office.tell(Answered(assignment, (), ""))

    async def conclude(self, contribution: str) -> Json:
        """The verdict on an audited contribution."""
        office, audit = self.office, self.office.desk.audits[contribution]
        work, layers = office.desk.work_of(contribution), audit.measured.layers
        if audit.draw.audited:
            opened = audit.opened or not audit.measured.states
            deciding = auditing.deciding(audit) if opened else []
            if deciding is None:
                raise ParisError("internal", "the audit is not decided")
            layers = (*layers, judging.audit(deciding))
        answer = audit.answer if audit.judged_by_answer else None
        if answer is not None and work.committed is not None and layers[-1].passed:
            layers = (*layers, judging.canary(work.committed, answer.states, answer.update_root))
        policy = office.policy(work.record.policy).record
        also = auditing.audited_layers(audit)
        accepted, code = judging.decide(layers, policy, work.record.round, also)
        if accepted and not office.desk.current(work):
            accepted, code = False, "unit.closed"  # the round went on without it
        reports = tuple(audit.reports)
        return await self.file(contribution, layers, accepted, code, audit.draw, reports)

    async def revoke(self, node: str) -> Json:
        """Revokes a key; what is unvested of its work will be taken out of the heads."""
        office = self.office
        taken = office.desk.unvested(node)
        reason = office.desk.nodes[node].condemned[:REASON]
        sealed = await office.file(
            Revocation(key=node, reason=reason, contributions=taken, at=office.now())
        )
        return {"node": node, "reason": reason, "revocation": sealed.id, "taken": list(taken)}

    # ------------------------------------------------------------ secret sets

    async def _secret_set(self, expert: int, head: str, clips: int) -> Json:
        office = self.office
        private = str(office.state.private_shard("validation", expert))
        return await self._jobs.run(secrets.job(private, office.secret("held-out"), head, clips))

    async def commit_secret(self, expert: int) -> Json:
        """Commits to the clips that judge an expert's head, before they judge anything."""
        office, desk = self.office, self.office.desk
        head, clips = desk.experts[expert].head.weights.root, desk.policy.margins.clips
        answer = await self._secret_set(expert, head, clips)
        record = secrets.commitment(desk.shelf, expert, answer, office.now())
        return {"expert": expert, "set": (await office.file(record)).id}

    async def open_secret(self, id: str) -> Json:
        """Opens a set whose head has been replaced."""
        office, kept = self.office, self.office.desk.shelf.sets[id]
        answer = await self._secret_set(kept.record.expert, kept.head, kept.record.clips)
        record = secrets.opening(office.desk.shelf, id, answer, office.now())
        return {"set": id, "opening": (await office.file(record)).id}


def comparable(board: Board, work: Work) -> list[Work]:
    """Rivals whose update passed L0, so that it can be opened: judged, or still under audit."""
    return [
        rival
        for rival in board.rivals(work)
        if (rival.contribution or "") in board.audits
        or (rival.judged is not None and any(layer.passed for layer in rival.judged.layers[:1]))
    ]
