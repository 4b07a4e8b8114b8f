"""Integer codes in Triton: from words of 16 bits to 16-bit floats, two at a time.

A code, masked out of its word and put under the exponent of 128 (bfloat16), 1024 (float16) or 2^23 (float32), is a float larger
than the code by just that number; taking away that and the zero point in one step is exact. The GPU's own conversions from
integers run at a quarter of the rate of such arithmetic, or less.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# $1 holds the words of two neighbouring columns, $2 their two (negative) offsets. lop3 0xea is (a & b) | c.
_NIBBLE = """{{
.reg .b32 code, one;
mov.b32 one, {one}; shr.b32 code, $1, {shift};
lop3.b32 code, code, 0x000f000f, {exponent}, 0xea; fma.rn.{type} $0, code, one, $2;
}}"""
_BYTE_FLOAT16 = """{{
.reg .b32 code, one;
mov.b32 one, 0x3c003c00;
prmt.b32 code, $1, 0x64646464, {bytes}; fma.rn.f16x2 $0, code, one, $2;
}}"""
_BYTE_BFLOAT16 = """{{
.reg .b32 low, high;
prmt.b32 low, $1, 0x4b000000, {low}; prmt.b32 high, $1, 0x4b000000, {high};
add.f32 low, low, $2; add.f32 high, high, $3; cvt.rn.bf16x2.f32 $0, high, low;
}}"""


_SHIFTS = (0, 4, 8, 12)
NIBBLES_BFLOAT16 = tl.constexpr(tuple(
    _NIBBLE.format(one="0x3f803f80", shift=shift, exponent="0x43004300", type="bf16x2") for shift in _SHIFTS))  # fmt: skip
NIBBLES_FLOAT16 = tl.constexpr(tuple(
    _NIBBLE.format(one="0x3c003c00", shift=shift, exponent="0x64006400", type="f16x2") for shift in _SHIFTS))  # fmt: skip
BYTES_FLOAT16 = tl.constexpr(tuple(_BYTE_FLOAT16.format(bytes=which) for which in ("0x4240", "0x4341")))
BYTES_BFLOAT16 = tl.constexpr(tuple(
    _BYTE_BFLOAT16.format(low=low, high=high) for low, high in (("0x7440", "0x7442"), ("0x7441", "0x7443"))))  # fmt: skip


@triton.jit
def offset(zero, BITS: tl.constexpr, target: tl.constexpr):
    """What `plane` adds to a code of the zero point `zero` (int32): minus the zero point and minus the exponent's number."""
    if INTERPRETED:
        return 0.0 - zero.to(tl.float32)
    elif target == tl.float16:
        return (-1024.0 - zero.to(tl.float32)).to(tl.float16)
    elif BITS == 4:
        return (-128.0 - zero.to(tl.float32)).to(tl.bfloat16)
    else:
        return -8388608.0 - zero.to(tl.float32)


@triton.jit
def plane(words, less, INDEX: tl.constexpr, BITS: tl.constexpr, target: tl.constexpr):
    """Codes INDEX of a tile of words, their zero points taken away, in the type `target`. less: from `offset`, [rows, 1]."""
    if INTERPRETED:
        code = (words.to(tl.int32) >> BITS * INDEX) & ((1 << BITS) - 1)
        return (code.to(tl.float32) + less).to(target)
    elif BITS == 8 and target == tl.bfloat16:
        wide: tl.constexpr = BYTES_BFLOAT16[INDEX]
        return tl.inline_asm_elementwise(wide, "=r,r,r,r", [words, less], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif BITS == 8:
        half: tl.constexpr = BYTES_FLOAT16[INDEX]
        return tl.inline_asm_elementwise(half, "=r,r,r", [words, less], dtype=tl.float16, is_pure=True, pack=2)
    elif target == tl.float16:
        nibble: tl.constexpr = NIBBLES_FLOAT16[INDEX]
        return tl.inline_asm_elementwise(nibble, "=r,r,r", [words, less], dtype=tl.float16, is_pure=True, pack=2)
    else:
        lower: tl.constexpr = NIBBLES_BFLOAT16[INDEX]
        return tl.inline_asm_elementwise(lower, "=r,r,r", [words, less], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def zero_points(zero, group, stride, channel, inside, BITS: tl.constexpr):
    """Zero points of a group's channels, int32. zero: packed as `int_weights` says, or None for the middle."""
    if zero is None:
        return tl.full(channel.shape, 1 << BITS - 1, tl.int32)
    elif BITS == 8:
        return tl.load(zero + group.to(tl.int64) * stride + channel, mask=inside, other=0).to(tl.int32)
    else:
        pair = tl.load(zero + group.to(tl.int64) * stride + channel // 2, mask=inside, other=0).to(tl.int32)
        return (pair >> (channel % 2) * 4) & 15
