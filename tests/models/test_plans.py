"""The arithmetic of training plans: published figures, exact counts, and measured peaks."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paris_models.codecs import CODECS, LORA, Codec, wire_bytes
from paris_models.config import LADDER, RecipeConfig
from paris_models.expert import build_expert, parameter_shapes
from paris_models.fitting import GIB, PROCESS, Facts, best, known, missed, offers_of
from paris_models.lean import LeanState, new_state, state_tensors
from paris_models.plans import (
    PLANS,
    Work,
    factored_values,
    forward_flops,
    largest_parameter,
    lora_parameters,
    most_swap,
    need_of,
    plan_of,
    state_bytes,
    step_flops,
    swapped_blocks,
    update_bytes,
    with_swap,
)
from tiny_models import KEY

PAPER = LADDER["paper"]
CLIP = Work(2304, 512)


@pytest.mark.parametrize(
    ("plan", "part", "gib"),
    [
        ("adafactor", "weights", 22.15),
        ("adamw", "gradients", 22.15),
        ("float32", "weights", 44.3),
        ("float32", "optimiser", 88.6),
        ("adamw", "optimiser", 88.6 + 22.15),
        ("adafactor", "optimiser", 0.03),
        ("adamw-host", "host", 88.6 + 22.15),
        ("adafactor", "upload", 22.15),
    ],
)
def test_the_published_arithmetic_of_the_paper_s_expert(plan: str, part: str, gib: float) -> None:
    need = need_of(PLANS[plan], PAPER, CLIP)
    assert getattr(need, part) / GIB == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize(
    ("frames", "tera"), [(1, 10.3), (17, 25.4), (33, 41.9), (65, 79.4), (129, 171.9)]
)
def test_the_published_compute_of_a_clip(frames: int, tera: float) -> None:
    tokens = ((frames - 1) // 4 + 1) * 256
    assert forward_flops(PAPER, tokens, 512) / 1e12 == pytest.approx(tera, abs=0.06)
    if frames == 33:
        assert step_flops(PLANS["adafactor"], PAPER, CLIP) / 1e12 == pytest.approx(168, abs=0.5)


@pytest.mark.parametrize(("rank", "millions"), [(16, 65), (32, 131), (64, 261)])
def test_the_published_sizes_of_factors(rank: int, millions: int) -> None:
    count = lora_parameters(PAPER, rank)
    assert round(count / 1e6) == millions
    need = need_of(PLANS[f"lora-{rank}-nf4"], PAPER, CLIP)
    lines = count // rank
    assert need.upload == 2 * count + lines
    if rank == 32:
        small = update_bytes("lora-int8", PAPER, 32)
        assert small == count + lines and small * 175 < 2 * PAPER.parameters
        assert need.device < 12 * GIB


def test_quantised_bases_have_the_published_sizes_and_their_scales() -> None:
    for name, gib in (("lora-16-fp8", 11.07), ("lora-16-nf4", 5.54)):
        factors = 4 * lora_parameters(PAPER, 16)
        base = (need_of(PLANS[name], PAPER, CLIP).weights - factors) / GIB
        assert gib < base < gib + 0.9  # scales, and what stands outside the blocks in bfloat16


@pytest.mark.parametrize("size", ["demo", "5M", "38M", "paper"])
def test_counts_are_those_of_the_expert(size: str) -> None:
    shapes = parameter_shapes(LADDER[size]).values()
    assert factored_values(LADDER[size]) == sum(
        sum(shape) if len(shape) == 2 else shape[0] for shape in shapes
    )
    assert largest_parameter(LADDER[size]) == max(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("name", list(PLANS))
def test_a_saved_state_has_the_bytes_that_a_plan_says(name: str) -> None:
    config = replace(LADDER["demo"], double_blocks=1, single_blocks=1)
    weights = dict(build_expert(config, seed=0).state_dict())
    plan = PLANS[name]
    state = new_state(plan, config, RecipeConfig(), weights, key=KEY)
    saved = sum(t.nbytes for n, t in state_tensors(state).items() if n != "step")
    assert saved == state_bytes(plan, config)
    if isinstance(state, LeanState) and plan.rank:
        kept = [*state.model.parameters(), *state.model.buffers()]
        held = sum(t.nbytes for t in kept if t.dtype != torch.int64)
        assert held == need_of(plan, config, Work(8, 8)).weights


@given(st.sampled_from(list(PLANS)), st.integers(0, 60), st.sampled_from(["287M", "paper"]))
def test_swapping_more_needs_less_of_the_device_and_more_of_the_host(
    name: str, blocks: int, size: str
) -> None:
    plan, config = PLANS[name], LADDER[size]
    most = most_swap(plan, config)
    if blocks > most:
        with pytest.raises(ValueError, match="swap"):
            need_of(with_swap(plan, blocks), config, CLIP)
        return
    chosen = swapped_blocks(config, blocks)
    assert len(set(chosen)) == blocks and list(chosen) == sorted(chosen)
    if most:
        less, more = (need_of(with_swap(plan, n), config, CLIP) for n in (max(1, blocks), most))
        assert more.weights <= less.weights and more.host >= less.host


@pytest.mark.parametrize("size", ["demo", "38M", "950M"])
@pytest.mark.parametrize("codec", CODECS)
def test_an_update_has_the_bytes_of_its_codec(codec: Codec, size: str) -> None:
    """Beside the exact count of the codec itself, which has headers and last bits too."""
    rank = 32 if codec in LORA else 0
    exact = wire_bytes(codec, parameter_shapes(LADDER[size]), rank)
    told = update_bytes(codec, LADDER[size], rank)
    assert 0 <= exact - told < 0.01 * exact + 8192


def test_codecs_that_cannot_be_are_refused() -> None:
    for codec, rank in (("zip", 0), ("lora-int8", 0), ("int8", 16), ("topk-65", 0)):
        with pytest.raises(ValueError, match="does not travel"):
            update_bytes(codec, PAPER, rank)


def test_a_plan_is_named_as_today_or_as_version_0_1_did() -> None:
    assert all(plan_of(name) is plan for name, plan in PLANS.items())
    assert plan_of("policy 12, unit-cosine") is PLANS["float32"]
    for name in ("", "sgd", "policy 12", "policy 12, slice ", "lora-16", "Float32"):
        with pytest.raises(ValueError, match="no training plan"):
            plan_of(name)


def test_a_sub_round_opens_its_last_state_alone() -> None:
    full, own = need_of(PLANS["adafactor"], PAPER, CLIP), need_of(PLANS["float32"], PAPER, CLIP)
    assert (
        full.opening == state_bytes(PLANS["adafactor"], PAPER) and full.hashed == 2 * full.opening
    )
    assert own.opening == 2 * state_bytes(PLANS["float32"], PAPER)
    assert own.hashed == 6 * state_bytes(PLANS["float32"], PAPER)


def test_work_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Work(0, 8)


# ---------------------------------------------------------------- machines


def card(name: str, gib: float, ram: int, **changes: object) -> Facts:
    tflops, watts = known(name, 1)
    facts = Facts(name, "cuda", int(gib * GIB), ram * GIB, 2000 * GIB, 20e6, 100e6, tflops, watts)
    return replace(facts, **changes)


@pytest.mark.parametrize(
    ("facts", "plan"),
    [
        (card("RTX 4090", 23.5, 64), "adafactor"),
        (card("RTX 3060", 11.5, 64), "adafactor"),
        (card("RTX 3060", 11.5, 12), "lora-64-fp8"),
        (card("L4", 22.5, 8), "lora-64-fp8"),
        (card("H200", 139, 512), "adamw-8bit"),
    ],
)
def test_the_tiers_of_the_paper_s_expert(facts: Facts, plan: str) -> None:
    """Science §7.3: 24 GB and 64 GB of RAM train all weights, 12 GB adapters or many swaps."""
    offers = offers_of(PAPER, CLIP, facts)
    chosen = best(offers)
    assert chosen is not None and chosen.plan.name == plan
    assert chosen.device <= facts.device and chosen.host <= facts.ram
    better = missed(offers)
    assert better is not None and better.why and offers.index(better) < offers.index(chosen)


def test_a_plan_without_an_affordable_audit_is_not_offered() -> None:
    rich = card("H200", 400, 4000)
    fine = {o.plan.name: o for o in offers_of(PAPER, CLIP, replace(rich, up=1e9, down=1e9))}
    slow = {o.plan.name: o for o in offers_of(PAPER, CLIP, replace(rich, up=4e6))}
    assert fine["adafactor"].fits and fine["lora-16-bf16"].fits
    assert "opening" in slow["adamw"].why and not slow["adamw"].fits
    assert "day" in slow["float32"].why
    assert "hashing" in fine["float32"].why


def test_a_unit_that_takes_longer_than_a_week_is_not_offered() -> None:
    cpu = Facts("CPU", "cpu", 900 * GIB, 900 * GIB, 9000 * GIB, 1e9, 1e9, 0.2, 100)
    assert "a week is the most" in offers_of(PAPER, CLIP, cpu)[1].why
    assert best(offers_of(PAPER, CLIP, replace(cpu, device=GIB))) is None
    assert missed(offers_of(PAPER, CLIP, replace(cpu, device=GIB))) is not None


def test_several_gpus_share_ram_disk_and_line() -> None:
    one, eight = (offers_of(LADDER["950M"], CLIP, card("A100", 79, 256, gpus=n)) for n in (1, 8))
    assert eight[0].opening_seconds == pytest.approx(8 * one[0].opening_seconds)
    assert eight[0].kwh_day == pytest.approx(8 * one[0].kwh_day)
    with pytest.raises(ValueError, match="positive"):
        card("A100", 79, 256, gpus=0)


# ---------------------------------------------------------------- predicted beside measured

PEAKS = [
    ("5M", "float32", 512, 64, 1),
    ("38M", "float32", 512, 64, 1),
    ("5M", "adafactor", 512, 64, 1),
    ("38M", "adafactor", 512, 64, 1),
    ("38M", "adamw", 512, 64, 1),
    ("38M", "adamw-host", 512, 64, 1),
    ("38M", "lora-32-nf4", 512, 64, 1),
    ("5M", "adamw-8bit", 512, 64, 4),
    ("38M", "adamw-8bit", 512, 64, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", PEAKS, ids=lambda c: "-".join(map(str, c[:2])))
def test_the_predicted_peak_is_the_measured_one_within_a_tenth(
    case: tuple[str, str, int, int, int],
) -> None:
    size, name, tokens, text, batch = case
    plan = PLANS[name]
    need = need_of(plan, LADDER[size], Work(tokens, text, batch))
    parent = 4 * LADDER[size].parameters if plan.base == "float32" else 0  # not kept by the target
    wanted = need.device + need.host - parent + PROCESS["cpu", plan.compute]
    words = [sys.executable, str(Path(__file__).with_name("peak_target.py")), *map(str, case)]
    paths = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=paths)
    assert int(done.stdout.split()[-1]) == pytest.approx(wanted, rel=0.1)
