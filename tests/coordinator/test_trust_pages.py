"""The pages of a network that audits: draws, reports, standing, rules, sets, scan, revocations."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from coordinator.fakes import MODEL, FakeJobs, FakeNode, found, new_shift, open_office, run_out
from coordinator.test_pages import Reader
from paris_coordinator.events import Ordered
from paris_coordinator.web import pages

HOSTILE = "<script>alert(1)</script>"
ZEBRA = {"expert": 0, "word": HOSTILE, "z": 41.5, "shift": 0.3, "consistency": 0.97}


class Auditing(FakeJobs):
    """Nothing is calibrated for the nodes' class, so nothing has to be laid open."""

    def numerics(self, job):
        return {"numerics": "b" * 64, "model": MODEL}

    def replay(self, job):
        return {
            "exact": False, "numerics": "b" * 64, "segments": [], "passed": True,
            "code": "audit.tolerance",
        }  # fmt: skip

    def scan(self, job):
        experts = [{"expert": 0, "used": [], "unused": [ZEBRA]}]
        return {"words": 1009, "experts": experts, "flagged": [ZEBRA]}


async def fetch(office, *paths):
    app = web.Application()
    pages.add_pages(app, office)
    texts = {}
    async with TestClient(TestServer(app)) as client:
        for path in paths:
            async with client.get(path) as answer:
                texts[path] = (await answer.read()).decode()
                assert answer.status == 200, path
    return texts


def read(texts):
    for path, text in texts.items():
        reader = Reader()
        reader.feed(text)
        assert reader.open == [], path
        assert "<script" not in text, path


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The pages before and after a revocation, and the keys and ids on them."""
    state = found(tmp_path_factory.mktemp("network"), audit={"canary": "0"})
    office = open_office(state)
    nodes = [FakeNode(office.network, seed) for seed in (1, 2)]

    async def life():
        shift = new_shift(office, Auditing())
        await office.register(nodes[0].registration())
        first = await nodes[0].hand_in(office, await office.lease(nodes[0].request()))
        while office.desk.work_of(first).state != "auditing":
            assert await shift.step()
        path = f"/contributions/{first}"
        under_way = (await fetch(office, path))[path]
        assert "Being audited; the draw is revealed with the verdict." in under_way
        assert office.desk.audits[first].draw.secret not in under_way
        # A flagged scan makes the release wait, which the helper takes for the end.
        await run_out(office, shift, nodes)
        await office.project()
        key = nodes[0].key.id
        one = next(w for w in office.desk.works.values() if w.record.node == key)
        paths = ["/", "/policy", "/log", "/releases", "/experts/0", f"/nodes/{key}",
                 f"/contributions/{one.contribution}"]  # fmt: skip
        before = await fetch(office, *paths)
        assert not office.desk.releases
        await office.tell(Ordered("revoke", key, HOSTILE))
        while await shift.step():
            pass
        await office.project()
        return paths, before, await fetch(office, *paths), office.desk, one

    result = asyncio.run(life())
    office.close()
    return result


def test_a_contributions_draw_can_be_read_off_its_page(shown):
    paths, before, _, _, one = shown
    read(before)
    text, draw = before[paths[-1]], one.judged.audit
    for part in (draw.root, draw.secret, f"number {draw.number},", "<strong>audited</strong>"):
        assert part in text
    assert "no tolerance is calibrated" in text
    assert "of 20 merges after its own" in text
    assert "opened in" in text  # the secret set of its head has retired: the exact numbers stand


def test_the_rules_and_the_log_stand_on_pages_of_their_own(shown):
    _, before, _, desk, _ = shown
    rules = before["/policy"]
    assert desk.policy.audit.chain in rules
    assert "None calibrated" in rules
    assert rules.count("in use") == 0
    for kind in ("verdict", "merge", "secret-set", "secret-set-opened", "audit-report"):
        assert f"<th>{kind}</th>" in before["/log"]


def test_a_flagged_word_is_never_silent(shown):
    _, before, _, desk, _ = shown
    assert desk.suspicious
    assert "The backdoor scan flagged 1 word" in before["/"]
    assert "the release waits for the operator" in before["/releases"]
    assert "41.5" in before["/releases"]
    assert json.loads(desk.scanned.report)["flagged"]


def test_a_revocation_is_told_where_it_matters(shown):
    paths, _, after, desk, one = shown
    read(after)
    node = desk.nodes[one.record.node]
    assert node.revoked in desk.revocations
    assert "Revoked" in after[paths[-2]]
    assert "&lt;script&gt;" in after[paths[-2]]  # the reason is only text
    assert ">revoked<" in after["/"]
    assert one.state == "revoked"
    assert "taken back" in after[paths[-1]]
    assert desk.reverts
    assert "Reverts" in after["/experts/0"]
    assert "made by revert" in after["/experts/0"]
    for kind in ("revocation", "revert"):
        assert f"<th>{kind}</th>" in after["/log"]
