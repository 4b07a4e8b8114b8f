"""4-bit weights, few rows, for Hopper, in Gluon: the products of `gemm_int.py` (one to four rows) and of `gemm_codes.py`
(e2m1, one or two) that decode a single conversation.

An integer c in the low bits of a byte is the e4m3 number c / 512, in the subnormals and the binade above them alike. So one
mask (and a shift, for the upper half) of a register of codes gives four operands of an FP8 product: 0.4 instructions a weight,
where `gemm_grouped_hopper.py` takes 1.4 to make 16-bit floats. x is taken apart: within a group of 128 columns, divided by a
power of two, a bfloat16 number is the sum of two e4m3 ones, exactly if it is at least 2^-9 of the group's largest, else to
2^-16 of that. They are two rows of the right operand, in the order that the bytes of codes have (`quantized.Halves`):

    y[m, n] = Σ_g scale[g, n] · 2^e[g, m] · (512 Σ_k (high + low)[m, k] · (code[n, k] / 512) − 8 Σ_k (high + low)[m, k])

Tensor cores keep 14 bits of a sum of FP8 products, a group's only; groups are added in float32. In all a step takes 1.0
instructions a weight (Triton 3.6, 1 row, a gate and its up), the other ring 2.1. One warp keeps a ring of codes and scales
filled by TMA, all of it before the kernel in front has ended; one warpgroup multiplies, one or two tiles of 64 output channels
(neighbours, or a gate and its up) over a part of K. Parts are added as in `gemm_hopper.py`.

e2m1 codes, sign and three bits put into a byte, are e4m3 numbers too, their 64ths: 0.9 instructions a weight. Their groups
have 32 or 16 columns, and the 32 of a product are 16 in the even bytes of words and 16 in the odd ones, which are 64 columns
on. So a row of x has four rows of the right operand, high and low numbers with zeros for odd bytes, then for even ones: a
product's sums of two groups stay apart, and each meets its scale. 1.6 instructions a weight with e8m0 scales, 1.9 with e4m3
ones.

Whoever made x may have taken it apart (`halves.py`), for integers; then it comes through the ring, beside the codes: nothing is
done before the loop, and shared memory holds no more than the ring. Else a program first takes its own columns of x apart.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined,assignment,var-annotated,misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from workstation.kernels.gemm_hopper import conclude
from workstation.kernels.halves import EXPONENT, ROWS, SPAN
from workstation.kernels.halves_hopper import take_apart
from workstation.kernels.hopper import align, allow_next, await_previous, fetch, reinterpreted
from workstation.kernels.hopper_codes import with_factor

BYTES = gl.constexpr(128)  # of a row of codes, a copy: two chunks
FIRST = gl.constexpr("and.b32 $0, $1, 0x0f0f0f0f;")
SECOND = gl.constexpr("{ .reg .b32 upper; shr.b32 upper, $1, 4; and.b32 $0, upper, 0x0f0f0f0f; }")
E2M1_FIRST = gl.constexpr("""{ .reg .b32 sign, code; shl.b32 code, $1, 2; and.b32 code, code, 0x1c1c1c1c; shl.b32 sign, $1, 4;
lop3.b32 $0, sign, 0x80808080, code, 0xea; }""")
E2M1_SECOND = gl.constexpr("""{ .reg .b32 code; shr.b32 code, $1, 2; and.b32 code, code, 0x1c1c1c1c;
lop3.b32 $0, $1, 0x80808080, code, 0xea; }""")
FOUR_SCALES = gl.constexpr("""{ .reg .b16 low, high, a, b, c, d; .reg .b32 pair; mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 pair, low; mov.b32 {a, b}, pair; cvt.rn.f16x2.e4m3x2 pair, high; mov.b32 {c, d}, pair;
cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }""")


@gluon.jit
def _codes(w_ring, panel, START: gl.constexpr, SHIFTED: gl.constexpr, KIND: gl.constexpr, A: gl.constexpr):
    """Lower or upper codes of bytes [START, START + 32) of a panel as e4m3 numbers, [64, 32]."""
    packed = w_ring.index(panel).slice(START, 32, dim=1).load(A)
    if KIND is not None and SHIFTED:
        return gl.inline_asm_elementwise(E2M1_SECOND, "=r,r", [packed], dtype=gl.float8e4nv, is_pure=True, pack=4)
    elif KIND is not None:
        return gl.inline_asm_elementwise(E2M1_FIRST, "=r,r", [packed], dtype=gl.float8e4nv, is_pure=True, pack=4)
    elif SHIFTED:
        return gl.inline_asm_elementwise(SECOND, "=r,r", [packed], dtype=gl.float8e4nv, is_pure=True, pack=4)
    else:
        return gl.inline_asm_elementwise(FIRST, "=r,r", [packed], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def _chunk_sums(w_ring, panel, x_tile, HALF: gl.constexpr, KIND: gl.constexpr, ACC: gl.constexpr, A: gl.constexpr):
    """A chunk's sums [64, 8], still in flight: one, or one for every two groups of e2m1 codes. HALF: of the panel's chunks."""
    COUNT: gl.constexpr = 1 if KIND is None else 2 if KIND == "e8m0" else 4
    found = ()
    for index in gl.static_range(4):
        lhs = _codes(w_ring, panel, HALF * 64 + index // 2 * 32, index % 2 == 1, KIND, A)
        rhs = x_tile.slice(index * 32, 32, dim=1).permute((1, 0))
        if index < COUNT:
            found = found + (warpgroup_mma(lhs, rhs, gl.zeros([64, ROWS], gl.float32, ACC), use_acc=False, is_async=True),)  # noqa: RUF005
        else:
            found = found[1:] + (warpgroup_mma(lhs, rhs, found[0], is_async=True),)  # noqa: RUF005
    return found


@gluon.jit
def _scales(s_ring, row, odd, KIND: gl.constexpr, ACC: gl.constexpr):
    """What a chunk's sums are multiplied with: a group's scales [64, 1], or of e2m1 codes those of two groups, [64, 8]. Lower
    codes come first, in each half of the bytes. odd [1, 8]: whether a column sums odd bytes, 64 columns behind even ones."""
    word = s_ring.index(row).permute((1, 0)).load(ACC)
    if KIND is None:
        return (word.to(gl.float32),)
    elif KIND == "e8m0":
        word = gl.where(odd, word >> 16, word)
        return (((word << 23) & EXPONENT).to(gl.float32, bitcast=True), ((word << 15) & EXPONENT).to(gl.float32, bitcast=True))
    else:
        word = gl.where(odd, s_ring.index(row + 1).permute((1, 0)).load(ACC), word)
        first, second, third, fourth = gl.inline_asm_elementwise(
            FOUR_SCALES, "=f,=f,=f,=f,r", [word], is_pure=True, pack=1,
            dtype=(gl.float32, gl.float32, gl.float32, gl.float32))  # fmt: skip
        return first, third, second, fourth


@gluon.jit
def _chunk(done, scales, power, less, AT: gl.constexpr, KIND: gl.constexpr):
    """A chunk's sums done[AT], … with all that they are multiplied with. less: what a code's middle takes away."""
    if KIND is None:
        return (done[AT] * power + less) * scales[AT]
    elif KIND == "e8m0":
        return (done[AT] * scales[AT] + done[AT + 1] * scales[AT + 1]) * power
    else:
        first = done[AT] * scales[AT] + done[AT + 1] * scales[AT + 1]
        return (first + done[AT + 2] * scales[AT + 2] + done[AT + 3] * scales[AT + 3]) * power


@gluon.jit
def _consume(
    x, out, partial, arrivals, factor, bias, w_ring, s_ring, x_tiles, powers, sums, ready, free, begin, steps, m, n, k, stride,
    first_channel, tile_stride, tile_number, split,
    KIND: gl.constexpr, DIVIDES: gl.constexpr, GROUP: gl.constexpr, TILES: gl.constexpr, SILU: gl.constexpr,
    SPLITS: gl.constexpr, TOKENS: gl.constexpr, CHUNKS: gl.constexpr, PANELS: gl.constexpr, STAGES: gl.constexpr,
    APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x taken apart if it is not yet, the products of the ring's steps, and what becomes of them."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    SUMS: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    SCALES: gl.constexpr = s_ring.shape[1]
    SHARE: gl.constexpr = 2 if KIND is None else 4  # rows of the right operand for one of x
    scales = reinterpreted(s_ring, [STAGES * TILES * SCALES, 1, 64])
    if not APART:
        if PDL:
            await_previous()
        take_apart(x, x_tiles, powers, sums, begin, k, m, stride, CHUNKS, TOKENS, SHARE)
    SPREAD: gl.constexpr = 2 if APART else 1  # through the ring come a chunk's powers and sums in turn
    first = gl.zeros([64, ROWS], gl.float32, ACC)
    second = gl.zeros([64, ROWS], gl.float32, ACC)
    odd = gl.arange(0, ROWS, layout=gl.SliceLayout(0, ACC))[None, :] // 2 % 2 == 1
    SUMS_OF: gl.constexpr = 1 if KIND is None else 2 if KIND == "e8m0" else 4
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        for panel in gl.static_range(PANELS):
            chunk = ((stage if APART else i) * PANELS + panel) * 2
            parts = ()
            for half in gl.static_range(2):
                for tile in gl.static_range(TILES):
                    at = (stage * TILES + tile) * PANELS + panel
                    parts = parts + _chunk_sums(w_ring, at, x_tiles.index(chunk + half), half, KIND, ACC, A)
            factors = ()
            found = ()
            for half in gl.static_range(2):
                at = (chunk + half) * SPREAD
                factors = factors + (powers.index(at).load(ACC), sums.index(at + SPREAD - 1).load(ACC))  # noqa: RUF005
                for tile in gl.static_range(TILES):
                    row = (stage * TILES + tile) * SCALES + (panel * 2 + half) * SPAN // GROUP
                    found = found + _scales(scales, row, odd, KIND, ACC)
            done = warpgroup_mma_wait(0, deps=parts)  # it takes no operands of 8 bits; the assembler keeps theirs until here
            for half in gl.static_range(2):
                power = factors[half * 2]
                less = factors[half * 2 + 1]
                first += _chunk(done, found, power, less, half * TILES * SUMS_OF, KIND)
                if TILES == 2:
                    second += _chunk(done, found, power, less, (half * TILES + 1) * SUMS_OF, KIND)
        fence_async_shared()  # as in `gemm_grouped_hopper.py`
        mbarrier.arrive(free.index(stage), count=1)
    first = _joined(first, KIND, SUMS)
    second = _joined(second, KIND, SUMS) if TILES == 2 else first
    channels = n * 2 if SILU else n
    channel = first_channel + gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    first = with_factor(first, factor, channel, channels, DIVIDES)
    if TILES == 2:
        second = with_factor(second, factor, channel + tile_stride, channels, DIVIDES)
    conclude(first, second, out, partial, arrivals, None, None, bias, None, m, n, first_channel, tile_stride, 0, tile_number,
             split, TILES, SILU, SPLITS, ROWS // SHARE, PDL, SUMS)  # fmt: skip


@gluon.jit
def _joined(sums, KIND: gl.constexpr, LAYOUT: gl.constexpr):
    """[64, 8] of high and low parts in turn → 512 times their sums, [64, 4]; of even and odd bytes too → 64 times, [64, 2]."""
    if KIND is None:
        high, low = gl.split(gl.reshape(sums, [64, ROWS // 2, 2]))
        return gl.convert_layout((high + low) * 512.0, LAYOUT)
    else:
        WHOLE: gl.constexpr = gl.BlockedLayout([1, ROWS], [32, 1], [4, 1], [1, 0])
        high, low = gl.split(gl.reshape(gl.convert_layout(sums, WHOLE), [64, ROWS // 2, 2]))
        even, odd = gl.split(gl.reshape(high + low, [64, ROWS // 4, 2]))
        return gl.convert_layout((even + odd) * 64.0, LAYOUT)


@gluon.jit
def _fetch_step(
    w, s, bar, w_ring, s_ring, stage, at, first_channel, tile_stride, size,
    TILES: gl.constexpr, PANELS: gl.constexpr,
):  # fmt: skip
    for tile in gl.static_range(TILES):
        channel = first_channel + tile * tile_stride
        slot = stage * TILES + tile
        for panel in gl.static_range(PANELS):
            fetch(w, [channel, at // 2 + panel * BYTES], bar, w_ring.index(slot * PANELS + panel))
        fetch(s, [at // size, channel], bar, s_ring.index(slot))


@gluon.jit
def _fetch_x(x, factors, bar, x_ring, f_ring, stage, at, PANELS: gl.constexpr):
    for panel in gl.static_range(PANELS):
        fetch(x, [(at // SPAN + panel * 2) * ROWS, 0], bar, x_ring.index(stage * PANELS + panel))
    fetch(factors, [at // SPAN, 0], bar, f_ring.index(stage))


@gluon.jit
def _produce(
    x, factors, w, s, w_ring, s_ring, x_ring, f_ring, ready, free, begin, steps, size, first_channel, tile_stride,
    TILES: gl.constexpr, PANELS: gl.constexpr, STAGES: gl.constexpr, STEP_BYTES: gl.constexpr, APART: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Codes and scales, step by step along K; a ring full of them before the kernel in front has ended. Then x, if apart."""
    STEP: gl.constexpr = PANELS * BYTES * 2
    early = gl.minimum(steps, STAGES)
    for i in range(early):
        mbarrier.expect(ready.index(i), STEP_BYTES)
        _fetch_step(w, s, ready.index(i), w_ring, s_ring, i, begin + i * STEP, first_channel, tile_stride, size, TILES, PANELS)
    if PDL:
        await_previous()
        allow_next()
    if APART:
        for i in range(early):
            _fetch_x(x, factors, ready.index(i), x_ring, f_ring, i, begin + i * STEP, PANELS)
    for i in range(early, steps):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), (i // STAGES - 1) & 1)
        mbarrier.expect(ready.index(stage), STEP_BYTES)
        _fetch_step(w, s, ready.index(stage), w_ring, s_ring, stage, begin + i * STEP, first_channel, tile_stride, size, TILES,
                    PANELS)  # fmt: skip
        if APART:
            _fetch_x(x, factors, ready.index(stage), x_ring, f_ring, stage, begin + i * STEP, PANELS)


@gluon.jit(do_not_specialize=["m"])
def hopper_few_kernel(
    x, w, s, out, partial, arrivals, factor, bias, factors, m, n, k, chunk, size, stride,
    KIND: gl.constexpr, DIVIDES: gl.constexpr, GROUP: gl.constexpr, TILES: gl.constexpr, SILU: gl.constexpr,
    SPLITS: gl.constexpr, TOKENS: gl.constexpr, CHUNKS: gl.constexpr, PANELS: gl.constexpr, STAGES: gl.constexpr,
    COPYING: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x [m, k], rows stride apart, or taken apart: `Halves`' values in boxes [16, 128], its factors in boxes [2 PANELS, 16].

    w: codes [n, k / 2] int8 (SILU: [2n, ·] = gate | up) in boxes [64, BYTES]; s: scales [G, n or 2n] in boxes [SCALES, 64].
    KIND: None for integers; of e2m1 codes what four scales a word of s are, "e8m0" or "e4m3". factor [n or 2n] float32 or
    None, DIVIDES: it does. size: columns of a row of s; GROUP: of those in a step; TOKENS: a power of two, at least m, at most
    4; CHUNKS: a power of two, at least 4 · TOKENS, and as many as a split has of 128 columns. A step is PANELS * 256 columns.
    out [m, n], bias [n or 2n] or None; partial, arrivals, chunk and grid: as `hopper_gemm_kernel`'s. 4 warps, and one that
    copies, with COPYING registers.
    """
    tile_number = gl.program_id(0)
    split = gl.program_id(1)
    WIDE: gl.constexpr = 64 if SILU else TILES * 64
    first_channel = tile_number * WIDE
    tile_stride = n if SILU else 64
    APART: gl.constexpr = factors is not None
    STEP: gl.constexpr = PANELS * BYTES * 2
    SCALES: gl.constexpr = STEP // GROUP
    begin = split * chunk
    steps = (gl.minimum(chunk, k - begin) + STEP - 1) // STEP

    SPANNED: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES * TILES * PANELS, 64, BYTES], SPANNED)
    s_ring = gl.allocate_shared_memory(s.dtype, [STAGES * TILES, SCALES, 64],
                                       gl.NVMMASharedLayout(0, s.dtype.primitive_bitwidth, 2))  # fmt: skip
    if APART:
        x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * PANELS, 2 * ROWS, SPAN], SPANNED)
        f_ring = gl.allocate_shared_memory(gl.float32, [STAGES, PANELS * 2, 2 * ROWS], gl.NVMMASharedLayout(0, 32, 2))
        x_tiles = reinterpreted(x_ring, [STAGES * PANELS * 2, ROWS, SPAN])
        powers = reinterpreted(f_ring, [STAGES * PANELS * 4, 1, ROWS])
        sums = powers
    else:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        x_tiles = gl.allocate_shared_memory(gl.float8e4nv, [CHUNKS, ROWS, SPAN], SPANNED)
        powers = gl.allocate_shared_memory(gl.float32, [CHUNKS, 1, ROWS], PLAIN)
        sums = gl.allocate_shared_memory(gl.float32, [CHUNKS, 1, ROWS], PLAIN)
        x_ring = x_tiles
        f_ring = powers
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    align()
    x_bytes: gl.constexpr = PANELS * 2 * ROWS * (SPAN + 8) if APART else 0
    step_bytes: gl.constexpr = TILES * 64 * (PANELS * BYTES + SCALES * s.dtype.primitive_bitwidth // 8) + x_bytes
    gl.warp_specialize(
        [
            (_consume, (x, out, partial, arrivals, factor, bias, w_ring, s_ring, x_tiles, powers, sums, ready, free, begin,
                        steps, m, n, k, stride, first_channel, tile_stride, tile_number, split, KIND, DIVIDES, GROUP, TILES,
                        SILU, SPLITS, TOKENS, CHUNKS, PANELS, STAGES, APART, PDL)),
            (_produce, (x, factors, w, s, w_ring, s_ring, x_ring, f_ring, ready, free, begin, steps, size, first_channel,
                        tile_stride, TILES, PANELS, STAGES, step_bytes, APART, PDL)),
        ],
        [1],
        [COPYING],
    )  # fmt: skip
