"""FP8 products on a GPU: which kernel serves a layer, and its grid. Called through `ops.py`, which has checked the shapes."""

from __future__ import annotations

from functools import cache

import torch
import triton

from workstation.kernels import gemm_launch, reference_fp8
from workstation.kernels.activation import silu_mul_round_kernel
from workstation.kernels.dependent import chained
from workstation.kernels.gemm import MAX_ROWS
from workstation.kernels.gemm_fp8_weight import fp8_weight_kernel
from workstation.kernels.norm import add_rms_norm_fp8_kernel
from workstation.kernels.paging import codes
from workstation.kernels.quantize import quantize_per_token_kernel
from workstation.kernels.quantized import Fp8Operand, Quantized, Rounding

FIRST_WITH_FP8 = (8, 9)


def quantize_fp8(x: torch.Tensor, rounding: Rounding) -> Quantized:
    out = _room(x, x.shape[1])
    if x.shape[0]:
        quantize_per_token_kernel[(x.shape[0],)](
            x, out.values, out.scale, x.shape[1], x.stride(0), rounding.bound, **_whole_row(x.shape[1]), **chained(x.device)
        )
    return out


def add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding
) -> tuple[Quantized, torch.Tensor]:
    tokens, width = x.shape
    out = _room(x, width)
    if tokens:
        add_rms_norm_fp8_kernel[(tokens,)](
            x, residual, weight, out.values, out.scale, width, eps, rounding.bound, **_whole_row(width), **chained(x.device)
        )
    return out, residual


def silu_mul_round(gate_up: torch.Tensor, rounding: Rounding) -> Quantized:
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = _room(gate_up, width)
    if tokens:
        silu_mul_round_kernel[(tokens,)](
            gate_up, out.values, out.scale, width, gate_up.stride(0), rounding.bound, **_whole_row(width),
            **chained(gate_up.device),
        )  # fmt: skip
    return out


def _room(x: torch.Tensor, width: int) -> Quantized:
    values = torch.empty((x.shape[0], width), dtype=torch.float8_e4m3fn, device=x.device)
    return Quantized(values, torch.empty(x.shape[0], dtype=torch.float32, device=x.device), x.dtype)


def _whole_row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def silu_mul_of_quantized(
    x: Quantized, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return gemm_launch.linear_silu_mul(x.values, weight, scale, x.scale, bias, x.dtype)


def linear_fp8(
    x: Fp8Operand, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(x, Quantized):
        return gemm_launch.linear(x.values, weight, scale, x.scale, bias, None, x.dtype, out)
    if x.is_cuda and 0 < x.shape[0] <= MAX_ROWS and x.dtype != torch.float32 and _by_rows(weight, scale):
        return gemm_launch.linear(x, weight, scale, None, bias, None, x.dtype, out)
    if has_fp8(x.device):
        return _weight_only(x, weight, scale, bias, out)
    y = reference_fp8.linear_fp8(x, weight, scale, bias)
    return y if out is None else out.copy_(y)


def multiplies_fp8(dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """float32 is asked for when exactness matters."""
    return dtype != torch.float32 and _by_rows(weight, scale) and has_fp8(weight.device) and scales_rows(weight.device)


def _by_rows(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """A scale a row, and a shape that `gemm_small.py` serves."""
    return scale.dim() == 1 and not (weight.shape[0] % 16 or weight.shape[1] % 16)


def _weight_only(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    tokens, (rows, columns) = x.shape[0], weight.shape
    if out is None:
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    small = tokens <= 64 or x.dtype == torch.float32
    tile = min(64 if small else 128, max(16, triton.next_power_of_2(tokens)))
    tile_rows = 64 if small else 128
    fp8_weight_kernel[(triton.cdiv(tokens, tile), triton.cdiv(rows, tile_rows))](
        x, weight, scale, bias, out, tokens, rows, columns, x.stride(0), scale.stride(0),
        BLOCKED=scale.dim() == 2, HAS_BIAS=bias is not None, TOKENS=tile, ROWS=tile_rows,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4 if small else 8,
        num_stages=1 if x.dtype == torch.float32 else 2,
    )  # fmt: skip
    return out


@cache
def scales_rows(device: torch.device) -> bool:
    """Whether torch multiplies FP8 with a scale a row on this device; asked once, before any graph is captured."""
    left = torch.zeros(16, 32, dtype=torch.float8_e4m3fn, device=device)
    ones = torch.ones(16, dtype=torch.float32, device=device)
    try:
        torch._scaled_mm(left, left.t(), scale_a=ones[:, None], scale_b=ones[None, :], out_dtype=torch.bfloat16,
                         use_fast_accum=True)
    except RuntimeError:
        return False
    return True


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether the device converts and multiplies e4m3: compute capability 8.9 and above (and Triton's interpreter)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FIRST_WITH_FP8


def readable(kv_layer: torch.Tensor) -> torch.Tensor:
    """The cache as the attention kernels can load it: an FP8 one as bytes where the device has no such type."""
    return kv_layer if has_fp8(kv_layer.device) else codes(kv_layer)
