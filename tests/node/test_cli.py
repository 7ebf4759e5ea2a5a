"""The commands: what they show before they do anything, their exit codes, and bad input."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from contracts.server import Handler, listening, refusals, routes
from nodeworld import ROOT, Office, make_policy
from paris_node import cli, doctor, machine
from paris_node.config import load_settings
from paris_node.control import Server
from paris_node.journal import Journal
from paris_node.machine import FakeMachine, RealMachine
from paris_node.volunteer import Phase, Snapshot
from paris_protocol.envelope import SELF, seal
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.keys import load_key
from paris_protocol.records import PlanRules

VERBS = (
    "join", "run", "start", "stop", "status", "why", "pause", "resume", "finish", "fit", "doctor",
    "logs", "receipts",
)  # fmt: skip


@contextmanager
def serving(
    office: Office | None, *others: web.RouteDef, middleware: Any = refusals
) -> Iterator[str]:
    """An HTTP server in a thread of its own; gives its address."""
    ready, stop = threading.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        table = [*others, *(routes(office.control) if office else [])]
        async with listening(*table, middleware=middleware) as url:
            found.update(url=url, loop=asyncio.get_running_loop())
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield found["url"]
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join(10)


def invite(url: str, office: Office) -> str:
    return f"paris://{url.removeprefix('http://')}/{office.network}"


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; (exit code, stdout, stderr). `run` itself is recorded only."""
    monkeypatch.setattr(cli, "_run", lambda folder, **options: print(f"ran {folder}"))

    def run(*words: object, typed: str = "") -> tuple[int, str, str]:
        import io

        monkeypatch.setattr(sys, "argv", ["paris-node", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def office() -> Office:
    return Office()


def test_join_shows_everything_before_it_fetches_anything(
    tmp_path: Path, call: Call, office: Office
) -> None:
    state = tmp_path / "state"
    with serving(office) as url:
        code, out, _ = call("join", invite(url, office), "--dry-run", "--state", state)
        assert code == 0
        for word in ("licence", "Apache-2.0", "not granted in: XX", "memory", "disk", "download"):
            assert word in out
        assert "your address to other volunteers" in out and office.network in out
        code, out, _ = call("join", invite(url, office), "--dry-run", "--json", "--state", state)
        plan = json.loads(out)
        assert plan["network"] == office.network and plan["fits"] is True
        code, out, _ = call("join", invite(url, office), "--state", state, typed="n\n")
        assert (code, "Nothing was changed." in out) == (2, True)
        assert call("join", invite(url, office), "--state", state, typed="")[0] == 2
    assert not state.exists()
    assert set(office.control.asked) <= {"genesis", "policy"}


def test_join_enrols_once_and_again_changes_nothing(
    tmp_path: Path, call: Call, office: Office
) -> None:
    state = tmp_path / "state"
    with serving(office) as url:
        code, out, _ = call(
            "join",
            invite(url, office),
            "--yes",
            "--state",
            state,
            "--name",
            "kitchen",
            "--no-swarm",
        )
        assert code == 0 and f"ran {state}" in out
        key = load_key(state / "key")
        before = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
        assert {"key", "node.toml", "genesis.json"} <= set(before)
        assert all(path.stat().st_mode & 0o077 == 0 for path in [state, *state.iterdir()])
        assert call("join", invite(url, office), "--yes", "--state", state)[0] == 0
    after = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
    assert after == before and load_key(state / "key") == key
    assert 'name = "kitchen"' in before["node.toml"].decode()


def test_a_folder_of_another_network_is_refused_and_stays_as_it_is(
    tmp_path: Path, call: Call, office: Office
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    another = office.genesis.record.model_copy(update={"name": "another"})
    (state / "genesis.json").write_bytes(seal(another, ROOT, SELF).raw)
    with serving(office) as url:
        code, _, err = call("join", invite(url, office), "--yes", "--state", state)
    assert code == REASONS["state.other-network"].exit == 24
    assert "another network" in err
    assert [path.name for path in state.iterdir()] == ["genesis.json"]


def test_a_bare_address_shows_the_id_and_asks(tmp_path: Path, call: Call, office: Office) -> None:
    state = tmp_path / "state"
    with serving(office) as url:
        code, out, err = call("join", url, "--yes", "--state", state)
        assert (code, out) == (2, "") and REASONS["network.bare-url"].text in err
        code, out, err = call("join", url, "--state", state, typed="n\n")
        assert code == 2 and office.network in out
        code, out, _ = call("join", url, "--state", state, typed="y\ny\n")
        assert code == 0 and "ran" in out


def test_a_genesis_file_works_with_the_policy_beside_it(
    tmp_path: Path, call: Call, office: Office
) -> None:
    there = tmp_path / "there"
    (there / "policy").mkdir(parents=True)
    (there / "genesis.json").write_bytes(office.genesis.raw)
    with serving(office) as url:
        command = ("join", there / "genesis.json", "--dry-run", "--state", tmp_path / "state")
        code, _, err = call(*command)
        assert (code, "names no address" in err) == (2, True)
        policy = make_policy(office.network, addresses=(url,))
        (there / "policy" / "1.json").write_bytes(policy.raw)
        assert call(*command)[0] == 0
    code, _, err = call("join", tmp_path / "nothing.json", "--state", tmp_path / "state")
    assert (code, REASONS["network.invite"].text in err) == (2, True)


async def web_page(_: web.Request) -> web.Response:
    return web.Response(text="<html>Please log in</html>", content_type="text/html")


@web.middleware
async def yesterday(request: web.Request, handler: Handler) -> web.StreamResponse:
    answer = await handler(request)
    answer.headers["Date"] = formatdate(1_000_000_000, usegmt=True)
    return answer


def test_a_coordinator_that_is_not_what_it_should_be(
    tmp_path: Path, call: Call, office: Office
) -> None:
    def refused(url: str, network: str = office.network) -> tuple[int, str]:
        named = f"paris://{url.removeprefix('http://')}/{network}"
        code, out, err = call("join", named, "--yes", "--json", "--state", tmp_path / "state")
        assert "what to do:" in err
        return code, json.loads(out)["code"]

    with serving(office) as url:
        assert refused(url, "ab" * 32) == (23, "network.mismatch")
        gone = url
    assert refused(gone) == (40, "network.down")
    with serving(None, web.get("/v1/genesis", web_page)) as url:
        assert refused(url) == (40, "network.not-paris")
    with serving(office, middleware=yesterday) as url:
        assert refused(url) == (40, "network.clock")
    assert call("join", "paris://example.org", "--state", tmp_path)[0] == 2
    assert not (tmp_path / "state").exists()


def test_a_machine_that_is_too_small_is_told_the_numbers(
    tmp_path: Path, call: Call, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RealMachine, "memory_mb", lambda self: 10)
    with serving(office) as url:
        code, out, err = call("join", invite(url, office), "--yes", "--state", tmp_path / "state")
    assert code == 20 and "10 MB free" in out and REASONS["machine.too-small"].text in err
    assert not (tmp_path / "state").exists()


def test_without_an_agent_the_journal_answers(tmp_path: Path, call: Call, office: Office) -> None:
    code, _, err = call("status", "--state", tmp_path)
    assert code == 2 and "no Paris state" in err
    (tmp_path / "genesis.json").write_bytes(office.genesis.raw)
    journal = Journal.open(tmp_path / "journal.sqlite", office.network)
    journal.record(Snapshot(Phase.OUTBOX, "u"), "done", 5.0)
    journal.close()
    code, out, _ = call("status", "--json", "--state", tmp_path)
    view = json.loads(out)
    assert (code, view["running"], view["state"]) == (40, False, "outbox")
    code, out, _ = call("why", "--state", tmp_path)
    assert code == 0 and "No node is running" in out and "what to do:" in out
    for verb in ("pause", "resume", "finish", "stop"):
        code, out, _ = call(verb, "--json", "--state", tmp_path)
        assert (code, json.loads(out)["code"]) == (40, "agent.not-running")


def test_status_ends_with_the_code_of_the_state(tmp_path: Path, call: Call, office: Office) -> None:
    from paris_node.view import describe

    journal = Journal.open(tmp_path / "journal.sqlite", office.network)
    views = {
        why: describe(journal, tmp_path, why=why, running=True)
        for why in ("node.working", "owner.paused", "work.none", "node.quarantined")
    }
    journal.close()
    for why, wanted in zip(views, (0, 10, 12, 22), strict=True):
        view = views[why]

        async def status(request: object, view: dict[str, Any] = view) -> dict[str, Any]:
            return view

        async def play(status: Any = status) -> int:
            server = Server(tmp_path, {"status": status})
            await server.start()
            command = [sys.executable, "-m", "paris_node.cli", "status", "--state", str(tmp_path)]
            child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
            code = await child.wait()
            await server.close()
            return code

        assert asyncio.run(play()) == wanted


def test_fit_needs_no_network_and_downloads_nothing(
    tmp_path: Path, call: Call, office: Office
) -> None:
    code, out, _ = call("fit", "--json", "--state", tmp_path)
    rows = {row["size"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and rows["paper"]["parameters"] == 11_891_387_456
    with serving(office) as url:
        code, out, _ = call("fit", invite(url, office), "--state", tmp_path)
    assert code == 0 and "small" in out
    assert set(office.control.asked) <= {"genesis", "policy"}


def test_the_doctor_names_every_fault_with_one_fix(
    tmp_path: Path, call: Call, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "torch_report", lambda: {"torch": "2", "name": "cpu"})
    found = [{"case": "float32", "rho": 1e-5, "passed": True}]
    monkeypatch.setattr(doctor, "numerics_report", lambda _: found)
    assert call("doctor", "--state", tmp_path / "none")[0] == 0
    with serving(office) as url:
        call("join", invite(url, office), "--yes", "--state", tmp_path / "s")
    (tmp_path / "s" / "key").chmod(0o644)
    code, out, _ = call("doctor", "--json", "--state", tmp_path / "s")
    bad = {one["name"]: one for one in json.loads(out)["checks"] if not one["ok"]}
    assert code == 1 and set(bad) == {"key", "coordinator"}
    assert all(one["fix"] and one["code"] in REASONS for one in bad.values())


def test_the_doctor_tells_of_wrong_numbers(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "torch_report", lambda: {"torch": "2", "name": "cpu"})
    found = [{"case": "float32", "rho": 0.3, "passed": False}]
    monkeypatch.setattr(doctor, "numerics_report", lambda _: found)
    code, out, _ = call("doctor", "--json", "--state", tmp_path / "none")
    [bad] = [one for one in json.loads(out)["checks"] if not one["ok"]]
    assert (code, bad["name"], bad["code"]) == (1, "numerics", "machine.numerics")
    assert "float32: 0.3 apart" in bad["detail"]


def test_a_plan_is_chosen_at_joining_and_one_that_cannot_be_is_refused(
    tmp_path: Path, call: Call, office: Office
) -> None:
    offered = PlanRules(plan="adafactor", dtype="bfloat16", update_codec="int8", rate="1")
    office.control.policies.append(make_policy(office.network, plans=(offered,)).raw)
    state = tmp_path / "state"
    with serving(office) as url:
        named = ("join", invite(url, office), "--yes", "--json", "--state", state, "--plan")
        code, out, err = call(*named, "lora-16-nf4")
        assert code == 20 and REASONS["machine.plan"].text in err
        assert "adafactor" in err, "what it takes is not said"
        code, out, err = call(*named, "sgd")
        assert code == 2 and "no plan" in err
        assert not state.exists()
        code, out, _ = call("join", invite(url, office), "--dry-run", "--json", "--state", state)
        assert json.loads(out)["plan"] == "float32"
        code, out, _ = call(*named, "adafactor")
    assert code == 0 and json.loads(out[: out.rindex("}") + 1])["plan"] == "adafactor"
    assert load_settings(state).plan == "adafactor"


def test_a_named_plan_that_does_not_fit_is_refused_with_its_bytes(
    tmp_path: Path, call: Call, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RealMachine", lambda: FakeMachine(memory=[100]))
    with serving(office) as url:
        code, _, err = call(
            "join", invite(url, office), "--yes", "--state", tmp_path / "s", "--plan", "float32"
        )
    assert code == REASONS["machine.too-small"].exit and "float32 (" in err and "bytes" in err
    assert not (tmp_path / "s").exists()


def test_logs_and_receipts_of_a_folder(tmp_path: Path, call: Call, office: Office) -> None:
    assert call("logs", "--state", tmp_path)[0] == 2
    (tmp_path / "logs").mkdir()
    line = {"at": 1.0, "level": "info", "event": "phase.idle"}
    (tmp_path / "logs" / "node.log").write_text(json.dumps(line) + "\n")
    code, out, _ = call("logs", "--state", tmp_path)
    assert code == 0 and "phase.idle" in out
    assert json.loads(call("logs", "--json", "--state", tmp_path)[1]) == line


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ParisError("disk.full")])
def test_a_full_disk_ends_in_its_own_code(
    tmp_path: Path, call: Call, office: Office, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from paris_node import enrol

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(enrol, "write_atomic", full)
    with serving(office) as url:
        code, _, err = call("join", invite(url, office), "--yes", "--state", tmp_path / "s")
    assert code == 31 and "disk is full" in err
    assert not (tmp_path / "s" / "genesis.json").exists()


HELP = """
import sys, runpy
from paris_node import cli
for verb in sys.argv[1:]:
    sys.argv = ["paris-node", verb, "--help"]
    try: cli.main()
    except SystemExit as ended: assert not ended.code, verb
heavy = ("torch", "hivemind", "aiohttp", "diffusers", "safetensors", "psutil")
found = [m for m in heavy if m in sys.modules]
assert not found, found
"""


def test_the_help_of_every_verb_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *VERBS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == len(VERBS)
