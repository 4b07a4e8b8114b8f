"""Launches of `gemm_few_hopper.py`. Called through `launch_int.py` and `launch_codes.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton

from workstation.kernels import gemm_launch
from workstation.kernels.code_tables import ScaleKind
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.dependent import chained
from workstation.kernels.gemm_few_hopper import hopper_few_kernel
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.launch_gemm_hopper import boxes, split_space
from workstation.kernels.launch_grouped_hopper import E4M3, E8M0
from workstation.kernels.quantized import Halves
from workstation.kernels.tuning import CHANNELS, FEW_ROWS, FEW_SPAN, PANEL_BYTES, GemmConfig, few_chunks

COPYING = 40  # registers of a thread that copies
# Of a thread that multiplies, by what scales are and by tiles.
REGISTERS: dict[str | None, dict[int, int]] = {None: {1: 88, 2: 120}, E8M0: {1: 88, 2: 136}, E4M3: {1: 104, 2: 168}}


def few_rows_call(
    x: Any | Halves, weight: IntWeight | CodeWeight, bias: Any, out: Any, config: GemmConfig, m: int, n: int, k: int, *,
    silu: bool,
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """(kernel, grid, arguments, options) for a weight of n channels (2n with silu), writing out [m, n]. m: at most FEW_ROWS.

    Dtypes may stand for tensors, those of `Halves` too.
    """
    assert m <= FEW_ROWS
    tiles = 2 if silu else config.block_n // CHANNELS
    chunk = gemm_launch.chunk_size(k, config)
    wide = CHANNELS if silu else tiles * CHANNELS
    grid = (triton.cdiv(n, wide), triton.cdiv(k, chunk))
    partial, arrivals = split_space(grid, tiles * CHANNELS * FEW_ROWS, out)
    channels = 2 * n if silu else n
    kind = None if isinstance(weight, IntWeight) else E8M0 if weight.kind is ScaleKind.E8M0 else E4M3
    together = weight.size if kind is None else 4 * weight.size  # columns of a row of scales, or of words of four
    group = min(together, config.block_k)
    words: Any = weight.words.view(torch.int8) if isinstance(weight.words, torch.Tensor) else torch.int8
    scales = boxes(weight.scale, (triton.cdiv(k, together), channels), (config.block_k // group, CHANNELS), 0)
    codes = boxes(words, (channels, k // 2), (CHANNELS, PANEL_BYTES), PANEL_BYTES)
    panels = config.block_k // (2 * FEW_SPAN)
    factors, stride = None, x.stride(0) if isinstance(x, torch.Tensor) else k
    if isinstance(x, Halves):
        groups, rows = k // FEW_SPAN, 2 * FEW_ROWS
        factors = boxes(x.factors, (groups, 2 * rows), (2 * panels, 2 * rows), 0)
        x = boxes(x.values, (groups * rows, FEW_SPAN), (2 * rows, FEW_SPAN), FEW_SPAN)
    factor, divides = (None, False) if isinstance(weight, IntWeight) else (weight.factor, weight.divides)
    arguments = (x, codes, scales, out, partial, arrivals, factor, bias, factors, m, n, k, chunk, together, stride)
    options = {
        "KIND": kind, "DIVIDES": divides, "GROUP": group, "TILES": tiles, "SILU": silu, "SPLITS": grid[1], "PANELS": panels,
        "TOKENS": 1 if factors else 1 << (m - 1).bit_length(), "CHUNKS": 1 if factors else few_chunks(k, config, m),
        "STAGES": config.stages, "COPYING": COPYING, "num_warps": 4,
        "maxnreg": -(-(REGISTERS[kind][tiles] + COPYING) // 16) * 8,
    }  # fmt: skip
    options |= chained(out.device) if isinstance(out, torch.Tensor) else {"PDL": True, "launch_pdl": True}
    return hopper_few_kernel, grid, arguments, options
