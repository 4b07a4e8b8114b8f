"""Weights in groups, few rows, for Hopper, in Gluon: the products of `gemm_int.py` and of `gemm_codes.py`.

One warp keeps a ring in shared memory filled by TMA: words of codes, the scales of their groups, and rows of x. One warpgroup
takes words into registers, turns a plane of their codes after the other into 16-bit floats (`hopper_codes.py`), and multiplies;
a group's float32 sum meets its scale. Integers are widened and e2m1 codes placed by arithmetic, exactly, other codes looked up
in a table, rounded to x's type. That takes 1.4 or 1.5 of the loop's 2.3 instructions a weight (2.1 of 3.4 for e2m1, in groups
of 32). A warpgroup stops while a group's products end, so several programs share a multiprocessor: three or four, or two beside
tables of 32 KiB.

Where a group has more sums than weights, weights meet their scales first, and one sum runs over all of K. Integers do in
programs of 128 rows, rounded to x's type again, as they are where weights are widened for the library: half an instruction a
weight for a group's 64 additions a thread, a wait a step instead of a group, and half the registers of sums. e2m1 codes do in
programs of 16 rows with e8m0 scales, and always with e4m3 ones, whose groups have 16 columns, exactly.

A warpgroup computes one or two tiles of 64 output channels, neighbours or a gate and its up, for BLOCK_M rows over a part of
K; parts are added by the last program, as in `gemm_hopper.py`. With many rows, whose x outweighs the codes, two warpgroups
share it, and the table; of a gate and its up each can have one, and the second hands its sums to the first.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined,assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from workstation.kernels.code_decode import REST
from workstation.kernels.gemm_hopper import conclude
from workstation.kernels.hopper import align, allow_next, await_previous, fetch, reinterpreted
from workstation.kernels.hopper_codes import fill_table, middle, offset, plane, scaled_plane, times, with_factor, zero_points

WORDS = gl.constexpr(64)  # of a row, a copy: 128 bytes, the span of the shared memory's swizzle
UNIT = gl.constexpr(32)  # `int_weights.UNIT`, columns of a plane
COLUMNS = gl.constexpr(64)  # of x, a copy: 128 bytes too
RESERVE = gl.constexpr(".shared .align 128 .b8 code_pairs[32768]; mov.u32 $0, code_pairs;")
COPYING = gl.constexpr(40)  # registers of a thread that copies


@gluon.jit
def _run(
    first, second, w_ring, panels, x_ring, boxes, less, up_less, scale, up_scale, START: gl.constexpr, SPAN: gl.constexpr,
    BITS: gl.constexpr, TABLE: gl.constexpr, TILES: gl.constexpr, PANELS: gl.constexpr, BLOCK_M: gl.constexpr,
    SCALED: gl.constexpr, ACC: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """Sums over a step's columns [START, START + SPAN), of one tile or two: still in flight, with their operands. They are a
    group's own, or with weights SCALED added to first and second."""
    PER: gl.constexpr = 16 // BITS
    CHUNK: gl.constexpr = UNIT * PER
    held = ()
    if SCALED is None:
        first = gl.zeros([64, BLOCK_M], gl.float32, ACC)
        second = first
    for chunk in gl.static_range(START // CHUNK, (START + SPAN + CHUNK - 1) // CHUNK):
        panel = panels + chunk // (WORDS // UNIT)
        words = w_ring.index(panel).slice(chunk % (WORDS // UNIT) * UNIT, UNIT, dim=1).load(A)
        if TILES == 2:
            up_words = w_ring.index(panel + PANELS).slice(chunk % (WORDS // UNIT) * UNIT, UNIT, dim=1).load(A)
        for index in gl.static_range(START % CHUNK // UNIT, START % CHUNK // UNIT + (SPAN if SPAN < CHUNK else CHUNK) // UNIT):
            box = x_ring.index(boxes + (chunk * PER + index) // 2)
            rhs = box.slice((chunk * PER + index) % 2 * UNIT, UNIT, dim=1).permute((1, 0))
            lhs = _operand(words, less, scale, index, BITS, TABLE, SCALED, A, x_ring.dtype)
            first = warpgroup_mma(lhs, rhs, first, use_acc=SCALED is not None or chunk * CHUNK + index * UNIT > START,
                                  is_async=True)  # fmt: skip
            held = held + (lhs,)  # noqa: RUF005
            if TILES == 2:
                lhs = _operand(up_words, up_less, up_scale, index, BITS, TABLE, SCALED, A, x_ring.dtype)
                second = warpgroup_mma(lhs, rhs, second, use_acc=SCALED is not None or chunk * CHUNK + index * UNIT > START,
                                       is_async=True)  # fmt: skip
                held = held + (lhs,)  # noqa: RUF005
    return first, second, held


@gluon.jit
def _operand(
    words, less, scale, INDEX: gl.constexpr, BITS: gl.constexpr, TABLE: gl.constexpr, SCALED: gl.constexpr, A: gl.constexpr,
    target: gl.constexpr,
):  # fmt: skip
    """Plane INDEX of a chunk's words, with its scales if it is SCALED."""
    if SCALED is None:
        return plane(words, less, INDEX, BITS, TABLE, target)
    elif SCALED == "number":
        return times(plane(words, less, INDEX, BITS, TABLE, target), scale)
    else:
        return scaled_plane(words, scale, INDEX, SCALED, A, target)


@gluon.jit
def _factors(s_ring, slot, RUN: gl.constexpr, SCALED: gl.constexpr, ACC: gl.constexpr, A: gl.constexpr, target: gl.constexpr):
    """What weights of a step's run RUN meet: `_factor`, or the words of a chunk's bytes."""
    if SCALED == "number":
        return _factor(s_ring, slot, RUN, target, ACC, A)
    else:
        found = ()
        WORDS_OF: gl.constexpr = 2 if SCALED == "e4m3" else 1
        for word in gl.static_range(WORDS_OF):
            bytes_of = gl.sum(s_ring.index(slot + RUN * WORDS_OF + word).permute((1, 0)).load(ACC), 1)
            found = found + (gl.convert_layout(bytes_of, gl.SliceLayout(1, A)),)  # noqa: RUF005
        return found


@gluon.jit
def _factor(s_ring, slot, RUN: gl.constexpr, dtype: gl.constexpr, ACC: gl.constexpr, A: gl.constexpr):
    """`_scale` as `times` takes it, [64]."""
    scale = gl.sum(_scale(s_ring, slot, RUN, ACC), 1)  # of one number each
    return gl.convert_layout(scale, gl.SliceLayout(1, A)).to(dtype)


@gluon.jit
def _scale(s_ring, slot, RUN: gl.constexpr, ACC: gl.constexpr):
    """Scales of a step's group RUN, for 64 channels, [64, 1] float32. slot: where a step's begin. Words are four e8m0 bytes."""
    if s_ring.dtype == gl.int32:
        word = s_ring.index(slot + RUN // 4).permute((1, 0)).load(ACC)
        bits = word >> 1 if RUN % 4 == 3 else word << (23 - 8 * (RUN % 4))
        return (bits & 0x7F800000).to(gl.float32, bitcast=True)
    else:
        return s_ring.index(slot + RUN).permute((1, 0)).load(ACC).to(gl.float32)


@gluon.jit
def _scales(s_ring, slot, RUN: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr, ACC: gl.constexpr):
    """`_scale` of groups RUN, + GROUPS of a step, of one tile or two in turn."""
    found = ()
    for group in gl.static_range(GROUPS):
        found = found + (_scale(s_ring, slot, RUN + group, ACC),)  # noqa: RUF005
        if TILES == 2:
            found = found + (_scale(s_ring, slot + ROWS, RUN + group, ACC),)  # noqa: RUF005
    return found


@gluon.jit
def _settle(first, second, parts, held, scales, GROUPS: gl.constexpr, TILES: gl.constexpr):
    """Wait for some groups' sums and add them, scaled. held: what the products in flight still read."""
    done = warpgroup_mma_wait(0, deps=parts + held)
    for group in gl.static_range(GROUPS):
        first += done[group * TILES] * scales[group * TILES]
        if TILES == 2:
            second += done[group * TILES + 1] * scales[group * TILES + 1]
    return first, second


@gluon.jit
def _landed(first, second, held, TILES: gl.constexpr):
    """Wait for the sums of scaled weights."""
    if TILES == 2:
        done = warpgroup_mma_wait(0, deps=(first, second) + held)  # noqa: RUF005
        return done[0], done[1]
    else:
        return warpgroup_mma_wait(0, deps=(first,) + held)[0], second  # noqa: RUF005


@gluon.jit
def _consume(
    out, partial, arrivals, zero, factor, bias, table, w_ring, s_ring, x_ring, up_sums, ready, free, filled, summed, begin,
    steps, m, n, k, size, zero_stride, first_channel, tile_stride, first_row, tile_number, split,
    BITS: gl.constexpr, TABLE: gl.constexpr, SPAN: gl.constexpr, GROUPS: gl.constexpr, TEAM: gl.constexpr,
    TEAMS: gl.constexpr, TILES: gl.constexpr, SILU: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr,
    PANELS: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr, DIVIDES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warpgroup's products of the ring's steps, group by group or with weights SCALED, and what becomes of them."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    STEP: gl.constexpr = PANELS * WORDS * 16 // BITS
    RUNS: gl.constexpr = STEP // SPAN
    LOOKS: gl.constexpr = TABLE is not None and TABLE != "e2m1"
    channels = n * 2 if SILU else n
    channel = first_channel + gl.arange(0, 64, layout=gl.SliceLayout(1, A))
    ROWS: gl.constexpr = s_ring.shape[1]
    scales = reinterpreted(s_ring, [STAGES * TEAMS * TILES * ROWS, 1, 64])
    first = gl.zeros([64, BLOCK_M], gl.float32, ACC)
    second = gl.zeros([64, BLOCK_M], gl.float32, ACC)
    less = fill_table(table, filled, TABLE, TEAM, TEAMS, A) if LOOKS else middle(BITS, x_ring.dtype, A)
    up_less = less
    if zero is not None:
        points = zero_points(zero, begin // size, zero_stride, channel, channels, BITS)
        up_points = points
        if TILES == 2:
            up_points = zero_points(zero, begin // size, zero_stride, channel + tile_stride, channels, BITS)
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        tile = (stage * TEAMS + TEAM) * TILES
        for run in gl.static_range(0, RUNS, GROUPS):
            if zero is not None:
                less = offset(points, BITS, x_ring.dtype)
                up_less = offset(up_points, BITS, x_ring.dtype)
                # The next group's are asked for while this one is multiplied.
                ahead = gl.minimum(begin + i * STEP + (run + 1) * SPAN, k - 1) // size
                points = zero_points(zero, ahead, zero_stride, channel, channels, BITS)
                if TILES == 2:
                    up_points = zero_points(zero, ahead, zero_stride, channel + tile_stride, channels, BITS)
            parts = ()
            held = ()
            scale, up_scale = less, up_less  # where none are needed
            for group in gl.static_range(GROUPS):
                if SCALED is not None:
                    scale = _factors(scales, tile * ROWS, run + group, SCALED, ACC, A, x_ring.dtype)
                    up_scale = _factors(scales, (tile + TILES - 1) * ROWS, run + group, SCALED, ACC, A, x_ring.dtype)
                part, up_part, read = _run(first, second, w_ring, tile * PANELS, x_ring, stage * (STEP // COLUMNS), less,
                                           up_less, scale, up_scale, (run + group) * SPAN, SPAN, BITS, TABLE, TILES, PANELS,
                                           BLOCK_M, SCALED, ACC, A)  # fmt: skip
                held = held + read
                if SCALED is not None:
                    first, second = part, up_part
                elif TILES == 2:
                    parts = parts + (part, up_part)  # noqa: RUF005
                else:
                    parts = parts + (part,)  # noqa: RUF005
            if SCALED is not None:
                first, second = _landed(first, second, held, TILES)
            else:
                scale = _scales(scales, tile * ROWS, run, GROUPS, ROWS, TILES, ACC)
                first, second = _settle(first, second, parts, held, scale, GROUPS, TILES)
        fence_async_shared()  # scales are all read: a barrier waits for no load under way, and the next copy may overtake one
        mbarrier.arrive(free.index(stage), count=1)
    if SCALED is not None and SCALED != "number":
        row = first_channel + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
        first = with_factor(first * REST, factor, row, channels, DIVIDES)
        if TILES == 2:
            second = with_factor(second * REST, factor, row + tile_stride, channels, DIVIDES)
    if SILU and TILES == 1 and TEAM == 1:
        up_sums.store(first)
        align()
        mbarrier.arrive(summed, count=1)
    elif SILU and TILES == 1:
        mbarrier.wait(summed, 0)
        second = up_sums.load(ACC)
        conclude(first, second, out, partial, arrivals, None, None, bias, None, m, n, first_channel, tile_stride, first_row,
                 tile_number, split, 2, SILU, SPLITS, BLOCK_M, PDL, ACC)  # fmt: skip
    else:
        conclude(first, second, out, partial, arrivals, None, None, bias, None, m, n, first_channel, tile_stride, first_row,
                 tile_number, split, TILES, SILU, SPLITS, BLOCK_M, PDL, ACC)  # fmt: skip


@gluon.jit
def _fetch_constants(
    w, s, bar, w_ring, s_ring, stage, at, first_channel, team_stride, tile_stride, size,
    BITS: gl.constexpr, SPAN: gl.constexpr, TEAMS: gl.constexpr, TILES: gl.constexpr, PANELS: gl.constexpr,
):  # fmt: skip
    """A step's codes and scales."""
    for tile in gl.static_range(TEAMS * TILES):
        channel = first_channel + tile // TILES * team_stride + tile % TILES * tile_stride
        slot = stage * TEAMS * TILES + tile
        for panel in gl.static_range(PANELS):
            fetch(w, [channel, at // (16 // BITS) + panel * WORDS], bar, w_ring.index(slot * PANELS + panel))
        fetch(s, [at // size, channel], bar, s_ring.index(slot))


@gluon.jit
def _fetch_rows(x, bar, ring, stage, at, first_row, BOXES: gl.constexpr):
    for box in gl.static_range(BOXES):
        fetch(x, [first_row, at + box * COLUMNS], bar, ring.index(stage * BOXES + box))


@gluon.jit
def _produce(
    x, w, s, w_ring, s_ring, x_ring, ready, free, begin, steps, size, first_channel, team_stride, tile_stride,
    first_row,
    BITS: gl.constexpr, SPAN: gl.constexpr, TEAMS: gl.constexpr, TILES: gl.constexpr, PANELS: gl.constexpr,
    STAGES: gl.constexpr, BYTES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Steps along K into the ring; the first codes and scales before the kernel in front has ended."""
    STEP: gl.constexpr = PANELS * WORDS * 16 // BITS
    early = gl.minimum(steps, STAGES)
    for i in range(early):
        mbarrier.expect(ready.index(i), BYTES)
        _fetch_constants(w, s, ready.index(i), w_ring, s_ring, i, begin + i * STEP, first_channel, team_stride, tile_stride,
                         size, BITS, SPAN, TEAMS, TILES, PANELS)  # fmt: skip
    if PDL:
        await_previous()
        allow_next()
    for i in range(early):
        _fetch_rows(x, ready.index(i), x_ring, i, begin + i * STEP, first_row, STEP // COLUMNS)
    for i in range(early, steps):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), (i // STAGES - 1) & 1)
        mbarrier.expect(ready.index(stage), BYTES)
        _fetch_constants(w, s, ready.index(stage), w_ring, s_ring, stage, begin + i * STEP, first_channel, team_stride,
                         tile_stride, size, BITS, SPAN, TEAMS, TILES, PANELS)  # fmt: skip
        _fetch_rows(x, ready.index(stage), x_ring, stage, begin + i * STEP, first_row, STEP // COLUMNS)


@gluon.jit(do_not_specialize=["m"])
def hopper_grouped_kernel(
    x, w, s, out, partial, arrivals, zero, factor, bias, m, n, k, chunk, size, zero_stride,
    BITS: gl.constexpr, TABLE: gl.constexpr, SPAN: gl.constexpr, GROUPS: gl.constexpr, TEAMS: gl.constexpr,
    TILES: gl.constexpr, SILU: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, PANELS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, SCALED: gl.constexpr, DIVIDES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x: descriptor [m, k] in boxes [BLOCK_M, COLUMNS]; w: of words [n, ·] int16 (SILU: [2n, ·] = gate | up) in boxes
    [64, WORDS]; s: of scales [G, n or 2n] in boxes [STEP // SPAN, 64], or of words of four e8m0 ones;
    zero: uint8, packed as `int_weights` says, rows zero_stride apart, or None.

    size: columns of a row of s; SPAN: a group's in a step, which holds whole groups or lies in one; GROUPS: those multiplied
    at a time, a divisor of those of a step, 1 beside zero points. A step, STEP columns, is PANELS * WORDS words. TABLE: None
    for integers, "e2m1", or 4-bit codes' `code_decode.filler`. SCALED: what scales are that weights meet before their
    products, "number" (integers', of x's type), "e8m0" or "e4m3"; None: sums meet them. factor [n or 2n] float32 or None, for
    e4m3 scales only, DIVIDES: it does. out [m, n], bias [n or 2n] or None; partial, arrivals, chunk and grid: as
    `hopper_gemm_kernel`'s. 4 warps for each of TEAMS (1 or 2) warpgroups with TILES tiles of their own, the second with
    REGISTERS a thread, and one warp that copies. With SILU two warpgroups of one tile have gate and up.
    """
    row_tiles = (m + BLOCK_M - 1) // BLOCK_M
    tile_number = gl.program_id(0)
    split = gl.program_id(1)
    PAIRED: gl.constexpr = SILU and TILES == 1
    WIDE: gl.constexpr = 64 if PAIRED else TEAMS * 64 if SILU else TEAMS * TILES * 64
    first_channel = tile_number // row_tiles * WIDE
    first_row = tile_number % row_tiles * BLOCK_M
    tile_stride = n if SILU else 64
    team_stride = n if PAIRED else WIDE // TEAMS
    STEP: gl.constexpr = PANELS * WORDS * 16 // BITS
    RUNS: gl.constexpr = STEP // SPAN
    begin = split * chunk
    steps = (gl.minimum(chunk, k - begin) + STEP - 1) // STEP

    SPANNED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES * TEAMS * TILES * PANELS, 64, WORDS], SPANNED)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * (STEP // COLUMNS), BLOCK_M, COLUMNS], SPANNED)
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, s.dtype.primitive_bitwidth, 2)
    FOURS: gl.constexpr = RUNS // 4 if SCALED is None else RUNS * 2 if SCALED == "e4m3" else RUNS
    ROWS: gl.constexpr = FOURS if s.dtype == gl.int32 else RUNS
    s_ring = gl.allocate_shared_memory(s.dtype, [STAGES * TEAMS * TILES, ROWS, 64], PLAIN)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=TEAMS)
    up_sums, filled, summed = x_ring, ready, ready  # where there is no need of them
    LOOKS: gl.constexpr = TABLE is not None and TABLE != "e2m1"
    if TEAMS == 2 and LOOKS:
        filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(filled, count=1)
    if PAIRED:
        SUMS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        up_sums = gl.allocate_shared_memory(gl.float32, [64, BLOCK_M], SUMS)
        summed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(summed, count=1)
    align()
    table = gl.inline_asm_elementwise(RESERVE, "=r", [], dtype=gl.int32, is_pure=False, pack=1) if LOOKS else 0
    scale_bytes: gl.constexpr = ROWS * s.dtype.primitive_bitwidth // 8
    step_bytes: gl.constexpr = TEAMS * TILES * 64 * (PANELS * WORDS * 2 + scale_bytes) + STEP * BLOCK_M * 2
    if TEAMS == 1:
        gl.warp_specialize(
            [
                (_consume, (out, partial, arrivals, zero, factor, bias, table, w_ring, s_ring, x_ring, up_sums, ready, free,
                            filled, summed, begin, steps, m, n, k, size, zero_stride, first_channel, tile_stride, first_row,
                            tile_number, split, BITS, TABLE, SPAN, GROUPS, 0, TEAMS, TILES, SILU, SPLITS, BLOCK_M, PANELS,
                            STAGES, SCALED, DIVIDES, PDL)),
                (_produce, (x, w, s, w_ring, s_ring, x_ring, ready, free, begin, steps, size, first_channel, team_stride,
                            tile_stride, first_row, BITS, SPAN, TEAMS, TILES, PANELS, STAGES, step_bytes, PDL)),
            ],
            [1],
            [COPYING],
        )  # fmt: skip
    else:
        first_number = tile_number if PAIRED else tile_number * 2
        gl.warp_specialize(
            [
                (_consume, (out, partial, arrivals, zero, factor, bias, table, w_ring, s_ring, x_ring, up_sums, ready, free,
                            filled, summed, begin, steps, m, n, k, size, zero_stride, first_channel, tile_stride, first_row,
                            first_number, split, BITS, TABLE, SPAN, GROUPS, 0, TEAMS, TILES, SILU, SPLITS, BLOCK_M, PANELS,
                            STAGES, SCALED, DIVIDES, PDL)),
                (_consume, (out, partial, arrivals, zero, factor, bias, table, w_ring, s_ring, x_ring, up_sums, ready, free,
                            filled, summed, begin, steps, m, n, k, size, zero_stride, first_channel + team_stride, tile_stride,
                            first_row, first_number + 1, split, BITS, TABLE, SPAN, GROUPS, 1, TEAMS, TILES, SILU, SPLITS,
                            BLOCK_M, PANELS, STAGES, SCALED, DIVIDES, PDL)),
                (_produce, (x, w, s, w_ring, s_ring, x_ring, ready, free, begin, steps, size, first_channel, team_stride,
                            tile_stride, first_row, BITS, SPAN, TEAMS, TILES, PANELS, STAGES, step_bytes, PDL)),
            ],
            [4, 1],
            [REGISTERS, COPYING],
        )  # fmt: skip
