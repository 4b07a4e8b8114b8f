"""Attention of single tokens for Hopper, in Gluon: keys and values by TMA from the pages, across the borders of sequences.

The same shares and the same sums as `attention_decode.py` (stream-K; online softmax in base 2, arXiv:2307.08691). There a
program's loads end with each sequence and begin again with the next; here one warp keeps copying, unit after unit, whatever
sequence it belongs to, so short contexts keep the memory as busy as long ones. It also starts while the kernel in front still
runs (`dependent.py`): keys of earlier steps lie ready, only a sequence's last unit holds the token that kernel writes.

One warpgroup multiplies. A KV head's query heads are the first rows of its 64; the others are zeros and cost nothing that
is waited for.
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

from workstation.kernels.hopper import PANEL, align, allow_next, as_tiles, await_previous, fetch_tile, zero_behind

UNIT = gl.constexpr(64)  # keys, as in `plan_shares_kernel`
CHUNK = gl.constexpr(8)  # pieces of a sequence that are combined at a time


@gluon.jit
def _produce(
    cache, tables, table_stride, rows, lengths, first, unit, last_unit, sequence, key_row, value_row, block_rows, key_ring,
    value_ring, bars, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Units [unit, last_unit) into the rings. What the step itself writes is waited for, nothing else."""
    keys_ready, values_ready, free = bars
    count = 0
    while unit < last_unit:
        first_unit = gl.load(first + sequence)
        behind = gl.load(first + sequence + 1)
        length = gl.load(lengths + sequence)
        table = tables + gl.load(rows + sequence).to(gl.int64) * table_stride
        last_block = gl.where(length > 0, (length - 1) // BLOCK_SIZE, -1)
        for tile in range(unit - first_unit, gl.minimum(behind, last_unit) - first_unit):
            if PDL and (tile + 1) * UNIT >= length:
                await_previous()
            stage = count % STAGES
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(keys_ready.index(stage), UNIT * HEAD_DIM * 2)
            fetch_tile(cache, table, tile, last_block, key_row, block_rows, keys_ready.index(stage), key_ring, stage,
                       UNIT // BLOCK_SIZE, HEAD_DIM // PANEL)  # fmt: skip
            mbarrier.expect(values_ready.index(stage), UNIT * HEAD_DIM * 2)
            fetch_tile(cache, table, tile, last_block, value_row, block_rows, values_ready.index(stage), value_ring, stage,
                       UNIT // BLOCK_SIZE, HEAD_DIM // PANEL)  # fmt: skip
            count += 1
        unit = behind
        sequence += 1


@gluon.jit
def _combine(
    partial, partial_lse, out, begin, pieces, first_head, sequence,
    HEADS: gl.constexpr, GROUP: gl.constexpr, MEMBERS: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """The pieces of one sequence and KV head, CHUNK at a time in the order of its keys, into out."""
    ALL: gl.constexpr = gl.BlockedLayout([CHUNK, 1, HEAD_DIM // 32], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    PIECES: gl.constexpr = gl.SliceLayout(2, ALL)
    SUM: gl.constexpr = gl.SliceLayout(0, ALL)
    member = gl.arange(0, MEMBERS, layout=gl.SliceLayout(0, PIECES))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, ALL)))
    highest = gl.full([MEMBERS], float("-inf"), gl.float32, gl.SliceLayout(0, PIECES))
    total = gl.zeros([MEMBERS], gl.float32, gl.SliceLayout(0, PIECES))
    acc = gl.zeros([MEMBERS, HEAD_DIM], gl.float32, SUM)
    for start in range(0, pieces, CHUNK):
        piece = start + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, PIECES))
        # A share leaves two pieces at most: of the sequence it begins within (0), and of the one it ends within (1).
        slot = 2 * (begin + piece) + gl.where(piece == 0, 1, 0)
        spot = slot[:, None] * HEADS + first_head + member[None, :]
        exists = (piece < pieces)[:, None] & (member < GROUP)[None, :]
        lse = gl.load(partial_lse + spot, mask=exists, other=float("-inf"), cache_modifier=".cg")
        part = gl.load(partial + spot[:, :, None] * HEAD_DIM + dim[None, :][:, None, :], mask=exists[:, :, None], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        higher = gl.maximum(highest, gl.max(lse, 0))
        base = gl.where(higher == float("-inf"), 0.0, higher)  # the lanes behind GROUP
        weight = gl.exp2(lse - base[None, :])
        fade = gl.exp2(highest - base)
        total = total * fade + gl.sum(weight, 0)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUM))[:, None] + gl.sum(weight[:, :, None] * part, 0)
        highest = higher
    share = 1.0 / gl.where(total > 0, total, 1.0)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, SUM))[:, None]
    row = gl.arange(0, MEMBERS, layout=gl.SliceLayout(1, SUM))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, SUM))
    target = out + (sequence * HEADS + first_head + row)[:, None] * HEAD_DIM + column[None, :]
    gl.store(target, acc.to(out.dtype.element_ty), mask=(row < GROUP)[:, None])


