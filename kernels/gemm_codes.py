"""4-bit codes: `y[M, N] = x[M, K] @ w[N, K]^T` with w[n, k] = table[code] · scale of its group · factor of its row, x 16-bit.

Few rows (M up to 256): as in `gemm_small.py`, the weight tile is the left operand of `tl.dot`, K is cut into chunks whose parts
are summed in order, and the next kernel of the chain is let in early. A tile of words gives four tiles of values, each against
its own 32 columns of x of every 128. Groups may be as narrow as 16 columns, so the scale meets the value in registers, in 16
bits: exactly for e2m1 with e4m3 or e8m0 scales; float32 scales come as the sum of two numbers of 16 bits, so that a value of
the table and the weight are rounded once each. A row's factor meets its float32 sum. Many rows: `widen_codes_kernel` turns a
part of the matrix into 16-bit floats for the library.

Layout: `code_weights.py`; decoding: `code_decode.py`.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.code_decode import INTERPRETED, REST, exponents, planes, scaled, small_floats
from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.gemm_small import finish, prefetch, swiglu

F32, E8M0, E4M3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds of scales


@triton.jit
def _scales(scale, column, stride, channel, SIZE: tl.constexpr, KIND: tl.constexpr):
    """What the scales of the chunk at `column` are read from: up to four vectors, unused ones repeat the first."""
    if KIND == E8M0:
        first = tl.load(scale + (column // 128).to(tl.int64) * stride + channel)
        return first, first, first, first
    elif KIND == E4M3:
        row = scale + (column // 128 * 2).to(tl.int64) * stride + channel
        first = tl.load(row)
        return first, tl.load(row + stride), first, first
    elif SIZE >= 128:
        first = tl.load(scale + (column // SIZE).to(tl.int64) * stride + channel)
        return first, first, first, first
    elif SIZE == 64:
        row = scale + (column // 64).to(tl.int64) * stride + channel
        first = tl.load(row)
        return first, tl.load(row + stride), first, first
    else:
        row = scale + (column // 32).to(tl.int64) * stride + channel
        return tl.load(row), tl.load(row + stride), tl.load(row + 2 * stride), tl.load(row + 3 * stride)


@triton.jit
def _weights(plane, scales, INDEX: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr,
             target: tl.constexpr):  # fmt: skip
    """A tile of plane INDEX, or of its first or second 16 columns, times the scales of its groups."""
    if KIND == E8M0:
        return scaled(plane, exponents(scales[0], INDEX, target)[:, None], None, target)
    elif KIND == E4M3:
        return scaled(plane, small_floats(scales[INDEX // 2], 2 * (INDEX % 2) + HALF, target)[:, None], None, target)
    else:
        wide = scales[INDEX * 32 // SIZE if SIZE < 128 else 0]
        if INTERPRETED:
            return scaled(plane, wide[:, None], None, target)
        else:
            near = wide.to(target)
            return scaled(plane, near[:, None], (wide - near.to(tl.float32)).to(target)[:, None], target)


@triton.jit
def _codes(at, word, stride, EVEN_K: tl.constexpr, EVICT: tl.constexpr):
    if EVEN_K:
        return tl.load(at, eviction_policy=EVICT)
    else:
        return tl.load(at, mask=(word < stride)[None, :], other=0, eviction_policy=EVICT)


@triton.jit(do_not_specialize=["m"])
def codes_gemm_kernel(
    x,
    words,
    out,
    scale,
    factor,
    table,
    bias,
    m,
    n,
    k,
    chunk,
    x_stride,
    w_stride,
    scale_stride,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    DIVIDES: tl.constexpr,
    DECODE: tl.constexpr,
    SMALLER: tl.constexpr,
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

    x [m, k]; words [n, ·] int16, with SILU [2n, ·] = gate | up, both in one program; scale [·, n or 2n] int32 or float32;
    factor [n or 2n] float32 or None; table [16] float32; bias [n or 2n] or None. out: [splits, m, n] contiguous; the grid is
    (tiles, splits), the rows' tiles next to each other. BLOCK_K is 128 or 256. SILU needs one split.
    SIZE: columns of a group, a multiple of 32, or 16 for e4m3.  DECODE: from `code_decode.decoder`.  SMALLER: it makes weights
    smaller, by REST once they are scaled.
    """
    PART: tl.constexpr = 16 if KIND == E4M3 else 32  # words that are multiplied at a time: of each plane they are in one group
    target: tl.constexpr = x.dtype.element_ty
    row_tiles = tl.cdiv(m, BLOCK_M)
    split = tl.program_id(1)
    channel = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = split * chunk
    end = tl.minimum(begin + chunk, k)
    word = tl.arange(0, PART)
    # Channels behind the last are computed from a copy of it and not stored: no mask on the stream of weights.
    kept = tl.minimum(channel, n - 1)
    rows = words + kept.to(tl.int64) * w_stride
    inside, real = channel < n, row < m
    if PDL:
        prefetch(rows, begin // 4, w_stride - 1, BLOCK_K // 4, STAGES)
        if SILU:
            prefetch(rows + n.to(tl.int64) * w_stride, begin // 4, w_stride - 1, BLOCK_K // 4, STAGES)
    await_previous(PDL)
    allow_next(PDL)
    words_at = rows[:, None] + (begin // 4 + word)[None, :]
    x_at = x + row[None, :].to(tl.int64) * x_stride + (begin + word)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if SILU:
        up_at = words_at + n.to(tl.int64) * w_stride
        up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        for part in tl.static_range(BLOCK_K // 4 // PART):
            # Behind the last chunk that is kept scales meet zeros of x.
            first = tl.minimum(at + part * PART // 32 * 128, (k - 1) // 128 * 128)
            scales = _scales(scale, first, scale_stride, kept, SIZE, KIND)
            codes = _codes(words_at + part * PART, at // 4 + part * PART + word, w_stride, EVEN_K, EVICT)
            values = planes(codes, table, DECODE, KIND == F32, target)
            if SILU:
                up_scales = _scales(scale, first, scale_stride, kept + n, SIZE, KIND)
                codes = _codes(up_at + part * PART, at // 4 + part * PART + word, w_stride, EVEN_K, EVICT)
                up_values = planes(codes, table, DECODE, KIND == F32, target)
            for i in tl.static_range(4):
                column = part * PART // 32 * 128 + 32 * i + part * PART % 32
                if EVEN_K:
                    rhs = tl.load(x_at + column, mask=real[None, :], other=0.0, eviction_policy="evict_last")
                else:
                    known = (at + column + word < end)[:, None] & real[None, :]
                    rhs = tl.load(x_at + column, mask=known, other=0.0, eviction_policy="evict_last")
                lhs = _weights(values[i], scales, i, part * PART % 32 // 16, SIZE, KIND, target)
                acc = tl.dot(lhs, rhs, acc, input_precision="ieee")
                if SILU:
                    lhs = _weights(up_values[i], up_scales, i, part * PART % 32 // 16, SIZE, KIND, target)
                    up_acc = tl.dot(lhs, rhs, up_acc, input_precision="ieee")
        words_at += BLOCK_K // 4
        if SILU:
            up_at += BLOCK_K // 4
        x_at += BLOCK_K
    acc = _whole(acc, factor, kept, DIVIDES, SMALLER)
    acc = finish(acc, None, None, bias, channel, row, n, m, split)
    if SILU:
        if bias is not None:
            bias += n
        up_acc = _whole(up_acc, factor, kept + n, DIVIDES, SMALLER)
        acc = swiglu(acc, finish(up_acc, None, None, bias, channel, row, n, m, split))
    place = row[None, :].to(tl.int64) * n + channel[:, None]
    out += split.to(tl.int64) * m * n
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _whole(acc, factor, channel, DIVIDES: tl.constexpr, SMALLER: tl.constexpr):
    """The sum with the row's factor, and with what decoding and scaling took away."""
    if SMALLER and not INTERPRETED:
        acc *= REST
    if factor is not None:
        by = tl.load(factor + channel)[:, None]
        acc = acc / by if DIVIDES else acc * by
    return acc


@triton.jit
def widen_codes_kernel(
    words,
    out,
    scale,
    factor,
    table,
    rows,
    columns,
    w_stride,
    scale_stride,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    DIVIDES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out [rows, columns] = table[code] · (scale · factor), in float32, rounded once. Grid (rows / ROWS, chunks)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * 32 + tl.arange(0, 32)
    inside = row < rows
    row_words = words + row.to(tl.int64)[:, None] * w_stride
    for i in tl.static_range(4):
        if KIND == F32:  # two columns' codes share a byte
            codes = tl.load(row_words + (word // 2 * 2 + i // 2)[None, :], mask=inside[:, None], other=0).to(tl.int32)
            codes >>= (i % 2 * 8 + word % 2 * 4)[None, :]
        else:
            codes = tl.load(row_words + word[None, :], mask=inside[:, None], other=0).to(tl.int32) >> 4 * i
        column = tl.program_id(1) * 128 + 32 * i + tl.arange(0, 32)
        known = inside[:, None] & (column < columns)[None, :]
        group = tl.minimum(column, columns - 1) // SIZE  # may end anywhere among these columns
        kept = group if KIND == F32 else group // 4
        s = tl.load(scale + kept.to(tl.int64)[None, :] * scale_stride + row[:, None], mask=known, other=0)
        if KIND == E8M0:
            # The byte 0 is 2^-127, which has no exponent of its own in float32.
            byte = s >> (group % 4 * 8)[None, :] & 255
            s = tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)
        elif KIND == E4M3:
            byte = s >> (group % 4 * 8)[None, :] & 127
            s = (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        if factor is not None:
            by = tl.load(factor + row, mask=inside, other=1.0)[:, None]
            s = tl.div_rn(s, by) if DIVIDES else s * by
        value = tl.load(table + (codes & 15))
        tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], (value * s).to(out.dtype.element_ty), mask=known)
