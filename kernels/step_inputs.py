"""What every layer reads of a step's tokens, from the rows' state: ids, positions and slots of the KV cache.

One kernel a KV group instead of a dozen small ones: at a batch of one, each launch costs as long as its work.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def step_inputs_kernel(
    tokens, positions, rows, last_token, table, token_ids, places, slots, count, table_stride,
    BLOCK_SIZE: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `ops.step_inputs`. All but the slots is the same for every KV group, and written for the first only."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    position = tl.load(positions + at, mask=inside, other=-1)
    row = tl.load(rows + at, mask=inside, other=0)
    real = position >= 0
    place = tl.where(real, position, 0)
    block = tl.load(table + row * table_stride + place // BLOCK_SIZE, mask=inside & real, other=0).to(tl.int64)
    tl.store(slots + at, tl.where(real, block * BLOCK_SIZE + place % BLOCK_SIZE, -1), mask=inside)
    if FIRST:
        token = tl.load(tokens + at, mask=inside, other=0)
        sampled = tl.load(last_token + row, mask=inside, other=0)
        tl.store(token_ids + at, tl.where(token < 0, sampled, token), mask=inside)
        tl.store(places + at, place, mask=inside)
