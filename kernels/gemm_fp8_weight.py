"""Weight-only FP8: y = x · Wᵀ + b with 16- or 32-bit x and W kept as float8 times a scale a row or a 128 × 128 block.

Weights are widened in registers (exactly: e4m3 fits into every wider format), products are summed in float32, and scales
meet the sums, never the weights: a row's scale once at the end, a block's after the 128 columns it covers.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_weight_kernel(
    x, weight, scale, bias, out, tokens, rows, columns, x_stride, scale_stride,
    BLOCKED: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [tokens, columns], weight [rows, columns] → out [tokens, rows]. ROWS divides 128, so a tile has one row of scales."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, columns, 128):
        column = start + tl.arange(0, 128)
        inside = column < columns
        left = tl.load(x + token[:, None] * x_stride + column[None, :],
                       mask=(token[:, None] < tokens) & inside[None, :], other=0.0)
        right = tl.load(weight + row[:, None] * columns + column[None, :],
                        mask=(row[:, None] < rows) & inside[None, :], other=0.0)
        part = tl.dot(left, tl.trans(right.to(left.dtype)), input_precision=PRECISION)
        if BLOCKED:
            part *= tl.load(scale + (tl.program_id(1) * ROWS // 128) * scale_stride + start // 128)
        total += part
    if not BLOCKED:
        total *= tl.load(scale + row, mask=row < rows, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(out + token[:, None] * rows + row[None, :], total.to(out.dtype.element_ty),
             mask=(token[:, None] < tokens) & (row[None, :] < rows))
