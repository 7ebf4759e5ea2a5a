"""The operator's commands: output, exit codes, and that `--help` loads nothing heavy."""

import json
import os
import socket
import subprocess
import sys

import pytest

from coordinator.fakes import found
from paris_coordinator import cli
from paris_coordinator.config import State
from paris_protocol.errors import REASONS


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*words)` → (exit code, output, errors) of the command line, in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["paris-coordinator", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            sys.exit(0)
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return call


@pytest.mark.parametrize(
    "verb", ["", "prepare", "init", "serve", "status", "inspect", "audit", "revoke", "merge"]
)
def test_help_imports_nothing_heavy(verb):
    heavy = ("torch", "diffusers", "transformers", "hivemind", "aiohttp", "sqlalchemy", "jinja2")
    code = (
        "import sys\nfrom paris_coordinator import cli\n"
        f"sys.argv = ['paris-coordinator', *{[verb] if verb else []}, '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
    assert "Usage" in done.stdout


def test_facts_are_printed_for_people_and_programs(run, tmp_path):
    state = found(tmp_path)
    code, out, _ = run("status", "--state", state.folder, "--json")
    assert code == 0
    assert json.loads(out)["network"] == state.settings().network
    code, out, _ = run("status", "--state", state.folder)
    assert "expert 0  round 0/2  units 0/2" in out
    code, out, _ = run("log", "--state", state.folder, "--json")
    assert [entry["type"] for entry in json.loads(out)] == ["genesis", "policy"]


def test_commands_without_a_network_say_so(run, tmp_path):
    for words in (["status"], ["log"], ["serve"], ["release"], ["inspect", "ab"]):
        code, _, errors = run(*words, "--state", tmp_path / "none")
        assert code == REASONS["state.missing"].exit, words
        assert REASONS["state.missing"].text in errors
        assert "[state.missing]" in errors
    assert not (tmp_path / "none").exists()


def test_a_folder_in_use_is_refused(run, tmp_path):
    state = found(tmp_path)
    with state.lock():
        code, _, errors = run("serve", "--state", state.folder, "--no-swarm")
    assert code == 24
    assert "state.in-use" in errors


def test_a_port_in_use_is_refused(run, tmp_path):
    state = found(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = run("serve", "--state", state.folder, "--no-swarm", "--port", port)
    assert code == 24
    assert "port.in-use" in errors
    with state.lock():
        pass  # nothing is held afterwards


def test_wrong_usage_and_wrong_input(run, tmp_path):
    state = found(tmp_path)
    assert run("serve", "--nonsense")[0] == 2
    assert run("init", tmp_path / "nothing", "--state", tmp_path / "x")[0] == 20
    assert run("init", tmp_path / "prepared", "--state", state.folder)[0] == 24
    assert run("inspect", "f", "--state", state.folder)[0] == 20
    assert run("merge", "--recompute", "f", "--state", state.folder)[0] == 20
    assert run("lift", "ed25519:" + "0" * 64, "--state", state.folder)[0] == 20


def test_orders_wait_for_the_coordinator_and_need_its_key(run, tmp_path):
    state = found(tmp_path)
    assert run("release", "--state", state.folder)[0] == 0
    assert len(list(state.orders.iterdir())) == 1
    State(tmp_path / "state").key_file.chmod(0o644)
    assert run("release", "--state", state.folder)[0] == 20
    assert len(list(state.orders.iterdir())) == 1
