"""What makes a step faster changes no bit of it: attention, clipping, kept pages."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paris_models.attention import TurningAttention, turn
from paris_models.config import ExpertConfig
from paris_models.expert import build_expert
from paris_models.optim import clip
from paris_models.train import new_state, train_step, weights
from tiny_models import EXPERT, PAPER, RECIPE, UNIT, clips

WEIGHTS = {
    name: tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
    for i, (name, tensor) in enumerate(build_expert(EXPERT, seed=5).state_dict().items())
}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 9), st.integers())
def test_turning_is_diffusers_rotary_embedding_bit_for_bit(
    n: int, tokens: int, heads: int, pairs: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed % 2**31)
    x = torch.randn(n, tokens, heads, 2 * pairs, generator=g)
    angles = torch.randn(tokens, pairs, generator=g)
    both = (angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1))
    gradient = torch.randn(x.shape, generator=g)
    ends = []
    for function in (turn, lambda x, both: apply_rotary_emb(x, both, sequence_dim=1)):
        leaf = x.clone().requires_grad_()
        out = function(leaf, both)
        out.backward(gradient)
        ends.append((out.detach(), leaf.grad))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("recipe", [RECIPE, PAPER], ids=["muon", "adamw"])
def test_training_has_the_bits_that_diffusers_own_attention_gives(recipe) -> None:
    ends = []
    for processor in (TurningAttention, FluxAttnProcessor):
        state = new_state(EXPERT, recipe, WEIGHTS)
        state.model.set_attn_processor(processor())
        losses = [train_step(state, clips(), UNIT) for _ in range(3)]
        ends.append((losses, weights(state)))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][name], tensor) for name, tensor in ends[1][1].items())


def test_an_expert_turns_by_itself() -> None:
    deep = ExpertConfig(1, 8, 8, 2, 3, 2, 8, (2, 2, 4), 12, 10)
    found = build_expert(deep).attn_processors.values()
    assert len(found) == 5 and all(type(p) is TurningAttention for p in found)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(1e-4, 1e4), st.sampled_from([0.5, 1.0, 1.0000001, 2.0]),
    st.sampled_from([1.0, float("nan"), float("inf"), 0.0]),
)  # fmt: skip
def test_clipping_has_the_bits_of_torch_s(size: float, most: float, factor: float) -> None:
    values = torch.linspace(-1, 1, 7)
    gradient = values / values.norm() * size * factor
    pair = [nn.Parameter(torch.zeros(7)) for _ in range(2)]
    for parameter in pair:
        parameter.grad = gradient.clone()
    clip(pair[:1], most)
    nn.utils.clip_grad_norm_(pair[1:], most)
    assert pair[0].grad is not None and pair[1].grad is not None
    assert pair[0].grad.numpy().tobytes() == pair[1].grad.numpy().tobytes()


def test_the_norm_at_the_limit_is_judged_in_float32() -> None:
    """A norm just below the limit whose float32 sum with torch's ε is not."""
    for number in range(200):
        gradient = torch.full((1,), 1.0 - 1e-6 + (number - 100) * 6e-8)
        pair = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        for parameter in pair:
            parameter.grad = gradient.clone()
        clip(pair[:1], 1.0)
        nn.utils.clip_grad_norm_(pair[1:], 1.0)
        assert torch.equal(pair[0].grad, pair[1].grad)  # type: ignore[arg-type]


SCRIPT = """
import sys
sys.path[:0] = {path!r}
import hashlib, resource, torch
from paris_models.expert import build_expert
from paris_models.pages import keep_pages
from paris_models.train import new_state, train_step, weights
from tiny_models import EXPERT, RECIPE, UNIT, clips
if sys.argv[1] == "keep" and not keep_pages():
    raise SystemExit(3)

def use():  # what a step does: several tensors, small and large, freed together
    held = [torch.ones(megabytes << 18) for megabytes in (8, 8, 40)]

use(); use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
state = new_state(EXPERT, RECIPE, dict(build_expert(EXPERT, seed=5).state_dict()))
for _ in range(3):
    train_step(state, clips(), UNIT)
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in weights(state).values())).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_kept_pages_are_not_asked_for_again_and_change_no_bit() -> None:
    found = {}
    for case in ("keep", "give back"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(path=sys.path), case],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 3:
            pytest.skip("this C library keeps no pages")
        assert done.returncode == 0, done.stderr
        found[case] = done.stdout.split()
    pages = 56 << 8  # of 4 KiB in 56 MiB
    assert int(found["keep"][0]) < pages // 100 < int(found["give back"][0])
    assert found["keep"][1] == found["give back"][1]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from paris_models import pages

    monkeypatch.setattr(pages.ctypes, "CDLL", lambda _name: object())
    assert pages.keep_pages() is False


def test_a_step_of_a_gradient_that_is_not_clipped_is_the_same_step() -> None:
    """A limit that is never reached, and one that is just not, give equal weights."""
    ends = []
    for most in (1e3, 1e6):
        state = new_state(EXPERT, replace(PAPER, clip_norm=most), WEIGHTS)
        train_step(state, clips(), UNIT)
        ends.append(weights(state))
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
