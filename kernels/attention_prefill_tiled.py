"""Causal attention of long chunks for half precision on tensor cores: as `attention_prefill`, without masks in its main loop.

The same grid and the same online softmax (arXiv:2307.08691) as `attention_prefill`. The block numbers of the next tile of keys
are fetched a tile ahead; of the keys that every row sees, none is masked.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.attention_prefill import find_tile
from workstation.kernels.fp8_codes import widen_cached


@triton.jit
def _walk(
    acc,
    total,
    highest,
    query,
    position,
    begin,
    end,
    oldest,
    length,
    keys_from,
    values_from,
    table,
    scale,
    window,
    kv_block_stride,
    kv_token_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Online softmax (base 2) of the tile's rows over keys [begin, end); MASKED keeps causality, window and length."""
    step = tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_DIM)
    block = tl.load(table + tl.minimum(begin + step, length - 1) // BLOCK_SIZE)
    for start in range(begin, end, KEYS):
        at = start + step
        place = block.to(tl.int64) * kv_block_stride + (at % BLOCK_SIZE) * kv_token_stride
        place = place[:, None] + dim[None, :]
        block = tl.load(table + tl.minimum(at + KEYS, length - 1) // BLOCK_SIZE)  # the next tile's
        if MASKED:  # a block may hold NaN behind a sequence's end or before its window, and 0 * NaN is NaN
            exists = (at < length) & (at >= oldest) if WINDOWED else at < length
            key = tl.load(keys_from + place, mask=exists[:, None], other=0.0)
            value = tl.load(values_from + place, mask=exists[:, None], other=0.0)
        else:
            key = tl.load(keys_from + place)
            value = tl.load(values_from + place)
        score = tl.dot(query, tl.trans(widen_cached(key, query.dtype)))
        if MASKED:
            seen = at[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1) * scale)
        base = higher
        if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score * scale - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weight.to(query.dtype), widen_cached(value, query.dtype), acc)
        highest = higher
    return acc, total, highest


@triton.jit(do_not_specialize=["first_sequence", "num_sequences"])
def tiled_prefill_kernel(
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
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """q [T, Hq, D] → out [T, Hq, D] for sequences [first_sequence, num_sequences). Grid: (tiles, KV heads).

    A tile has ROWS rows: QUERY_TOKENS tokens by the GROUP query heads of a KV head. HEAD_DIM is a power of two.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles, with the most keys, come first
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
        dim = tl.arange(0, HEAD_DIM)
        real = ((row < QUERY_TOKENS * GROUP) & (token < queries))[:, None]
        where = (start + token).to(tl.int64)
        query = tl.load(q + (where * q_token_stride + head * q_head_stride)[:, None] + dim[None, :], mask=real, other=0.0)

        lowest = past + first_query
        stop = tl.minimum(lowest + QUERY_TOKENS, length)
        oldest = 0
        common = 0  # the first key that every row's window holds
        if WINDOWED:
            oldest = tl.maximum(lowest + 1 - window, 0)
            common = (tl.maximum(lowest + QUERY_TOKENS - window, 0) + KEYS - 1) // KEYS * KEYS
        begin = oldest // KEYS * KEYS
        diagonal = tl.maximum((lowest + 1) // KEYS * KEYS, begin)  # keys before it are seen by every row
        edge = tl.minimum(common, diagonal)

        table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride
        keys_from = kv + kv_head * kv_head_stride
        values_from = keys_from + kv_side_stride
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        if WINDOWED:
            acc, total, highest = _walk(
                acc, total, highest, query, position, begin, edge, oldest, length, keys_from, values_from, table, scale, window,
                kv_block_stride, kv_token_stride, HEAD_DIM, BLOCK_SIZE, KEYS, True, WINDOWED,
            )  # fmt: skip
        acc, total, highest = _walk(
            acc, total, highest, query, position, tl.maximum(begin, edge), diagonal, oldest, length, keys_from, values_from,
            table, scale, window, kv_block_stride, kv_token_stride, HEAD_DIM, BLOCK_SIZE, KEYS, False, WINDOWED,
        )  # fmt: skip
        acc, total, highest = _walk(
            acc, total, highest, query, position, diagonal, stop, oldest, length, keys_from, values_from, table, scale, window,
            kv_block_stride, kv_token_stride, HEAD_DIM, BLOCK_SIZE, KEYS, True, WINDOWED,
        )  # fmt: skip
        acc = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
        heads: tl.constexpr = KV_HEADS * GROUP
        target = out + ((where * heads + head) * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=real)
