"""Codes of 4 and 8 bits as 16-bit floats in registers, in Gluon: what `gemm_grouped_hopper.py` multiplies.

A tile of words [64, 32] lies in registers as a wgmma wants its left operand; each of its planes of codes (`int_weights.UNIT`)
becomes one of floats, by arithmetic (`int_codes.py`), or through a table in shared memory (`code_decode.py`).
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from workstation.kernels.code_decode import (
    E2M1_BFLOAT16,
    E2M1_FLOAT16,
    E4M3_BFLOAT16,
    E4M3_FLOAT16,
    E8M0_BFLOAT16,
    LOOKUPS,
    PLACED_BFLOAT16,
    PLACED_FLOAT16,
)
from workstation.kernels.hopper import align
from workstation.kernels.int_codes import BYTES_BFLOAT16, BYTES_FLOAT16, NIBBLES_BFLOAT16, NIBBLES_FLOAT16

UNIT = gl.constexpr(32)  # `int_weights.UNIT`
TIMES_BFLOAT16 = gl.constexpr("mul.rn.bf16x2 $0, $1, $2;")
TIMES_FLOAT16 = gl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@gluon.jit
def plane(words, less, INDEX: gl.constexpr, BITS: gl.constexpr, TABLE: gl.constexpr, target: gl.constexpr):
    """As `int_codes.plane`: codes INDEX of words [64, 32], `less` added, as `target`. With a table: looked up at `less`."""
    if TABLE == "e2m1" and target == gl.bfloat16:
        placed: gl.constexpr = E2M1_BFLOAT16[INDEX]
        return gl.inline_asm_elementwise(placed, "=r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2)
    elif TABLE == "e2m1":
        put: gl.constexpr = E2M1_FLOAT16[INDEX]
        return gl.inline_asm_elementwise(put, "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)
    elif TABLE is not None:
        lookup: gl.constexpr = LOOKUPS[INDEX]
        if target == gl.bfloat16:
            return gl.inline_asm_elementwise(lookup, "=r,r,r,r", [words, less], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            return gl.inline_asm_elementwise(lookup, "=r,r,r,r", [words, less], dtype=gl.float16, is_pure=True, pack=2)
    elif BITS == 8 and target == gl.bfloat16:
        wide: gl.constexpr = BYTES_BFLOAT16[INDEX]
        return gl.inline_asm_elementwise(wide, "=r,r,r,r", [words, less], dtype=gl.bfloat16, is_pure=True, pack=2)
    elif BITS == 8:
        half: gl.constexpr = BYTES_FLOAT16[INDEX]
        return gl.inline_asm_elementwise(half, "=r,r,r", [words, less], dtype=gl.float16, is_pure=True, pack=2)
    elif target == gl.float16:
        nibble: gl.constexpr = NIBBLES_FLOAT16[INDEX]
        return gl.inline_asm_elementwise(nibble, "=r,r,r", [words, less], dtype=gl.float16, is_pure=True, pack=2)
    else:
        lower: gl.constexpr = NIBBLES_BFLOAT16[INDEX]
        return gl.inline_asm_elementwise(lower, "=r,r,r", [words, less], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def scaled_plane(words, scales, INDEX: gl.constexpr, KIND: gl.constexpr, A: gl.constexpr, target: gl.constexpr):
    """e2m1 codes INDEX of words [64, 32] times their groups' scales, exactly, but for REST. scales: a channel's bytes of the
    chunk, of KIND, one word [64] of e8m0 ones (for bfloat16), or two of e4m3 ones, whose groups have 16 columns."""
    if target == gl.bfloat16:
        put: gl.constexpr = PLACED_BFLOAT16[INDEX]
        values = gl.inline_asm_elementwise(put, "=r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        place: gl.constexpr = PLACED_FLOAT16[INDEX]
        values = gl.inline_asm_elementwise(place, "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)
    if KIND == "e8m0":
        factor = _byte_factor(scales[0], INDEX, KIND, target)
    else:
        later = gl.arange(0, UNIT, layout=gl.SliceLayout(0, A)) >= 16
        low = _byte_factor(scales[INDEX // 2], INDEX % 2 * 2, KIND, target)
        high = _byte_factor(scales[INDEX // 2], INDEX % 2 * 2 + 1, KIND, target)
        factor = gl.where(later[None, :].broadcast_to([64, UNIT]), high, low)
    return _times(values, factor)


@gluon.jit
def _byte_factor(word, BYTE: gl.constexpr, KIND: gl.constexpr, target: gl.constexpr):
    """A byte of a word a channel [64] as a plane's factors [64, 32]; the compiler sees that a channel's are one."""
    word = word[:, None].broadcast_to([64, UNIT])
    if KIND == "e8m0":
        power: gl.constexpr = E8M0_BFLOAT16[BYTE]
        return gl.inline_asm_elementwise(power, "=r,r,r", [word], dtype=gl.bfloat16, is_pure=True, pack=2)
    elif target == gl.bfloat16:
        small: gl.constexpr = E4M3_BFLOAT16[BYTE]
        return gl.inline_asm_elementwise(small, "=r,r,r", [word], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        half: gl.constexpr = E4M3_FLOAT16[BYTE]
        return gl.inline_asm_elementwise(half, "=r,r,r", [word], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def with_factor(sums, factor, channel, channels, DIVIDES: gl.constexpr):
    """Sums [64, M] times (or by) the factors of channels [64], if there are any."""
    if factor is not None:
        by = gl.load(factor + gl.minimum(channel, channels - 1))[:, None]
        sums = sums / by if DIVIDES else sums * by
    return sums


@gluon.jit
def zero_points(zero, group, stride, channel, channels, BITS: gl.constexpr):
    """int32, as `int_codes.zero_points`; channels behind the last count as the last."""
    channel = gl.minimum(channel, channels - 1)
    if BITS == 8:
        return gl.load(zero + group.to(gl.int64) * stride + channel).to(gl.int32)
    else:
        pair = gl.load(zero + group.to(gl.int64) * stride + channel // 2).to(gl.int32)
        return (pair >> (channel % 2) * 4) & 15


@gluon.jit
def offset(points, BITS: gl.constexpr, target: gl.constexpr):
    """As `int_codes.offset`: minus the zero point and the number that a code's float has on top, [64, 32]."""
    if target == gl.float16:
        less = (-1024.0 - points.to(gl.float32)).to(gl.float16)
    elif BITS == 4:
        less = (-128.0 - points.to(gl.float32)).to(gl.bfloat16)
    else:
        less = -8388608.0 - points.to(gl.float32)
    return less[:, None].broadcast_to([64, UNIT])


