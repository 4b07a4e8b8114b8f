"""New keys and values into their slots, with what precedes the write: QK-norm and rotary embedding. And block copies."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.dependent import allow_next, await_previous
from workstation.kernels.fp8_codes import round_to_codes


@triton.jit
def _head_norm(first, second, rest, weight, at, tail, half, rotary, head_dim, eps, dtype: tl.constexpr):
    """RMS norm of heads given in three parts of their components: [0, half), [half, rotary), [rotary, head_dim)."""
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
    scale = tl.rsqrt(squares / head_dim + eps)[:, None]
    gain_first = tl.load(weight + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
    gain_second = tl.load(weight + half + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
    gain_rest = tl.load(weight + rotary + tail, mask=tail < head_dim - rotary, other=0.0).to(tl.float32)[None, :]
    first = ((first * scale).to(dtype).to(tl.float32) * gain_first).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * gain_second).to(dtype).to(tl.float32)
    rest = ((rest * scale).to(dtype).to(tl.float32) * gain_rest).to(dtype).to(tl.float32)
    return first, second, rest


@triton.jit
def _kept(values, scale, dtype: tl.constexpr, kept: tl.constexpr):
    """What the cache keeps of float32 values: themselves in its type, or codes of value / scale.

    Codes are made of values in the activations' type, so that they do not depend on how exactly RoPE was computed.
    """
    if kept == tl.uint8:
        return round_to_codes(tl.div_rn(values.to(dtype).to(tl.float32), scale))
    return values.to(kept)


@triton.jit
def rope_and_cache_kernel(
    qkv,
    positions,
    cos_sin,
    q_norm,
    k_norm,
    kv,
    slots,
    q_out,
    eps,
    key_scale,
    value_scale,
    kv_block_stride,
    kv_side_stride,
    kv_head_stride,
    kv_token_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: HEADS heads of one token. Query heads go to q_out [T, Hq, D], key and value heads to the cache.

    A cache of bytes keeps e4m3 codes of key / key_scale and value / value_scale; in any other the scales mean nothing.
    """
    allow_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF_PAD)
    tail = tl.arange(0, REST_PAD)
    half: tl.constexpr = ROTARY // 2
    all_heads: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    dtype: tl.constexpr = q_out.dtype.element_ty

    angle = cos_sin + tl.load(positions + token) * ROTARY + at
    cos = tl.load(angle, mask=at < half, other=1.0)[None, :]
    sin = tl.load(angle + half, mask=at < half, other=0.0)[None, :]
    slot = tl.load(slots + token)
    await_previous(PDL)

    source = qkv + (token * all_heads + head)[:, None] * HEAD_DIM
    pair = (head < all_heads)[:, None] & (at < half)[None, :]
    spare = (head < all_heads)[:, None] & (tail < HEAD_DIM - ROTARY)[None, :]
    first = tl.load(source + at[None, :], mask=pair, other=0.0).to(tl.float32)
    second = tl.load(source + half + at[None, :], mask=pair, other=0.0).to(tl.float32)
    rest = tl.load(source + ROTARY + tail[None, :], mask=spare, other=0.0).to(tl.float32)
    value_first, value_second, value_rest = first, second, rest

    if HAS_NORM:
        qf, qs, qr = _head_norm(first, second, rest, q_norm, at, tail, half, ROTARY, HEAD_DIM, eps, dtype)
        kf, ks, kr = _head_norm(first, second, rest, k_norm, at, tail, half, ROTARY, HEAD_DIM, eps, dtype)
        first = tl.where(is_query[:, None], qf, kf)
        second = tl.where(is_query[:, None], qs, ks)
        rest = tl.where(is_query[:, None], qr, kr)

    turned_first = tl.where(is_value[:, None], value_first, first * cos - second * sin)
    turned_second = tl.where(is_value[:, None], value_second, second * cos + first * sin)
    rest = tl.where(is_value[:, None], value_rest, rest)

    query = q_out + (token * NUM_HEADS + head)[:, None] * HEAD_DIM
    tl.store(query + at[None, :], turned_first.to(dtype), mask=pair & is_query[:, None])
    tl.store(query + half + at[None, :], turned_second.to(dtype), mask=pair & is_query[:, None])
    tl.store(query + ROTARY + tail[None, :], rest.to(dtype), mask=spare & is_query[:, None])

    if slot >= 0:
        stored = (head >= NUM_HEADS)[:, None]
        kv_head = tl.where(is_value, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
        place = slot // BLOCK_SIZE * kv_block_stride + slot % BLOCK_SIZE * kv_token_stride
        target = kv + place + (is_value.to(tl.int64) * kv_side_stride + kv_head * kv_head_stride)[:, None]
        kept: tl.constexpr = kv.dtype.element_ty
        scale = tl.where(is_value, value_scale, key_scale)[:, None]
        tl.store(target + at[None, :], _kept(turned_first, scale, dtype, kept), mask=pair & stored)
        tl.store(target + half + at[None, :], _kept(turned_second, scale, dtype, kept), mask=pair & stored)
        tl.store(target + ROTARY + tail[None, :], _kept(rest, scale, dtype, kept), mask=spare & stored)


@triton.jit
def copy_blocks_kernel(kv, source, target, size, stride, BLOCK: tl.constexpr):
    """kv[target[i]] = kv[source[i]] for blocks of `size` elements that start `stride` apart."""
    pair = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    origin = kv + tl.load(source + pair) * stride
    goal = kv + tl.load(target + pair) * stride
    tl.store(goal + at, tl.load(origin + at, mask=at < size), mask=at < size)
