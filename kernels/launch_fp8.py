"""FP8 products on a GPU: which kernel serves a layer, and its grid. Called through `ops.py`, which has checked the shapes."""

from __future__ import annotations

from functools import cache

import torch
import triton

from workstation.kernels import gemm_launch, reference_fp8
from workstation.kernels.gemm import MAX_ROWS
from workstation.kernels.gemm_fp8_weight import fp8_weight_kernel
from workstation.kernels.norm import add_rms_norm_fp8_kernel
from workstation.kernels.paging import codes
from workstation.kernels.quantize import quantize_per_token_kernel
from workstation.kernels.quantized import Quantized

FIRST_WITH_FP8 = (8, 9)


def quantize_fp8_per_token(x: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        block = triton.next_power_of_2(width)
        quantize_per_token_kernel[(tokens,)](
            x, out, scale, width, x.stride(0), bound, BLOCK=block, num_warps=min(16, max(1, block // 512))
        )
    return out, scale


def add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, bound: float
) -> tuple[Quantized, torch.Tensor]:
    tokens, width = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        block = triton.next_power_of_2(width)
        add_rms_norm_fp8_kernel[(tokens,)](
            x, residual, weight, out, scale, width, eps, bound, BLOCK=block, num_warps=min(16, max(1, block // 512))
        )
    return Quantized(out, scale, x.dtype), residual


def product_of_quantized(
    x: Quantized, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, silu: bool
) -> torch.Tensor:
    if silu:
        return gemm_launch.linear_silu_mul(x.values, weight, scale, x.scale, bias, x.dtype)
    return gemm_launch.linear(x.values, weight, scale, x.scale, bias, None, x.dtype)


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, quantized: bool, bound: float
) -> torch.Tensor:
    if not has_fp8(x.device):
        return reference_fp8.linear_fp8(x, weight, scale, bias)
    if quantized and multiplies_fp8(x, weight, scale):
        return _scaled_product(x, weight, scale, bias, bound)
    return _weight_only(x, weight, scale, bias)


def silu_mul_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, quantized: bool, bound: float
) -> torch.Tensor | None:
    """The fused product of few rows, or None where no kernel serves it."""
    if not (quantized and multiplies_fp8(x, weight, scale)) or weight.shape[0] % 32:
        return None
    return product_of_quantized(Quantized(*quantize_fp8_per_token(x, bound), x.dtype), weight, scale, bias, silu=True)


def multiplies_fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """FP8 by FP8 wants a scale a row and multiples of 16; float32 is asked for when exactness matters."""
    fits = scale.dim() == 1 and x.dtype != torch.float32 and not (weight.shape[0] % 16 or weight.shape[1] % 16)
    return fits and x.is_cuda and x.shape[0] > 0 and has_fp8(x.device) and scales_rows(x.device)


def _scaled_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bound: float
) -> torch.Tensor:
    x8, token_scale = quantize_fp8_per_token(x, bound)
    if x.shape[0] <= MAX_ROWS:
        return product_of_quantized(Quantized(x8, token_scale, x.dtype), weight, scale, bias, silu=False)
    fused = bias if bias is not None and bias.dtype == torch.bfloat16 else None
    out = torch._scaled_mm(
        x8, weight.t(), scale_a=token_scale[:, None], scale_b=scale[None, :], bias=fused, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).to(x.dtype)  # fmt: skip
    return out.add_(bias) if bias is not None and fused is None else out


def _weight_only(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    tokens, (rows, columns) = x.shape[0], weight.shape
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
