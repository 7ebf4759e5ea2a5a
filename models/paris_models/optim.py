"""The optimisers of a recipe, deterministic and with their state as named tensors.

"adamw" is AdamW on everything. "muon" takes Muon (momentum, Nesterov, five quintic Newton–Schulz
steps, factor √max(1, rows/columns)) for the matrices inside the transformer blocks and AdamW for
the rest; matrices of one shape are orthogonalised together. Weight decay is AdamW's part only.
A state that does not fit the model is refused with `ValueError`::

    optimiser = Optimiser(model, recipe)
    optimiser.step(multiplier=0.5)               # both rates × 0.5; gradients are cleared
    named = optimiser.state(); optimiser.load(named, steps=1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paris_models.config import RecipeConfig


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices (k, rows, columns), roughly: Newton–Schulz, 5 steps.

    The polynomial 3.4445 x - 4.7750 x³ + 2.0315 x⁵ drives all singular values into about [.7, 1.2]
    (Muon, K. Jordan 2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        quintic = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, quintic, x, beta=3.4445)
    result: Tensor = x.mT if tall else x
    return result


def clip(parameters: Sequence[Tensor], most: float) -> None:
    """`clip_grad_norm_` without its product by 1 where nothing is clipped, the same bits.

    Only the CPU looks first: elsewhere the look would wait for the device, and cost more.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # gradients that are cut over several GPUs
        norm = norm.full_tensor()
    if norm.device.type == "cpu" and float(most / (norm + 1e-6)) >= 1.0:
        return
    nn.utils.clip_grads_with_norm_(parameters, most, norm)


class Optimiser:
    """Muon and AdamW over the parameters of one model, as the recipe says."""

    def __init__(self, model: nn.Module, recipe: RecipeConfig) -> None:
        self.recipe = recipe
        self.parameters = dict(model.named_parameters())
        shapes: dict[tuple[int, ...], list[str]] = {}
        self.rest: list[str] = []
        for name, parameter in self.parameters.items():
            matrix = parameter.ndim == 2 and "transformer_blocks." in name
            if matrix and recipe.optimiser == "muon":
                shapes.setdefault(tuple(parameter.shape), []).append(name)
            else:
                self.rest.append(name)
        self.groups = [
            (names, torch.zeros(len(names), *shape, device=self.parameters[names[0]].device))
            for shape, names in shapes.items()
        ]
        self.adam = torch.optim.AdamW(
            [self.parameters[name] for name in self.rest],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        for name in self.rest:  # AdamW makes its state at the first step; a fresh one is committed
            parameter = self.parameters[name]
            self.adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, multiplier: float) -> None:
        """Clip the gradients' norm, take one step at `multiplier` × the peak rates, clear them."""
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # a part that the loss does not reach
                parameter.grad = torch.zeros_like(parameter)
        clip(parameters, self.recipe.clip_norm)
        rate = self.recipe.matrix_lr * multiplier
        for names, momentum in self.groups:
            group: list[Tensor] = [self.parameters[name] for name in names]
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.mul_(self.recipe.momentum).add_(gradient)
            gradient.add_(momentum, alpha=self.recipe.momentum)
            rows, columns = gradient.shape[1:]
            update = orthogonalise(gradient) * max(1.0, rows / columns) ** 0.5
            torch._foreach_sub_(group, list(update.unbind()), alpha=rate)
        for settings in self.adam.param_groups:
            settings["lr"] = self.recipe.lr * multiplier
        self.adam.step()
        for parameter in parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Named views of the state: `momentum.<parameter>`, `exp_avg.…`, `exp_avg_sq.…`."""
        named = {
            f"momentum.{name}": momentum[i]
            for names, momentum in self.groups
            for i, name in enumerate(names)
        }
        for name in self.rest:
            state = self.adam.state[self.parameters[name]]
            named[f"exp_avg.{name}"] = state["exp_avg"]
            named[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
        return named

    @torch.no_grad()
    def load(self, named: Mapping[str, Tensor], steps: int) -> None:
        """Take over a state after `steps` steps. Raises `ValueError` when it does not fit."""
        own = self.state()
        if own.keys() != named.keys() or any(own[k].shape != named[k].shape for k in own):
            raise ValueError("the optimiser state is not that of this model and recipe")
        for name, tensor in own.items():
            tensor.copy_(named[name])
        for name in self.rest:
            self.adam.state[self.parameters[name]]["step"].fill_(steps)
