"""Launches of `gemm_codes_hopper.py`. Called through `launch_codes.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton

from workstation.kernels.code_tables import CHUNK
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.dependent import chained
from workstation.kernels.gemm_codes_hopper import hopper_codes_kernel
from workstation.kernels.int_weights import UNIT
from workstation.kernels.launch_codes import decoding
from workstation.kernels.launch_gemm_hopper import boxes, split_space
from workstation.kernels.tuning import CHANNELS, GemmConfig

COPYING, WORDS = 40, 64  # as in `gemm_codes_hopper.py`


def hopper_codes_call(
    x: Any, weight: CodeWeight, bias: Any, out: Any, config: GemmConfig, m: int, n: int, k: int, *, silu: bool
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """(kernel, grid, arguments, options) for a weight of n channels (2n with silu), writing out [m, n]."""
    tiles = 2 if silu else config.block_n // CHANNELS
    chunk = triton.cdiv(triton.cdiv(k, config.block_k), config.splits) * config.block_k
    grid = (triton.cdiv(n, CHANNELS if silu else config.block_n) * triton.cdiv(m, config.block_m), triton.cdiv(k, chunk))
    partial, arrivals = split_space(grid, tiles * CHANNELS * config.block_m, out)
    channels, kept = (2 * n if silu else n), isinstance(out, torch.Tensor)
    arguments = (
        boxes(x, (m, k), (config.block_m, UNIT), 64),
        boxes(weight.words, (channels, triton.cdiv(k, CHUNK) * UNIT), (CHANNELS, WORDS), 128), weight.scale, weight.factor,
        out, partial, arrivals, bias, m, n, k, chunk, weight.scale.stride(0) if kept else channels,
    )  # fmt: skip
    options = {
        "DIVIDES": weight.divides,
        **decoding(weight, x.dtype if kept else x), "TILES": tiles, "SILU": silu, "SPLITS": grid[1],
        "BLOCK_M": config.block_m, "PANELS": config.block_k // (4 * WORDS), "STAGES": config.stages, "num_warps": 4,
        "maxnreg": -(-(_registers(tiles, config.block_m) + COPYING) // 16) * 8,
    }  # fmt: skip
    options |= chained(out.device) if kept else {"PDL": True, "launch_pdl": True}
    return hopper_codes_kernel, grid, arguments, options


def _registers(tiles: int, block_m: int) -> int:
    """A multiplying thread's: sums, a chunk's products in flight, and what decoding needs."""
    return 112 + (tiles - 1) * 56 + tiles * block_m // 2
