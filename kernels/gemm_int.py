"""Integer weights: `y[M, N] = x[M, K] @ w[N, K]^T` with w[n, k] = (code − zero) · scale of its group, x 16-bit.

Few rows (M up to 256): as in `gemm_small.py`, the weight tile is the left operand of `tl.dot`, K is cut into chunks whose parts
are summed in order, and the next kernel of the chain is let in early. A tile of words gives 4 (or 2) tiles of integers, each
against its own 32 columns of x of every 128 (or 64). Integers are exact in 16 bits; a group's scale meets its float32 sum, not
the weights. Many rows: `widen_kernel` turns a part of the matrix into 16-bit floats for the library.

Layout: `int_weights.py`. Groups come in three ways: WHOLE rows, whose scale meets the final sum; STEPS, of at least a program's
step along K; PLANES, as narrow as 32 columns, with a sum for each tile of integers.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.gemm_small import finish, prefetch, swiglu
from workstation.kernels.int_codes import offset, plane, zero_points

WHOLE, STEPS, PLANES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _scales(scale, group, stride, channel, inside):
    return tl.load(scale + group.to(tl.int64) * stride + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["m"])
def int_gemm_kernel(
    x,
    words,
    out,
    scale,
    zero,
    bias,
    m,
    n,
    k,
    chunk,
    x_stride,
    w_stride,
    scale_stride,
    zero_stride,
    size,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SILU: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK_N output channels of BLOCK_M rows over one chunk of K, a multiple of BLOCK_K.

    x [m, k]; words [n, ·] int16, with SILU [2n, ·] = gate | up, both in one program; scale [G, n or 2n], zero uint8 or None;
    bias [n or 2n] or None; size: columns of a group. out: [splits, m, n] contiguous; the grid is (tiles, splits), the rows'
    tiles next to each other. BLOCK_K is a multiple of a chunk of the layout. SILU needs one split.
    """
    PER: tl.constexpr = 16 // BITS
    UNIT: tl.constexpr = 32  # `int_weights.UNIT`
    target: tl.constexpr = x.dtype.element_ty
    row_tiles = tl.cdiv(m, BLOCK_M)
    split = tl.program_id(1)
    channel = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = split * chunk
    end = tl.minimum(begin + chunk, k)
    step = tl.arange(0, BLOCK_K // PER)
    column = step // UNIT * (UNIT * PER) + step % UNIT  # of a word's first code
    # Channels behind the last are computed from a copy of it and not stored: no mask on the stream of weights.
    rows = words + tl.minimum(channel, n - 1).to(tl.int64) * w_stride
    inside, real = channel < n, row < m
    if PDL:
        prefetch(rows, begin // PER, w_stride - 1, BLOCK_K // PER, STAGES)
        if SILU:
            prefetch(rows + n.to(tl.int64) * w_stride, begin // PER, w_stride - 1, BLOCK_K // PER, STAGES)
    first = begin // size
    s = _scales(scale, first, scale_stride, channel, inside)
    z = zero_points(zero, first, zero_stride, channel, inside, BITS)
    if SILU:
        up_s = _scales(scale, first, scale_stride, channel + n, inside)
        up_z = zero_points(zero, first, zero_stride, channel + n, inside, BITS)
    await_previous(PDL)
    allow_next(PDL)
    words_at = rows[:, None] + (begin // PER + step)[None, :]
    x_at = x + row[None, :].to(tl.int64) * x_stride + (begin + column)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if SILU:
        up_at = words_at + n.to(tl.int64) * w_stride
        up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            codes = tl.load(words_at, eviction_policy=EVICT)
        else:
            stored = at // PER + step < w_stride
            codes = tl.load(words_at, mask=stored[None, :], other=0, eviction_policy=EVICT)
        if SILU:
            if EVEN_K:
                up_codes = tl.load(up_at, eviction_policy=EVICT)
            else:
                up_codes = tl.load(up_at, mask=stored[None, :], other=0, eviction_policy=EVICT)
            up_at += BLOCK_K // PER
        if GROUPS == STEPS:
            # The next step's numbers are asked for a step ahead: they are too small for the pipeline of the tiles.
            ahead = tl.minimum(at + BLOCK_K, k - 1) // size
            s_ahead = _scales(scale, ahead, scale_stride, channel, inside)
            z_ahead = zero_points(zero, ahead, zero_stride, channel, inside, BITS)
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            if SILU:
                up_s_ahead = _scales(scale, ahead, scale_stride, channel + n, inside)
                up_z_ahead = zero_points(zero, ahead, zero_stride, channel + n, inside, BITS)
                up_part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for i in tl.static_range(PER):
            if EVEN_K:
                rhs = tl.load(x_at + UNIT * i, mask=real[None, :], other=0.0, eviction_policy="evict_last")
            else:
                known = (at + UNIT * i + column < end)[:, None] & real[None, :]
                rhs = tl.load(x_at + UNIT * i, mask=known, other=0.0, eviction_policy="evict_last")
            if GROUPS == PLANES:
                group = tl.minimum(at + UNIT * i, k - 1) // size
                s = _scales(scale, group, scale_stride, channel, inside)
                z = zero_points(zero, group, zero_stride, channel, inside, BITS)
            lhs = plane(codes, offset(z, BITS, target)[:, None], i, BITS, target)
            if GROUPS == WHOLE:
                acc = tl.dot(lhs, rhs, acc, input_precision="ieee")
            elif GROUPS == STEPS:
                part = tl.dot(lhs, rhs, part, input_precision="ieee")
            else:
                acc += tl.dot(lhs, rhs, input_precision="ieee") * s[:, None]
            if SILU:
                if GROUPS == PLANES:
                    up_s = _scales(scale, group, scale_stride, channel + n, inside)
                    up_z = zero_points(zero, group, zero_stride, channel + n, inside, BITS)
                lhs = plane(up_codes, offset(up_z, BITS, target)[:, None], i, BITS, target)
                if GROUPS == WHOLE:
                    up_acc = tl.dot(lhs, rhs, up_acc, input_precision="ieee")
                elif GROUPS == STEPS:
                    up_part = tl.dot(lhs, rhs, up_part, input_precision="ieee")
                else:
                    up_acc += tl.dot(lhs, rhs, input_precision="ieee") * up_s[:, None]
        if GROUPS == STEPS:
            acc += part * s[:, None]
            s, z = s_ahead, z_ahead
            if SILU:
                up_acc += up_part * up_s[:, None]
                up_s, up_z = up_s_ahead, up_z_ahead
        words_at += BLOCK_K // PER
        x_at += BLOCK_K
    if GROUPS == WHOLE:
        acc *= s[:, None]
        if SILU:
            up_acc *= up_s[:, None]
    acc = finish(acc, None, None, bias, channel, row, n, m, split)
    if SILU:
        if bias is not None:
            bias += n
        acc = swiglu(acc, finish(up_acc, None, None, bias, channel, row, n, m, split))
    place = row[None, :].to(tl.int64) * n + channel[:, None]
    out += split.to(tl.int64) * m * n
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def widen_kernel(
    words, out, scale, zero, rows, columns, w_stride, scale_stride, zero_stride, size, BITS: tl.constexpr, ROWS: tl.constexpr
):
    """out [rows, columns] = (code − zero) · scale, multiplied in float32 and rounded once. Grid (rows / ROWS, chunks)."""
    PER: tl.constexpr = 16 // BITS
    UNIT: tl.constexpr = 32  # `int_weights.UNIT`
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * UNIT + tl.arange(0, UNIT)
    inside = row < rows
    codes = tl.load(words + row.to(tl.int64)[:, None] * w_stride + word[None, :], mask=inside[:, None], other=0)
    for i in tl.static_range(PER):
        start = tl.program_id(1) * (UNIT * PER) + UNIT * i
        column = start + tl.arange(0, UNIT)
        # A group may end anywhere among these columns.
        group = tl.minimum(column, columns - 1) // size
        known = inside[:, None] & (column < columns)[None, :]
        s = tl.load(scale + group.to(tl.int64)[None, :] * scale_stride + row[:, None], mask=known, other=0.0)
        if zero is None:
            z = tl.full((ROWS, UNIT), 1 << BITS - 1, tl.int32)
        elif BITS == 8:
            z = tl.load(zero + group.to(tl.int64)[None, :] * zero_stride + row[:, None], mask=known, other=0).to(tl.int32)
        else:
            pair = tl.load(zero + group.to(tl.int64)[None, :] * zero_stride + (row // 2)[:, None], mask=known, other=0)
            z = (pair.to(tl.int32) >> (row % 2 * 4)[:, None]) & 15
        code = (codes.to(tl.int32) >> BITS * i) & ((1 << BITS) - 1)
        wide = (code - z).to(tl.float32) * s.to(tl.float32)
        tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], wide.to(out.dtype.element_ty), mask=known)
