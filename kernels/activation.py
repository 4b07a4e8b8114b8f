"""SwiGLU's product (arXiv:2002.05202): silu(gate) * up, where silu(x) = x / (1 + exp(-x)); alone, or rounded to FP8."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.quantize import round_row


@triton.jit
def silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """gate_up [T, 2 * width] → out [T, width]; silu is rounded to the type before the product, as the model defines it."""
    allow_next(PDL)
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_round_kernel(gate_up, out, scale, width, stride, bound, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """`silu_mul_kernel`, then `quantize_per_token_kernel` on its result. One program a row of gate_up, rows `stride` apart."""
    allow_next(PDL)
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + at, mask=inside, other=0.0).to(tl.float32)
    kept: tl.constexpr = gate_up.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(kept).to(tl.float32)
    values = (silu * up).to(kept).to(tl.float32)
    rounded, factor = round_row(values, bound)
    tl.store(scale + row, factor)
    tl.store(out + row * width + at, rounded.to(out.dtype.element_ty), mask=inside)
