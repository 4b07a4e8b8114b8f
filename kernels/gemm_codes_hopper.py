"""4-bit codes with e4m3 scales, few rows, for Hopper, in Gluon: the product of `gemm_codes.py`, weights by TMA.

One warp keeps a ring in shared memory filled with words of codes and rows of x. One warpgroup takes a chunk's words into
registers as a wgmma wants its left operand, decodes its four planes (`code_decode.py`), multiplies them with the scales, which
it reads itself, and sums over all of K. It computes one or two tiles of 64 output channels, neighbours or a gate and its up,
for BLOCK_M rows over a part of K; parts are added by the last program, as in `gemm_hopper.py`.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined,assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from workstation.kernels.code_decode import ONE_BFLOAT16, ONE_FLOAT16, REST
from workstation.kernels.gemm_hopper import conclude
from workstation.kernels.hopper import align, allow_next, await_previous, fetch

WORDS = gl.constexpr(64)  # of a row, a copy: 128 bytes, the span of the shared memory's swizzle
UNIT = gl.constexpr(32)  # `int_weights.UNIT`
COPYING = gl.constexpr(40)  # registers of a thread that copies


@gluon.jit
def _planes(words, DECODE: gl.constexpr, target: gl.constexpr):
    """As `code_decode.planes`: four tiles of words [64, 32]."""
    if target == gl.bfloat16:
        return gl.inline_asm_elementwise(DECODE, "=r,=r,=r,=r,r", [words], pack=2, is_pure=True,
                                         dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16))  # fmt: skip
    else:
        return gl.inline_asm_elementwise(DECODE, "=r,=r,=r,=r,r", [words], pack=2, is_pure=True,
                                         dtype=(gl.float16, gl.float16, gl.float16, gl.float16))  # fmt: skip


@gluon.jit
def _scales(scale, column, stride, channel):
    """As in `gemm_codes.py`: what the scales of the chunk at `column` are read from."""
    row = scale + (column // 128 * 2).to(gl.int64) * stride + channel
    first = gl.load(row)
    return first, gl.load(row + stride)


@gluon.jit
def _byte_factor(word, INDEX: gl.constexpr, target: gl.constexpr):
    """As `code_decode.small_floats`: the factors of the bytes INDEX."""
    bits = word >> 4 if INDEX == 3 else word << (20 - 8 * INDEX)
    value = (bits & 0x07F00000).to(gl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    if target == gl.bfloat16:
        value = value * 3.3230699894622897e35  # 2^118
    else:
        value = value * 64.0
    return value.to(target)


@gluon.jit
def _weights(plane, scales, later, INDEX: gl.constexpr, target: gl.constexpr):
    """A plane [64, 32] times the scales of its groups. later: [32], whether a column is one of the second 16."""
    low = _byte_factor(scales[INDEX // 2], 2 * (INDEX % 2), target)[:, None].broadcast_to([64, UNIT])
    high = _byte_factor(scales[INDEX // 2], 2 * (INDEX % 2) + 1, target)[:, None].broadcast_to([64, UNIT])
    factor = gl.where(later[None, :].broadcast_to([64, UNIT]), high, low)
    if target == gl.bfloat16:
        return gl.inline_asm_elementwise(ONE_BFLOAT16, "=r,r,r", [plane, factor], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(ONE_FLOAT16, "=r,r,r", [plane, factor], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _whole(acc, factor, channel, channels, DIVIDES: gl.constexpr, SMALLER: gl.constexpr):
    """As in `gemm_codes.py`: the sum with the row's factor, and with what decoding and scaling took away."""
    if SMALLER:
        acc *= REST
    if factor is not None:
        by = gl.load(factor + gl.minimum(channel, channels - 1))[:, None]
        acc = acc / by if DIVIDES else acc * by
    return acc


