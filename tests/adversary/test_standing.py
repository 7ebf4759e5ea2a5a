"""Rows about who a node is: sybils, the long con, a stolen key, lying auditors, canaries.

Whole rounds with merges, over HTTP: standing, weights, vesting, revocation, what leaves the head.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adversary.arena import Arena
from adversary.cheats import CHEATS
from adversary.light import refusal
from adversary.players import Player, Work
from paris_coordinator.events import Ordered
from paris_models.checkpoint import load_tensors
from paris_protocol.audit import check_draw, segments_of
from paris_protocol.errors import ParisError
from paris_protocol.records import AuditReport, Merge, Revert, Revocation, Segment, Statement
from tinynet import root_of

AUDIT = {"segments": 1, "rate": "10", "probation": 2, "probation_weight": "0.25", "canary": "0"}
PLAN = {"units": 2, "steps": 6, "rounds": 9}


def scene(folder: Path, play: Callable[[Arena], Awaitable[None]], **audit: Any) -> None:
    async def life() -> None:
        rules = AUDIT | audit
        plan = PLAN | rules.pop("plan", {})
        async with Arena(folder, audit=rules, plan=plan, commit_every=3) as arena:
            await play(arena)

    asyncio.run(life())


async def turn(arena: Arena, player: Player, patience: int = 0, **more: Any) -> Work | None:
    """One unit by this player, judged; None if there is no work for it."""
    try:
        work = await player.unit(**more)
    except ParisError as error:
        if error.code == "work.none":
            return None
        raise
    await arena.judge(work, patience)
    return work


def merges(arena: Arena) -> list[Merge]:
    return list(arena.office.desk.merges.values())


def weight_of(arena: Arena, merge: Merge, nodes: set[str]) -> float:
    """The weight that these nodes have in a merge."""
    desk = arena.office.desk
    return sum(
        float.fromhex(part.weight)
        for part in merge.inputs
        if desk.work_of(part.contribution).record.node in nodes
    )


# ---------------------------------------------------------------- sybils


def test_sybils_in_probation_have_a_bounded_weight(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        ada = await arena.player("ada")
        for _ in range(2):  # bootstrap: everything is audited, and all count fully
            await turn(arena, ada)
        desk = arena.office.desk
        assert desk.nodes[ada.id].standing == 2 and desk.of_standing() == [ada.id]
        sybils = [await arena.player(f"sybil {n}") for n in range(8)]
        ids = {sybil.id for sybil in sybils}
        for n, sybil in enumerate(sybils):  # each works once, so that all stay in probation
            if n % 2 == 0:
                await turn(arena, ada)
            await turn(arena, sybil)
        late = [
            merge
            for merge in merges(arena)
            if {desk.work_of(p.contribution).record.node for p in merge.inputs} & ids
        ]
        mixed = [merge for merge in late if weight_of(arena, merge, {ada.id})]
        assert mixed, "sybils did merge beside honest work"
        for merge in mixed:
            total = sum(float.fromhex(part.weight) for part in merge.inputs)
            assert weight_of(arena, merge, ids) / total <= 0.25 + 1e-6
            assert weight_of(arena, merge, {ada.id}) / total >= 0.75 - 1e-6

    scene(tmp_path, play, probation=2, plan={"units": 3})


def test_a_single_sybil_cannot_fill_a_merge_alone(tmp_path: Path) -> None:
    """A round that only nodes in probation worked on moves the head by a quarter at most."""

    async def play(arena: Arena) -> None:
        ada = await arena.player("ada")
        while len(arena.office.desk.of_standing()) < 1:
            await turn(arena, ada)
        while len(merges(arena)) < 2:
            await turn(arena, ada)
        before = len(merges(arena))
        eve = await arena.player("eve")
        while len(merges(arena)) == before:
            assert await turn(arena, eve)
            if arena.office.desk.nodes[eve.id].standing >= 2:
                break
        for merge in merges(arena)[before:]:
            if weight_of(arena, merge, {eve.id}) and not weight_of(arena, merge, {ada.id}):
                assert weight_of(arena, merge, {eve.id}) <= 0.25 + 1e-6

    scene(tmp_path, play, probation=2, plan={"units": 1})


# ---------------------------------------------------------------- the long con and the stolen key


async def settled(arena: Arena, players: list[Player], merged: int) -> None:
    """Honest turns until so many merges are there."""
    for n in range(40):
        if len(merges(arena)) >= merged:
            return
        await turn(arena, players[n % len(players)])
    raise AssertionError(f"{len(merges(arena))} merges")


def statements(arena: Arena, kind: type[Statement]) -> list[Any]:
    """The records of this kind in the ledger, in order."""
    sealed = [arena.office.sealed(row.id) for row in arena.office.ledger.logged(0, 10_000)]
    return [each.record for each in sealed if isinstance(each.record, kind)]


def test_after_a_long_honest_history_one_lie_takes_back_what_has_not_vested(
    tmp_path: Path,
) -> None:
    async def play(arena: Arena) -> None:
        ada, con = await arena.player("ada"), await arena.player("con")
        await settled(arena, [ada, con], 4)
        desk = arena.office.desk
        taken = set(desk.unvested(con.id))
        assert taken, "some of it is in the heads"
        for _ in range(4):  # the lie is committed as soon as there is a unit; here it is audited
            lie = await turn(arena, con, cheat=CHEATS["half of the steps"])
            if lie is not None:
                break
        assert lie is not None
        verdict = arena.verdict(lie.id)
        assert verdict is not None and verdict.code == "audit.mismatch"
        await arena.work()
        [revocation] = statements(arena, Revocation)
        assert revocation.key == con.id and set(revocation.contributions) == taken
        reverts = statements(arena, Revert)
        assert {p.contribution for r in reverts for p in r.removed} == taken
        for revert in reverts:
            check_revert(arena, revert)
        assert await refusal(con.unit()) == "node.revoked"
        before = len(merges(arena))
        await settled(arena, [ada], before + 1)
        for merge in merges(arena)[before:]:
            assert not weight_of(arena, merge, {con.id})

    scene(tmp_path, play, vesting=20)


def check_revert(arena: Arena, revert: Revert) -> None:
    """The head without what was taken back: parent − Σ weight · scale · update, numerically."""
    office = arena.office
    head = load_tensors(office.store.path(revert.result.blob))
    assert root_of(head) == revert.result.root
    expected = load_tensors(office.store.path(revert.parent.weights.blob))
    for part in revert.removed:
        update = load_tensors(office.store.path(part.update.blob))
        factor = float.fromhex(part.weight) * float.fromhex(part.scale)
        expected = {name: expected[name] - factor * update[name] for name in expected}
    for name, tensor in head.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5), name


def test_vested_work_stays(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        ada, con = await arena.player("ada"), await arena.player("con")
        await settled(arena, [ada, con], 6)
        desk = arena.office.desk
        merged = [
            desk.works[id].contribution
            for id in desk.nodes[con.id].works
            if desk.works[id].state == "merged"
        ]
        taken = desk.unvested(con.id)
        assert 0 < len(taken) < len(merged)

    scene(tmp_path, play, vesting=1)


def test_a_stolen_key_revoked_in_the_middle_of_a_round(tmp_path: Path) -> None:
    """What the thief has handed in is not merged; what the owner did before is taken back too."""

    async def play(arena: Arena) -> None:
        ada, owner = await arena.player("ada"), await arena.player("owner")
        await settled(arena, [owner], 1)
        works = arena.office.desk.works
        stolen = None  # the thief uses the owner's key, and works well
        while stolen is None or arena.office.desk.work_of(stolen.id).state != "accepted":
            stolen = await turn(arena, owner)
        assert works[stolen.assignment.id].merge is None, "its round is still open"
        before = len(merges(arena))
        leased = await owner.lease()
        await arena.office.tell(Ordered("revoke", owner.id, "the key was stolen"))
        await arena.work()
        [revocation] = statements(arena, Revocation)
        assert (revocation.key, revocation.reason) == (owner.id, "the key was stolen")
        assert statements(arena, Revert), "the head was made again without it"
        work = owner.train(leased, owner.parent(leased.record))
        assert await refusal(owner.hand_in(work)) == "node.revoked"
        assert await refusal(owner.lease()) == "node.revoked"
        await settled(arena, [ada], before + 1)
        assert all(not weight_of(arena, m, {owner.id}) for m in merges(arena)[before:])

    scene(tmp_path, play)


# ---------------------------------------------------------------- draws


def test_every_verdict_has_the_only_draw_that_is_possible(tmp_path: Path) -> None:
    """Neither side chose: numbers without gaps, and each draw follows from log, chain, standing."""

    async def play(arena: Arena) -> None:
        ada, eve = await arena.player("ada"), await arena.player("eve")
        await settled(arena, [ada, eve], 3)
        await turn(arena, eve, tamper=lambda w: w.with_update(dict.fromkeys(w.update, 0) and {
            name: -tensor for name, tensor in w.update.items()}))  # fmt: skip
        desk = arena.office.desk
        judged = [work for work in desk.works.values() if work.judged is not None]
        draws = [work.judged.audit for work in judged if work.judged is not None]
        assert sorted(draw.number for draw in draws if draw is not None) == list(range(len(judged)))
        await arena.office.project()
        rules = desk.policy.audit
        assert rules is not None
        for work, draw in zip(judged, draws, strict=True):
            assert draw is not None
            root = arena.office.log.root(draw.size)
            count = segments_of(work.record)
            check_draw(draw, rules, count, root=root, standing=draw.standing)
            for change in ({"secret": "0" * 64}, {"audited": not draw.audited},
                           {"segments": (1, 0)}, {"number": draw.number + 1},
                           {"standing": draw.standing + 9}):  # fmt: skip
                with pytest.raises(ParisError):
                    check_draw(draw.model_copy(update=change), rules, count, root=root,
                               standing=draw.standing)  # fmt: skip
            with pytest.raises(ParisError):
                check_draw(draw, rules, count, root="0" * 64, standing=draw.standing)

    scene(tmp_path, play)


# ---------------------------------------------------------------- volunteers as auditors


def report(player: Player, lease: Any, passed: bool) -> bytes:
    """What a volunteer says of the audit that it was given, true or not."""
    task = lease.record.audit
    segments = tuple(
        Segment(index=index, exact=True, rho="0" if passed else "1", tensor="0",
                limit="0", tensor_limit="0", passed=passed)
        for index in task.segments
    )  # fmt: skip
    return player.seal(
        AuditReport(
            contribution=task.contribution, assignment=lease.id, auditor=player.id,
            numerics="0" * 64, segments=segments, passed=passed, at=player.arena.now,
        )
    ).raw  # fmt: skip


async def volunteers(arena: Arena) -> list[Player]:
    """Three nodes of standing, from address blocks that tell nothing."""
    players = [await arena.player(f"auditor {n}") for n in range(3)]
    for _ in range(12):
        for player in players:
            if arena.office.desk.nodes[player.id].standing < 1:
                await turn(arena, player, patience=61)
    assert set(arena.office.desk.of_standing()) == {player.id for player in players}
    return players


@pytest.mark.parametrize(("honest_work", "liars"), [(True, 0), (True, 1), (False, 2), (False, 3)])
def test_lying_auditors_are_found_and_lose_standing(
    tmp_path: Path, honest_work: bool, liars: int
) -> None:
    """Two of three decide only on a pass that nobody contradicts; a fail is always replayed."""

    async def play(arena: Arena) -> None:
        players = await volunteers(arena)
        trainer = await arena.player("trainer")
        cheat = None if honest_work else CHEATS["half of the steps"]
        work = await trainer.unit(cheat=cheat)
        await arena.work()
        await trainer.answer()
        await arena.work()
        leases = [await player.lease() for player in players]
        assert all(lease.record.kind == "audit" for lease in leases)
        for n, (player, lease) in enumerate(zip(players, leases, strict=True)):
            says = honest_work if n >= liars else not honest_work
            await player.post("audits", report(player, lease, says))
        verdict = await arena.judge(work)
        if honest_work:
            assert verdict.accepted
        elif liars < 3:
            assert verdict.code == "audit.mismatch"
        standing = arena.office.desk.nodes
        if liars < 3:
            assert [standing[player.id].standing > 0 for player in players] == [
                n >= liars for n in range(3)
            ]
        assert len(verdict.reports) >= 2

    scene(tmp_path, play, auditors=3, probation=1, floor="0")


def test_colluding_auditors_are_caught_at_the_floor_rate(tmp_path: Path) -> None:
    """Three liars of one mind pass a cheat; the share that is checked anyway finds them."""

    async def play(arena: Arena) -> None:
        players = await volunteers(arena)
        trainer = await arena.player("trainer")
        work = await trainer.unit(cheat=CHEATS["half of the steps"])
        await arena.work()
        await trainer.answer()
        await arena.work()
        for player in players:
            await player.post("audits", report(player, await player.lease(), passed=True))
        verdict = await arena.judge(work)
        assert verdict.code == "audit.mismatch"
        assert all(arena.office.desk.nodes[player.id].standing == 0 for player in players)

    scene(tmp_path, play, auditors=3, probation=1, floor="1")


def test_reports_that_nobody_asked_for_change_nothing(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        players = await volunteers(arena)
        trainer, stranger = await arena.player("trainer"), await arena.player("stranger")
        work = await trainer.unit()
        await arena.work()
        await trainer.answer()
        await arena.work()
        lease = await players[0].lease()
        task = lease.record.audit
        assert task is not None and trainer.id not in {p.id for p in players}
        before = list(arena.office.ledger.entries())
        foreign = report(stranger, lease, passed=False)
        assert await refusal(stranger.post("audits", foreign)) == "unit.not-yours"
        own = Player.seal(players[0], AuditReport(
            contribution=work.id, assignment="0" * 64, auditor=players[0].id, numerics="0" * 64,
            segments=(), passed=False, at=arena.now))  # fmt: skip
        assert await refusal(players[0].post("audits", own.raw)) == "audit.unknown"
        assert list(arena.office.ledger.entries()) == before
        for player in players:
            mine = lease if player is players[0] else await player.lease()
            await player.post("audits", report(player, mine, passed=True))
        assert (await arena.judge(work)).accepted

    scene(tmp_path, play, auditors=3, probation=1, floor="0")


# ---------------------------------------------------------------- canaries


def test_a_canary_finds_a_cheat_whom_no_audit_was_drawn_for(tmp_path: Path) -> None:
    async def play(arena: Arena) -> None:
        eve, ada = await arena.player("eve"), await arena.player("ada")
        verdict = await arena.judge(await eve.unit(cheat=CHEATS["half of the steps"]))
        assert verdict.audit is not None and not verdict.audit.audited
        assert (verdict.accepted, verdict.code) == (False, "canary.mismatch")
        await arena.work()
        assert arena.office.desk.nodes[eve.id].revoked is not None
        assert (await arena.judge(await ada.unit())).accepted

    scene(tmp_path, play, rate="0", floor="0", canary="1")
