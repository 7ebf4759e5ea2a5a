"""Fit, machine, settings and log: the small parts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeworld import Office
from paris_models.config import LADDER, RecipeConfig
from paris_node import logs
from paris_node.config import Settings, load_settings, parse_changes
from paris_node.fit import ladder, need_of, need_of_network
from paris_node.machine import Device, FakeMachine, RealMachine, _nvidia
from paris_node.view import state_code
from paris_protocol.errors import REASONS, ParisError

# ---------------------------------------------------------------- fit


def test_the_ladder_is_estimated_without_a_network() -> None:
    needs = ladder()
    assert list(needs) == list(LADDER)
    assert needs["demo"].parameters == 319_392
    assert needs["paper"].parameters == 11_891_387_456
    assert needs["demo"].fits(2_000, 2_000) and not needs["paper"].fits(24_000, 10_000_000)
    # Parent, weights, gradients and two moments of the paper's expert in float32.
    assert needs["paper"].memory_mb > 5 * 4 * 11_891_387_456 >> 20


@given(
    st.sampled_from(sorted(LADDER)),
    st.integers(1, 4096),
    st.integers(0, 1 << 40),
    st.integers(1, 256),
)
def test_more_work_never_needs_less(size: str, tokens: int, shards: int, batch: int) -> None:
    recipe, more = RecipeConfig(batch=batch), RecipeConfig(batch=batch + 1)
    small = need_of(LADDER[size], recipe, tokens=tokens, shard_bytes=shards)
    for large in (
        need_of(LADDER[size], recipe, tokens=tokens + 1, shard_bytes=shards),
        need_of(LADDER[size], recipe, tokens=tokens, shard_bytes=shards + (1 << 20)),
        need_of(LADDER[size], more, tokens=tokens, shard_bytes=shards),
    ):
        assert large.memory_mb >= small.memory_mb
        assert large.disk_mb >= small.disk_mb and large.download_mb >= small.download_mb


def test_a_network_s_need_counts_the_shards_of_one_unit() -> None:
    genesis = Office().genesis.record
    need = need_of_network(genesis, units=2)
    assert need.download_mb >= 1


# ---------------------------------------------------------------- machine


def test_the_scripted_machine_takes_one_value_a_question() -> None:
    gpu = Device("cuda", "Fake", 24_000)
    machine = FakeMachine(memory=[5, 4], gpu=gpu)
    assert [machine.memory_mb() for _ in range(3)] == [5, 4, 4]
    assert machine.device("auto") == gpu and machine.device("cpu").kind == "cpu"
    with pytest.raises(ParisError) as refused:
        FakeMachine().device("cuda")
    assert refused.value.code == "gpu.unavailable"


def test_the_real_machine_answers(tmp_path: Path) -> None:
    machine = RealMachine()
    assert machine.memory_mb() > 0
    assert machine.disk_mb(tmp_path / "not" / "there" / "yet") > 0
    assert machine.device("cpu").kind == "cpu"


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("echo 'NVIDIA H200, 590.1, 100'; echo 'NVIDIA L4, 590.1, 20000'", "NVIDIA L4"),
        ("echo 'no devices were found'; exit 9", None),
        ("echo 'NVIDIA, Lost, 590.1, [N/A]'", None),
        ("echo 'NVIDIA H200, 100'", None),
    ],
)
def test_the_driver_s_tool_is_read_with_suspicion(script: str, name: str | None) -> None:
    found = _nvidia(("sh", "-c", script))
    assert (found.name if found else None) == name
    assert found is None or found.driver == "590.1"


# ---------------------------------------------------------------- settings


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    settings = Settings(network="paris://localhost:1/" + "0" * 64, name='k"ü', listen=("/ip4/x",))
    settings.save(tmp_path)
    assert load_settings(tmp_path) == settings
    assert (tmp_path / "node.toml").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "network = 5",
        'network = "x"\nswarm = 1',
        'network = "x"\nnonsense = 1',
        'network = "x"\nplan = "sgd"',
        "network = ",
        "\xff",
    ],
)
def test_other_settings_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ParisError) as refused:
        load_settings(tmp_path)
    assert refused.value.code == "state.corrupt"


def test_a_folder_without_settings_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(ParisError) as refused:
        load_settings(tmp_path)
    assert refused.value.code == "state.missing"


def test_changes_of_the_command_line() -> None:
    assert parse_changes(["retry=1", "swarm=false", "name=kitchen", 'device="cpu"']) == {
        "retry": 1.0,
        "swarm": False,
        "name": "kitchen",
        "device": "cpu",
    }
    for text in ("retry", "retry=fast", "network=x", "nonsense=1"):
        with pytest.raises(ParisError) as refused:
            parse_changes([text])
        assert refused.value.code == "usage"


# ---------------------------------------------------------------- log and codes


def test_log_lines_are_json_and_readable(tmp_path: Path) -> None:
    record = logging.makeLogRecord(
        {
            "msg": "phase.%s",
            "args": ("training",),
            "levelname": "INFO",
            "unit": "ab" * 32,
            "code": "",
        }
    )
    line = logs.JsonLines().format(record)
    assert json.loads(line)["event"] == "phase.training"
    assert logs.human(line).endswith("INFO    phase.training unit=" + "ab" * 6)
    assert logs.human("not json\n") == "not json"


def test_state_codes_are_those_of_the_command_contract() -> None:
    wanted = {
        "node.working": 0,
        "owner.paused": 10,
        "work.none": 12,
        "unit.closed": 20,
        "network.version": 21,
        "node.quarantined": 22,
        "gpu.unavailable": 30,
        "disk.full": 31,
        "network.down": 40,
        "internal": 50,
    }
    assert {why: state_code(why) for why in wanted} == wanted
    known = {0, 10, 12, 20, 21, 22, 30, 31, 40, 50}
    assert {state_code(why) for why in REASONS} <= known
