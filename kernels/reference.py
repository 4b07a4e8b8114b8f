"""The plain-torch twin of every op in `ops.py`: what the CPU runs, and what the Triton kernels are tested against.

Attention's twin is in `reference_attention.py`. At one token a call into torch costs more than its arithmetic, so calls
are counted here, and what the layers of a step share (angles, cache rows) is worked out once and remembered.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from workstation.kernels.paging import FP8, KVScales, StepInputs, codes
from workstation.kernels.reference_attention import attention, flat_rows, row_strides
from workstation.kernels.reference_fp8 import to_codes

__all__ = ["add_rms_norm", "attention", "copy_blocks", "mask_tokens", "rms_norm", "rope_and_cache", "silu_mul", "step_inputs"]

# Up to here two passes of layer_norm's one kernel are cheaper than the seven small calls behind torch's rms_norm.
MIRRORED_NORM_ELEMENTS = 2048
ROLLED_ELEMENTS = 16384  # likewise: one call and a copy instead of two calls on halves


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype != torch.float32:
        return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight
    if x.numel() > MIRRORED_NORM_ELEMENTS:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _mirrored_norm(x, eps) * weight


def _mirrored_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm without a weight: (x | -x) has mean zero, so its layer norm is x's RMS norm."""
    width = x.shape[-1]
    return torch.layer_norm(torch.cat((x, -x), -1), (2 * width,), None, None, eps)[..., :width]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def step_inputs(
    tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, last_token: torch.Tensor,
    tables: tuple[torch.Tensor, ...], block_size: int,
) -> StepInputs:
    token_ids = torch.where(tokens < 0, last_token[rows], tokens)
    places = positions.clamp(min=0)
    entries, offsets = places // block_size, places % block_size
    slots = tuple(torch.where(positions < 0, -1, table[rows, entries].to(torch.int64) * block_size + offsets)
                  for table in tables)
    return StepInputs(token_ids, places, slots)


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    scales: KVScales,
) -> torch.Tensor:
    head_dim = kv_layer.shape[-1]
    rotated_heads = num_heads + num_kv_heads
    heads = qkv.view(qkv.shape[0], rotated_heads + num_kv_heads, head_dim)
    qk, value = heads[:, :rotated_heads], heads[:, rotated_heads:]
    if q_norm is not None and k_norm is not None:
        qk = _norm_heads(qk, q_norm, k_norm, num_heads, eps)
    qk = _rotate(qk, _angles_of_step(cos_sin, positions))
    key = qk[:, num_heads:]
    rows = _rows_of_step(slots, kv_layer)
    if rows.kept is not None:
        key, value = key[rows.kept], value[rows.kept]
    cache = flat_rows(codes(kv_layer), head_dim)
    if kv_layer.dtype == FP8:
        key, value = to_codes(key, scales.key), to_codes(value, scales.value)
    elif cache.dtype != qkv.dtype:
        key, value = key.to(cache.dtype), value.to(cache.dtype)
    cache.index_put_((rows.key,), key)
    cache.index_put_((rows.value,), value)
    return qk[:, :num_heads]


def _norm_heads(
    qk: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, num_heads: int, eps: float
) -> torch.Tensor:
    """RMSNorm of query heads and key heads [T, Hq + Hkv, D], each side with its own weight [D]."""
    if qk.dtype == torch.float32 and qk.numel() <= MIRRORED_NORM_ELEMENTS:
        return _mirrored_norm(qk, eps).mul_(_head_weights(q_norm, k_norm, num_heads, qk.shape[1]))
    return torch.cat((rms_norm(qk[:, :num_heads], q_norm, eps), rms_norm(qk[:, num_heads:], k_norm, eps)), 1)


def _head_weights(q_norm: torch.Tensor, k_norm: torch.Tensor, num_heads: int, heads: int) -> torch.Tensor:
    """[heads, D]: a layer's norm weights, one row a head; made once a layer."""
    found: torch.Tensor | None = _weights_by_layer.get(q_norm)  # type: ignore[no-untyped-call]
    if found is None or found.shape[0] != heads:
        found = torch.cat((q_norm.expand(num_heads, -1), k_norm.expand(heads - num_heads, -1)))
        _weights_by_layer[q_norm] = found
    return found


