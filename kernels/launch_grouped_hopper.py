"""Launches of `gemm_grouped_hopper.py`. Called through `launch_int.py` and `launch_codes.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton

from workstation.kernels.code_decode import filler
from workstation.kernels.code_tables import CHUNK, ScaleKind
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.dependent import chained
from workstation.kernels.gemm_grouped_hopper import hopper_grouped_kernel
from workstation.kernels.int_weights import UNIT, WORD_BITS, IntWeight
from workstation.kernels.launch_gemm_hopper import boxes, split_space
from workstation.kernels.tuning import CHANNELS, PANEL_BYTES, GemmConfig, table_stages

E2M1 = "e2m1"  # a table that needs no looking up
NUMBER, E8M0, E4M3 = "number", "e8m0", "e4m3"  # what scales are that weights meet before their products
BYTES = (E8M0, E4M3)
COPYING, WORDS, COLUMNS = 40, 64, 64  # as in `gemm_grouped_hopper.py`
ALONE = 80 << 10  # bytes of a ring beside a table, for which a multiprocessor has room once
FEW_SUMS = 32  # tiles times rows of a warpgroup, up to which two groups narrower than a chunk are multiplied at a time
MOST_REGISTERS = 232  # of a thread that multiplies
TOGETHER = 256  # columns of one tile or two whose products are in flight, where weights meet scales first
SCALED_POWERS = 16  # `SCALED_ROWS` of e8m0 scales, which are exact in bfloat16
SCALED_ROWS = 128  # of a program, from which a group has more sums than weights: weights are scaled instead


def grouped_call(
    x: Any, weight: IntWeight | CodeWeight, bias: Any, out: Any, config: GemmConfig, m: int, n: int, k: int, *, silu: bool
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """(kernel, grid, arguments, options) for a weight of n channels (2n with silu), writing out [m, n].

    Codes: without a factor, or with e4m3 scales.
    """
    bits, zero, table = _form(weight, _type(x))
    factor, divides = (None, False) if isinstance(weight, IntWeight) else (weight.factor, weight.divides)
    teams = config.warps // 4
    tiles = config.block_n // (teams * CHANNELS)
    if silu:
        tiles = 2 if tiles else 1  # a warpgroup has gate and up, or one of two has either
    chunk = triton.cdiv(triton.cdiv(k, config.block_k), config.splits) * config.block_k
    wide = teams * tiles * CHANNELS // (2 if silu else 1)
    grid = (triton.cdiv(n, wide) * triton.cdiv(m, config.block_m), triton.cdiv(k, chunk))
    partial, arrivals = split_space(grid, teams * tiles * CHANNELS * config.block_m, out)
    channels = 2 * n if silu else n
    width = triton.cdiv(k, WORD_BITS // bits * UNIT) * UNIT
    step = config.block_k
    together = weight.size * (4 if table == E2M1 else 1)  # columns of a row of scales
    scales = boxes(weight.scale, (triton.cdiv(k, together), channels), (max(1, step // together), CHANNELS), 0)
    zero_stride = zero.stride(0) if isinstance(zero, torch.Tensor) else channels  # else a dtype, or None
    arguments = (
        boxes(x, (m, k), (config.block_m, COLUMNS), PANEL_BYTES),
        boxes(weight.words, (channels, width), (CHANNELS, WORDS), PANEL_BYTES), scales, out, partial, arrivals, zero, factor,
        bias, m, n, k, chunk, together, zero_stride,
    )  # fmt: skip
    scaled = _scaled(weight, _type(x), config.block_m)
    span = CHUNK if scaled in BYTES else step if weight.size == weight.columns else min(step, weight.size)
    groups, registers, stages = _room(config, teams, tiles, span, scaled, table, zeros=zero is not None)
    options = {
        "BITS": bits, "TABLE": table, "SPAN": span, "GROUPS": groups, "TEAMS": teams,
        "TILES": tiles, "SILU": silu, "SPLITS": grid[1], "BLOCK_M": config.block_m,
        "PANELS": step // (WORDS * WORD_BITS // bits), "STAGES": stages, "REGISTERS": registers, "SCALED": scaled,
        "DIVIDES": divides, "num_warps": 4, "maxnreg": -(-(teams * registers + COPYING) // (8 * (teams + 1))) * 8,
    }  # fmt: skip
    options |= chained(out.device) if isinstance(out, torch.Tensor) else {"PDL": True, "launch_pdl": True}
    return hopper_grouped_kernel, grid, arguments, options


def _room(
    config: GemmConfig, teams: int, tiles: int, span: int, scaled: str | None, table: str | None, *, zeros: bool
) -> tuple[int, int, int]:
    """(groups multiplied at a time, registers of a thread that multiplies, stages): what keeps products in flight together."""
    step, block_m, stages = config.block_k, config.block_m, config.stages
    sums = tiles * block_m
    if scaled is not None and not zeros:
        spare = 56 if block_m == SCALED_ROWS else 0  # such programs fill a multiprocessor
        return max(1, min(step, TOGETHER) // tiles // span), min(MOST_REGISTERS, 104 + sums // 2 + spare), stages
    if table is None:
        return 1, _registers(tiles, block_m, span, zeros=zeros), stages
    if table == E2M1:
        return max(1, min(4, 2 * FEW_SUMS // sums)), min(MOST_REGISTERS, 64 + tiles * (4 * block_m + step // 8 - 32)), stages
    stages = max(stages, table_stages(step, teams * tiles * CHANNELS, block_m))
    # A ring that fills a multiprocessor has its registers to itself.
    alone = stages * teams * step * (tiles * CHANNELS // 2 + block_m) > ALONE
    registers = _table_registers(tiles, block_m, span, step // min(span, 64) + 2 * alone)
    return 2 if span < CHUNK and sums <= FEW_SUMS else 1, registers, stages


def _scaled(weight: IntWeight | CodeWeight, dtype: torch.dtype, block_m: int) -> str | None:
    """What scales are that weights meet before their products, in programs of so many rows; None: sums meet them."""
    if isinstance(weight, IntWeight):
        return NUMBER if weight.scales_first(dtype) and block_m >= SCALED_ROWS else None
    if weight.kind is ScaleKind.E4M3:
        return E4M3
    first = weight.kind is ScaleKind.E8M0 and dtype == torch.bfloat16 and block_m >= SCALED_POWERS
    return E8M0 if first else None


def _type(tensor: Any) -> torch.dtype:
    return tensor.dtype if isinstance(tensor, torch.Tensor) else tensor


def _form(weight: IntWeight | CodeWeight, dtype: torch.dtype) -> tuple[int, Any, str | None]:
    """(bits, zero points, what fills the table) for activations of `dtype`."""
    if isinstance(weight, IntWeight):
        return weight.bits, weight.zero, None
    if weight.kind is not ScaleKind.F32:
        return 4, None, E2M1
    return 4, None, filler(weight.values, "fp16" if dtype == torch.float16 else "bf16")


def _registers(tiles: int, block_m: int, span: int, *, zeros: bool) -> int:
    """A multiplying thread's: as few as the compiler can keep a group's products in flight with, so that programs find room."""
    sums = tiles * block_m * 9 // 8 if block_m > 16 or tiles > 1 else 0
    return min(MOST_REGISTERS, (80 + (tiles - 1) * 64 + sums + 16 * (zeros + tiles * (span > 128))) // 8 * 8)


def _table_registers(tiles: int, block_m: int, span: int, groups: int) -> int:
    """The same beside a table: operands in flight, sums, and the places of so many groups of a step."""
    columns = max(span, CHUNK if tiles * block_m <= FEW_SUMS else CHUNK // 2)
    sums = 20 if tiles == 1 and block_m <= 16 else tiles * block_m * 5 // 2
    return min(MOST_REGISTERS, -(-(44 + tiles * columns // 4 + sums + 10 * tiles * (groups - 4)) // 8) * 8)