@gluon.jit
def middle(BITS: gl.constexpr, target: gl.constexpr, A: gl.constexpr):
    """`offset` of the middle, for weights without zero points."""
    if target == gl.float16:
        less = gl.full([64, UNIT], -1024.0 - (1 << BITS - 1), gl.float16, A)
    elif BITS == 4:
        less = gl.full([64, UNIT], -136.0, gl.bfloat16, A)
    else:
        less = gl.full([64, UNIT], -8388736.0, gl.float32, A)
    return less


@gluon.jit
def fill_table(table, filled, TABLE: gl.constexpr, TEAM: gl.constexpr, TEAMS: gl.constexpr, A: gl.constexpr):
    """The first warpgroup fills the table, the second awaits that. Where a thread's bank of it lies, [64, 32]."""
    if TEAM == 0:
        THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        thread = gl.arange(0, 128, layout=THREADS)
        place = gl.full([128], table, gl.int32, THREADS)
        gl.inline_asm_elementwise(TABLE, "=r,r,r", [thread, place], dtype=gl.int32, is_pure=False, pack=1)
        align()
        if TEAMS == 2:
            mbarrier.arrive(filled, count=1)
    else:
        mbarrier.wait(filled, 0)
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    return gl.full([64, UNIT], table + lane * 4, gl.int32, A)


@gluon.jit
def times(values, scale):
    """values [64, 32] times a scale a channel [64], both of one 16-bit type, rounded to it."""
    return _times(values, scale[:, None].broadcast_to([64, UNIT]))


@gluon.jit
def _times(values, scale):
    if values.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(TIMES_BFLOAT16, "=r,r,r", [values, scale], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(TIMES_FLOAT16, "=r,r,r", [values, scale], dtype=gl.float16, is_pure=True, pack=2)
