"""Plain-torch twins of the FP8 operations. Weights are widened a few rows at a time; activations keep their dtype."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from workstation.kernels.quantized import Fp8Operand, Quantized, Rounding

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128
CHUNK_ELEMENTS = 1 << 24


def quantize_fp8(x: torch.Tensor, rounding: Rounding) -> Quantized:
    values = x.float()
    largest = values.abs().amax(-1).clamp(max=rounding.bound)
    scale = torch.where(largest == 0, 1.0, largest) / FP8_MAX
    return Quantized((values / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale, x.dtype)


def to_codes(values: torch.Tensor, scale: float) -> torch.Tensor:
    """values / scale as e4m3 codes (uint8): to nearest even, saturating at 448; NaN stays NaN."""
    return (values.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)


def from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 codes (uint8) in a wider dtype. Eight times as fast as torch's own conversion, which goes value by value.

    A code's exponent and mantissa, moved to where float16 keeps them, lack a factor of 2 to the 15 - 7; NaN comes out as 480.
    """
    signed = codes.view(torch.int8).to(torch.int16)  # the sign in the upper byte, too
    wide = signed.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float().mul_(256.0)
    return wide.masked_fill_(wide.abs() > FP8_MAX, torch.nan).to(dtype)


def linear_fp8(x: Fp8Operand, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """scale [N] float32, or [⌈N/128⌉, ⌈K/128⌉] for 128 × 128 blocks."""
    if isinstance(x, Quantized):
        x = (x.values.float() * x.scale[:, None]).to(x.dtype)
    rows, columns = weight.shape
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    step = max(BLOCK, CHUNK_ELEMENTS // columns // BLOCK * BLOCK)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        wide = _widen(weight[part], scale, start, x.dtype)
        out[:, part] = F.linear(x, wide, None if bias is None else bias[part])
    return out


def _widen(weight: torch.Tensor, scale: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights of some rows, the first of which is row `start` (a multiple of 128 for block scales)."""
    rows, columns = weight.shape
    if scale.dim() == 1:
        factor = scale[start:start + rows, None]
    else:
        first = start // BLOCK
        factor = scale[first:first + -(-rows // BLOCK)].repeat_interleave(BLOCK, 0)[:rows]
        factor = factor.repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float().mul_(factor).to(dtype)
