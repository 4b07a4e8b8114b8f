"""Activations to FP8, one scale a token: scale = max |x| / 448, x8 = x / scale rounded to nearest even (e4m3)."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_per_token_kernel(x, out, scale, width, stride, bound, BLOCK: tl.constexpr):
    """x [T, width], rows `stride` apart → out [T, width] float8, scale [T] float32. A row's maximum counts up to `bound`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.minimum(tl.max(tl.abs(values), 0), bound)
    factor = tl.where(largest > 0.0, largest, 1.0) / 448.0
    tl.store(scale + row, factor)
    # NaN must stay NaN: a sequence whose numbers broke has to be seen at its logits.
    scaled = tl.clamp(values / factor, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * width + at, scaled.to(out.dtype.element_ty), mask=inside)
