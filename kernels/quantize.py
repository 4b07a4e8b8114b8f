"""Activations to FP8, one scale a token: scale = max |x| / 448, x8 = x / scale rounded to nearest even (e4m3)."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous


@triton.jit
def round_row(values, bound):
    """A row [width] float32 → (the row over its scale, within e4m3's range; the scale). Its maximum counts up to `bound`."""
    largest = tl.minimum(tl.max(tl.abs(values), 0), bound)
    scale = tl.where(largest > 0.0, largest, 1.0) / 448.0
    # NaN must stay NaN: a sequence whose numbers broke has to be seen at its logits.
    return tl.clamp(values / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL), scale


@triton.jit
def quantize_per_token_kernel(x, out, scale, width, stride, bound, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x [T, width], rows `stride` apart → out [T, width] float8, scale [T] float32."""
    allow_next(PDL)
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    rounded, factor = round_row(tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32), bound)
    tl.store(scale + row, factor)
    tl.store(out + row * width + at, rounded.to(out.dtype.element_ty), mask=inside)
