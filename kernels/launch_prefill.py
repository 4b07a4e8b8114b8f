"""Which prefill kernel runs with which tiles, and how it is launched. The one seam is `attend_prefills`."""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from workstation.kernels.attention_prefill import prefill_kernel
from workstation.kernels.attention_prefill_tiled import gather_context_kernel, tiled_prefill_kernel
from workstation.kernels.paging import AttentionPlan

LOG2_E = 1.4426950408889634
GATHER_KEYS = 64  # keys a program of the gather copies: 16 KiB at head dim 128
GATHER_ALIGN = 128  # the copy is defined up to a multiple of this, the longest tile
SOURCES = {"paged": 0, "dense": 1, "descriptor": 2}


class PrefillConfig(NamedTuple):
    """A kernel and its tiles. kind: "exact" (any dtype, any head dim), "hopper" (128 rows, warps unused), or a source of keys
    of the tiled kernel, see there."""

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
) -> None:
    """Write `out` for the plan's sequences behind its decodes. ValueError: `config` cannot serve these inputs."""
    config = config or choose(q, kv_layer, plan)
    if config.kind == "exact":
        _attend_exactly(q, kv_layer, plan, scale, out, config)
        return
    if not serves(config, q, kv_layer, plan):
        raise ValueError(f"{config} does not serve q {list(q.shape)} {q.dtype} with a window of {plan.window}")
    if config.kind == "hopper":
        _attend_on_hopper(q, kv_layer, plan, scale, out, config)
        return
    _attend_tiled(q, kv_layer, plan, scale, out, config)


def serves(config: PrefillConfig, q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan) -> bool:
    if config.kind == "exact":
        return True
    if q.dtype == torch.float32 or kv_layer.dtype != q.dtype or q.shape[2] not in (64, 128, 256):
        return False
    if config.kind == "hopper":
        return _hopper_serves(q, kv_layer, plan, config)
    return config.kind == "paged" or plan.window == 0


def _hopper_serves(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, config: PrefillConfig) -> bool:
    head_dim, block_size = q.shape[2], kv_layer.shape[3]
    rows = kv_layer.shape[0] * kv_layer.stride(0) // head_dim
    by_rows = kv_layer.stride(3) == head_dim and all(stride % head_dim == 0 for stride in kv_layer.stride()[:3])
    fits = config.keys % block_size == 0 and block_size >= 8 and q.shape[1] // kv_layer.shape[2] <= config.rows
    return plan.window == 0 and by_rows and fits and rows < 2**31 and _is_hopper(q.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    if _capability(device) != (9, 0):
        return False
    try:  # Gluon is young: a Triton without what the kernel uses leaves the other kernels
        importlib.import_module("workstation.kernels.attention_prefill_hopper")
    except (ImportError, AttributeError):
        return False
    return True


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)  # the interpreter


def choose(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan) -> PrefillConfig:
    """The fastest kernel that serves the step, with tiles that compile without spills for compute capability 9.0."""
    longest = plan.max_query_len * q.shape[1] // kv_layer.shape[2]  # query rows of the longest chunk
    wide = q.shape[2] > 128
    if q.dtype == torch.float32:  # no tensor cores: small tiles, for exactness rather than speed
        return PrefillConfig("exact", 32, 16, 8, 3)
    if longest <= 64:
        narrow = PrefillConfig("paged", 64, 32, 8, 2) if wide else PrefillConfig("paged", 64, 64, 4, 2)
        return narrow if serves(narrow, q, kv_layer, plan) else PrefillConfig("exact", 64, 32 if wide else 64, 8, 3)
    hopper = PrefillConfig("hopper", 128, 64 if wide else 128, 4, 2)
    if serves(hopper, q, kv_layer, plan):
        return hopper
    stages = 3 if _capability(q.device)[0] == 9 else 2  # below and at 12.0 two of them keep within 99 KiB
    paged = PrefillConfig("paged", 64 if wide else 128, 32 if wide else 64, 8, stages)
    return paged if serves(paged, q, kv_layer, plan) else PrefillConfig("exact", 128, 32 if wide else 64, 8, stages)


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


