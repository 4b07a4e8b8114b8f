"""Grid and tiles of the decode kernel. The one seam is `attend_decodes`."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from workstation.kernels import launch_fp8
from workstation.kernels.attention_decode import FEW, decode_shares_kernel, plan_shares_kernel
from workstation.kernels.dependent import chained
from workstation.kernels.gemm_launch import Call
from workstation.kernels.launch_hopper import cache_rows, lies_in_rows
from workstation.kernels.paging import FP8, UNSCALED, AttentionPlan, KVScales

LOG2_E = 1.4426950408889634
PLAN_LANES = 1024  # sequences the planning kernel is compiled for, so that batch sizes do not each compile one
REGISTERS = 65536  # of a multiprocessor, on every NVIDIA GPU since Kepler
SPARE_ROWS = 20  # rows of query and scores a program holds in shared memory beside K and V, and
SPARE = 8192  # bytes at least
HOPPER_REGISTERS = 128  # a thread's at launch, of 256: two programs fill a multiprocessor's
UNIT = 64  # keys a unit: what shares and sequences are counted in


class DecodeConfig(NamedTuple):
    """kind: "shares" (any GPU) or "hopper" (16-bit, D = 64 or 128, no window, compute capability 9.0; a unit a turn).

    keys: read a turn; per_sm: programs a multiprocessor; least: units a share has, as a rule; whole: units never cut.
    """

    kind: str
    keys: int
    warps: int
    stages: int
    per_sm: int
    least: int
    whole: int


class Shares(NamedTuple):
    """One step's shares (see `plan_shares_kernel`) and the room for their pieces."""

    header: torch.Tensor
    first: torch.Tensor
    start: torch.Tensor
    sequence: torch.Tensor
    arrivals: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor
    number: int


