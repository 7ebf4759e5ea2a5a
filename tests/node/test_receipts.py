"""Receipts: a proof that holds, and every way in which one does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeworld import NODE, ROOT, Office, digest, key, make_kit, make_policy
from paris_node import proofs, receipts
from paris_node.journal import Journal, Receipt
from paris_node.kit import watch
from paris_node.view import describe
from paris_protocol.audit import chain_head, chain_value, make_draw
from paris_protocol.envelope import seal
from paris_protocol.errors import ParisError
from paris_protocol.log import Checkpoint, Tree, leaf_hash, origin
from paris_protocol.records import AuditRules, Contribution, Draw, Verdict

OFFICE = Office()
NET = OFFICE.network


def receipt(**changes: Any) -> Receipt:
    assignment = OFFICE.assignment(0, NODE.id)
    commitment, merge = digest("commitment"), digest("merge")
    contribution = seal(
        Contribution(
            assignment=assignment.id,
            commitment=commitment,
            update=OFFICE.genesis.record.initial,
            steps=10,
            samples=40,
            loss="0.5",
            seconds=1,
        ),
        changes.get("author", NODE),
        NET,
    )
    verdict = seal(
        Verdict(
            contribution=changes.get("judged", contribution.id),
            assignment=assignment.id,
            node=NODE.id,
            expert=0,
            round=0,
            accepted=True,
            code="",
            layers=(),
            policy=1,
            at=1,
            audit=changes.get("draw"),
        ),
        changes.get("judge", ROOT),
        NET,
    )
    ids = [digest("other"), assignment.id, commitment, contribution.id, verdict.id, merge]
    tree = Tree([leaf_hash(bytes.fromhex(one)) for one in ids])
    note = Checkpoint(origin(NET), tree.size, tree.root()).sign(changes.get("log", ROOT))
    body = {
        "contribution": json.loads(contribution.raw),
        "verdict": json.loads(verdict.raw),
        "merge": merge,
        "indices": {one: i for i, one in enumerate(ids)},
        "proofs": {one: [part.hex() for part in tree.inclusion(i)] for i, one in enumerate(ids)},
        "checkpoint": note,
    }
    return Receipt(
        contribution.id, 1.0, "judged", {"accepted": True, "merge": merge, "receipt": body}
    )


def check(one: Receipt) -> dict[str, Any]:
    return proofs.check(one, NET, NODE.id, {ROOT.id})


def test_a_receipt_is_proved_without_asking_anybody() -> None:
    proved = check(receipt())
    assert proved["accepted"] is True and proved["merge"] == digest("merge")


@pytest.mark.parametrize(
    "changes",
    [
        {"author": key("another")},
        {"judge": key("mallory")},
        {"log": key("mallory")},
        {"judged": digest("another contribution")},
    ],
)
def test_statements_of_others_prove_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ParisError):
        check(receipt(**changes))


@pytest.mark.parametrize("statement", range(1, 6))
@pytest.mark.parametrize("harm", ["index", "proof", "missing", "type"])
def test_every_statement_must_be_in_the_log(statement: int, harm: str) -> None:
    one = receipt()
    body = one.body["receipt"]
    name = list(body["indices"])[statement]
    if harm == "index":
        body["indices"][name] = 0
    elif harm == "proof":
        body["proofs"][name][0] = digest("forged")
    elif harm == "missing":
        del body["proofs"][name]
    else:
        body["indices"][name] = "1"
    with pytest.raises(ParisError) as refused:
        check(one)
    assert refused.value.code == "log.proof"


def test_answers_are_kept_until_the_story_is_over(tmp_path: Path) -> None:
    office = Office()
    kit = make_kit(tmp_path / "a", office)
    kit.journal.keep_receipt(Receipt("c1", 1.0, "queued", {}))
    kit.journal.keep_receipt(Receipt("c2", 1.0, "queued", {}))
    answer: dict[str, Any] = {"state": "queued", "verdict": None, "accepted": None, "merge": None}
    office.control.objects["contributions/c1"] = answer
    asyncio.run(receipts.refresh(kit))
    judged = {"state": "judged", "verdict": {}, "accepted": True, "code": "", "merge": None}
    office.control.objects |= {"contributions/c1": judged, "receipts/c1": {"checkpoint": "x"}}
    asyncio.run(receipts.refresh(kit))
    [one, two] = sorted(kit.journal.receipts(), key=lambda receipt: receipt.contribution)
    assert one.state == "judged" and one.body["receipt"] == {"checkpoint": "x"}
    assert two.body == {}, "a contribution that the coordinator does not know is left as it was"
    assert receipts.known_keys(kit.journal) == {ROOT.id}
    office.control.objects["contributions/c1"] = {**judged, "merge": "m"}
    asyncio.run(receipts.refresh(kit))
    asked = len(office.control.asked)
    asyncio.run(receipts.refresh(kit))
    assert not any("c1" in call for call in office.control.asked[asked:]), (
        "asked although it is over"
    )
    assert receipts.line(receipts.summary(one)).startswith("c1")
    kit.journal.close()


@pytest.mark.parametrize(
    ("end", "told"),
    [({"vested": True}, "vested"), ({"vested": None, "outcome": "revoked"}, "taken back")],
)
def test_merged_work_is_asked_after_until_it_has_vested_or_was_taken_back(
    tmp_path: Path, end: dict[str, Any], told: str
) -> None:
    office = Office()
    kit = make_kit(tmp_path / "a", office)
    kit.journal.keep_receipt(Receipt("c1", 1.0, "queued", {}))
    merged: dict[str, Any] = {"state": "judged", "verdict": {}, "accepted": True, "code": ""}
    merged |= {"merge": "m" * 64, "vested": False, "outcome": "merged"}
    office.control.objects |= {"contributions/c1": merged, "receipts/c1": {"checkpoint": "x"}}
    assert asyncio.run(receipts.refresh(kit))
    [one] = kit.journal.receipts()
    assert receipts.line(receipts.summary(one)).endswith("not vested yet")
    office.control.objects["receipts/c1"] = {"checkpoint": "longer"}
    assert not asyncio.run(receipts.refresh(kit)), "a longer log is no news"
    office.control.objects["contributions/c1"] = merged | end
    assert asyncio.run(receipts.refresh(kit))
    [one] = kit.journal.receipts()
    line = receipts.line(receipts.summary(one))
    assert told in line and "not vested" not in line
    asked = len(office.control.asked)
    assert not asyncio.run(receipts.refresh(kit))
    assert len(office.control.asked) == asked, "asked although it is over"
    kit.journal.close()


def test_an_alarm_about_the_log_lasts_until_the_log_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = make_kit(tmp_path / "a", Office())
    kit.settings = replace(kit.settings, network=f"paris://127.0.0.1:9/{'ab' * 32}")
    codes: list[str | None] = ["log.rollback", "network.down", None]

    def look(*_: Any) -> None:
        if (code := codes.pop(0)) is not None:
            raise ParisError(code)

    monkeypatch.setattr("paris_node.kit.follow", look)
    seen = []
    for _ in range(3):
        asyncio.run(watch(kit))
        seen.append(describe(kit.journal, kit.folder, why="node.working", running=True)["alarm"])
    assert seen[0] is not None and seen[0] == seen[1] and seen[2] is None
    kit.journal.close()


# ---------------------------------------------------------------- the draw

START = b"the start of the chain"
RULES = AuditRules(
    chain=chain_head(START, 8),
    chain_length=8,
    segments=1,
    rate="10",
    floor="0.05",
    probation=3,
    probation_weight="0.25",
    vesting=3,
    answer_within=60,
    retry_within=60,
    auditors=0,
    canary="0",
)


def drawn(**changes: Any) -> Draw:
    """The honest draw of `receipt`: its commitment is leaf 2 of the log."""
    facts = {"number": 1, "size": 3, "root": digest("root"), "standing": 0} | changes
    return make_draw(RULES, 2, secret=chain_value(START, 8, facts["number"]), **facts)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal.open(tmp_path / "journal.sqlite", NET)
    sealed = OFFICE.assignment(0, NODE.id)
    made.keep_unit(sealed.id, sealed.raw, 1.0)
    made.set_fact(f"{receipts.POLICY}1", make_policy(NET, audit=RULES).raw.decode())
    yield made
    made.close()


def test_a_draw_is_repeated_from_the_receipt(journal: Journal) -> None:
    found = proofs.check_audit(receipt(draw=drawn()), journal)
    assert found is not None
    assert (found["audited"], found["number"], found["root"]) == (True, 1, "stated")
    found = proofs.check_audit(receipt(draw=drawn()), journal, lambda size: digest("root"))
    assert found is not None and found["root"] == "checked"
    assert proofs.check_audit(receipt(), journal) is None


@pytest.mark.parametrize(
    "forged",
    [
        drawn().model_copy(update={"segments": (1 - drawn().segments[0],)}),
        drawn().model_copy(update={"audited": False, "segments": ()}),
        drawn().model_copy(update={"rate": "0.05"}),
        drawn().model_copy(update={"secret": chain_value(START, 8, 2)}),
        drawn().model_copy(update={"number": 2}),
        drawn(size=4),
    ],
)
def test_a_draw_that_somebody_chose_is_seen(journal: Journal, forged: Draw) -> None:
    with pytest.raises(ParisError) as refused:
        proofs.check_audit(receipt(draw=forged), journal)
    assert refused.value.code == "audit.draw"


def test_a_root_that_the_log_never_had_is_seen(journal: Journal) -> None:
    with pytest.raises(ParisError) as refused:
        proofs.check_audit(receipt(draw=drawn()), journal, lambda size: digest("another"))
    assert refused.value.code == "audit.draw"


def test_a_policy_that_was_not_kept_proves_nothing(journal: Journal) -> None:
    journal._db.execute("DELETE FROM facts WHERE key LIKE 'policy.%'")
    with pytest.raises(ParisError) as refused:
        proofs.check_audit(receipt(draw=drawn()), journal)
    assert refused.value.code == "audit.draw"


def test_what_a_replay_found_in_words() -> None:
    exact = {"segments": "2", "exact": "1", "rho": "0", "limit": "0"}
    assert receipts.told(exact) == "audited: 2 segments, equal bits"
    assert receipts.told(exact | {"segments": "1", "rho": "0.4"}) == "audited: 1 segment, others"
    within = {"segments": "1", "exact": "0", "rho": "0.01", "limit": "0.05"}
    assert receipts.told(within) == "audited: 1 segment, rho 0.01 (limit 0.05)"
    assert receipts.told({"segments": "0"}) == "audit proved nothing"
    assert receipts.replayed(None) == receipts.replayed({"payload": "!"}) == {}
