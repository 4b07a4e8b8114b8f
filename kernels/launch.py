"""Grids and tile sizes of the Triton kernels. Called through `ops.py`, which has checked the shapes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from workstation.kernels.activation import silu_mul_kernel
from workstation.kernels.attention_decode import combine_kernel, decode_kernel, plan_tiles_kernel
from workstation.kernels.kv_store import copy_blocks_kernel, rope_and_cache_kernel
from workstation.kernels.launch_decode import attend_decodes
from workstation.kernels.launch_prefill import attend_prefills
from workstation.kernels.norm import add_rms_norm_kernel, rms_norm_kernel
from workstation.kernels.paging import AttentionPlan

LOG2_E = 1.4426950408889634
SHORTEST_TILE = 128  # keys of a decode tile, at least: below, a tile's fixed cost outweighs its keys
TILE_HEADS = 4096  # (tile, KV head) pairs a decode step is cut into, about: some rounds of every SM
PROGRAMS_PER_SM = 3  # what stays resident of the decode kernel at head dim 128: a fourth would wait and run alone
PLAN_LANES = 1024  # sequences the planning kernel is compiled for, so that batch sizes do not each compile one
COMBINE_TILES = 32


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, width, rows.stride(0), eps, BLOCK=block, num_warps=_row_warps(block)
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    _require_contiguous(x=x, residual=residual)
    out = torch.empty_like(residual)
    rows = x.numel() // width
    if rows:
        block = triton.next_power_of_2(width)
        add_rms_norm_kernel[(rows,)](x, residual, weight, out, width, eps, BLOCK=block, num_warps=_row_warps(block))
    return out, residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    _require_contiguous(gate_up=gate_up)
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    rows = out.numel() // max(width, 1)
    if rows:
        silu_mul_kernel[(rows, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


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
) -> torch.Tensor:
    _require_contiguous(qkv=qkv, positions=positions, cos_sin=cos_sin, slots=slots)
    head_dim, rotary = kv_layer.shape[-1], cos_sin.shape[-1]
    tokens = qkv.shape[0]
    out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return out
    heads = 8
    block, side, head, token, _ = kv_layer.stride()
    rope_and_cache_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
        qkv, positions, cos_sin, q_norm, k_norm, kv_layer, slots, out, eps, block, side, head, token,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ROTARY=rotary,
        BLOCK_SIZE=kv_layer.shape[3], HAS_NORM=q_norm is not None, HEADS=heads,
        HALF_PAD=triton.next_power_of_2(rotary // 2), REST_PAD=triton.next_power_of_2(max(head_dim - rotary, 1)),
        num_warps=4,
    )  # fmt: skip
    return out


def copy_blocks(kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    size = kv[0].numel()
    copy_blocks_kernel[(source.numel(), triton.cdiv(size, 4096))](
        kv, source, target, size, kv.stride(0), BLOCK=4096, num_warps=8
    )


def attention(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.num_decodes:
        attend_decodes(q, kv_layer, plan, scale, out)
    if plan.context_lens.shape[0] > plan.num_decodes:
        attend_prefills(q, kv_layer, plan, scale, out)
    return out


class DecodeTiles(NamedTuple):
    """One step's flat list of decode tiles (see `plan_tiles_kernel`) and the room for their partial results."""

    header: torch.Tensor
    first: torch.Tensor
    tile_sequence: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor
    programs: int
    split: bool


def _plan_tiles(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, keys: int) -> DecodeTiles:
    """Host bounds decide sizes and grid; the lengths themselves stay on the device."""
    count, kv_heads = plan.num_decodes, kv_layer.shape[2]
    seen = min(plan.max_context_len, plan.window + keys) if plan.window else plan.max_context_len
    limit = max(2 * count, TILE_HEADS // kv_heads)
    bound = min(limit, count * max(1, triton.cdiv(seen, SHORTEST_TILE)))
    split = seen > SHORTEST_TILE
    padded = -(-bound // 4) * 4  # 16-byte starts, whatever the batch: a pointer's alignment is part of what is compiled
    ints = torch.empty(4 + padded + count + 1, dtype=torch.int32, device=q.device)
    header, tile_sequence, first = ints[:2], ints[4 : 4 + bound], ints[4 + padded :]
    rows = bound * q.shape[1] if split else 0
    floats = torch.empty(rows * (q.shape[2] + 1), dtype=torch.float32, device=q.device)
    plan_tiles_kernel[(1,)](
        plan.context_lens, header, first, tile_sequence, count, limit, plan.window,
        SHORTEST=SHORTEST_TILE, ALIGN=keys, PAD=max(PLAN_LANES, triton.next_power_of_2(count)), num_warps=4,
    )  # fmt: skip
    programs = min(bound * kv_heads, PROGRAMS_PER_SM * _multiprocessors(q.device))
    partial, lse = floats[: rows * q.shape[2]], floats[rows * q.shape[2] :]
    return DecodeTiles(header, first, tile_sequence, partial, lse, programs, split)


def _attend_decodes(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, out: torch.Tensor) -> None:
    _, num_heads, head_dim = q.shape
    kv_heads, block_size = kv_layer.shape[2:4]
    dim_pad = triton.next_power_of_2(head_dim)
    keys = _decode_keys(q)
    tiles: DecodeTiles | None = plan.scratch.get("decode_tiles")
    if tiles is None:
        tiles = _plan_tiles(q, kv_layer, plan, keys)
        plan.scratch["decode_tiles"] = tiles
    block, side, head, token, _ = kv_layer.stride()
    group = num_heads // kv_heads
    decode_kernel[(tiles.programs,)](
        q, kv_layer, out, tiles.partial, tiles.partial_lse, plan.tables, plan.rows, plan.context_lens,
        tiles.header, tiles.first, tiles.tile_sequence, scale * LOG2_E, q.stride(0), q.stride(1),
        block, side, head, token, plan.tables.stride(0), plan.window,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        DIM_PAD=dim_pad, BLOCK_SIZE=block_size, KEYS=keys, PRECISION=_precision(q), num_warps=4, num_stages=3,
    )  # fmt: skip
    if tiles.split:
        combine_kernel[(plan.num_decodes, num_heads)](
            tiles.partial, tiles.partial_lse, out, tiles.first,
            HEADS=num_heads, HEAD_DIM=head_dim, DIM_PAD=dim_pad, TILES=COMBINE_TILES, num_warps=4,
        )  # fmt: skip


def _decode_keys(q: torch.Tensor) -> int:
    """Keys a pipeline stage loads, without spills for compute capability 9.0: K and V take 16 KiB each at most."""
    row_bytes = triton.next_power_of_2(q.shape[2]) * q.element_size()
    return 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16


def _precision(q: torch.Tensor) -> str:
    """float32 inputs get float32 products; without this Hopper would round them to TF32."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _row_warps(block: int) -> int:
    return min(16, max(1, block // 512))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _require_contiguous(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} ({list(tensor.shape)}, strides {tensor.stride()}) must be contiguous")
