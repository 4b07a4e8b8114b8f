"""Paged attention for sequences with one new token: split over keys (flash-decoding), combined in a fixed order.

Three kernels. `plan_tiles_kernel`, once a step: cut every sequence's keys into tiles of one length, chosen so that the
device is full and the partial results stay few. `decode_kernel`: a fixed grid walks the list of (tile, KV head); the
query heads of one KV head are the rows of one matrix product, so K and V are read once. `combine_kernel`: sums the tiles.
The grid follows host bounds only, lengths are read on the device: a captured graph serves every mix of lengths.

Formula: online softmax (arXiv:1805.02867, arXiv:2205.14135) in base 2; a tile leaves its normalised output and
lse = max + log2(sum); the whole is sum_i 2^(lse_i - m) o_i / sum_i 2^(lse_i - m).
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "limit", "window"])
def plan_tiles_kernel(
    lengths,
    header,
    first,
    tile_sequence,
    count,
    limit,
    window,
    SHORTEST: tl.constexpr,
    ALIGN: tl.constexpr,
    PAD: tl.constexpr,
):
    """header = (number of tiles, keys a tile); first[s] = s's first tile; tile_sequence[t] = the sequence of tile t.

    Keys a tile: SHORTEST times the least power of two that makes at most `limit` tiles (limit >= 2 * count).
    """
    at = tl.arange(0, PAD)
    inside = at < count
    length = tl.load(lengths + at, mask=inside, other=0)
    if window > 0:
        length -= tl.maximum(length - window, 0) // ALIGN * ALIGN
    keys = SHORTEST
    tiles = tl.where(inside, tl.maximum((length + keys - 1) // keys, 1), 0)
    while tl.sum(tiles, 0) > limit:
        keys *= 2
        tiles = tl.where(inside, tl.maximum((length + keys - 1) // keys, 1), 0)
    end = tl.cumsum(tiles, 0)
    tl.store(header, tl.sum(tiles, 0))
    tl.store(header + 1, keys)
    tl.store(first + at, end - tiles, mask=inside)
    tl.store(first + at + 1, end, mask=inside)
    for i in range(tl.max(tiles, 0)):
        tl.store(tile_sequence + end - tiles + i, at, mask=i < tiles)


@triton.jit
def decode_kernel(
    q,
    kv,
    out,
    partial,
    partial_lse,
    tables,
    rows,
    lengths,
    header,
    first,
    tile_sequence,
    scale,
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
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q [S, Hq, D] → out [S, Hq, D] for sequences of one tile, else partial [tiles, Hq, D] and partial_lse [tiles, Hq]."""
    heads: tl.constexpr = KV_HEADS * GROUP
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    step = tl.arange(0, KEYS)
    real_dim = dim < HEAD_DIM
    real = (member < GROUP)[:, None] & real_dim[None, :]
    tile_keys = tl.load(header + 1)
    for item in range(tl.program_id(0), tl.load(header) * KV_HEADS, tl.num_programs(0)):
        tile = item // KV_HEADS
        kv_head = item % KV_HEADS
        sequence = tl.load(tile_sequence + tile).to(tl.int64)
        first_tile = tl.load(first + sequence)
        tiles = tl.load(first + sequence + 1) - first_tile
        length = tl.load(lengths + sequence)
        oldest = tl.where(window > 0, tl.maximum(length - window, 0), 0)
        begin = oldest // KEYS * KEYS + (tile - first_tile) * tile_keys
        end = tl.minimum(begin + tile_keys, length)
        table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride

        head = kv_head * GROUP + member
        query = tl.load(q + sequence * q_token_stride + head[:, None] * q_head_stride + dim[None, :], mask=real, other=0.0)
        source = kv + kv_head * kv_head_stride
        highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
        for start in range(begin, end, KEYS):
            at = start + step
            seen = (at >= oldest) & (at < end)
            block = tl.load(table + at // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            place = block * kv_block_stride + (at % BLOCK_SIZE) * kv_token_stride
            # Masked: a recycled block may hold NaN behind the sequence's end, and 0 * NaN is NaN.
            key = tl.load(source + place[None, :] + dim[:, None], mask=seen[None, :] & real_dim[:, None], other=0.0)
            value = tl.load(
                source + kv_side_stride + place[:, None] + dim[None, :], mask=seen[:, None] & real_dim[None, :], other=0.0
            )
            score = tl.dot(query, key.to(query.dtype), input_precision=PRECISION) * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(weight, 1)
            acc = acc * fade[:, None]
            acc = tl.dot(weight.to(query.dtype), value.to(query.dtype), acc, input_precision=PRECISION)
            highest = higher
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # an empty sequence gives zeros
        if tiles == 1:
            target = out + (sequence * heads + head)[:, None] * HEAD_DIM + dim[None, :]
            tl.store(target, acc.to(out.dtype.element_ty), mask=real)
        else:
            spot = tile.to(tl.int64) * heads + head
            tl.store(partial + spot[:, None] * HEAD_DIM + dim[None, :], acc, mask=real)
            tl.store(partial_lse + spot, highest + tl.log2(total), mask=member < GROUP)


@triton.jit
def combine_kernel(
    partial,
    partial_lse,
    out,
    first,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program a (sequence, query head): the tiles' outputs, weighted by their share of the softmax's sum."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(first + sequence)
    end = tl.load(first + sequence + 1)
    if end - begin > 1:
        dim = tl.arange(0, DIM_PAD)
        highest = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        acc = tl.zeros([DIM_PAD], tl.float32)
        for start in range(begin, end, TILES):
            tile = start + tl.arange(0, TILES)
            spot = tile.to(tl.int64) * HEADS + head
            lse = tl.load(partial_lse + spot, mask=tile < end, other=float("-inf"))
            inside = (tile < end)[:, None] & (dim < HEAD_DIM)[None, :]
            part = tl.load(partial + spot[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
            higher = tl.maximum(highest, tl.max(lse, 0))
            weight = tl.exp2(lse - higher)
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(weight, 0)
            acc = acc * fade + tl.sum(weight[:, None] * part, 0)
            highest = higher
        target = out + (sequence.to(tl.int64) * HEADS + head) * HEAD_DIM + dim
        tl.store(target, (acc / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)