@gluon.jit
def _consume(
    out, partial, arrivals, scale, factor, bias, w_ring, x_ring, ready, free, begin, steps, m, n, k, scale_stride,
    first_channel, tile_stride, first_row, tile_number, split,
    DIVIDES: gl.constexpr, DECODE: gl.constexpr, SMALLER: gl.constexpr,
    TILES: gl.constexpr, SILU: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, PANELS: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warpgroup's products of the ring's steps, and what becomes of them."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    CHUNKS: gl.constexpr = PANELS * WORDS // UNIT
    target: gl.constexpr = x_ring.dtype
    channels = n * 2 if SILU else n
    channel = gl.minimum(first_channel + gl.arange(0, 64, layout=gl.SliceLayout(1, A)), channels - 1)
    up_channel = gl.minimum(first_channel + tile_stride + gl.arange(0, 64, layout=gl.SliceLayout(1, A)), channels - 1)
    later = gl.arange(0, UNIT, layout=gl.SliceLayout(0, A)) >= 16
    first = gl.zeros([64, BLOCK_M], gl.float32, ACC)
    second = gl.zeros([64, BLOCK_M], gl.float32, ACC)
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        for chunk in gl.static_range(CHUNKS):
            # Behind the last chunk that is kept scales meet zeros of x.
            column = gl.minimum(begin + (i * CHUNKS + chunk) * 128, (k - 1) // 128 * 128)
            scales = _scales(scale, column, scale_stride, channel)
            panel = stage * TILES * PANELS + chunk // (WORDS // UNIT)
            codes = w_ring.index(panel).slice(chunk % (WORDS // UNIT) * UNIT, UNIT, dim=1).load(A)
            values = _planes(codes, DECODE, target)
            held = ()
            if TILES == 2:
                up_scales = _scales(scale, column, scale_stride, up_channel)
                codes = w_ring.index(panel + PANELS).slice(chunk % (WORDS // UNIT) * UNIT, UNIT, dim=1).load(A)
                up_values = _planes(codes, DECODE, target)
            for index in gl.static_range(4):
                rhs = x_ring.index((stage * CHUNKS + chunk) * 4 + index).permute((1, 0))
                lhs = _weights(values[index], scales, later, index, target)
                first = warpgroup_mma(lhs, rhs, first, is_async=True)
                held = held + (lhs,)  # noqa: RUF005
                if TILES == 2:
                    lhs = _weights(up_values[index], up_scales, later, index, target)
                    second = warpgroup_mma(lhs, rhs, second, is_async=True)
                    held = held + (lhs,)  # noqa: RUF005
            if TILES == 2:
                done = warpgroup_mma_wait(0, deps=(first, second) + held)  # noqa: RUF005
                first = done[0]
                second = done[1]
            else:
                done = warpgroup_mma_wait(0, deps=(first,) + held)  # noqa: RUF005
                first = done[0]
        mbarrier.arrive(free.index(stage), count=1)
    row_channel = first_channel + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    first = _whole(first, factor, row_channel, channels, DIVIDES, SMALLER)
    if TILES == 2:
        second = _whole(second, factor, row_channel + tile_stride, channels, DIVIDES, SMALLER)
    conclude(first, second, out, partial, arrivals, None, None, bias, None, m, n, first_channel, tile_stride, first_row,
             tile_number, split, TILES, SILU, SPLITS, BLOCK_M, PDL, ACC)  # fmt: skip


@gluon.jit
def _fetch_words(w, bar, ring, stage, at, first_channel, tile_stride, TILES: gl.constexpr, PANELS: gl.constexpr):
    for tile in gl.static_range(TILES):
        for panel in gl.static_range(PANELS):
            fetch(w, [first_channel + tile * tile_stride, at // 4 + panel * WORDS], bar,
                  ring.index((stage * TILES + tile) * PANELS + panel))  # fmt: skip


@gluon.jit
def _fetch_rows(x, bar, ring, stage, at, first_row, UNITS: gl.constexpr):
    for unit in gl.static_range(UNITS):
        fetch(x, [first_row, at + unit * UNIT], bar, ring.index(stage * UNITS + unit))


@gluon.jit
def _produce(
    x, w, w_ring, x_ring, ready, free, begin, steps, first_channel, tile_stride, first_row,
    TILES: gl.constexpr, PANELS: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Steps along K into the ring; the first codes before the kernel in front has ended."""
    STEP: gl.constexpr = PANELS * WORDS * 4
    early = gl.minimum(steps, STAGES)
    for i in range(early):
        mbarrier.expect(ready.index(i), BYTES)
        _fetch_words(w, ready.index(i), w_ring, i, begin + i * STEP, first_channel, tile_stride, TILES, PANELS)
    if PDL:
        await_previous()
        allow_next()
    for i in range(early):
        _fetch_rows(x, ready.index(i), x_ring, i, begin + i * STEP, first_row, STEP // UNIT)
    for i in range(early, steps):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), (i // STAGES - 1) & 1)
        mbarrier.expect(ready.index(stage), BYTES)
        _fetch_words(w, ready.index(stage), w_ring, stage, begin + i * STEP, first_channel, tile_stride, TILES, PANELS)
        _fetch_rows(x, ready.index(stage), x_ring, stage, begin + i * STEP, first_row, STEP // UNIT)


@gluon.jit(do_not_specialize=["m"])
def hopper_codes_kernel(
    x, w, scale, factor, out, partial, arrivals, bias, m, n, k, chunk, scale_stride,
    DIVIDES: gl.constexpr, DECODE: gl.constexpr, SMALLER: gl.constexpr,
    TILES: gl.constexpr, SILU: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, PANELS: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x: descriptor [m, k] in boxes [BLOCK_M, UNIT]; w: of words [n, ·] int16 (SILU: [2n, ·] = gate | up) in boxes [64, WORDS].

    scale, factor, DIVIDES to SMALLER: as `codes_gemm_kernel`'s. A step: PANELS * WORDS words. out [m, n], bias [n or 2n] or
    None; partial, arrivals, chunk and grid: as `hopper_gemm_kernel`'s. 4 warps, and one that copies.
    """
    row_tiles = (m + BLOCK_M - 1) // BLOCK_M
    tile_number = gl.program_id(0)
    split = gl.program_id(1)
    wide: gl.constexpr = TILES * 64 if not SILU else 64
    first_channel = tile_number // row_tiles * wide
    first_row = tile_number % row_tiles * BLOCK_M
    tile_stride = n if SILU else 64
    STEP: gl.constexpr = PANELS * WORDS * 4
    begin = split * chunk
    steps = (gl.minimum(chunk, k - begin) + STEP - 1) // STEP

    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES * TILES * PANELS, 64, WORDS], gl.NVMMASharedLayout(128, 16, 2))
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * (STEP // UNIT), BLOCK_M, UNIT], gl.NVMMASharedLayout(64, 16, 2))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    align()
    step_bytes: gl.constexpr = TILES * 64 * PANELS * WORDS * 2 + STEP * BLOCK_M * 2
    gl.warp_specialize(
        [
            (_consume, (out, partial, arrivals, scale, factor, bias, w_ring, x_ring, ready, free, begin, steps, m, n, k,
                        scale_stride, first_channel, tile_stride, first_row, tile_number, split, DIVIDES, DECODE,
                        SMALLER, TILES, SILU, SPLITS, BLOCK_M, PANELS, STAGES, PDL)),
            (_produce, (x, w, w_ring, x_ring, ready, free, begin, steps, first_channel, tile_stride, first_row, TILES, PANELS,
                        STAGES, step_bytes, PDL)),
        ],
        [1],
        [COPYING],
    )  # fmt: skip
