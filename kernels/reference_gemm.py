"""The plain-torch twin of `gemm.py`: what the CPU runs, and what the Triton kernels are tested against."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if weight.dtype == x.dtype == out_dtype and residual is None and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight, bias)  # 16-bit CPU kernels sum in float32 too
    y = _product(x, weight, weight_scale, x_scale, bias)
    return (y if residual is None else y + residual.float()).to(out_dtype)


def linear_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    gate, up = _product(x, weight, weight_scale, x_scale, bias).chunk(2, -1)
    return (F.silu(gate) * up).to(out_dtype)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """[M, N] float32."""
    y = x.float() @ weight.float().t()
    if weight_scale is not None:
        y *= weight_scale
    if x_scale is not None:
        y *= x_scale[:, None]
    return y if bias is None else y + bias.float()
