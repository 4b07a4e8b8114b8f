"""x taken apart into pairs of e4m3 numbers by a program that multiplies it, in Gluon: what `gemm_few_hopper.py` does before its
loop where the norm in front has not (`halves.py`)."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined,assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from workstation.kernels.halves import EXPONENT, LEAST, ROWS, SPAN, TOP
from workstation.kernels.hopper import align, reinterpreted

REST = gl.constexpr("sub.rn.f32 $0, $1, $2;")  # of a product, which the compiler would make twice


@gluon.jit
def _halves(values):
    """values [C, 128] float32, a group a row → e4m3 (high, low), 2^e · (high + low) ≈ values; 2^e; the sums of values / 2^e."""
    largest = gl.max(gl.abs(values), 1).to(gl.int32, bitcast=True) & EXPONENT
    endless = largest == EXPONENT
    exponent = gl.maximum(largest, LEAST) - TOP
    power = exponent.to(gl.float32, bitcast=True)
    inverse = ((254 << 23) - exponent).to(gl.float32, bitcast=True)
    values = values * inverse[:, None]
    # Cut off, not rounded: what remains has four bits either way, and nothing need be read back from e4m3, which Triton 3.6's
    # assembler gets wrong here (it unpacks a register before it is packed).
    high = (values.to(gl.int32, bitcast=True) & -(1 << 20)).to(gl.float32, bitcast=True)
    low = gl.inline_asm_elementwise(REST, "=f,f,f", [values, high], dtype=gl.float32, is_pure=True, pack=1)
    return high.to(gl.float8e4nv), low.to(gl.float8e4nv), gl.where(endless, float("nan"), power), gl.sum(values, 1)


@gluon.jit
def _places(COUNT: gl.constexpr, LOAD: gl.constexpr):
    """Columns of x, [COUNT, 4, 2, 16]: a chunk, a run of 32 bytes of it, a byte's parity there, and the byte. So a thread loads
    neighbouring columns, twice, and has what a run of bytes holds."""
    THREE: gl.constexpr = gl.SliceLayout(3, LOAD)
    TWO: gl.constexpr = gl.SliceLayout(2, THREE)
    chunk = gl.arange(0, COUNT, layout=gl.SliceLayout(1, TWO))
    run = gl.arange(0, 4, layout=gl.SliceLayout(0, TWO))
    odd = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(0, THREE)))
    byte = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, LOAD))))
    first = gl.expand_dims(chunk[:, None] * SPAN + (run % 2 * 32 + run // 2 * 16)[None, :], 2)
    halves = first + gl.expand_dims(gl.expand_dims(odd, 0), 0) * 64
    return gl.expand_dims(halves, 3) + gl.expand_dims(gl.expand_dims(gl.expand_dims(byte, 0), 0), 0)


@gluon.jit
def take_apart(
    x, x_tiles, powers, sums, begin, k, m, stride, CHUNKS: gl.constexpr, TOKENS: gl.constexpr, SHARE: gl.constexpr
):
    """Columns [begin, begin + 128 · CHUNKS) of x into shared memory, as SHARE rows for each of x: its high and low numbers; or
    those for even bytes of codes with zeros for odd ones, and the other way round."""
    COUNT: gl.constexpr = CHUNKS // TOKENS  # chunks at a time: as many values a thread, however many rows
    EACH: gl.constexpr = 16 if COUNT >= 32 else 8 if COUNT >= 16 else 4  # neighbours a thread loads at once
    LOAD: gl.constexpr = gl.BlockedLayout([1, 1, 2, EACH], [EACH // 2, 4, 1, 16 // EACH], [4, 1, 1, 1], [3, 2, 1, 0])
    BYTE_ORDER: gl.constexpr = gl.BlockedLayout([1, 2 * EACH], [EACH // 2, 64 // EACH], [4, 1], [1, 0])
    TILE: gl.constexpr = gl.BlockedLayout([8, 2 * EACH], [1, 32], [1, 4], [1, 0])
    FACTORS: gl.constexpr = gl.BlockedLayout([1, (EACH + 7) // 8], [EACH // 2, 64 // EACH], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE))[:, None]
    factor_row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, FACTORS))[None, :]
    odd = gl.arange(0, COUNT * 128, layout=gl.SliceLayout(0, TILE))[None, :] % 2
    places = begin + _places(COUNT, LOAD)
    for part in gl.static_range(TOKENS):
        at = part * COUNT * SPAN + places
        tile = gl.zeros([ROWS, COUNT * 128], gl.int8, TILE)
        power_tile = gl.zeros([COUNT, ROWS], gl.float32, FACTORS)
        sum_tile = power_tile
        for token in gl.static_range(TOKENS):
            values = gl.load(x + token * stride + at, mask=(at < k) & (token < m), other=0.0).to(gl.float32)
            # Into the order of bytes before they are made, so that neighbours are made together: registers change names only.
            values = gl.convert_layout(gl.reshape(gl.permute(values, (0, 1, 3, 2)), [COUNT, 128]), BYTE_ORDER)
            high, low, power, total = _halves(values)
            high = gl.convert_layout(gl.reshape(high.to(gl.int8, bitcast=True), [COUNT * 128]), gl.SliceLayout(0, TILE))
            low = gl.convert_layout(gl.reshape(low.to(gl.int8, bitcast=True), [COUNT * 128]), gl.SliceLayout(0, TILE))
            both = gl.where(row % 2 == 0, high[None, :], low[None, :])
            if SHARE == 4:
                both = gl.where(row // 2 % 2 == odd, both, gl.zeros_like(both))
            tile = gl.where(row // SHARE == token, both, tile)
            power = gl.convert_layout(power, gl.SliceLayout(1, FACTORS))[:, None]
            total = gl.convert_layout(total, gl.SliceLayout(1, FACTORS))[:, None]
            power_tile = gl.where(factor_row // SHARE == token, power, power_tile)
            sum_tile = gl.where(factor_row == SHARE * token, total * power * (-8.0 / 512.0), sum_tile)
        reinterpreted(x_tiles, [TOKENS, ROWS, COUNT * SPAN]).index(part).store(tile.to(gl.float8e4nv, bitcast=True))
        reinterpreted(powers, [TOKENS, COUNT, ROWS]).index(part).store(power_tile)
        reinterpreted(sums, [TOKENS, COUNT, ROWS]).index(part).store(sum_tile)
    fence_async_shared()
    align()
