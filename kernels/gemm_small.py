"""Matrix products of few rows: `y[M, N] = x[M, K] @ w[N, K]^T` for M up to 256, where streaming w decides the time.

The weight tile is the left operand of `tl.dot`, so that output channels fill the 64 rows of a Hopper wgmma (16 of an
mma.sync), and the few activation rows are its columns: nothing is padded to 64. Weights pass through once and are marked
evict_first, activations evict_last. M, N, K and the strides are run-time values: one compiled kernel serves every layer.

Too few tiles to fill the device: K is cut into `splits` chunks. Each writes its float32 part, scales applied and, in the
first, the bias added; `y = sum_s partial[s]` is left to the consumer or to `reduce_kernel`, always in the order of s, so
that results do not depend on who came first (split-K as in arXiv:2301.03598, section 3, without its atomics).

FP8 (e4m3fn: 1 sign, 4 exponent, 3 mantissa bits; arXiv:2209.05433): y[m, n] = x_scale[m] * w_scale[n] * sum_k x[m, k] w[n, k].
On Hopper the tensor cores add FP8 products with about 14 bits of mantissa inside a chunk, in float32 between chunks.
With 16-bit activations the weight is widened in registers, exactly.

Programmatic dependent launch (PDL, see `dependent.py`): the first weights are prefetched into the L2 before waiting for the
previous kernel; the next one is let in only after that, so that the chain of waiting kernels stays short.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.fp8_codes import widen


@triton.jit
def prefetch(rows, begin, last, BLOCK_K: tl.constexpr, TILES: tl.constexpr):
    """Ask the L2 for the first TILES tiles of the weight rows, a 128-byte line at a time."""
    size: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    lines: tl.constexpr = BLOCK_K * size // 128 if BLOCK_K * size > 128 else 1
    line = begin + tl.arange(0, lines) * (128 // size)
    for tile in tl.static_range(TILES):
        address = (rows[:, None] + tl.minimum(line + tile * BLOCK_K, last)[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def finish(acc, w_scale, x_scale, bias, channel, row, n, m, split):
    """Scales, and the bias in the first chunk. acc [BLOCK_N, BLOCK_M], channel [BLOCK_N], row [BLOCK_M]."""
    if w_scale is not None:
        acc = acc * tl.load(w_scale + channel, mask=channel < n, other=0.0)[:, None]
    if x_scale is not None:
        acc = acc * tl.load(x_scale + row, mask=row < m, other=0.0)[None, :]
    if bias is not None:
        biased = tl.where(split == 0, n, 0)
        acc = acc + tl.load(bias + channel, mask=channel < biased, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def swiglu(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x,
    w,
    out,
    x_scale,
    w_scale,
    bias,
    residual,
    m,
    n,
    k,
    chunk,
    x_stride,
    w_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SILU: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK_N output channels of BLOCK_M rows over one chunk of K.

    x [m, k]; w [n, k], with SILU [2n, k] = gate | up, both tiles in one program; x_scale [m], w_scale [n or 2n] float32 or
    None; bias [n or 2n] or None; residual [m, n] or None. out: [splits, m, n] contiguous; the grid is (tiles, splits), the
    rows' tiles next to each other, so that they find the weights in the L2. chunk: a multiple of BLOCK_K.
    SILU and residual need the whole sum: one split.
    """
    row_tiles = tl.cdiv(m, BLOCK_M)
    split = tl.program_id(1)
    channel = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = split * chunk
    end = tl.minimum(begin + chunk, k)
    step = tl.arange(0, BLOCK_K)
    # Channels behind the last are computed from a copy of it and not stored: no mask on the stream of weights.
    rows = w + tl.minimum(channel, n - 1).to(tl.int64) * w_stride
    real = row < m
    if PDL:
        prefetch(rows, begin, k - 1, BLOCK_K, STAGES)
        if SILU:
            prefetch(rows + n.to(tl.int64) * w_stride, begin, k - 1, BLOCK_K, STAGES)
    await_previous(PDL)
    allow_next(PDL)
    weight_at = rows[:, None] + (begin + step)[None, :]
    x_at = x + row[None, :].to(tl.int64) * x_stride + (begin + step)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if SILU:
        up_at = weight_at + n.to(tl.int64) * w_stride
        up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_at, eviction_policy=EVICT)
            rhs = tl.load(x_at, mask=real[None, :], other=0.0, eviction_policy="evict_last")
        else:
            inside = at + step < end
            weight = tl.load(weight_at, mask=inside[None, :], other=0.0, eviction_policy=EVICT)
            rhs = tl.load(x_at, mask=inside[:, None] & real[None, :], other=0.0, eviction_policy="evict_last")
        acc = tl.dot(widen(weight, x.dtype.element_ty), rhs, acc, input_precision="ieee")
        if SILU:
            if EVEN_K:
                weight = tl.load(up_at, eviction_policy=EVICT)
            else:
                weight = tl.load(up_at, mask=inside[None, :], other=0.0, eviction_policy=EVICT)
            up_acc = tl.dot(widen(weight, x.dtype.element_ty), rhs, up_acc, input_precision="ieee")
            up_at += BLOCK_K
        weight_at += BLOCK_K
        x_at += BLOCK_K
    acc = finish(acc, w_scale, x_scale, bias, channel, row, n, m, split)
    if SILU:
        if w_scale is not None:
            w_scale += n
        if bias is not None:
            bias += n
        acc = swiglu(acc, finish(up_acc, w_scale, x_scale, bias, channel, row, n, m, split))
    place = row[None, :].to(tl.int64) * n + channel[:, None]
    stored = (channel < n)[:, None] & real[None, :]
    if residual is not None:
        acc += tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
    out += split.to(tl.int64) * m * n
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit
def gemv_kernel(
    x,
    w,
    out,
    x_scale,
    w_scale,
    bias,
    residual,
    n,
    k,
    chunk,
    w_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SILU: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """`gemm_kernel` for one row, on the CUDA cores in float32: wide, register-to-register, no shared memory needed."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, k)
    step = tl.arange(0, BLOCK_K)
    rows = w + tl.minimum(channel, n - 1).to(tl.int64) * w_stride
    if PDL:
        prefetch(rows, begin, k - 1, BLOCK_K, STAGES)
        if SILU:
            prefetch(rows + n.to(tl.int64) * w_stride, begin, k - 1, BLOCK_K, STAGES)
    await_previous(PDL)
    allow_next(PDL)
    weight_at = rows[:, None] + (begin + step)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if SILU:
        up_at = weight_at + n.to(tl.int64) * w_stride
        up_acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_at, eviction_policy="evict_first")
            rhs = tl.load(x + at + step, eviction_policy="evict_last").to(tl.float32)
        else:
            inside = at + step < end
            weight = tl.load(weight_at, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            rhs = tl.load(x + at + step, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        acc += widen(weight, tl.float32) * rhs[None, :]
        if SILU:
            if EVEN_K:
                weight = tl.load(up_at, eviction_policy="evict_first")
            else:
                weight = tl.load(up_at, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            up_acc += widen(weight, tl.float32) * rhs[None, :]
            up_at += BLOCK_K
        weight_at += BLOCK_K
    row = tl.arange(0, 1)
    total = finish(tl.sum(acc, 1)[:, None], w_scale, x_scale, bias, channel, row, n, 1, split)
    if SILU:
        if w_scale is not None:
            w_scale += n
        if bias is not None:
            bias += n
        up = finish(tl.sum(up_acc, 1)[:, None], w_scale, x_scale, bias, channel, row, n, 1, split)
        total = swiglu(total, up)
    stored = (channel < n)[:, None]
    if residual is not None:
        total += tl.load(residual + channel[:, None], mask=stored, other=0.0).to(tl.float32)
    out += split.to(tl.int64) * n
    tl.store(out + channel[:, None], total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["m"])
def reduce_kernel(
    partial, out, residual, m, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, PDL: tl.constexpr
):
    """out [m, n] = sum_s partial[s] (+ residual); with SILU partial is [SPLITS, m, 2n] = gate | up. Grid (m, n / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    width = n * 2 if SILU else n
    await_previous(PDL)
    allow_next(PDL)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        source = partial + (row + split * m) * width + column
        total += tl.load(source, mask=inside, other=0.0)
        if SILU:
            up += tl.load(source + n, mask=inside, other=0.0)
    if SILU:
        total = swiglu(total, up)
    if residual is not None:
        total += tl.load(residual + row * n + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + column, total.to(out.dtype.element_ty), mask=inside)