def copy_blocks(kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    stored = codes(kv)
    stored.index_copy_(0, target, stored.index_select(0, source))


class _Angles(NamedTuple):
    """cos and sin [T, 1, rotary_dim] for `positions` of `table`: cos twice, and -sin | sin."""

    table: weakref.ref[torch.Tensor]
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class _Rows(NamedTuple):
    """Rows of the flat cache that `slots` stand for: key, value [T', Hkv]; kept [T'] when some slots are negative."""

    slots: torch.Tensor
    geometry: tuple[int, ...]
    key: torch.Tensor
    value: torch.Tensor
    kept: torch.Tensor | None


_weights_by_layer = WeakTensorKeyDictionary()
# The last steps' index work. Entries are compared by content, since callers refill their buffers in place.
_last_angles: _Angles | None = None
_last_rows: tuple[_Rows, ...] = ()
ROWS_REMEMBERED = 4  # one a KV group, so that groups taking turns do not push each other out


def _angles_of_step(table: torch.Tensor, positions: torch.Tensor) -> _Angles:
    global _last_angles
    last = _last_angles
    if last is not None and last.table() is table and torch.equal(last.positions, positions):
        return last
    cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    last = _Angles(weakref.ref(table), positions.clone(), torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    _last_angles = last
    return last


def _rotate(x: torch.Tensor, angles: _Angles) -> torch.Tensor:
    """x [T, heads, D] → a new tensor with the first rotary_dim components of each head rotated."""
    rotary = angles.cos.shape[-1]
    x32 = x if x.dtype == torch.float32 else x.float()
    part = x32 if rotary == x.shape[-1] else x32[..., :rotary]
    half = rotary // 2
    turned = part * angles.cos
    if part.numel() <= ROLLED_ELEMENTS:
        turned.addcmul_(part.roll(half, -1), angles.sin)  # rolling swaps the halves
    else:
        turned[..., :half].addcmul_(part[..., half:], angles.sin[..., :half])
        turned[..., half:].addcmul_(part[..., :half], angles.sin[..., half:])
    if rotary != x.shape[-1]:
        turned = torch.cat((turned, x32[..., rotary:]), -1)
    return turned if x.dtype == torch.float32 else turned.to(x.dtype)


def _rows_of_step(slots: torch.Tensor, kv_layer: torch.Tensor) -> _Rows:
    global _last_rows
    block_size, head_dim = kv_layer.shape[3:]
    geometry = (kv_layer.shape[2], block_size, head_dim, *kv_layer.stride())
    for rows in _last_rows:
        if rows.geometry == geometry and torch.equal(rows.slots, slots):
            return rows
    kept = None
    written = slots
    if slots.numel() and int(slots.min()) < 0:
        kept = (slots >= 0).nonzero().squeeze(1)
        written = slots[kept]
    per_block, per_side, per_head = row_strides(kv_layer, head_dim)
    first = (written // block_size) * per_block + written % block_size
    key = first.unsqueeze(1) + torch.arange(kv_layer.shape[2]) * per_head
    rows = _Rows(slots.clone(), geometry, key, key + per_side, kept)
    _last_rows = (rows, *_last_rows[: ROWS_REMEMBERED - 1])
    return rows


def mask_tokens(logits: torch.Tensor, bits: torch.Tensor, index: torch.Tensor) -> None:
    rows = (index >= 0).nonzero().flatten()
    masks = bits.index_select(0, index.index_select(0, rows).long())
    allowed = (masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)).bitwise_and_(1).flatten(1).bool()
    allowed = F.pad(allowed, (0, logits.shape[1] - allowed.shape[1]))  # or cut
    x = logits.index_select(0, rows)
    logits.index_copy_(0, rows, x.masked_fill_(~(allowed | x.isnan() | x.isposinf()), float("-inf")))
