"""Muon: momentum whose direction is orthogonalised, for stacks of matrices (Jordan et al. 2024; scale of Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients tuned by the authors for steps that need not converge


def orthogonalised(gradient: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices by Newton–Schulz steps in bf16. gradient: [n, rows, columns]."""
    x: Tensor = gradient.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. The update's RMS is 0.2 · lr, like AdamW's."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameter: nn.Parameter, lr: float, momentum: float, weight_decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        direction = orthogonalised(gradient.lerp(state["momentum"], momentum))
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(direction.to(parameter.dtype), alpha=-lr * 0.2 * max(parameter.shape[-2:]) ** 0.5)
