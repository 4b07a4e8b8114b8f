"""Paged causal attention for sequences with many new tokens, in any dtype and head dim (FlashAttention-2, arXiv:2307.08691).

A program takes QUERY_TOKENS tokens of one sequence with all query heads of one KV head as the rows of its tile, and walks
the keys through the block table. Keys fall in up to three ranges: those some rows miss because of the window, those all
rows see (no mask), and those around the diagonal. What no row sees is never loaded.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.fp8_codes import widen_cached


@triton.jit
def find_tile(tile, query_start, first_sequence, num_sequences, QUERY_TOKENS: tl.constexpr):
    """→ (sequence, first query of the tile within it).

    Sequence s owns tiles from (query_start[s] - query_start[first]) // QUERY_TOKENS + (s - first) on: enough for its
    ceil(queries / QUERY_TOKENS) whatever its neighbours bring, and known without a list.
    """
    origin = tl.load(query_start + first_sequence)
    low = first_sequence
    high = num_sequences
    while high - low > 1:  # the last sequence whose first tile is not behind this one
        middle = (low + high) // 2
        ahead = (tl.load(query_start + middle) - origin) // QUERY_TOKENS + (middle - first_sequence) > tile
        high = tl.where(ahead, middle, high)
        low = tl.where(ahead, low, middle)
    first_tile = (tl.load(query_start + low) - origin) // QUERY_TOKENS + (low - first_sequence)
    return low, (tile - first_tile) * QUERY_TOKENS


@triton.jit
def _attend(
    acc,
    total,
    highest,
    query,
    position,
    begin,
    end,
    oldest,
    length,
    source,
    table,
    scale,
    window,
    kv_block_stride,
    kv_side_stride,
    kv_token_stride,
    dim,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax (base 2) of the tile's rows over keys [begin, end); MASKED keeps causality, window and length."""
    real = dim < HEAD_DIM
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        # MASKED also keeps NaN out, which a block may hold behind a sequence's end; elsewhere every key is seen.
        exists = (at >= oldest) & (at < length) if MASKED else at >= 0
        block = tl.load(table + at // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        place = block * kv_block_stride + (at % BLOCK_SIZE) * kv_token_stride
        key = tl.load(source + place[None, :] + dim[:, None], mask=exists[None, :] & real[:, None], other=0.0)
        value = tl.load(
            source + kv_side_stride + place[:, None] + dim[None, :], mask=exists[:, None] & real[None, :], other=0.0
        )
        score = tl.dot(query, widen_cached(key, query.dtype), input_precision=PRECISION) * scale
        if MASKED:
            seen = (at[None, :] <= position[:, None]) & exists[None, :]
            if window > 0:
                seen = seen & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        base = higher
        if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weight.to(query.dtype), widen_cached(value, query.dtype), acc, input_precision=PRECISION)
        highest = higher
    return acc, total, highest


@triton.jit(do_not_specialize=["first_sequence", "num_sequences"])
def prefill_kernel(
    q,
    kv,
    out,
    tables,
    rows,
    lengths,
    query_start,
    first_sequence,
    num_sequences,
    scale,
    value_scale,
    q_token_stride,
    q_head_stride,
    kv_block_stride,
    kv_side_stride,
    kv_head_stride,
    kv_token_stride,
    table_stride,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q [T, Hq, D] → out [T, Hq, D] for sequences [first_sequence, num_sequences). Grid: (tiles, KV heads).

    Any head dim up to DIM_PAD, a power of two. Late tiles, with the most keys, come first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    found, first_query = find_tile(tile, query_start, first_sequence, num_sequences, QUERY_TOKENS)
    sequence = found.to(tl.int64)
    start = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - start
    if first_query < queries:
        length = tl.load(lengths + sequence)
        past = length - queries
        row = tl.arange(0, ROWS)
        token = first_query + row // GROUP
        position = past + token
        head = kv_head * GROUP + row % GROUP
        dim = tl.arange(0, DIM_PAD)
        real = ((row < QUERY_TOKENS * GROUP) & (token < queries))[:, None] & (dim < HEAD_DIM)[None, :]
        where = (start + token).to(tl.int64)
        query = tl.load(q + (where * q_token_stride + head * q_head_stride)[:, None] + dim[None, :], mask=real, other=0.0)

        lowest = past + first_query
        stop = tl.minimum(lowest + QUERY_TOKENS, length)
        oldest = 0
        common = 0  # the first key that every row's window holds
        if window > 0:
            oldest = tl.maximum(lowest + 1 - window, 0)
            common = (tl.maximum(lowest + QUERY_TOKENS - window, 0) + KEYS - 1) // KEYS * KEYS
        begin = oldest // KEYS * KEYS
        diagonal = tl.maximum((lowest + 1) // KEYS * KEYS, begin)  # keys before it are seen by every row
        edge = tl.minimum(common, diagonal)

        table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride
        source = kv + kv_head * kv_head_stride
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        if window > 0:
            acc, total, highest = _attend(
                acc, total, highest, query, position, begin, edge, oldest, length, source, table, scale, window,
                kv_block_stride, kv_side_stride, kv_token_stride, dim,
                HEAD_DIM, BLOCK_SIZE, KEYS, PRECISION, True,
            )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, query, position, tl.maximum(begin, edge), diagonal, oldest, length, source, table, scale,
            window,
            kv_block_stride, kv_side_stride, kv_token_stride, dim,
            HEAD_DIM, BLOCK_SIZE, KEYS, PRECISION, False,
        )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, query, position, diagonal, stop, oldest, length, source, table, scale, window,
            kv_block_stride, kv_side_stride, kv_token_stride, dim,
            HEAD_DIM, BLOCK_SIZE, KEYS, PRECISION, True,
        )  # fmt: skip
        acc = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
        heads: tl.constexpr = KV_HEADS * GROUP
        target = out + ((where * heads + head) * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=real)
