"""Products with integer weights on a GPU: which kernel serves a layer. Called through `ops.py`, which checks the shapes."""

from __future__ import annotations

import torch

from workstation.kernels import reference_int
from workstation.kernels.int_weights import IntWeight


def linear_int(x: torch.Tensor, weight: IntWeight, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    y = reference_int.linear_int(x, weight, bias)
    return y if out is None else out.copy_(y)


def silu_mul_int(x: torch.Tensor, weight: IntWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from workstation.kernels import launch

    made: torch.Tensor = launch.silu_mul(linear_int(x, weight, bias, None))
    return made