def _attend_exactly(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, out: torch.Tensor, config: PrefillConfig
) -> None:
    tiles = _tiles(q, kv_layer, plan, config)
    kv_heads, block_size, head_dim = kv_layer.shape[2:]
    block, side, head, token, _ = kv_layer.stride()
    prefill_kernel[tiles.grid](
        q, kv_layer, out, plan.tables, plan.rows, plan.context_lens, plan.query_start, plan.num_decodes, tiles.sequences,
        scale * LOG2_E, q.stride(0), q.stride(1), block, side, head, token, plan.tables.stride(0), plan.window,
        KV_HEADS=kv_heads, GROUP=tiles.group, ROWS=tiles.rows, QUERY_TOKENS=tiles.query_tokens, HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size, KEYS=config.keys,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # else Hopper would round float32 products to TF32
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _attend_tiled(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, out: torch.Tensor, config: PrefillConfig
) -> None:
    tiles = _tiles(q, kv_layer, plan, config)
    kv_heads, block_size, head_dim = kv_layer.shape[2:]
    keys: torch.Tensor = kv_layer
    descriptor = None
    capacity = 0
    if config.kind != "paged":
        keys, capacity = gather_context(kv_layer, plan)
        if config.kind == "descriptor":
            descriptor = TensorDescriptor.from_tensor(keys.view(-1, head_dim), [config.keys, head_dim])
    block, side, head, token, _ = kv_layer.stride()
    tiled_prefill_kernel[tiles.grid](
        q, keys, descriptor, out, plan.tables, plan.rows, plan.context_lens, plan.query_start, plan.num_decodes,
        tiles.sequences, scale * LOG2_E, q.stride(0), q.stride(1), block, side, head, token, plan.tables.stride(0), capacity,
        plan.window,
        KV_HEADS=kv_heads, GROUP=tiles.group, ROWS=tiles.rows, QUERY_TOKENS=tiles.query_tokens, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, KEYS=config.keys, SOURCE=SOURCES[config.kind], WINDOWED=plan.window > 0,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def gather_context(kv_layer: torch.Tensor, plan: AttentionPlan) -> tuple[torch.Tensor, int]:
    """→ (copy [2, Hkv, sequences, capacity, D], capacity): the prefills' keys and values, contiguous."""
    kv_heads, block_size, head_dim = kv_layer.shape[2:]
    prefills = plan.context_lens.shape[0] - plan.num_decodes
    capacity = triton.cdiv(plan.max_context_len, GATHER_ALIGN) * GATHER_ALIGN
    copy = torch.empty((2, kv_heads, prefills, capacity, head_dim), dtype=kv_layer.dtype, device=kv_layer.device)
    block, side, head, token, _ = kv_layer.stride()
    gather_context_kernel[(prefills * capacity // GATHER_KEYS, 2 * kv_heads)](
        kv_layer, copy, plan.tables, plan.rows, plan.context_lens, plan.num_decodes, capacity, block, side, head, token,
        plan.tables.stride(0), KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, KEYS=GATHER_KEYS,
        ALIGN=GATHER_ALIGN, num_warps=4,
    )  # fmt: skip
    return copy, capacity


def _attend_on_hopper(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, out: torch.Tensor, config: PrefillConfig
) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from workstation.kernels.attention_prefill_hopper import hopper_prefill_kernel

    tiles = _tiles(q, kv_layer, plan, config)
    kv_heads, block_size, head_dim = kv_layer.shape[2:]
    strides = [stride // head_dim for stride in kv_layer.stride()[:3]]
    span = 1 + sum((n - 1) * s for n, s in zip(kv_layer.shape[:3], strides, strict=True)) + block_size - 1
    cache = GluonDescriptor(
        kv_layer.as_strided((span, head_dim), (head_dim, 1)), [span, head_dim], [head_dim, 1], [block_size, 64],
        gl.NVMMASharedLayout(128, 16, 2),
    )  # fmt: skip
    hopper_prefill_kernel[tiles.grid](
        q, cache, out, plan.tables, plan.rows, plan.context_lens, plan.query_start, plan.num_decodes, tiles.sequences,
        scale * LOG2_E, q.stride(0), q.stride(1), *strides, plan.tables.stride(0),
        KV_HEADS=kv_heads, GROUP=tiles.group, QUERY_TOKENS=tiles.query_tokens, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        KEYS=config.keys, STAGES=config.stages, num_warps=4,
    )  # fmt: skip
