"""RMSNorm (arXiv:1910.07467), alone, with the residual sum in front of it, and with rounding to FP8 behind it.

One program a row, float32 inside.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.quantize import round_row


@triton.jit
def rms_norm_kernel(x, weight, out, width, stride, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[r] = (x[r] / sqrt(mean(x[r]^2) + eps)) rounded to x's type, times weight. Rows of x lie `stride` apart."""
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    await_previous(PDL)
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (normed * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_kernel(x, residual, weight, out, width, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """residual += x, rounded to its type as the model defines it, and out = the RMS norm of the rounded sum."""
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    await_previous(PDL)
    total = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(residual.dtype.element_ty)
    tl.store(residual + row + at, rounded, mask=inside)
    values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row + at, (normed * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_fp8_kernel(x, residual, weight, out, scale, width, eps, bound, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """`add_rms_norm_kernel`, then `quantize_per_token_kernel` on its result (rounded to x's type first, so both ways agree)."""
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    await_previous(PDL)
    total = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + row * width + at, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(residual.dtype.element_ty)
    tl.store(residual + row * width + at, rounded, mask=inside)
    values = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    normed = (values * factor).to(x.dtype.element_ty).to(tl.float32)
    normed = (normed * gain).to(x.dtype.element_ty).to(tl.float32)
    scaled, step = round_row(normed, bound)
    tl.store(scale + row, step)
    tl.store(out + row * width + at, scaled.to(out.dtype.element_ty), mask=inside)
