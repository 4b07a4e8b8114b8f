"""bfloat16 activations taken apart into pairs of e4m3 numbers (`quantized.Halves`) by the norm that makes them.

A program a row. Groups of 128 columns are read as two runs of 64, whose numbers take turns in the order that
`gemm_few_hopper.py` wants; joined they are a thread's neighbours, so that what is read and what is written is 16 bytes.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.tuning import FEW_ROWS, FEW_SPAN

SPAN = tl.constexpr(FEW_SPAN)  # columns of a group, and of a chunk of the layout of codes
ROWS = tl.constexpr(2 * FEW_ROWS)  # of a group's tile, the least columns of a wgmma: two for each of four rows of x
EXPONENT = tl.constexpr(0x7F800000)  # of a float32
TOP = tl.constexpr(7 << 23)  # a group's largest becomes 2^7 to 2^8, which e4m3 holds
LEAST = tl.constexpr(8 << 23)


@triton.jit
def store_halves(values, out, factors, row, width, BLOCK: tl.constexpr):
    """values [BLOCK / 128, 128] float32, rounded to bfloat16, in the order of bytes → a row of `Halves`."""
    group = tl.arange(0, BLOCK // SPAN)
    largest = tl.max(tl.abs(values), 1).to(tl.int32, bitcast=True) & EXPONENT
    exponent = tl.maximum(largest, LEAST) - TOP
    power = tl.where(largest == EXPONENT, float("nan"), exponent.to(tl.float32, bitcast=True))
    values = values * ((254 << 23) - exponent).to(tl.float32, bitcast=True)[:, None]
    high = (values.to(tl.int32, bitcast=True) & -(1 << 20)).to(tl.float32, bitcast=True)
    kept = (group < width // SPAN)[:, None]
    place = out + (group * ROWS + 2 * row)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    tl.store(place, high.to(out.dtype.element_ty), mask=kept)
    tl.store(place + SPAN, (values - high).to(out.dtype.element_ty), mask=kept)
    less = tl.sum(values, 1) * power * (-8.0 / 512.0)
    pair = factors + (group * 2 * ROWS + 2 * row)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pair, tl.join(power, power), mask=kept)
    tl.store(pair + ROWS, tl.join(less, tl.zeros_like(less)), mask=kept)


@triton.jit
def add_rms_norm_halves_kernel(
    x, residual, weight, out, factors, width, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """`add_rms_norm_kernel` (`norm.py`), its result taken apart. width: a multiple of 128; BLOCK: a power of two from there."""
    allow_next(PDL)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK // 2)
    column = at // 64 * SPAN + at // 16 % 2 * 32 + at // 32 % 2 * 16 + at % 16  # in its group's lower half
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    upper_gain = tl.load(weight + column + 64, mask=inside, other=0.0).to(tl.float32)
    await_previous(PDL)
    place = row * width + column
    total = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    upper = tl.load(x + place + 64, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    upper += tl.load(residual + place + 64, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = residual.dtype.element_ty
    tl.store(residual + place, total.to(dtype), mask=inside)
    tl.store(residual + place + 64, upper.to(dtype), mask=inside)
    total = total.to(dtype).to(tl.float32)
    upper = upper.to(dtype).to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total + upper * upper, 0) / width + eps)
    total = (total * scale).to(dtype).to(tl.float32) * gain
    upper = (upper * scale).to(dtype).to(tl.float32) * upper_gain
    normed = tl.join(total.to(dtype).to(tl.float32), upper.to(dtype).to(tl.float32))
    store_halves(tl.reshape(normed, [BLOCK // SPAN, SPAN]), out, factors, row, width, BLOCK)
