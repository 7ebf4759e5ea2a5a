"""Optimisers that need little memory: Adafactor and AdamW on bfloat16 or float32 parameters.

Fused, each parameter is updated inside backward as soon as its gradient is there, and the gradient
is freed; clipping is then per parameter (AdamW: norm; Adafactor: root mean square of the step),
since the norm of all is not known yet. Unfused, the whole gradient is clipped as the recipe says,
and one that is not finite changes nothing. Adafactor keeps a row and a column per matrix (Shazeer
and Stern 2018: decay 1 - t^-0.8, step clipped at 1, no momentum, the recipe's rate)::

    optimiser = LeanOptimiser(dict(model.named_parameters()), plan, recipe)
    optimiser.begin(unit.key, step, multiplier)
    loss.backward()
    optimiser.finish()                  # ArithmeticError if a gradient was not finite
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from paris_models import narrow
from paris_models.config import RecipeConfig
from paris_models.plans import Plan
from paris_models.rounding import add_with_residual, round_to, seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator

DECAY: Final = 0.8
TINY: Final = 1e-30
LARGEST_STEP: Final = 1.0


class LeanOptimiser:
    """The optimiser of a plan over named parameters, in the order of their names given."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        recipe: RecipeConfig,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.parameters, self.plan, self.recipe = dict(parameters), plan, recipe
        # A swapped parameter is empty while it waits; its true shape is given then.
        shapes = shapes or {name: tuple(p.shape) for name, p in parameters.items()}
        self.index = {name: i for i, name in enumerate(self.parameters)}
        self._state: dict[str, dict[str, Tensor]] = {
            name: self._fresh(parameter, shapes[name])
            for name, parameter in self.parameters.items()
        }
        self._norms: list[Tensor] = []
        self._at: tuple[bytes, int, float] | None = None
        if plan.fused:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def begin(self, key: bytes, step: int, multiplier: float) -> None:
        """Announce a step: updates may come from now on."""
        self._at, self._norms = (key, step, multiplier), []

    def finish(self) -> None:
        """End the step; unfused, it is applied here and whole or not at all.

        Raises `ArithmeticError` for a gradient that was not finite; a fused optimiser has used it
        then, and the state is lost.
        """
        try:
            if self.plan.fused:
                self._check()
                return
            named = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            self._norms = [gradient.float().norm() for gradient in named.values()]
            scale = self._clip(self._check())
            for name, gradient in named.items():
                self._update(name, gradient.float().mul_(scale))
        finally:
            self.drop()

    def drop(self) -> None:
        """Forget gradients and the announced step."""
        self._at = None
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Named views of the state: `exp_avg.<parameter>`, `row.…`, `column.…`, `residual.…`."""
        return {
            f"{kind}.{name}": tensor
            for name, kinds in self._state.items()
            for kind, tensor in kinds.items()
        }

    @torch.no_grad()
    def load(self, named: Mapping[str, Tensor]) -> None:
        """Take over a state, in place. `ValueError` when it does not fit; then nothing changes."""
        own = self.state()
        if own.keys() != named.keys() or any(own[k].shape != named[k].shape for k in own):
            raise ValueError("the optimiser state is not that of this model and plan")
        for name, tensor in own.items():
            tensor.copy_(named[name])

    def _fresh(self, parameter: nn.Parameter, shape: tuple[int, ...]) -> dict[str, Tensor]:
        device = torch.device("cpu") if self.plan.host_state else parameter.device

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            pinned = self.plan.host_state and parameter.is_cuda
            return torch.zeros(*size, dtype=dtype, device=device, pin_memory=pinned)

        fresh: dict[str, Tensor] = {}
        if self.plan.narrow:
            fresh |= narrow.fresh(shape, device)
        elif self.plan.optimiser == "adamw":
            fresh |= {"exp_avg": zeros(*shape), "exp_avg_sq": zeros(*shape)}
        elif len(shape) == 2:
            fresh |= {"row": zeros(shape[0]), "column": zeros(shape[1])}
        else:
            fresh["exp_avg_sq"] = zeros(*shape)
        if self.plan.rounding == "kahan":
            fresh["residual"] = zeros(*shape, dtype=torch.bfloat16)
        return fresh

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - torch's own type
        def update(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or self._at is None:
                raise RuntimeError("backward ran outside an announced step")
            exact = gradient.float()
            norm = exact.norm()
            self._norms.append(norm)
            if self.plan.optimiser == "adamw":
                exact = exact * self._clip(norm)
            self._update(name, exact)

        return update

    def _check(self) -> Tensor:
        norm = torch.stack(self._norms).norm() if self._norms else torch.zeros(())
        if not bool(torch.isfinite(norm)):
            raise ArithmeticError("a gradient is not finite")
        return norm

    def _clip(self, norm: Tensor) -> Tensor:
        return (self.recipe.clip_norm / (norm + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def _update(self, name: str, gradient: Tensor) -> None:
        """One parameter's step from its float32 gradient, which may be overwritten."""
        assert self._at is not None
        key, step, multiplier = self._at
        parameter, rate = self.parameters[name], self.recipe.lr * multiplier
        with self._borrowed(name, gradient.device) as state:
            if self.plan.narrow:
                mean, square = narrow.read(state, tuple(gradient.shape))
                wide = {"exp_avg": mean, "exp_avg_sq": square}
                change = self._adamw(wide, gradient, step + 1)
                narrow.write(state, mean, square, seed_of(key, step, self.index[name]))
            elif self.plan.optimiser == "adamw":
                change = self._adamw(state, gradient, step + 1)
            else:
                change = _adafactor(state, gradient, step + 1)
            change.mul_(-rate)
            if self.recipe.weight_decay:
                change.add_(parameter, alpha=-rate * self.recipe.weight_decay)
            if self.plan.rounding == "kahan":
                add_with_residual(parameter, state["residual"], change)
            elif self.plan.rounding == "stochastic":
                exact = change.add_(parameter)
                round_to(parameter.data, exact, seed_of(key, step, self.index[name]))
            else:
                parameter.add_(change)

    @contextmanager
    def _borrowed(self, name: str, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """A parameter's state where it is computed; what waits in host memory goes back there."""
        home = self._state[name]
        if not self.plan.host_state:
            yield home
            return
        here = {k: t.to(device, copy=True, non_blocking=True) for k, t in home.items()}
        yield here
        for kind, tensor in here.items():
            home[kind].copy_(tensor, non_blocking=True)

    def _adamw(self, state: Mapping[str, Tensor], gradient: Tensor, t: int) -> Tensor:
        beta1, beta2 = self.recipe.beta1, self.recipe.beta2
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square / (1 - beta2**t)).sqrt_().add_(self.recipe.eps)
        return torch.div(mean, scale, out=scale).div_(1 - beta1**t)


def _adafactor(state: Mapping[str, Tensor], gradient: Tensor, t: int) -> Tensor:
    """The clipped step of Adafactor before its rate; `gradient` is overwritten."""
    keep = 1 - t**-DECAY
    square = gradient.square().add_(TINY)
    if "row" in state:
        row, column = state["row"], state["column"]
        row.mul_(keep).add_(square.mean(dim=1), alpha=1 - keep)
        column.mul_(keep).add_(square.mean(dim=0), alpha=1 - keep)
        gradient.mul_((row / row.mean()).rsqrt_()[:, None]).mul_(column.rsqrt()[None, :])
    else:
        state["exp_avg_sq"].mul_(keep).add_(square, alpha=1 - keep)
        gradient.mul_(state["exp_avg_sq"].rsqrt())
    size = torch.square(gradient, out=square).mean().sqrt_()
    return gradient.div_((size / LARGEST_STEP).clamp_(min=1.0))
