"""Paged attention for sequences with one new token: every program gets an equal share of all keys (stream-K).

Keys are counted in units of UNIT. The units of all sequences, one after the other, are cut into equal shares, one a program
(per KV head), so that the device finishes at once whatever the mix of lengths. A sequence cut by a share's border leaves
pieces; the program that delivers the last one combines them, in the order of the keys, so results do not depend on who is
last. Borders inside a short sequence move to its end: short sequences are never cut. `plan_shares_kernel` makes the list once
a step; lengths stay on the device, so a captured graph serves every mix of them.

Formula: online softmax (arXiv:1805.02867, arXiv:2205.14135) in base 2; a piece leaves its normalised output and
lse = max + log2(sum); the whole is sum_i 2^(lse_i - m) o_i / sum_i 2^(lse_i - m).

An FP8 cache is read as pairs of codes. The even components of keys and values and the odd ones are then products of their own:
S = Q_even K_even^T + Q_odd K_odd^T, O_even = P V_even, O_odd = P V_odd (`fp8_codes.widen_pairs` says what that saves).
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.fp8_codes import widen_pairs

FEW = tl.constexpr(8)  # shares a step is cut into at least, if it has as many units
MOST = tl.constexpr(16)  # pieces of a sequence, about, before shares grow


@triton.jit(do_not_specialize=["count", "shares", "window"])
def plan_shares_kernel(
    lengths,
    header,
    first,
    share_start,
    share_sequence,
    arrivals,
    count,
    shares,
    window,
    UNIT: tl.constexpr,
    LEAST: tl.constexpr,
    WHOLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAD: tl.constexpr,
):
    """header = (units a share, longest sequence that is not cut); first[s] = s's first unit; first[count] = all units.

    Share i holds units [share_start[i], share_start[i + 1]), beginning in sequence share_sequence[i]. A share has LEAST units
    at least, fewer if all units make less than FEW such shares, up to twice as many where a sequence would leave more than
    MOST pieces: each piece costs the combination time. Sequences up to max(WHOLE, an eighth of a share) are not cut.
    arrivals [count, KV_HEADS] = 0.
    """
    at = tl.arange(0, PAD)
    inside = at < count
    length = tl.load(lengths + at, mask=inside, other=0)
    if window > 0:
        length -= tl.maximum(length - window, 0) // UNIT * UNIT
    units = tl.where(inside, tl.maximum((length + UNIT - 1) // UNIT, 1), 0)
    end = tl.cumsum(units, 0)
    begin = end - units
    total = tl.sum(units, 0)
    longest = tl.max(units, 0)
    least = tl.maximum(tl.minimum(LEAST, (total + FEW - 1) // FEW), tl.minimum(2 * LEAST, (longest + MOST - 1) // MOST))
    share = tl.maximum((total + shares - 1) // shares, least)
    whole = tl.maximum(share // 8, WHOLE)
    tl.store(header, share)
    tl.store(header + 1, whole)
    tl.store(first + at, begin, mask=inside)
    tl.store(first + at + 1, end, mask=inside)
    for head in range(KV_HEADS):
        tl.store(arrivals + at * KV_HEADS + head, tl.zeros([PAD], tl.int32), mask=inside)
    lowest = (begin + share - 1) // share  # the first border at or behind this sequence's beginning
    highest = tl.where(at == count - 1, shares + 1, (end + share - 1) // share)  # the last sequence sets all that follow
    for i in range(tl.max(tl.where(inside, highest - lowest, 0), 0)):
        index = lowest + i
        border = index * share
        cut = (border == begin) | ((border < end) & (units > whole))
        mine = inside & (index < highest)
        tl.store(share_start + index, tl.where(cut, border, end), mask=mine)
        tl.store(share_sequence + index, tl.where(cut, at, at + 1), mask=mine)


@triton.jit
def _combine(
    partial,
    partial_lse,
    out,
    begin,
    pieces,
    first_head,
    sequence,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The pieces of one sequence and KV head, CHUNK at a time in the order of its keys, into out."""
    member = tl.arange(0, MEMBERS)
    dim = tl.arange(0, DIM_PAD)
    inside = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    highest = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc = tl.zeros([MEMBERS, DIM_PAD], tl.float32)
    for start in range(0, pieces, CHUNK):
        piece = start + tl.arange(0, CHUNK)
        # A share leaves two pieces at most: of the sequence it begins within (0), and of the one it ends within (1).
        slot = 2 * (begin + piece) + tl.where(piece == 0, 1, 0)
        spot = slot[:, None] * HEADS + first_head + member[None, :]
        exists = (piece < pieces)[:, None] & (member < GROUP)[None, :]
        lse = tl.load(partial_lse + spot, mask=exists, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial + spot[:, :, None] * HEAD_DIM + dim[None, None, :], mask=exists[:, :, None] & inside[None, :, :], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # the lanes behind GROUP
        weight = tl.exp2(lse - base[None, :])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * part, 0)
        highest = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = out + (sequence * HEADS + first_head + member)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_shares_kernel(
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
    share_start,
    share_sequence,
    arrivals,
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
    GROUP_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """q [S, Hq, D] → out [S, Hq, D]. partial [2 * shares, Hq, D], partial_lse [2 * shares, Hq]. Grid: shares * KV_HEADS.

    GROUP_PAD: query heads a KV head, padded for the matrix product; MEMBERS: padded to a power of two only.
    scale: on the scores, a stored key's own and log2(e) included.  value_scale: of stored values, applied once, at the end.
    """
    allow_next(PDL)
    heads: tl.constexpr = KV_HEADS * GROUP
    share = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    unit = tl.load(share_start + share)
    last_unit = tl.load(share_start + share + 1)
    sequence = tl.load(share_sequence + share)
    size = tl.load(header)
    whole = tl.load(header + 1)
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    paired: tl.constexpr = kv.dtype.element_ty == tl.uint16  # codes of FP8, two an element
    width: tl.constexpr = DIM_PAD // 2 if paired else DIM_PAD
    column = tl.arange(0, width)
    step = tl.arange(0, KEYS)
    real_dim = dim < HEAD_DIM
    real_column = column < (HEAD_DIM // 2 if paired else HEAD_DIM)
    real = (member < GROUP)[:, None] & real_dim[None, :]
    head = kv_head * GROUP + member
    if paired:  # strides are given in codes: what is known of them (multiples of 16) lets loads be wide
        kv_block_stride, kv_side_stride = kv_block_stride // 2, kv_side_stride // 2
        kv_head_stride, kv_token_stride = kv_head_stride // 2, kv_token_stride // 2
    source = kv + kv_head * kv_head_stride
    await_previous(PDL)
    while unit < last_unit:
        place_of = sequence.to(tl.int64)
        first_unit = tl.load(first + sequence)
        behind = tl.load(first + sequence + 1)
        length = tl.load(lengths + sequence)
        table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride
        oldest = tl.where(window > 0, tl.maximum(length - window, 0), 0)
        stop = tl.minimum(behind, last_unit)
        # Not before the first turn that holds a key of the window: a turn without any would give NaN.
        begin = tl.maximum(oldest // UNIT * UNIT + (unit - first_unit) * UNIT, oldest // KEYS * KEYS)
        end = tl.minimum(oldest // UNIT * UNIT + (stop - first_unit) * UNIT, length)

        query = tl.load(q + place_of * q_token_stride + head[:, None] * q_head_stride + dim[None, :], mask=real, other=0.0)
        highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, width], tl.float32)
        if paired:
            query, query_second = tl.split(tl.reshape(query, (GROUP_PAD, width, 2)))
            acc_second = tl.zeros([GROUP_PAD, width], tl.float32)
        at = begin + step
        block = tl.load(table + at // BLOCK_SIZE, mask=at < end, other=0)
        for start in range(begin, end, KEYS):
            at = start + step
            seen = (at >= oldest) & (at < end)
            place = block.to(tl.int64) * kv_block_stride + (at % BLOCK_SIZE) * kv_token_stride
            block = tl.load(table + (at + KEYS) // BLOCK_SIZE, mask=at + KEYS < end, other=0)  # the next turn's
            # Masked: a recycled block may hold NaN behind the sequence's end, and 0 * NaN is NaN.
            inside = seen[:, None] & real_column[None, :]
            key = tl.load(source + place[:, None] + column[None, :], mask=inside, other=0)
            value = tl.load(source + kv_side_stride + place[:, None] + column[None, :], mask=inside, other=0)
            if paired:
                key, key_second = widen_pairs(key, query.dtype, HAS_FP8)
                value, value_second = widen_pairs(value, query.dtype, HAS_FP8)
            score = tl.dot(query, tl.trans(key).to(query.dtype), input_precision=PRECISION)
            if paired:
                score = tl.dot(query_second, tl.trans(key_second), score, input_precision=PRECISION)
            score = score * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(weight, 1)
            acc = acc * fade[:, None]
            acc = tl.dot(weight.to(query.dtype), value.to(query.dtype), acc, input_precision=PRECISION)
            if paired:
                acc_second = acc_second * fade[:, None]
                acc_second = tl.dot(weight.to(query.dtype), value_second, acc_second, input_precision=PRECISION)
            highest = higher
        if paired:
            acc = tl.interleave(acc, acc_second)
        acc = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]  # an empty sequence gives zeros
        earliest = first_unit // size
        pieces = (behind - 1) // size - earliest + 1
        if (pieces == 1) | (behind - first_unit <= whole):
            target = out + (place_of * heads + head)[:, None] * HEAD_DIM + dim[None, :]
            tl.store(target, acc.to(out.dtype.element_ty), mask=real)
        else:
            slot = 2 * share + tl.where(share == earliest, 1, 0)
            spot = slot * heads + head
            tl.store(partial + spot[:, None] * HEAD_DIM + dim[None, :], acc, mask=real)
            tl.store(partial_lse + spot, highest + tl.log2(total), mask=member < GROUP)
            tl.debug_barrier()  # all threads' pieces are written before one thread says so
            counter = arrivals + sequence * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
                tl.store(counter, 0)  # for the next layer
                _combine(
                    partial, partial_lse, out, earliest, pieces, kv_head * GROUP, place_of,
                    heads, GROUP, HEAD_DIM, DIM_PAD, MEMBERS, CHUNK,
                )  # fmt: skip
        unit = behind
        sequence += 1
