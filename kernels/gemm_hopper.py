"""Matrix products of few rows for Hopper, in Gluon: `y[M, N] = x[M, K] @ w[N, K]^T`, weights by TMA through a deep ring.

The same product as `gemm_small.py`, with another way for the weights: one warp keeps copying them into shared memory, as
much of it as the ring takes, and starts before the kernel in front has ended (programmatic dependent launch, `dependent.py`).
So the memory stays busy while a norm or an attention of few keys runs, and when x is there, much of a small matrix already
is. One warpgroup multiplies; weight rows are the 64 rows of a wgmma, rows of x its columns.

A program computes TILES tiles of 64 output channels for BLOCK_M rows: neighbours, or a gate and its up (SiLU·mul,
arXiv:2002.05202). K may be cut into SPLITS chunks: each leaves a float32 part, and the program that comes last adds them in
the order of K, so the result does not depend on who came first.

FP8 as in `gemm_small.py`: y[m, n] = x_scale[m] * w_scale[n] * sum_k x[m, k] w[n, k].
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from workstation.kernels.hopper import align, allow_next, await_previous, fetch


@gluon.jit
def _fetch_weights(
    w, bar, ring, stage, at, first_channel, tile_stride, TILES: gl.constexpr, PANELS: gl.constexpr, WIDTH: gl.constexpr
):
    for tile in gl.static_range(TILES):
        for panel in gl.static_range(PANELS):
            fetch(w, [first_channel + tile * tile_stride, at + panel * WIDTH], bar,
                   ring.index((stage * TILES + tile) * PANELS + panel))  # fmt: skip


@gluon.jit
def _fetch_rows(x, bar, ring, stage, at, first_row, PANELS: gl.constexpr, WIDTH: gl.constexpr):
    for panel in gl.static_range(PANELS):
        fetch(x, [first_row, at + panel * WIDTH], bar, ring.index(stage * PANELS + panel))


@gluon.jit
def _produce(
    x, w, w_ring, x_ring, ready, free, begin, steps, first_channel, tile_stride, first_row,
    TILES: gl.constexpr, PANELS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Steps of PANELS * WIDTH elements along K into the ring; the first weights before the kernel in front has ended."""
    early = gl.minimum(steps, STAGES)
    for i in range(early):
        mbarrier.expect(ready.index(i), BYTES)
        _fetch_weights(w, ready.index(i), w_ring, i, begin + i * PANELS * WIDTH, first_channel, tile_stride, TILES, PANELS,
                       WIDTH)  # fmt: skip
    if PDL:
        await_previous()
        allow_next()
    for i in range(early):
        _fetch_rows(x, ready.index(i), x_ring, i, begin + i * PANELS * WIDTH, first_row, PANELS, WIDTH)
    for i in range(early, steps):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), (i // STAGES - 1) & 1)
        mbarrier.expect(ready.index(stage), BYTES)
        at = begin + i * PANELS * WIDTH
        _fetch_weights(w, ready.index(stage), w_ring, stage, at, first_channel, tile_stride, TILES, PANELS, WIDTH)
        _fetch_rows(x, ready.index(stage), x_ring, stage, at, first_row, PANELS, WIDTH)


@gluon.jit
def _scaled(acc, x_scale, w_scale, bias, channel, row, m, channels):
    """acc [64, BLOCK_M] times its scales, plus bias. channel [64], row [BLOCK_M]."""
    if w_scale is not None:
        acc = acc * gl.load(w_scale + channel, mask=channel < channels, other=0.0).to(gl.float32)[:, None]
    if x_scale is not None:
        acc = acc * gl.load(x_scale + row, mask=row < m, other=0.0)[None, :]
    if bias is not None:
        acc = acc + gl.load(bias + channel, mask=channel < channels, other=0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def _store(acc, out, residual, first_channel, first_row, m, n, BLOCK_M: gl.constexpr):
    """acc [64, BLOCK_M] → out [m, n], channels next to each other."""
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    channel = first_channel + gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
    row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, STORE))
    place = row[None, :].to(gl.int64) * n + channel[:, None]
    inside = (channel < n)[:, None] & (row < m)[None, :]
    values = gl.convert_layout(acc, STORE)
    if residual is not None:
        values += gl.load(residual + place, mask=inside, other=0.0).to(gl.float32)
    gl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _park(acc, part, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    channel = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(part + channel[:, None] * BLOCK_M + row[None, :], acc)


@gluon.jit
def _gather(part, stride, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    channel = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT))
    total = gl.zeros([64, BLOCK_M], gl.float32, LAYOUT)
    for split in gl.static_range(SPLITS):
        total += gl.load(part + split * stride + channel[:, None] * BLOCK_M + row[None, :], cache_modifier=".cg")
    return total


