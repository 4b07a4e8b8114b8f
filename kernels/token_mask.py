"""Which tokens a grammar allows, laid over a step's logits in place."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_mask_kernel(logits, bits, index, width, row_stride, words, BLOCK: tl.constexpr):
    """See `ops_sampling.mask_tokens`. Program (row, part) of [L, parts]; a row without a mask costs one load."""
    row = tl.program_id(0).to(tl.int64)
    mask = tl.load(index + row).to(tl.int64)
    if mask >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        known = at // 32 < words
        word = tl.load(bits + mask * words + at // 32, mask=inside & known, other=0)
        x = tl.load(logits + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
        broken = (x != x) | (x == float("inf"))
        barred = inside & (((word >> (at % 32)) & 1) == 0) & ~broken
        tl.store(logits + row * row_stride + at, float("-inf"), mask=barred)
