"""4-bit codes in Triton: from words of 16 bits to 16-bit floats, two columns at a time.

A register holds the words of two neighbouring columns, and so eight codes (`code_weights.py`).

    e2m1    a code's bits, put where a float has its sign, its lowest exponent bits and its highest mantissa bit, are the code's
            value but for a power of two, subnormal numbers included: a mask, a multiplication that shifts to two places, a mask
    tables  `prmt` takes four bytes out of eight, so two of them and a third that chooses look up four codes in a table of 16
            bytes; once for the lower and once for the upper halves of the floats, which two more put together
    lookups a byte of two codes is a line of a table in shared memory that has the two values in each of the 32 banks, so that
            every thread of a warp reads its own: a byte out of the word, an address, a load

That is 2.1, 2.6 and 1.5 instructions a weight, of which 1.2, 2.6 and 0.5 run on the pipe that has half the lanes on Hopper; a
lookup's load runs on that of shared memory, which has a quarter. A scale costs one multiplication more for two weights, or two.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import struct
from functools import cache

import triton
import triton.language as tl

from workstation.kernels.code_tables import Table

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# What `e2m1` decoders make smaller: 2^126 in bfloat16 and 2^14 in float16. Factors give it back but for 2^8, which products of
# the largest scales and of this would not leave room for; the sum is multiplied by it.
REST = tl.constexpr(256.0)

# $0 … $3 are planes 0 … 3, $4 the words. lop3 0xea is (a & b) | c.
_E2M1_BFLOAT16 = """{
.reg .b32 code, high;
and.b32 code, $4, 0x000f000f; mul.lo.u32 code, code, 4160; and.b32 $0, code, 0x81c081c0;
and.b32 code, $4, 0x00f000f0; mul.lo.u32 code, code, 260; and.b32 $1, code, 0x81c081c0;
shr.b32 high, $4, 8;
and.b32 code, high, 0x000f000f; mul.lo.u32 code, code, 4160; and.b32 $2, code, 0x81c081c0;
and.b32 code, high, 0x00f000f0; mul.lo.u32 code, code, 260; and.b32 $3, code, 0x81c081c0;
}"""
_E2M1_FLOAT16 = """{
.reg .b32 sign, code;
shl.b32 sign, $4, 12; and.b32 sign, sign, 0x80008000; shl.b32 code, $4, 9; lop3.b32 $0, code, 0x0e000e00, sign, 0xea;
shl.b32 sign, $4, 8; and.b32 sign, sign, 0x80008000; shl.b32 code, $4, 5; lop3.b32 $1, code, 0x0e000e00, sign, 0xea;
shl.b32 sign, $4, 4; and.b32 sign, sign, 0x80008000; shl.b32 code, $4, 1; lop3.b32 $2, code, 0x0e000e00, sign, 0xea;
and.b32 sign, $4, 0x80008000; shr.b32 code, $4, 3; lop3.b32 $3, code, 0x0e000e00, sign, 0xea;
}"""
# A plane of e2m1's in $0, words in $1: placed, or also times the power of two that the placing takes away, exactly.
_E2M1_PLANE_BFLOAT16 = """{{
.reg .b32 code, zero, power; mov.b32 zero, 0x80008000; mov.b32 power, 0x7e807e80;
{shift}and.b32 code, {words}, {mask}; mul.lo.u32 code, code, {places}; and.b32 {placed}, code, 0x81c081c0;
{whole}}}"""
_E2M1_PLANE_FLOAT16 = """{{
.reg .b32 sign, code, zero, power; mov.b32 zero, 0x80008000; mov.b32 power, 0x74007400;
shl.b32 sign, $1, {left}; and.b32 sign, sign, 0x80008000; {place}
lop3.b32 {placed}, code, 0x0e000e00, sign, 0xea; {whole}}}"""
# A byte of a scale, of the word in $1, as two floats of 16 bits, each 2^118 (2^6 in float16) times too large: with the
# placing's 2^-126 (2^-14) that leaves REST, and room for the largest of e4m3, which takes the place of bits that need another
# 2^120 (2^8) for their exponents' bias.
_FACTOR = """{{
.reg .b32 pair, power; mov.b32 power, {power};
prmt.b32 pair, $1, 0, 0x4{byte}4{byte}; shl.b32 pair, pair, {left};
mul.rn.{type} pair, pair, power; {again}mov.b32 $0, pair;
}}"""


def _e2m1_planes(target: str, *, placed: bool) -> tuple[str, ...]:
    """The assembly of each plane."""
    where, whole = ("$0", "") if placed else ("code", f"fma.rn.{target}x2 $0, code, power, zero;\n")
    if target == "bf16":
        return tuple(_E2M1_PLANE_BFLOAT16.format(
            shift="shr.b32 code, $1, 8; " if plane > 1 else "", words="code" if plane > 1 else "$1", placed=where, whole=whole,
            mask=("0x000f000f", "0x00f000f0")[plane % 2], places=(4160, 260)[plane % 2]) for plane in range(4))  # fmt: skip
    places = [f"shl.b32 code, $1, {9 - 4 * plane};" for plane in range(3)] + ["shr.b32 code, $1, 3;"]
    return tuple(_E2M1_PLANE_FLOAT16.format(left=12 - 4 * plane, placed=where, whole=whole, place=place)
                 for plane, place in enumerate(places))  # fmt: skip


def _byte_factors(left: int, target: str, power: str, *, twice: bool = False) -> tuple[str, ...]:
    """The assembly for each byte."""
    again = f"mul.rn.{target} pair, pair, power; " if twice else ""
    return tuple(_FACTOR.format(byte=byte, left=left, type=target, power=power, again=again) for byte in range(4))


E2M1_BFLOAT16, E2M1_FLOAT16 = (tl.constexpr(_e2m1_planes(target, placed=False)) for target in ("bf16", "f16"))
PLACED_BFLOAT16, PLACED_FLOAT16 = (tl.constexpr(_e2m1_planes(target, placed=True)) for target in ("bf16", "f16"))
E8M0_BFLOAT16 = tl.constexpr(_byte_factors(7, "bf16x2", "0x7a807a80"))  # 2^118
E4M3_BFLOAT16 = tl.constexpr(_byte_factors(4, "bf16x2", "0x7b007b00", twice=True))  # 2^119, twice
E4M3_FLOAT16 = tl.constexpr(_byte_factors(7, "f16x2", "0x74007400"))  # 2^14
# Two planes: bytes of codes a0 b0 a1 b1, of column a and its neighbour b, from `index` and `half`.
_TWO_PLANES = """prmt.b32 low, {l0}, {l1}, index; prmt.b32 other, {l2}, {l3}, index; prmt.b32 low, low, other, half;
prmt.b32 high, {h0}, {h1}, index; prmt.b32 other, {h2}, {h3}, index; prmt.b32 high, high, other, half;
prmt.b32 {first}, low, high, 0x5140; prmt.b32 {second}, low, high, 0x7362;
"""
_SELECT = """.reg .b32 index, half, low, high, other;
shr.b32 half, {words}, 1; and.b32 index, {words}, 0x77777777; lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;
"""
_TABLE = """{{
{select}{first}shr.b32 index, index, 16; shr.b32 half, half, 16;
{second}}}"""
# The same for a table in shared memory. $1 is the thread's number t: it puts entries 2t and 2t + 1 into all 32 banks, in an
# order in which eight neighbours meet no bank twice. $2 is where the table lies.
_FILL = """{{
.reg .b32 words, at, next, one, two;
mad.lo.u32 words, $1, 0x202, 0x100;
{select}{planes}mad.lo.u32 at, $1, 256, $2; and.b32 next, $1, 7; mad.lo.u32 at, next, 16, at;
{stores}mov.b32 $0, 0;
}}"""
_STORE = """xor.b32 next, at, {bank};
st.shared.v4.b32 [next], {{one, one, one, one}}; st.shared.v4.b32 [next+128], {{two, two, two, two}};
"""
# $1 the words, $2 where the thread's bank of the table lies.
_LOOKUP = """{{
.reg .b32 at;
prmt.b32 at, $1, 0, 0x444{plane}; mad.lo.u32 at, at, 128, $2; ld.shared.b32 $0, [at];
}}"""
LOOKUPS = tl.constexpr(tuple(_LOOKUP.format(plane=plane) for plane in range(4)))
_SCALED = """{{
.reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.{type} $0, $1, $2, zero;
}}"""
_SCALED_TWICE = """{{
.reg .b32 zero, part; mov.b32 zero, 0x80008000; fma.rn.{type} part, $1, $3, zero; fma.rn.{type} $0, $1, $2, part;
}}"""
ONE_BFLOAT16, ONE_FLOAT16 = (tl.constexpr(_SCALED.format(type=name)) for name in ("bf16x2", "f16x2"))
TWO_BFLOAT16, TWO_FLOAT16 = (tl.constexpr(_SCALED_TWICE.format(type=name)) for name in ("bf16x2", "f16x2"))


@cache
def decoder(values: Table | None, target: str) -> str:
    """The assembly that turns words into planes of `target`, "bf16" or "fp16".

    values: a table's, which are rounded to it; None: e2m1's, a power of two smaller.
    """
    if values is None:
        return _E2M1_BFLOAT16 if target == "bf16" else _E2M1_FLOAT16
    return _TABLE.format(select=_SELECT.format(words="$4"), first=_two_planes("$0", "$1", values, target),
                         second=_two_planes("$2", "$3", values, target))  # fmt: skip


@cache
def filler(values: Table, target: str) -> str:
    """The assembly by which 128 threads fill a table in shared memory for `LOOKUPS`: two values for every two codes."""
    planes = _two_planes("one", "two", values, target)
    stores = "".join(_STORE.format(bank=16 * i) for i in range(8))
    return _FILL.format(select=_SELECT.format(words="words"), planes=planes, stores=stores)


def _two_planes(first: str, second: str, values: Table, target: str) -> str:
    bits = [_bits(value, target) for value in values]
    tables = {f"{name}{i}": _bytes(bits[4 * i : 4 * i + 4], shift) for name, shift in (("l", 0), ("h", 8)) for i in range(4)}
    return _TWO_PLANES.format(first=first, second=second, **tables)


def _bits(value: float, target: str) -> int:
    if target == "fp16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest even


def _bytes(bits: list[int], shift: int) -> str:
    return f"0x{sum((value >> shift & 255) << 8 * i for i, value in enumerate(bits)):08x}"


@triton.jit
def planes(words, table, DECODE: tl.constexpr, PAIRED: tl.constexpr, target: tl.constexpr):
    """Four tiles of `words` [rows, columns] int16: their codes' values, but for the power of two that `factor` gives back.

    DECODE: from `decoder`.  table: a pointer to the 16 values, which the interpreter reads instead.  PAIRED: codes of two
    columns share a byte, as they do where DECODE looks them up.
    """
    if INTERPRETED and PAIRED:
        low, high = tl.split(tl.reshape(words.to(tl.int32), (words.shape[0], words.shape[1] // 2, 2)))
        return (_pairs(low, table, words.shape), _pairs(low >> 8, table, words.shape), _pairs(high, table, words.shape),
                _pairs(high >> 8, table, words.shape))  # fmt: skip
    elif INTERPRETED:
        code = words.to(tl.int32)
        return (tl.load(table + (code & 15)), tl.load(table + (code >> 4 & 15)), tl.load(table + (code >> 8 & 15)),
                tl.load(table + (code >> 12 & 15)))  # fmt: skip
    elif target == tl.bfloat16:
        return tl.inline_asm_elementwise(DECODE, "=r,=r,=r,=r,r", [words], pack=2, is_pure=True,
                                         dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16))  # fmt: skip
    else:
        return tl.inline_asm_elementwise(DECODE, "=r,=r,=r,=r,r", [words], pack=2, is_pure=True,
                                         dtype=(tl.float16, tl.float16, tl.float16, tl.float16))  # fmt: skip


@triton.jit
def _pairs(codes, table, SHAPE: tl.constexpr):
    return tl.reshape(tl.join(tl.load(table + (codes & 15)), tl.load(table + (codes >> 4 & 15))), SHAPE)


@triton.jit
def exponents(word, INDEX: tl.constexpr, target: tl.constexpr):
    """Factors of the e8m0 bytes INDEX of `word` [rows] int32: 2^(byte − 127), in `target`."""
    if INDEX == 3:
        value = ((word >> 1) & 0x7F800000).to(tl.float32, bitcast=True)
    else:
        value = ((word << (23 - 8 * INDEX)) & 0x7F800000).to(tl.float32, bitcast=True)
    if INTERPRETED:
        return value
    elif target == tl.bfloat16:
        return (value * 3.3230699894622897e35).to(target)  # 2^118
    else:
        return (value * 64.0).to(target)


@triton.jit
def small_floats(word, INDEX: tl.constexpr, target: tl.constexpr):
    """Factors of the e4m3 bytes INDEX of `word` [rows] int32, none of them negative, in `target`."""
    if INDEX == 3:
        value = ((word >> 4) & 0x07F00000).to(tl.float32, bitcast=True)
    else:
        value = ((word << (20 - 8 * INDEX)) & 0x07F00000).to(tl.float32, bitcast=True)
    value = value * 1.329227995784916e36  # 2^120
    if INTERPRETED:
        return value
    elif target == tl.bfloat16:
        return (value * 3.3230699894622897e35).to(target)  # 2^118
    else:
        return (value * 64.0).to(target)


@triton.jit
def scaled(plane, factor, rest, target: tl.constexpr):
    """`plane · (factor + rest)` in `target`, rounded once. factor, rest (or None): [rows, 1] or as the plane."""
    if INTERPRETED:
        return (plane * factor).to(target)
    elif rest is None:
        if target == tl.bfloat16:
            return tl.inline_asm_elementwise(ONE_BFLOAT16, "=r,r,r", [plane, factor], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(ONE_FLOAT16, "=r,r,r", [plane, factor], dtype=tl.float16, is_pure=True, pack=2)
    elif target == tl.bfloat16:
        both = [plane, factor, rest]
        return tl.inline_asm_elementwise(TWO_BFLOAT16, "=r,r,r,r", both, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        both = [plane, factor, rest]
        return tl.inline_asm_elementwise(TWO_FLOAT16, "=r,r,r,r", both, dtype=tl.float16, is_pure=True, pack=2)