@gluon.jit
def conclude(
    first, second, out, partial, arrivals, x_scale, w_scale, bias, residual, m, n, first_channel, tile_stride, first_row,
    tile_number, split,
    TILES: gl.constexpr, SILU: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, PDL: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """From one or two tiles of sums, [64, BLOCK_M] in ACC, to the result: the sum over the splits, scales, bias, SiLU·mul."""
    if PDL:
        await_previous()
    last = True
    if SPLITS > 1:
        size: gl.constexpr = TILES * 64 * BLOCK_M
        mine = partial + (tile_number * SPLITS + split) * size
        _park(first, mine, BLOCK_M, ACC)
        if TILES == 2:
            _park(second, mine + 64 * BLOCK_M, BLOCK_M, ACC)
        align()  # all threads' parts are written before one thread says so
        last = gl.atomic_add(arrivals + tile_number, 1, sem="acq_rel") == SPLITS - 1
        if last:
            gl.store(arrivals + tile_number, 0)  # for the next product
            whole = partial + tile_number * SPLITS * size
            first = _gather(whole, size, SPLITS, BLOCK_M, ACC)
            if TILES == 2:
                second = _gather(whole + 64 * BLOCK_M, size, SPLITS, BLOCK_M, ACC)
    if last:
        channels = n * 2 if SILU else n
        channel = first_channel + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
        row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
        first = _scaled(first, x_scale, w_scale, bias, channel, row, m, channels)
        if TILES == 2:
            second = _scaled(second, x_scale, w_scale, bias, channel + tile_stride, row, m, channels)
        if SILU:
            first = first / (1 + gl.exp(-first)) * second
        _store(first, out, residual, first_channel, first_row, m, n, BLOCK_M)
        if TILES == 2 and not SILU:
            _store(second, out, residual, first_channel + 64, first_row, m, n, BLOCK_M)


@gluon.jit
def _consume(
    out, partial, arrivals, x_scale, w_scale, bias, residual, w_ring, x_ring, ready, free, steps, m, n, first_channel,
    tile_stride, first_row, tile_number, split,
    TILES: gl.constexpr, SILU: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, PANELS: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Products of the ring's steps, and what becomes of them."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32 // (128 // WIDTH)])
    first = gl.zeros([64, BLOCK_M], gl.float32, ACC)
    second = gl.zeros([64, BLOCK_M], gl.float32, ACC)
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        for panel in gl.static_range(PANELS):
            columns = x_ring.index(stage * PANELS + panel).permute((1, 0))
            first = warpgroup_mma(w_ring.index(stage * TILES * PANELS + panel), columns, first, is_async=True)
            if TILES == 2:
                second = warpgroup_mma(w_ring.index((stage * TILES + 1) * PANELS + panel), columns, second, is_async=True)
        if TILES == 2:
            first, second = warpgroup_mma_wait(0, deps=(first, second))
        else:
            first = warpgroup_mma_wait(0, deps=(first,))
        mbarrier.arrive(free.index(stage), count=1)
    conclude(first, second, out, partial, arrivals, x_scale, w_scale, bias, residual, m, n, first_channel, tile_stride,
             first_row, tile_number, split, TILES, SILU, SPLITS, BLOCK_M, PDL, ACC)  # fmt: skip


@gluon.jit(do_not_specialize=["m"])
def hopper_gemm_kernel(
    x, w, out, partial, arrivals, x_scale, w_scale, bias, residual, m, n, k, chunk,
    TILES: gl.constexpr, SILU: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, PANELS: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x: descriptor [m, k] in boxes [BLOCK_M, WIDTH]; w: descriptor [n, k] (SILU: [2n, k] = gate | up) in boxes [64, WIDTH].

    WIDTH elements are 128 bytes; a step along K is PANELS of them. out [m, n] and residual, or None, contiguous; bias [n or
    2n] or None; x_scale [m], w_scale [n or 2n] float32 or None. With SPLITS > 1: partial [tiles, SPLITS, TILES, 64, BLOCK_M]
    float32, arrivals [tiles] int32, zeros, and zeros again at the end; chunk: elements of K a split takes. Grid: (row tiles *
    channel tiles, SPLITS), a weight tile's row tiles next to each other. 4 warps and one that copies.
    """
    row_tiles = (m + BLOCK_M - 1) // BLOCK_M
    tile_number = gl.program_id(0)
    split = gl.program_id(1)
    wide: gl.constexpr = TILES * 64 if not SILU else 64
    first_channel = tile_number // row_tiles * wide
    first_row = tile_number % row_tiles * BLOCK_M
    tile_stride = n if SILU else 64
    begin = split * chunk
    steps = (gl.minimum(chunk, k - begin) + PANELS * WIDTH - 1) // (PANELS * WIDTH)

    RING: gl.constexpr = gl.NVMMASharedLayout(128, 1024 // WIDTH, 2)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES * TILES * PANELS, 64, WIDTH], RING)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * PANELS, BLOCK_M, WIDTH], RING)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    align()
    step_bytes: gl.constexpr = PANELS * 128 * (TILES * 64 + BLOCK_M)
    gl.warp_specialize(
        [
            (_consume, (out, partial, arrivals, x_scale, w_scale, bias, residual, w_ring, x_ring, ready, free, steps, m, n,
                        first_channel, tile_stride, first_row, tile_number, split, TILES, SILU, SPLITS, BLOCK_M, PANELS,
                        WIDTH, STAGES, PDL)),
            (_produce, (x, w, w_ring, x_ring, ready, free, begin, steps, first_channel, tile_stride, first_row, TILES, PANELS,
                        WIDTH, STAGES, step_bytes, PDL)),
        ],
        [1],
        [40],
    )  # fmt: skip
