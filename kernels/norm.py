"""RMSNorm (arXiv:1910.07467), alone and with the residual sum in front of it: one program a row, float32 inside."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, weight, out, width, stride, eps, BLOCK: tl.constexpr):
    """out[r] = (x[r] / sqrt(mean(x[r]^2) + eps)) rounded to x's type, times weight. Rows of x lie `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (normed * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_kernel(x, residual, weight, out, width, eps, BLOCK: tl.constexpr):
    """residual += x, rounded to its type as the model defines it, and out = the RMS norm of the rounded sum."""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    total = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(residual.dtype.element_ty)
    tl.store(residual + row + at, rounded, mask=inside)
    values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, (normed * gain).to(out.dtype.element_ty), mask=inside)
