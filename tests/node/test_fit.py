"""`paris-node fit` on ten described machines, beside a golden file; and what the verb refuses.

`python tests/node/test_fit.py` writes the golden file again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nodeworld import Office
from paris_models.fitting import Facts, offers_of
from paris_models.plans import PLANS
from paris_node import cli
from paris_node.fit import (
    HOME,
    Links,
    facts_json,
    facts_of,
    ladder_work,
    part_lines,
    plan_lines,
    work_of_network,
)

GOLDEN = Path(__file__).with_name("fit_machines.txt")
FIBRE = Links(1000.0, 1000.0)


def machine(
    name: str, gib: float, ram: int, disk: int, cores: int, links: Links = HOME, gpus: int = 1
) -> Facts:
    kind = "cpu" if name == "CPU" else "cuda"
    return facts_of(
        kind, name, free_mb=int(gib * 1024), ram_mb=ram * 1024, disk_mb=disk * 1024, cores=cores,
        links=links, gpus=gpus,
    )  # fmt: skip


MACHINES = {
    "laptop, CPU, 8 GB": machine("CPU", 5, 5, 60, 4),
    "desktop, CPU, 32 GB": machine("CPU", 26, 26, 300, 8),
    "workstation, CPU, 128 GB": machine("CPU", 118, 118, 2000, 32, FIBRE),
    "T4 in a cloud, 16 GB": machine("Tesla T4", 14.5, 12, 100, 4, FIBRE),
    "RTX 3060, 12 GB": machine("NVIDIA GeForce RTX 3060", 11.2, 26, 500, 8),
    "RTX 4080, 16 GB": machine("NVIDIA GeForce RTX 4080", 15.2, 26, 500, 8),
    "RTX 4090, 24 GB, 64 GB RAM": machine("NVIDIA GeForce RTX 4090", 23, 58, 1000, 16),
    "RTX 5090, 32 GB, 192 GB RAM": machine("NVIDIA GeForce RTX 5090", 31, 180, 2000, 16),
    "H200, 141 GB": machine("NVIDIA H200", 139, 120, 60, 16, FIBRE),
    "8 × A100, 80 GB": machine("NVIDIA A100-SXM4-80GB", 79, 960, 8000, 128, FIBRE, gpus=8),
}


def described() -> str:
    pages = []
    for name, facts in MACHINES.items():
        sizes = ladder_work().items()
        report = {size: offers_of(config, work, facts) for size, (config, work) in sizes}
        pages.append("\n".join([f"## {name}", *plan_lines(report, every=False)]))
        pages.append("\n".join(plan_lines({"paper": report["paper"]}, every=True)))
    return "\n\n".join(pages) + "\n"


def test_ten_machines_get_the_plans_of_the_golden_file() -> None:
    assert len(MACHINES) == 10
    assert described() == GOLDEN.read_text(encoding="utf-8")


def test_the_parts_of_a_plan_sum_up_to_its_memory() -> None:
    for config, work in ladder_work().values():
        for offer in offers_of(config, work, MACHINES["RTX 4090, 24 GB, 64 GB RAM"]):
            facts = facts_json(offer)
            assert sum(facts["parts"].values()) == facts["device_bytes"] == offer.device
            assert json.loads(json.dumps(facts)) == facts
            assert len(part_lines(offer)) == 9


def test_a_network_s_unit_is_read_from_its_signed_facts() -> None:
    genesis = Office().genesis.record
    config, work = work_of_network(genesis, steps=7, units=2, codecs={"adafactor": "int8"})
    assert work.steps == work.commit_every == 7 and work.codecs == {"adafactor": "int8"}
    assert work.tokens * config.patch**2 == (
        genesis.codec.frames * genesis.codec.height * genesis.codec.width
    )
    assert (
        0
        < work.shard_bytes
        <= max(
            sum(shard.file.blob.size for shard in cluster.shards) for cluster in genesis.clusters
        )
    )


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["paris-node", "fit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_verb_shows_every_size_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "none"
    assert call(monkeypatch, "--all", "--json", "--state", state) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == len(ladder_work()) * len(PLANS)
    assert sum(plan["chosen"] for plan in found["plans"]) <= len(ladder_work())
    assert all(plan["why"] for plan in found["plans"] if not plan["fits"])
    assert call(monkeypatch, "--up", "7", "--tflops", "0.5", "--state", state) == 0
    out = capsys.readouterr().out
    assert "7 Mbit/s up" in out and "0.50 TFLOP/s (measured)" in out and "paper" in out
    assert not state.exists()


@pytest.mark.parametrize("words", [("--up", "0"), ("--down", "-1"), ("--tflops", "0")])
def test_a_line_or_a_rate_that_cannot_be_is_refused(
    words: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert call(monkeypatch, *words, "--state", tmp_path) == 2
    assert "must be positive" in capsys.readouterr().err


if __name__ == "__main__":
    GOLDEN.write_text(described(), encoding="utf-8")
