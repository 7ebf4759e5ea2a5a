"""The trainer: a unit is a function of (assignment, step), in one process or in many."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from paris_models.checkpoint import load_tensors, raw_items, save_tensors
from paris_models.selftest import Found, cases
from paris_node import trainer
from paris_node.trainer import Asked, train_unit
from paris_node.training import TrainerProcess
from paris_node.unit import RESULT, STATE, Order, Unit
from paris_protocol.errors import ParisError
from paris_protocol.lineage import committed_steps
from paris_protocol.tensors import states_root, tensor_root
from tinynet import EVERY, STEPS, TinyNet, plain

UNIT = "ab" * 32


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("net"))


def value(net: TinyNet, work: Path, **changes: Any) -> dict[str, Any]:
    work.mkdir(exist_ok=True)
    return {
        "unit": UNIT,
        "assignment": plain(net.assignment(0, 0, **changes.pop("assignment", {}))),
        "genesis": str(net.folder / "genesis.json"),
        "network": net.genesis.id,
        "work": str(work),
        "parent": str(net.head_file),
        "shards": [str(net.shard(0, 0))],
        "device": "cpu",
        "save_every": 240,
        **changes,
    }


def trained(order: Order, stop_at: int | None = None) -> dict[str, Any]:
    """Train in this process; stop by an exception before the given step, as a kill would."""

    class Killed(Exception):
        pass

    said: list[dict[str, Any]] = []
    real = Unit.step

    def step(unit: Unit) -> float:
        if unit.state.step == stop_at:
            raise Killed
        return real(unit)

    Unit.step = step  # type: ignore[method-assign]
    try:
        train_unit(order, said.append, Asked())
    except Killed:
        return {}
    finally:
        Unit.step = real  # type: ignore[method-assign]
    return said[-1]


def test_the_result_is_what_the_records_ask_for(net: TinyNet, tmp_path: Path) -> None:
    result = trained(Order.parse(value(net, tmp_path / "a")))
    honest = net.unit(0, 0)
    assert result["update_root"] == honest.commitment.update_root
    assert result["states"] == list(honest.commitment.states)
    assert len(result["states"]) == len(committed_steps(STEPS, EVERY))
    assert result["states_root"] == states_root(result["states"])
    assert (result["steps"], result["samples"]) == (STEPS, STEPS * 16)
    update = load_tensors(Path(result["update"]))
    assert tensor_root(raw_items(update)) == result["update_root"]
    assert json.loads((tmp_path / "a" / RESULT).read_text())["update_root"] == result["update_root"]


@pytest.mark.parametrize("stops", [[1], [5], [7], [11], [3, 6, 9]])
def test_stopped_anywhere_and_resumed_equals_never_stopped(
    net: TinyNet, tmp_path: Path, stops: list[int]
) -> None:
    whole = trained(Order.parse(value(net, tmp_path / "whole")))
    order = Order.parse(value(net, tmp_path / "parts"))
    for stop in stops:
        assert trained(order, stop) == {}
    resumed = trained(order)
    for name in ("update_root", "states", "states_root", "loss", "steps"):
        assert resumed[name] == whole[name], name


def test_it_resumes_from_the_last_save_not_from_the_start(net: TinyNet, tmp_path: Path) -> None:
    order = Order.parse(value(net, tmp_path / "a"))
    trained(order, 8)
    unit = Unit(order)
    assert unit.state.step == EVERY
    unit.step()
    unit.save()
    assert Unit(order).state.step == EVERY + 1


def test_a_save_of_another_unit_or_a_damaged_one_is_not_used(net: TinyNet, tmp_path: Path) -> None:
    order = Order.parse(value(net, tmp_path / "a"))
    trained(order, 8)
    other = Order.parse(value(net, tmp_path / "a", unit="cd" * 32))
    assert Unit(other).state.step == 0
    path = tmp_path / "a" / STATE
    path.write_bytes(path.read_bytes()[:-100])
    assert Unit(order).state.step == 0
    assert path.with_name(f"{STATE}.damaged").exists()
    assert trained(order)["update_root"] == net.unit(0, 0).commitment.update_root


def test_files_that_are_not_what_was_signed_are_refused_before_they_are_opened(
    net: TinyNet, tmp_path: Path
) -> None:
    head = load_tensors(net.head_file)
    bad = tmp_path / "bad.safetensors"
    cases: list[tuple[str, dict[str, torch.Tensor]]] = [
        ("tensor.header", {name: tensor.double() for name, tensor in head.items()}),
        ("tensor.header", dict(list(head.items())[1:])),
        ("tensor.values", {name: tensor * float("nan") for name, tensor in head.items()}),
    ]
    for code, tensors in cases:
        save_tensors(tensors, bad)
        with pytest.raises(ParisError) as refused:
            Unit(Order.parse(value(net, tmp_path / "a", parent=str(bad))))
        assert refused.value.code == code
    bad.write_bytes(b"\x80\x04 this is a pickle")
    for where in ({"parent": str(bad)}, {"shards": [str(bad)]}):
        with pytest.raises(ParisError) as refused:
            Unit(Order.parse(value(net, tmp_path / "a", **where)))
        assert refused.value.code == "tensor.header"
    with pytest.raises(ParisError):  # a shard with another number of clips than was signed
        shutil.copy(net.private(0), bad)
        Unit(Order.parse(value(net, tmp_path / "a", shards=[str(bad)])))


def test_a_full_disk_is_said_so_and_the_last_save_stays(
    net: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order.parse(value(net, tmp_path / "a"))
    trained(order, 6)
    before = (tmp_path / "a" / STATE).read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ParisError) as refused:
            trained(order)
    assert refused.value.code == "disk.full"
    assert [one.name for one in (tmp_path / "a").iterdir()] == [STATE]
    assert (tmp_path / "a" / STATE).read_bytes() == before
    assert trained(order)["update_root"] == net.unit(0, 0).commitment.update_root


def test_a_wanted_gpu_that_is_not_there_is_said_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ParisError) as refused:
        trainer.pick_device("cuda")
    assert refused.value.code == "gpu.unavailable"
    assert trainer.pick_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("kind", "right", "picked"),
    [("xpu", True, "xpu"), ("mps", True, "mps"), ("xpu", False, "cpu"), ("hpu", True, "cpu")],
)
def test_another_accelerator_is_taken_if_all_its_numbers_are_right(
    monkeypatch: pytest.MonkeyPatch, kind: str, right: bool, picked: str
) -> None:
    asked: list[tuple[list[str], str]] = []

    def examine(wanted: list[str], device: str) -> list[Found]:
        asked.append((wanted, device))
        return [
            Found(case, 0.0 if right or n else 1.0, 0.0, 0.1, 0.1) for n, case in enumerate(wanted)
        ]

    there = SimpleNamespace(current_accelerator=lambda check_available: SimpleNamespace(type=kind))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "accelerator", there)
    monkeypatch.setattr(trainer, "examine", examine)
    trainer._accelerator.cache_clear()
    try:
        assert [trainer.pick_device("auto") for _ in range(2)] == [picked] * 2
        assert trainer.pick_device("cpu") == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert trainer.pick_device("auto") == "cuda"
    finally:
        trainer._accelerator.cache_clear()
    assert asked == ([] if kind == "hpu" else [(cases(), kind)]), "once, and all of them"


# ---------------------------------------------------------------- the process


def test_the_process_trains_the_same_bits_stays_for_the_next_unit_and_frees_its_memory(
    net: TinyNet, tmp_path: Path
) -> None:
    """One process for all of it: starting one costs seconds."""
    order = value(net, tmp_path / "a", assignment={"steps": 4000, "commit_every": 4000})
    shorter = value(net, tmp_path / "b")

    async def play() -> tuple[int, float, str]:
        process = TrainerProcess(tmp_path / "trainer.log")
        steps: list[int] = []
        begun = asyncio.Event()

        def hear(report: dict[str, Any]) -> None:
            steps.append(report["step"])
            if report["event"] == "progress":
                begun.set()

        [found] = await process.test("cpu", ["float32"])
        assert found["passed"] and found["case"] == "float32"
        pid = process.pid
        result = await process.train(shorter, hear)
        assert pid is not None and process.pid == pid
        task = asyncio.create_task(process.train(order, hear))
        await asyncio.wait_for(begun.wait(), 60)
        assert process.pid == pid, "a second process was started"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        clock = time.monotonic()
        saved = await process.pause(grace=5.0)
        took = time.monotonic() - clock
        assert saved is not None and not psutil.pid_exists(pid)
        return saved, took, result["update_root"]

    saved, took, root = asyncio.run(play())
    assert root == net.unit(0, 0).commitment.update_root
    assert took <= 10.0
    assert Unit(Order.parse(order)).state.step == saved


IMPORTS = """
import sys, paris_node.trainer
ours = ("paris_models.encoders", "paris_models.codec", "paris_models.text")
theirs = tuple(f"transformers.models.{name}" for name in ("t5", "clip", "dinov2"))
bad = [m for m in sys.modules if m in ours or m.startswith(theirs)
       or (m.startswith("diffusers.models.autoencoders.") and "autoencoder_kl" in m)]
print(",".join(bad))
"""


def test_no_module_of_an_encoder_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'paris_node.trainer'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.05)
