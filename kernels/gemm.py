"""Linear layers of few and many rows in bf16, fp16 and FP8: shapes are checked here, then Triton, torch or the twin runs.

Letters: M rows (tokens), K input features, N output features. FP8 is e4m3fn throughout; scales are float32, and a stored
weight times its scale is the real one. On CUDA, products of up to 256 rows run in `gemm_small.py` where that was measured
or is expected to be faster, all others in torch's library. A shape, dtype or layout that nothing serves raises ValueError
naming the argument.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from workstation.kernels import reference_gemm
from workstation.kernels.door import FORCE_TRITON, check

FP8 = torch.float8_e4m3fn
MAX_ROWS = 256  # up to here our own kernels are considered
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _triton() -> Any:
    """The Triton side, imported at its first use: a CPU install may lack Triton."""
    from workstation.kernels import gemm_launch

    return gemm_launch


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight^T * scales + bias + residual`, summed in float32 and rounded once.

    Args:
        x: [M, K] bf16, fp16 or FP8, the last dimension contiguous. FP8 activations need FP8 weights.
        weight: [N, K] of x's dtype, or FP8, rows contiguous; K and N multiples of 16 for Triton.
        weight_scale: [N] float32, with FP8 weights only.  x_scale: [M] float32, with FP8 activations only.
        bias: [N].  residual: [M, N] contiguous, of the result's dtype.
        out_dtype: the result's; x's by default, bfloat16 for FP8 activations.
        out: [M, N] contiguous, of the result's dtype, to write into.
    Returns:
        [M, N] contiguous.
    """
    _check_operands(x, weight, weight_scale, x_scale, bias)
    out_dtype = out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)
    if residual is not None:
        check(residual.shape == (x.shape[0], weight.shape[0]), "residual", residual, "must be [M, N]")
        check(residual.is_contiguous() and residual.dtype == out_dtype, "residual", residual, f"must be dense {out_dtype}")
    if out is not None:
        check(out.shape == (x.shape[0], weight.shape[0]) and out.is_contiguous() and out.dtype == out_dtype, "out", out,
               f"must be dense [M, N] {out_dtype}")  # fmt: skip
    if x.is_cuda or FORCE_TRITON:
        return _triton().linear(  # type: ignore[no-any-return]
            x, weight, weight_scale, x_scale, bias, residual, out_dtype, out
        )
    y = reference_gemm.linear(x, weight, weight_scale, x_scale, bias, residual, out_dtype)
    return y if out is None else out.copy_(y)


def linear_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """SwiGLU's first half, `silu(x @ gate^T) * (x @ up^T)` in float32, rounded once (arXiv:2002.05202).

    weight [2F, K] = gate | up rows, scales and bias [2F] likewise; otherwise as `linear`. Returns [M, F].
    """
    _check_operands(x, weight, weight_scale, x_scale, bias)
    check(weight.shape[0] % 32 == 0, "weight", weight, "must be [2F, K], F a multiple of 16")
    out_dtype = out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)
    if x.is_cuda or FORCE_TRITON:
        return _triton().linear_silu_mul(x, weight, weight_scale, x_scale, bias, out_dtype)  # type: ignore[no-any-return]
    return reference_gemm.linear_silu_mul(x, weight, weight_scale, x_scale, bias, out_dtype)


def _check_operands(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    check(x.dim() == 2 and x.stride(1) == 1, "x", x, "must be [M, K] with contiguous rows")
    check(x.dtype in (FP8, *FLOATS), "x", x, "must be bfloat16, float16, float32 or float8_e4m3fn")
    check(weight.dim() == 2 and weight.shape[1] == x.shape[1], "weight", weight, f"must be [N, K={x.shape[1]}]")
    check(weight.stride(1) == 1, "weight", weight, "must have contiguous rows")
    check(weight.dtype in (x.dtype, FP8), "weight", weight, f"must be {x.dtype} like x, or float8_e4m3fn")
    channels = (weight.shape[0],)
    _check_scale("weight_scale", weight_scale, channels, weight.dtype == FP8, "[N] float32 with FP8 weights, else None")
    _check_scale("x_scale", x_scale, (x.shape[0],), x.dtype == FP8, "[M] float32 with FP8 activations, else None")
    if bias is not None:
        check(bias.shape == channels and bias.is_contiguous(), "bias", bias, "must be [N]")


def _check_scale(name: str, scale: torch.Tensor | None, shape: tuple[int, ...], needed: bool, message: str) -> None:
    if scale is None:
        check(not needed, name, scale, f"must be {message}")
    else:
        right = needed and scale.shape == shape and scale.dtype == torch.float32 and scale.is_contiguous()
        check(right, name, scale, f"must be {message}")
