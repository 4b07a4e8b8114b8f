"""Grids and tile sizes of the Triton kernels. Called through `ops.py`, which has checked the shapes."""

from __future__ import annotations

import torch
import triton

from workstation.kernels.activation import silu_mul_kernel
from workstation.kernels.dependent import chained
from workstation.kernels.halves import add_rms_norm_halves_kernel
from workstation.kernels.kv_store import copy_blocks_kernel, rope_and_cache_kernel
from workstation.kernels.launch_decode import attend_decodes
from workstation.kernels.launch_prefill import attend_prefills
from workstation.kernels.norm import add_rms_norm_kernel, rms_norm_kernel
from workstation.kernels.paging import AttentionPlan, KVScales, StepInputs, codes
from workstation.kernels.quantized import Halves
from workstation.kernels.step_inputs import step_inputs_kernel
from workstation.kernels.tuning import FEW_SPAN


def step_inputs(
    tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, last_token: torch.Tensor,
    tables: tuple[torch.Tensor, ...], block_size: int,
) -> StepInputs:
    _require_contiguous(tokens=tokens, positions=positions, rows=rows)
    count, block = tokens.shape[0], 128
    wide = [torch.empty_like(tokens) for _ in range(2 + len(tables))]
    if count:
        for group, table in enumerate(tables):
            step_inputs_kernel[(triton.cdiv(count, block),)](
                tokens, positions, rows, last_token, table, *wide[:2], wide[2 + group], count, table.stride(0),
                BLOCK_SIZE=block_size, FIRST=group == 0, BLOCK=block, num_warps=1,
            )  # fmt: skip
    token_ids, places, *slots = wide
    return StepInputs(token_ids, places, tuple(slots))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, width, rows.stride(0), eps, BLOCK=block, num_warps=_row_warps(block), **chained(x.device)
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
        add_rms_norm_kernel[(rows,)](
            x, residual, weight, out, width, eps, BLOCK=block, num_warps=_row_warps(block), **chained(x.device)
        )
    return out, residual


def add_rms_norm_halves(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[Halves, torch.Tensor]:
    tokens, width = x.shape
    _require_contiguous(x=x, residual=residual)
    out = Halves.empty(tokens, width, x.device)
    if tokens:
        block = max(FEW_SPAN, triton.next_power_of_2(width))
        add_rms_norm_halves_kernel[(tokens,)](
            x, residual, weight, out.values, out.factors, width, eps, BLOCK=block, num_warps=_row_warps(block),
            **chained(x.device),
        )  # fmt: skip
    return out, residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    _require_contiguous(gate_up=gate_up)
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    rows = out.numel() // max(width, 1)
    if rows:
        silu_mul_kernel[(rows, triton.cdiv(width, 1024))](
            gate_up, out, width, BLOCK=1024, num_warps=4, **chained(out.device)
        )
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
    scales: KVScales,
) -> torch.Tensor:
    _require_contiguous(qkv=qkv, positions=positions, cos_sin=cos_sin, slots=slots)
    head_dim, rotary = kv_layer.shape[-1], cos_sin.shape[-1]
    tokens = qkv.shape[0]
    out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return out
    heads = 8 if tokens > 1 else 2  # of a program: a single token's end sooner when they are small
    block, side, head, token, _ = kv_layer.stride()
    rope_and_cache_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
        qkv, positions, cos_sin, q_norm, k_norm, codes(kv_layer), slots, out, eps, scales.key, scales.value,
        block, side, head, token,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ROTARY=rotary,
        BLOCK_SIZE=kv_layer.shape[3], HAS_NORM=q_norm is not None, HEADS=heads,
        HALF_PAD=triton.next_power_of_2(rotary // 2), REST_PAD=triton.next_power_of_2(max(head_dim - rotary, 1)),
        num_warps=4, **chained(qkv.device),
    )  # fmt: skip
    return out


def copy_blocks(kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    size = kv[0].numel()
    copy_blocks_kernel[(source.numel(), triton.cdiv(size, 4096))](
        codes(kv), source, target, size, kv.stride(0), BLOCK=4096, num_warps=8
    )


def attention(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, scales: KVScales
) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.num_decodes:
        attend_decodes(q, kv_layer, plan, scale, out, scales=scales)
    if plan.context_lens.shape[0] > plan.num_decodes:
        attend_prefills(q, kv_layer, plan, scale, out, scales=scales)
    return out


def _row_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _require_contiguous(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} ({list(tensor.shape)}, strides {tensor.stride()}) must be contiguous")
