"""Which prefill kernel runs with which tiles, and how it is launched. The one seam is `attend_prefills`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from workstation.kernels.attention_prefill import prefill_kernel
from workstation.kernels.attention_prefill_tiled import tiled_prefill_kernel
from workstation.kernels.gemm_launch import Call
from workstation.kernels.launch_fp8 import readable
from workstation.kernels.launch_hopper import cache_rows, capability, lies_in_rows
from workstation.kernels.paging import FP8, UNSCALED, AttentionPlan, KVScales

LOG2_E = 1.4426950408889634
SHORT = 1024  # keys: up to here tiles of 64 keys are faster than those of 128


class PrefillConfig(NamedTuple):
    """A kernel and its tiles. kind: "exact" (any dtype, any head dim), "tiled" (16-bit, its cache too or FP8, on any GPU) or
    "hopper" (16-bit throughout, no window, compute capability 9.0; 128 rows, warps unused)."""

    kind: str
    rows: int
    keys: int
    warps: int
    stages: int


def attend_prefills(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    out: torch.Tensor,
    config: PrefillConfig | None = None,
    scales: KVScales = UNSCALED,
) -> None:
    """Write `out` for the plan's sequences behind its decodes. ValueError: `config` cannot serve these inputs."""
    prefill_call(q, kv_layer, plan, scale, out, config or choose(q, kv_layer, plan), scales).launch()


def prefill_call(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    out: torch.Tensor,
    config: PrefillConfig,
    scales: KVScales = UNSCALED,
) -> Call:
    """The launch of `config`'s kernel. ValueError: it cannot serve these inputs."""
    if not serves(config, q, kv_layer, plan):
        given = f"q {list(q.shape)} {q.dtype} with a cache of {kv_layer.dtype} and a window of {plan.window}"
        raise ValueError(f"{config} does not serve {given}")
    if config.kind == "hopper":
        return _hopper_call(q, kv_layer, plan, scale, out, config)
    return _portable_call(q, kv_layer, plan, scale, out, config, scales)


def serves(config: PrefillConfig, q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan) -> bool:
    """Whether `config`'s kernel takes these dtypes, head dim, window, layout and GPU."""
    if config.kind == "exact":
        return True
    if q.dtype == torch.float32 or kv_layer.dtype not in (q.dtype, FP8) or q.shape[2] not in (64, 128, 256):
        return False
    return config.kind == "tiled" or _hopper_serves(q, kv_layer, plan, config)


def _hopper_serves(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, config: PrefillConfig) -> bool:
    same = kv_layer.dtype == q.dtype  # TMA brings keys as they are: nobody there would widen them
    few = q.shape[1] // kv_layer.shape[2] <= config.rows
    return same and plan.window == 0 and few and lies_in_rows(kv_layer, config.keys)


def choose(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan) -> PrefillConfig:
    """The fastest kernel that serves the step; tiles as measured on an H200, elsewhere such that they fit without spills."""
    if q.dtype == torch.float32:  # no tensor cores: small tiles, for exactness rather than speed
        return PrefillConfig("exact", 32, 16, 8, 3)
    wide = q.shape[2] > 128
    # wgmma and tcgen05 read keys from shared memory; mma.sync holds them in registers, where 64 keys leave room for no mask.
    roomy = capability(q.device)[0] in (9, 10)
    masked = 32 if wide or not roomy else 64  # keys a tile with masks in its loop, or of few rows
    longest = plan.max_query_len * q.shape[1] // kv_layer.shape[2]  # query rows of the longest chunk
    if longest <= 64:
        tiled = PrefillConfig("tiled", 64, 32 if plan.window else masked, 8 if wide else 4, 2)
        return tiled if serves(tiled, q, kv_layer, plan) else PrefillConfig("exact", 64, masked, 8, 3)
    short = min(plan.max_context_len, plan.window or plan.max_context_len) <= SHORT
    hopper = PrefillConfig("hopper", 128, 64 if wide or short else 128, 4, 4 if short and not wide else 2)
    if serves(hopper, q, kv_layer, plan):
        return hopper
    stages = 3 if capability(q.device)[0] == 9 else 2  # below 9.0 and at 12.0 two of them keep within 99 KiB
    crowded = wide or plan.window > 0 or (not roomy and kv_layer.dtype != q.dtype)  # registers hold FP8 keys and the wider
    tiled = PrefillConfig("tiled", 64 if wide else 128, masked if crowded else 64, 8, stages)
    exact = PrefillConfig("exact", 128 if roomy else 64, 32 if wide else 64, 8, stages)
    return tiled if serves(tiled, q, kv_layer, plan) else exact


class _Tiles(NamedTuple):
    group: int
    rows: int
    query_tokens: int
    sequences: int
    grid: tuple[int, int]


def _tiles(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, config: PrefillConfig) -> _Tiles:
    kv_heads = kv_layer.shape[2]
    group = q.shape[1] // kv_heads
    rows = max(config.rows, triton.next_power_of_2(group))
    query_tokens = rows // group
    sequences = plan.context_lens.shape[0]
    grid = ((q.shape[0] - plan.num_decodes) // query_tokens + sequences - plan.num_decodes, kv_heads)
    return _Tiles(group, rows, query_tokens, sequences, grid)


def _portable_call(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    out: torch.Tensor,
    config: PrefillConfig,
    scales: KVScales,
) -> Call:
    tiles = _tiles(q, kv_layer, plan, config)
    kv_heads, block_size, head_dim = kv_layer.shape[2:]
    arguments = (
        q, readable(kv_layer), out, plan.tables, plan.rows, plan.context_lens, plan.query_start, plan.num_decodes,
        tiles.sequences, scale * scales.key * LOG2_E, scales.value, q.stride(0), q.stride(1), *kv_layer.stride()[:4],
        plan.tables.stride(0), plan.window,
    )  # fmt: skip
    options = {
        "KV_HEADS": kv_heads, "GROUP": tiles.group, "ROWS": tiles.rows, "QUERY_TOKENS": tiles.query_tokens,
        "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size, "KEYS": config.keys,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    if config.kind == "tiled":
        return Call(tiled_prefill_kernel, tiles.grid, arguments, options | {"WINDOWED": plan.window > 0})
    precision = {"PRECISION": "ieee" if q.dtype == torch.float32 else "tf32"}  # else Hopper would round to TF32
    return Call(prefill_kernel, tiles.grid, arguments, options | {"DIM_PAD": triton.next_power_of_2(head_dim)} | precision)


def _hopper_call(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, out: torch.Tensor, config: PrefillConfig
) -> Call:
    from workstation.kernels.attention_prefill_hopper import hopper_prefill_kernel

    tiles = _tiles(q, kv_layer, plan, config)
    kv_heads, block_size, head_dim = kv_layer.shape[2:]
    cache, strides = cache_rows(kv_layer)
    arguments = (
        q, cache, out, plan.tables, plan.rows, plan.context_lens, plan.query_start, plan.num_decodes, tiles.sequences,
        scale * LOG2_E, q.stride(0), q.stride(1), *strides, plan.tables.stride(0),
    )  # fmt: skip
    options = {
        "KV_HEADS": kv_heads, "GROUP": tiles.group, "QUERY_TOKENS": tiles.query_tokens, "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size, "KEYS": config.keys, "STAGES": config.stages, "num_warps": 4,
    }  # fmt: skip
    return Call(hopper_prefill_kernel, tiles.grid, arguments, options)
