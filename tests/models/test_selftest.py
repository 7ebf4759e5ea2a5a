"""The numeric self-test: what every machine must find, and what a wrong kernel does to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from paris_models import selftest
from paris_models.assets import asset
from paris_models.plans import PLANS, numeric_case
from paris_models.replay import FAR
from paris_models.selftest import cases, examine


def test_this_machine_finds_what_was_published() -> None:
    found = examine(cases())
    assert [one.case for one in found] == cases()
    assert all(one.passed for one in found), found
    # The precise one is 40 times nearer than it has to be, and is no copy of the answer.
    assert 0 < found[0].rho < found[0].limit / 10


def test_every_plan_has_a_case_in_each_precision_that_it_can_have() -> None:
    known = json.loads(asset(selftest.NAME).read_text("utf-8"))["cases"]
    assert set(known) == set(cases())
    for plan in PLANS.values():
        assert numeric_case(plan, "bfloat16") in known
    assert numeric_case(PLANS["float32"], "float32") == "float32"
    assert numeric_case(PLANS["lora-64-fp8"], "bfloat16") == "lora-16-fp8"


def rounded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matrix product that keeps 8 bits of its inputs."""
    return REAL(x.bfloat16().to(x.dtype), weight.bfloat16().to(weight.dtype), bias)


def shifted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matrix product whose rows arrive one place off."""
    return REAL(x.roll(1, dims=-1), weight, bias)


REAL: Callable[..., Tensor] = functional.linear


@pytest.mark.parametrize(
    ("kernel", "case"),
    [(rounded, "float32"), (shifted, "float32"), (shifted, "bfloat16"), (shifted, "adafactor")],
)
def test_a_wrong_matrix_product_is_found(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor], case: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(functional, "linear", kernel)
        [wrong] = examine([case])
    assert not wrong.passed and wrong.rho > wrong.limit
    assert examine([case])[0].passed


def test_wrong_quantised_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from paris_models import adapters

    real = adapters.dense

    def transposed(kept: Any, base: Any, shape: Any) -> Tensor:
        found = real(kept, base, shape)
        return found.mT.contiguous() if found.shape[0] == found.shape[1] else found.flip(0)

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "dense", transposed)
        assert not examine(["lora-16-nf4"])[0].passed


def test_an_operation_that_is_missing_here_fails_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object, **__: object) -> Tensor:
        raise RuntimeError("not implemented for this device")

    with monkeypatch.context() as patch:
        patch.setattr(functional, "linear", missing)
        [found] = examine(["float32"])
    assert (found.passed, found.rho) == (False, FAR)
    with pytest.raises(ValueError, match="no numeric test"):
        examine(["sgd"])


def test_torch_is_left_as_it_was() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    examine(["float32"])
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_the_answers_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "cases", lambda: ["float32"])
    path = tmp_path / "numerics.json"
    assert selftest.main(["--out", str(path)]) == 0
    monkeypatch.setattr(selftest, "asset", lambda _: path)
    assert selftest.main([]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["case"] == "float32" and row["passed"] and row["rho"] < 1e-4
