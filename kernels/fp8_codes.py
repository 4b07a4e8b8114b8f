"""e4m3fn codes in Triton: widened in registers, and rounded to, also on GPUs that have no such type.

A code has a sign, four bits of exponent (bias 7) and three of mantissa (arXiv:2209.05433). There is no infinity, the largest
number is 448, and 0x7F (or 0xFF) is not a number.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Four codes in a register become two pairs of 16-bit floats: a code into the upper byte of each half word, its exponent and
# mantissa shifted to where the wider type keeps them, then times a power of two (an fma with -0 keeps the sign of zero).
_UNPACK = """{{
.reg .b32 pair, sign, factor, zero;
mov.b32 factor, {factor}; mov.b32 zero, 0x80008000;
prmt.b32 pair, 0, $2, 0x5040; and.b32 sign, pair, 0x80008000; shr.b32 pair, pair, {shift}; and.b32 pair, pair, {mask};
or.b32 pair, pair, sign; fma.rn.{type} $0, pair, factor, zero;
prmt.b32 pair, 0, $2, 0x7060; and.b32 sign, pair, 0x80008000; shr.b32 pair, pair, {shift}; and.b32 pair, pair, {mask};
or.b32 pair, pair, sign; fma.rn.{type} $1, pair, factor, zero;
}}"""
_UNPACK_BFLOAT16 = tl.constexpr(_UNPACK.format(factor="0x7b807b80", shift=4, mask="0x07f007f0", type="bf16x2"))
_UNPACK_FLOAT16 = tl.constexpr(_UNPACK.format(factor="0x5c005c00", shift=1, mask="0x3f803f80", type="f16x2"))

_SPLIT = tl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")  # even bytes, odd bytes


@triton.jit
def widen(tile, target: tl.constexpr):
    """A tile in the type `target`. Bytes are e4m3fn codes, for devices that have no such type (sm_80).

    A code's exponent and mantissa, put under the wider type's, lack a factor of two to the difference of the exponents'
    biases; multiplying by it is exact and turns subnormals into what they mean. The NaN code, as a byte, reads as 480.
    """
    if tile.dtype == tl.uint8:
        if INTERPRETED:
            code = tile.to(tl.uint16)
            half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
            return (half.to(tl.float16, bitcast=True) * 256.0).to(target)
        if target == tl.float16:
            return tl.inline_asm_elementwise(_UNPACK_FLOAT16, "=r,=r,r", [tile], dtype=tl.float16, is_pure=True, pack=4)
        wide = tl.inline_asm_elementwise(_UNPACK_BFLOAT16, "=r,=r,r", [tile], dtype=tl.bfloat16, is_pure=True, pack=4)
        return wide.to(target)
    if tile.dtype == tl.float8e4nv and target == tl.bfloat16:
        return tile.to(tl.float32).to(target)  # Hopper's direct conversion runs at a quarter of this one's rate
    return tile.to(target)


@triton.jit
def widen_cached(tile, target: tl.constexpr):
    """`widen` for keys and values: unlike weights they may hold NaN, and a broken sequence has to be seen at its logits."""
    wide = widen(tile, target)
    if tile.dtype == tl.uint8:
        wide = tl.where((tile & 0x7F) == 0x7F, float("nan"), wide)
    return wide


@triton.jit
def widen_pairs(pairs, target: tl.constexpr, HAS_FP8: tl.constexpr):
    """Two neighbouring codes an element (uint16) → the first ones and the second ones, each in the type `target`.

    Tensor cores want neighbouring keys in one register, and shared memory is transposed on the way there (ldmatrix) in units
    of 16 bits only: of single bytes each would be a load of its own.
    """
    if INTERPRETED:
        first, second = (pairs & 0xFF).to(tl.uint8), (pairs >> 8).to(tl.uint8)
    else:
        first, second = tl.inline_asm_elementwise(
            _SPLIT, "=r,=r,r,r", [pairs], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    if HAS_FP8:
        first = first.to(tl.float8e4nv, bitcast=True)
        second = second.to(tl.float8e4nv, bitcast=True)
    return widen_cached(first, target), widen_cached(second, target)


@triton.jit
def round_to_codes(values):
    """float32 values → uint8 codes: to nearest, ties to even; what lies beyond 448 saturates, NaN stays NaN.

    By integers: one way for GPUs with and without FP8, and Triton's interpreter casts some values wrongly.
    """
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(values), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Twenty bits of mantissa are dropped, with a carry into the exponent, whose bias was 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (127 - 7) * 8
    # Below 2^-6 codes count steps of 2^-9, which is the last place of a float32 from 2^14 on.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, subnormal, normal)
    return (tl.where(values != values, 0x7F, code) | sign).to(tl.uint8)
