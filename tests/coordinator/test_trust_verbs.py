"""inspect, revoke --dry-run and log --check on a network that has run, and what they refuse."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys

import pytest

from coordinator.fakes import MODEL, FakeJobs, FakeNode, found, new_shift, open_office, run_out
from coordinator.synthetic import refused
from paris_coordinator import cli, inspecting
from paris_coordinator.checking import check_log, check_text
from paris_coordinator.orders import Order, take_orders
from paris_coordinator.reading import open_desk
from paris_coordinator.revoking import consequences, consequences_text
from paris_protocol.errors import ParisError
from paris_protocol.records import Layer


class Losses(FakeJobs):
    """With exact numbers that agree with the published buckets, for verdicts and merges.

    Of another numeric class than the nodes and with nothing calibrated: no state is laid open.
    """

    def numerics(self, job):
        return {"numerics": "b" * 64, "model": MODEL}

    def replay(self, job):
        return {
            "exact": False, "numerics": "b" * 64, "segments": [], "passed": True,
            "code": "audit.tolerance",
        }  # fmt: skip

    def verify(self, job):
        answer = super().verify(job)
        return answer | {"private": {"delta": "-0.1", "se": "0.01"}}

    def merge(self, job):
        answer = super().merge(job)
        return answer | {"numbers": [["delta", "-0.2"], ["se", "0.02"], ["after", "1.5"]]}


def finished(folder, jobs):
    """A network of two nodes that has run to its release, and its log."""
    state = found(folder, audit={"canary": "0"})
    office = open_office(state)
    nodes = [FakeNode(office.network, seed) for seed in (1, 2)]

    async def life():
        await run_out(office, new_shift(office, jobs), nodes)
        await office.project()

    asyncio.run(life())
    office.close()
    return state


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("network"), Losses())


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["paris-coordinator", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            sys.exit(0)
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return call


def test_inspect_shows_each_number_beside_the_cohorts(state, run):
    desk = open_desk(state)
    one = next(iter(desk.contributions))
    code, out, _ = run("inspect", one[:16], "--state", state.folder, "--json")
    assert code == 0
    facts = json.loads(out)
    numbers = {n["name"]: n for layer in facts["layers"] for n in layer["numbers"]}
    same_round = [w for w in desk.works.values() if w.record.round == facts["round"]]
    assert numbers["norm"]["others"] == len(same_round) - 1
    assert numbers["norm"]["median"] == 1.0
    code, out, _ = run("inspect", one[:16], "--state", state.folder)
    assert "L2 statistics of the update: passed" in out
    assert "norm 1 (size of the update); 3 others of the round: 1 to 1, median 1" in out
    assert "merged" in out
    assert facts["draw"]["audited"]
    assert "audited on segments" in out


def layer(value):
    return (Layer(layer="L2", passed=True, code="", numbers=(("norm", value),)),)


def test_far_off_numbers_are_called_far_off():
    others = [layer(value) for value in ("1", "1.1", "0.9", "1.05")]
    [far] = inspecting.compared(layer("4"), others)
    assert far["numbers"][0] | {"z": None} == {
        "name": "norm", "value": "4", "others": 4, "min": 0.9, "max": 1.1, "median": 1.025,
        "z": None,
    }  # fmt: skip
    assert far["numbers"][0]["z"] > 20
    assert "far off, robust z +" in inspecting.layers_text([far])[1]
    [near] = inspecting.compared(layer("1"), others)
    assert "; not far off" in inspecting.layers_text([near])[1]
    [alone] = inspecting.compared(layer("1"), [])
    assert inspecting.layers_text([alone])[1].endswith("norm 1 (size of the update)")
    [two] = inspecting.compared(layer("9"), others[:2])
    assert two["numbers"][0]["z"] is None  # too few to say


def test_no_names_of_people_are_printed(state, run):
    shown = [run("inspect", one, "--state", state.folder)[1] for one in
             open_desk(state).contributions]  # fmt: skip
    assert all("cpu" not in text for text in shown)


def test_a_dry_run_of_a_revocation_lists_what_would_go_and_orders_nothing(state, run):
    desk = open_desk(state)
    node = next(iter(desk.nodes))
    code, out, _ = run("revoke", node, "--dry-run", "--state", state.folder, "--json")
    assert code == 0
    facts = json.loads(out)
    merged = [w for w in desk.works.values() if w.record.node == node and w.state == "merged"]
    assert len(facts["contributions"]) == len(merged) > 0
    assert all(0 < one["weight"] <= 1 for one in facts["contributions"])
    assert {one["expert"] for one in facts["heads"]} == {w.record.expert for w in merged}
    assert facts["vested"] == []
    assert list(state.orders.iterdir()) == []
    assert "leaves" in consequences_text(facts)
    with refused("not-found"):
        consequences(state.folder, "ed25519:" + "7" * 64)
    assert run("revoke", "nobody", "--dry-run", "--state", state.folder)[0] != 0


def test_an_order_to_revoke_waits_for_the_coordinator(state, run):
    node = list(open_desk(state).nodes)[1]
    code, out, told = run("revoke", node, "--reason", "stolen", "--state", state.folder, "--json")
    assert code == 0
    assert json.loads(out)["node"] == node  # facts alone
    assert "order is left" in told
    assert take_orders(state, state.key()) == [Order("revoke", node, "stolen")]


def test_log_check_derives_the_whole_log(state, run):
    code, out, _ = run("log", "--check", "--state", state.folder, "--json")
    assert code == 0, out
    facts = json.loads(out)
    desk = open_desk(state)
    assert facts["heads"] == {str(e.index): e.head.weights.root for e in desk.experts}
    assert facts["statements"]["verdict"] == len(desk.contributions)
    assert facts["draws"] == facts["audited"] == len(desk.contributions)
    assert facts["waiting"] == []
    assert facts["secret_sets_open"] == facts["statements"]["secret-set"] == 4
    assert facts["secret_sets_in_use"] == 0
    assert "4 secret sets opened" in check_text(facts)
    code, out, _ = run("log", "--state", state.folder)
    assert len(out.splitlines()) == facts["size"]


def test_a_log_that_was_tampered_with_is_refused(state, tmp_path):
    network, copy = state.settings().network, tmp_path / "log"
    shutil.copytree(state.log, copy)
    assert check_log(copy, network)["size"] > 0
    statement = next((copy / "statements").iterdir())
    statement.write_bytes(statement.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(ParisError):
        check_log(copy, network)


class Lying(Losses):
    """A coordinator that publishes another bucket than its numbers say."""

    def verify(self, job):
        return super().verify(job) | {"private": {"delta": "0.5", "se": "0.01"}}


def test_a_bucket_that_is_not_what_was_measured_is_noticed_when_the_set_opens(tmp_path):
    state = finished(tmp_path, Lying())
    with refused("secret.set"):
        check_log(state.log, state.settings().network)


def test_commands_refuse_what_is_not_there(state, run, tmp_path):
    for words in (["inspect", "ab"], ["audit", "ab"], ["revoke", "ed25519:" + "7" * 64]):
        code, _, errors = run(*words, "--state", state.folder)
        assert code == 20, (words, errors)
    one = next(iter(open_desk(state).contributions))
    assert run("audit", one, "--segments", "x", "--state", state.folder)[0] == 2
    code, _, errors = run("audit", one, "--segments", "0,99", "--state", state.folder)
    assert "[audit.unknown]" in errors
    for verb in ("audit", "revoke", "log"):
        code, _, errors = run(verb, *(["ab"] if verb == "audit" else ["ed25519:" + "7" * 64] if
                              verb == "revoke" else []), "--state", tmp_path / "none")  # fmt: skip
        assert "[state.missing]" in errors