def choose(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan) -> DecodeConfig:
    """On Hopper rings of three units, two programs a multiprocessor. Elsewhere, or with a window, in float32 or at other head
    dims: K and V take 16 KiB each a turn, at most. Two turns are under way where shared memory has room for it, else one.

    At head dim 128 on an H200 these are the measured 64 keys, 4 warps, 3 stages, 3 programs a multiprocessor. An FP8 cache
    is read twice as many keys at a time, hence the same bytes, unless the query is float32: widened keys fill registers.
    """
    hopper = DecodeConfig("hopper", UNIT, 4, 3, 2, 4, 8)
    if serves(hopper, q, kv_layer, plan):
        return hopper
    dim = triton.next_power_of_2(q.shape[2])
    row_bytes = dim * q.element_size()  # of the query, and of a key in registers
    keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    if kv_layer.element_size() == 1 and q.element_size() == 2:
        keys *= 2
    held = 2 * keys * dim * kv_layer.element_size()  # K and V of a turn
    room = _shared_memory(q.device)
    spare = max(SPARE, SPARE_ROWS * row_bytes)
    if kv_layer.element_size() < q.element_size() == 4:
        spare += 2 * keys * row_bytes  # without tensor cores, what was widened returns to shared memory
    stages = 3 if room >= 2 * (2 * held + spare) else 2
    per_sm = min(3 if q.element_size() == 2 else 2, max(1, room // ((stages - 1) * held + spare)))
    return DecodeConfig("shares", keys, 4, stages, per_sm, 4, 8)


def serves(config: DecodeConfig, q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan) -> bool:
    """Whether `config`'s kernel takes these dtypes, head dim, window, layout and GPU."""
    if config.kind == "shares":
        return True
    group = q.shape[1] // kv_layer.shape[2]
    sixteen = q.dtype != torch.float32 and kv_layer.dtype == q.dtype
    return sixteen and q.shape[2] in (64, 128) and group <= 16 and plan.window == 0 and lies_in_rows(kv_layer, UNIT)


def attend_decodes(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    out: torch.Tensor,
    config: DecodeConfig | None = None,
    scales: KVScales = UNSCALED,
) -> None:
    """Write `out` for the plan's decodes."""
    config = config or choose(q, kv_layer, plan)
    shares: Shares | None = plan.scratch.get("decode_shares")
    shares_known = shares is not None
    if shares is None:
        shares = make_room(q, kv_layer, plan, config)
        plan_call(kv_layer, plan, config, shares).launch()
        plan.scratch["decode_shares"] = shares
    # The first layer's kernel follows the plan it reads at once, so it may not start early.
    decode_call(q, kv_layer, plan, scale, out, config, shares, scales, chain=shares_known).launch()


def make_room(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, config: DecodeConfig) -> Shares:
    """Host bounds decide sizes and grid; the lengths themselves stay on the device."""
    count, kv_heads = plan.num_decodes, kv_layer.shape[2]
    seen = min(plan.max_context_len, plan.window + UNIT) if plan.window else plan.max_context_len
    bound = count * triton.cdiv(max(seen, 1), UNIT)  # units there can be
    room = max(1, config.per_sm * _multiprocessors(q.device) // kv_heads)
    shares = min(room, max(triton.cdiv(bound, config.least), min(FEW.value, bound)))
    sizes = [4, count + 1, shares + 2, shares + 2, count * kv_heads]  # each starts at 16 bytes: alignment is compiled in
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 4) * 4)
    ints = torch.empty(starts[-1], dtype=torch.int32, device=q.device)
    header, first, start, sequence, arrivals = (ints[a : a + size] for a, size in zip(starts, sizes, strict=False))
    pieces = 2 * shares * q.shape[1]
    floats = torch.empty(pieces * (q.shape[2] + 1), dtype=torch.float32, device=q.device)
    partial, lse = floats[: pieces * q.shape[2]], floats[pieces * q.shape[2] :]
    return Shares(header, first, start, sequence, arrivals, partial, lse, shares)


def plan_call(kv_layer: torch.Tensor, plan: AttentionPlan, config: DecodeConfig, shares: Shares) -> Call:
    arguments = (
        plan.context_lens, shares.header, shares.first, shares.start, shares.sequence, shares.arrivals, plan.num_decodes,
        shares.number, plan.window,
    )  # fmt: skip
    options = {
        "UNIT": UNIT, "LEAST": config.least, "WHOLE": config.whole, "KV_HEADS": kv_layer.shape[2],
        "PAD": max(PLAN_LANES, triton.next_power_of_2(plan.num_decodes)), "num_warps": 4,
    }  # fmt: skip
    return Call(plan_shares_kernel, (1,), arguments, options)


def decode_call(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    out: torch.Tensor,
    config: DecodeConfig,
    shares: Shares,
    scales: KVScales = UNSCALED,
    *,
    chain: bool = False,
) -> Call:
    _, num_heads, head_dim = q.shape
    kv_heads, block_size = kv_layer.shape[2:4]
    if config.kind == "hopper":
        return _hopper_call(q, kv_layer, plan, scale, out, config, shares, chain=chain)
    stored = kv_layer.view(torch.uint16) if kv_layer.dtype == FP8 else kv_layer
    block, side, head, token, _ = kv_layer.stride()
    group = num_heads // kv_heads
    members = triton.next_power_of_2(group)
    dim_pad = max(32, triton.next_power_of_2(head_dim))  # the halves of a paired key are products of 16, the least there is
    arguments = (
        q, stored, out, shares.partial, shares.partial_lse, plan.tables, plan.rows, plan.context_lens,
        shares.header, shares.first, shares.start, shares.sequence, shares.arrivals, scale * scales.key * LOG2_E, scales.value,
        q.stride(0), q.stride(1), block, side, head, token, plan.tables.stride(0), plan.window,
    )  # fmt: skip
    options = {
        "KV_HEADS": kv_heads, "GROUP": group, "GROUP_PAD": max(16, members), "MEMBERS": members, "HEAD_DIM": head_dim,
        "DIM_PAD": dim_pad, "BLOCK_SIZE": block_size, "UNIT": UNIT, "KEYS": config.keys,
        "CHUNK": max(1, min(16, 8192 // (members * dim_pad))), "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": config.warps, "num_stages": config.stages, "maxnreg": _registers(config),
        "HAS_FP8": launch_fp8.has_fp8(kv_layer.device),
    }  # fmt: skip
    options |= chained(q.device) if chain else {"PDL": False}
    return Call(decode_shares_kernel, (shares.number * kv_heads,), arguments, options)


def _hopper_call(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, out: torch.Tensor, config: DecodeConfig,
    shares: Shares, *, chain: bool,
) -> Call:
    from workstation.kernels.attention_decode_hopper import hopper_decode_kernel

    kv_heads, block_size, head_dim = kv_layer.shape[2:]
    group = q.shape[1] // kv_heads
    cache, strides = cache_rows(kv_layer)
    arguments = (
        q, cache, out, shares.partial, shares.partial_lse, plan.tables, plan.rows, plan.context_lens, shares.header,
        shares.first, shares.start, shares.sequence, shares.arrivals, scale * LOG2_E, q.stride(0), q.stride(1), *strides,
        plan.tables.stride(0),
    )  # fmt: skip
    options = {
        "KV_HEADS": kv_heads, "GROUP": group, "MEMBERS": max(4, triton.next_power_of_2(group)), "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size, "STAGES": config.stages, "num_warps": 4, "maxnreg": HOPPER_REGISTERS,
    }  # fmt: skip
    options |= chained(q.device) if chain else {"PDL": False}
    return Call(hopper_decode_kernel, (shares.number * kv_heads,), arguments, options)


def _registers(config: DecodeConfig) -> int | None:
    """Registers a thread may take so that `per_sm` programs are resident: one that waits for the others would run alone."""
    room = REGISTERS // (config.per_sm * config.warps * 32) // 8 * 8
    return room if room < 255 else None


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 20  # the interpreter
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