@gluon.jit
def _consume(
    q, out, partial, partial_lse, lengths, header, first, arrivals, query, key_tiles, value_ring, value_tiles, bars, unit,
    last_unit, sequence, share, kv_head, scale, q_token_stride, q_head_stride,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, MEMBERS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, UNIT, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    heads: gl.constexpr = KV_HEADS * GROUP
    keys_ready, values_ready, free = bars
    size = gl.load(header)
    whole = gl.load(header + 1)
    count = 0
    if PDL:
        await_previous()
    while unit < last_unit:
        first_unit = gl.load(first + sequence)
        behind = gl.load(first + sequence + 1)
        length = gl.load(lengths + sequence)
        member = gl.arange(0, 64, layout=gl.SliceLayout(1, LOAD))
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LOAD))
        spot = sequence.to(gl.int64) * q_token_stride + (kv_head * GROUP + member) * q_head_stride
        query.store(gl.load(q + spot[:, None] + dim[None, :], mask=(member < GROUP)[:, None], other=0.0))
        fence_async_shared()
        align()
        highest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([64, HEAD_DIM], gl.float32, OUTPUT)
        for tile in range(unit - first_unit, gl.minimum(behind, last_unit) - first_unit):
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(keys_ready.index(stage), phase)
            score = warpgroup_mma(query, key_tiles.index(stage).permute((1, 0)), gl.zeros([64, UNIT], gl.float32, SCORES),
                                  use_acc=False, is_async=True)  # fmt: skip
            score = warpgroup_mma_wait(0, deps=(score,))
            at = tile * UNIT + gl.arange(0, UNIT, layout=gl.SliceLayout(0, SCORES))
            score = gl.where((at < length)[None, :], score, float("-inf"))
            higher = gl.maximum(highest, gl.max(score, 1) * scale)
            base = gl.where(higher == float("-inf"), 0.0, higher)  # an empty sequence
            weight = gl.exp2(score * scale - base[:, None])
            fade = gl.exp2(highest - base)
            total = total * fade + gl.sum(weight, 1)
            highest = higher
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUTPUT))[:, None]
            mbarrier.wait(values_ready.index(stage), phase)
            if ((tile + 1) * UNIT > length) & (length % BLOCK_SIZE != 0):
                within = (length - 1) // BLOCK_SIZE - tile * (UNIT // BLOCK_SIZE)
                zero_behind(value_ring, stage, within, length % BLOCK_SIZE, UNIT // BLOCK_SIZE, HEAD_DIM, BLOCK_SIZE)
            acc = warpgroup_mma(gl.convert_layout(weight.to(query.dtype), gl.DotOperandLayout(0, OUTPUT, 2)),
                                value_tiles.index(stage), acc, is_async=True)  # fmt: skip
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(free.index(stage), count=1)
            count += 1
        factor = 1.0 / gl.where(total > 0, total, 1.0)  # an empty sequence gives zeros
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
        earliest = first_unit // size
        pieces = (behind - 1) // size - earliest + 1
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT))
        column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUTPUT))
        real = (row < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
        if (pieces == 1) | (behind - first_unit <= whole):
            target = out + (sequence.to(gl.int64) * heads + kv_head * GROUP + row)[:, None] * HEAD_DIM + column[None, :]
            gl.store(target, acc.to(out.dtype.element_ty), mask=real)
        else:
            slot = 2 * share + gl.where(share == earliest, 1, 0)
            place = slot * heads + kv_head * GROUP
            gl.store(partial + (place + row)[:, None] * HEAD_DIM + column[None, :], acc, mask=real)
            line = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
            gl.store(partial_lse + place + line, highest + gl.log2(total), mask=line < GROUP)
            align()  # all threads' pieces are written before one thread says so
            counter = arrivals + sequence * KV_HEADS + kv_head
            if gl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
                gl.store(counter, 0)  # for the next layer
                _combine(partial, partial_lse, out, earliest, pieces, kv_head * GROUP, sequence.to(gl.int64), heads, GROUP,
                         MEMBERS, HEAD_DIM)  # fmt: skip
        unit = behind
        sequence += 1


@gluon.jit
def hopper_decode_kernel(
    q, cache, out, partial, partial_lse, tables, rows, lengths, header, first, share_start, share_sequence, arrivals, scale,
    q_token_stride, q_head_stride, block_rows, side_rows, head_rows, table_stride,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, MEMBERS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """q [S, Hq, D] → out [S, Hq, D]; grid and shares as `decode_shares_kernel`, 16-bit, D = 64 or 128, no window.

    cache: tensor descriptor [rows, D] over the layer's cache in boxes [BLOCK_SIZE, 64]; a slot's row is block * block_rows
    + side * side_rows + head * head_rows + offset. MEMBERS: query heads a KV head, padded to a power of two, 4 at least.
    """
    share = gl.program_id(0) // KV_HEADS
    kv_head = gl.program_id(0) % KV_HEADS
    unit = gl.load(share_start + share)
    last_unit = gl.load(share_start + share + 1)
    sequence = gl.load(share_sequence + share)
    if PDL:
        allow_next()
    if unit < last_unit:
        RING: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        pieces: gl.constexpr = STAGES * (HEAD_DIM // PANEL) * (UNIT // BLOCK_SIZE)
        key_ring = gl.allocate_shared_memory(cache.dtype, [pieces, BLOCK_SIZE, PANEL], RING)
        value_ring = gl.allocate_shared_memory(cache.dtype, [pieces, BLOCK_SIZE, PANEL], RING)
        query = gl.allocate_shared_memory(cache.dtype, [64, HEAD_DIM], RING)
        keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(keys_ready.index(i), count=1)
            mbarrier.init(values_ready.index(i), count=1)
            mbarrier.init(free.index(i), count=1)
        align()
        bars = (keys_ready, values_ready, free)
        key_row = kv_head * head_rows
        gl.warp_specialize(
            [
                (_consume, (q, out, partial, partial_lse, lengths, header, first, arrivals, query,
                            as_tiles(key_ring, STAGES, UNIT, HEAD_DIM), value_ring,
                            as_tiles(value_ring, STAGES, UNIT, HEAD_DIM), bars, unit, last_unit, sequence, share, kv_head,
                            scale, q_token_stride, q_head_stride, KV_HEADS, GROUP, MEMBERS, HEAD_DIM, BLOCK_SIZE, STAGES,
                            PDL)),
                (_produce, (cache, tables, table_stride, rows, lengths, first, unit, last_unit, sequence, key_row,
                            key_row + side_rows, block_rows, key_ring, value_ring, bars, HEAD_DIM, BLOCK_SIZE, STAGES, PDL)),
            ],
            [1],
            [40],
        )  # fmt: skip
