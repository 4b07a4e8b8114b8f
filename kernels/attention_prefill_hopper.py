"""Causal attention of long chunks for Hopper (compute capability 9.0), in Gluon: warp-specialised, keys by TMA from the pages.

The same tiles, grid and online softmax (arXiv:2307.08691) as `attention_prefill_tiled`. One warp fetches keys and values
through the block table, a block of a head and 64 of its components a copy, into rings of shared memory. Two warpgroups own
64 rows each; a warpgroup's softmax of one tile runs beside its product of the tile before with V (arXiv:2407.08608, section
3.2). Tiles are walked from the last to the first, so that masks and the sequence's end come first, outside the main loop.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from workstation.kernels.attention_prefill import find_tile
from workstation.kernels.hopper import PANEL, align, as_tiles, fetch_tile, zero_behind


@gluon.jit
def _produce(
    cache, table, tiles, last_block, key_row, value_row, block_rows, key_ring, value_ring, bars,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    keys_ready, keys_free, values_ready, values_free = bars
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        tile = tiles - 1 - i
        mbarrier.wait(keys_free.index(stage), phase ^ 1)
        mbarrier.expect(keys_ready.index(stage), KEYS * HEAD_DIM * 2)
        fetch_tile(cache, table, tile, last_block, key_row, block_rows, keys_ready.index(stage), key_ring, stage,
                    KEYS // BLOCK_SIZE, HEAD_DIM // PANEL)  # fmt: skip
        mbarrier.wait(values_free.index(stage), phase ^ 1)
        mbarrier.expect(values_ready.index(stage), KEYS * HEAD_DIM * 2)
        fetch_tile(cache, table, tile, last_block, value_row, block_rows, values_ready.index(stage), value_ring, stage,
                    KEYS // BLOCK_SIZE, HEAD_DIM // PANEL)  # fmt: skip


@gluon.jit
def _weigh(score, highest, total, position, start, scale, LAYOUT: gl.constexpr, KEYS: gl.constexpr, MASKED: gl.constexpr):
    """→ (weights, new maximum, new sum, factor on what was summed before)."""
    if MASKED:
        at = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        score = gl.where(at[None, :] <= position[:, None], score, float("-inf"))
    higher = gl.maximum(highest, gl.max(score, 1) * scale)
    base = higher
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        base = gl.where(higher == float("-inf"), 0.0, higher)
    weight = gl.exp2(score * scale - base[:, None])
    fade = gl.exp2(highest - base)
    return weight, higher, total * fade + gl.sum(weight, 1), fade


@gluon.jit
def _step(
    i, tiles, acc, total, highest, weight, query, key_tiles, value_tiles, bars, position, scale,
    HEAD_DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, OUTPUT: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Tile i's scores, beside the product of tile i - 1's weights with its values; ends when tile i + 1's keys are there."""
    keys_ready, keys_free, values_ready, values_free = bars
    stage = i % STAGES
    before = (i - 1) % STAGES
    score = warpgroup_mma(query, key_tiles.index(stage).permute((1, 0)), gl.zeros([64, KEYS], gl.float32, SCORES),
                          use_acc=False, is_async=True)  # fmt: skip
    mbarrier.wait(values_ready.index(before), ((i - 1) // STAGES) & 1)
    acc = warpgroup_mma(weight, value_tiles.index(before), acc, is_async=True)
    score = warpgroup_mma_wait(1, deps=(score,))
    mbarrier.arrive(keys_free.index(stage), count=1)
    fresh, highest, total, fade = _weigh(score, highest, total, position, (tiles - 1 - i) * KEYS, scale, SCORES, KEYS,
                                         MASKED)  # fmt: skip
    following = gl.convert_layout(fresh.to(query.dtype), gl.DotOperandLayout(0, OUTPUT, 2))
    # Waiting here, not at the next step's start, also keeps the compiler from moving the weights behind the product's end.
    mbarrier.wait(keys_ready.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < tiles)
    acc, weight = warpgroup_mma_wait(0, deps=(acc, weight))
    mbarrier.arrive(values_free.index(before), count=1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUTPUT))[:, None]
    return acc, total, highest, following


@gluon.jit
def _consume(
    out, query, key_ring, key_tiles, value_ring, value_tiles, bars, tiles, clear, lowest, first_query, queries, length,
    out_row, first_head, scale, WARPGROUP: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr,
    QUERY_TOKENS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 rows. `clear`: tiles that every row sees whole."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row = WARPGROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    position = lowest + row // GROUP
    keys_ready, keys_free, values_ready, _ = bars

    mbarrier.wait(keys_ready.index(0), 0)
    score = warpgroup_mma(query, key_tiles.index(0).permute((1, 0)), gl.zeros([64, KEYS], gl.float32, SCORES),
                          use_acc=False, is_async=True)  # fmt: skip
    score = warpgroup_mma_wait(0, deps=(score,))
    mbarrier.arrive(keys_free.index(0), count=1)
    highest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    last = tiles - 1
    fresh, highest, total, _ = _weigh(score, highest, total, position, last * KEYS, scale, SCORES, KEYS, True)
    weight = gl.convert_layout(fresh.to(query.dtype), gl.DotOperandLayout(0, OUTPUT, 2))
    acc = gl.zeros([64, HEAD_DIM], gl.float32, OUTPUT)

    filled = length - (length - 1) // BLOCK_SIZE * BLOCK_SIZE  # slots of the sequence's last block that hold values
    if (tiles * KEYS >= length) & (filled < BLOCK_SIZE):
        mbarrier.wait(values_ready.index(0), 0)  # both warpgroups write the same bytes
        within = (length - 1) // BLOCK_SIZE - last * (KEYS // BLOCK_SIZE)
        zero_behind(value_ring, 0, within, filled, KEYS // BLOCK_SIZE, HEAD_DIM, BLOCK_SIZE)

    masked = gl.maximum(tiles - clear, 1)
    mbarrier.wait(keys_ready.index(1 % STAGES), (1 // STAGES) & 1, pred=tiles > 1)
    for i in range(1, masked):
        acc, total, highest, weight = _step(i, tiles, acc, total, highest, weight, query, key_tiles, value_tiles, bars,
                                            position, scale, HEAD_DIM, KEYS, STAGES, SCORES, OUTPUT, True)  # fmt: skip
    for i in range(masked, tiles):
        acc, total, highest, weight = _step(i, tiles, acc, total, highest, weight, query, key_tiles, value_tiles, bars,
                                            position, scale, HEAD_DIM, KEYS, STAGES, SCORES, OUTPUT, False)  # fmt: skip
    mbarrier.wait(values_ready.index(last % STAGES), (last // STAGES) & 1)
    acc = warpgroup_mma(weight, value_tiles.index(last % STAGES), acc, is_async=True)
    acc, weight = warpgroup_mma_wait(0, deps=(acc, weight))

    share = 1.0 / gl.where(total > 0, total, 1.0)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, OUTPUT))[:, None]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    result = gl.convert_layout(acc.to(out.dtype.element_ty), STORE)
    row = WARPGROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, STORE))
    token = row // GROUP
    real = (row < QUERY_TOKENS * GROUP) & (first_query + token < queries)
    where = ((out_row + token).to(gl.int64) * HEADS + first_head + row % GROUP) * HEAD_DIM
    gl.store(out + where[:, None] + dim[None, :], result, mask=real[:, None])


@gluon.jit(do_not_specialize=["first_sequence", "num_sequences"])
def hopper_prefill_kernel(
    q,
    cache,
    out,
    tables,
    rows,
    lengths,
    query_start,
    first_sequence,
    num_sequences,
    scale,
    q_token_stride,
    q_head_stride,
    block_rows,
    side_rows,
    head_rows,
    table_stride,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    QUERY_TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """q [T, Hq, D] → out [T, Hq, D] for sequences [first_sequence, num_sequences). Grid: (tiles, KV heads), 4 warps.

    cache: tensor descriptor [rows, D] over the layer's cache in boxes [BLOCK_SIZE, 64]; a slot's row is block * block_rows
    + side * side_rows + head * head_rows + offset. A tile has 128 rows: QUERY_TOKENS tokens (128 // GROUP) by GROUP heads.
    HEAD_DIM is 64, 128 or 256; there is no window.
    """
    number = gl.num_programs(0) - 1 - gl.program_id(0)  # late tiles, with the most keys, come first
    kv_head = gl.program_id(1)
    sequence, first_query = find_tile(number, query_start, first_sequence, num_sequences, QUERY_TOKENS)
    start = gl.load(query_start + sequence)
    queries = gl.load(query_start + sequence + 1) - start
    if first_query < queries:
        length = gl.load(lengths + sequence)
        lowest = length - queries + first_query
        stop = gl.minimum(lowest + QUERY_TOKENS, length)
        tiles = (stop + KEYS - 1) // KEYS
        table = tables + gl.load(rows + sequence).to(gl.int64) * table_stride

        RING: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        pieces: gl.constexpr = STAGES * (HEAD_DIM // PANEL) * (KEYS // BLOCK_SIZE)
        key_ring = gl.allocate_shared_memory(cache.dtype, [pieces, BLOCK_SIZE, PANEL], RING)
        value_ring = gl.allocate_shared_memory(cache.dtype, [pieces, BLOCK_SIZE, PANEL], RING)
        key_tiles = as_tiles(key_ring, STAGES, KEYS, HEAD_DIM)
        value_tiles = as_tiles(value_ring, STAGES, KEYS, HEAD_DIM)
        keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(keys_ready.index(i), count=1)
            mbarrier.init(keys_free.index(i), count=2)
            mbarrier.init(values_ready.index(i), count=1)
            mbarrier.init(values_free.index(i), count=2)

        query = gl.allocate_shared_memory(cache.dtype, [2, 64, HEAD_DIM], RING)
        LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LOAD))
        for half in gl.static_range(2):
            row = half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LOAD))
            token = first_query + row // GROUP
            real = (row < QUERY_TOKENS * GROUP) & (token < queries)
            where = (start + token).to(gl.int64) * q_token_stride + (kv_head * GROUP + row % GROUP) * q_head_stride
            query.index(half).store(gl.load(q + where[:, None] + dim[None, :], mask=real[:, None], other=0.0))
        fence_async_shared()
        align()

        bars = (keys_ready, keys_free, values_ready, values_free)
        key_row = kv_head * head_rows
        clear = (lowest + 1) // KEYS
        gl.warp_specialize(
            [
                (_consume, (out, query.index(0), key_ring, key_tiles, value_ring, value_tiles, bars, tiles, clear, lowest,
                            first_query, queries, length, start + first_query, kv_head * GROUP, scale, 0, KV_HEADS * GROUP,
                            GROUP, QUERY_TOKENS, HEAD_DIM, BLOCK_SIZE, KEYS, STAGES)),
                (_consume, (out, query.index(1), key_ring, key_tiles, value_ring, value_tiles, bars, tiles, clear, lowest,
                            first_query, queries, length, start + first_query, kv_head * GROUP, scale, 1, KV_HEADS * GROUP,
                            GROUP, QUERY_TOKENS, HEAD_DIM, BLOCK_SIZE, KEYS, STAGES)),
                (_produce, (cache, table, tiles, (length - 1) // BLOCK_SIZE, key_row, key_row + side_rows, block_rows,
                            key_ring, value_ring, bars, HEAD_DIM, BLOCK_SIZE, KEYS, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
