"""Launches of `gemm_hopper.py`. Called through `gemm_launch.py`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from workstation.kernels.dependent import chained
from workstation.kernels.gemm_hopper import hopper_gemm_kernel
from workstation.kernels.tuning import CHANNELS, PANEL_BYTES, GemmConfig

MOST_TILES = 1 << 16  # output tiles of a product whose K is split


def hopper_call(
    x: Any, weight: Any, x_scale: Any, weight_scale: Any, bias: Any, residual: Any, out: Any, config: GemmConfig,
    m: int, n: int, k: int, *, silu: bool,
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """(kernel, grid, arguments, options) for a weight of n channels (2n with silu), writing out [m, n].

    Dtypes may stand for the tensors, for compiling ahead.
    """
    element = _dtype(weight).itemsize
    width = PANEL_BYTES // element
    tiles = 2 if silu else config.block_n // CHANNELS
    steps = triton.cdiv(k, config.block_k)
    chunk = triton.cdiv(steps, config.splits) * config.block_k
    grid = (triton.cdiv(n, CHANNELS if silu else config.block_n) * triton.cdiv(m, config.block_m), triton.cdiv(k, chunk))
    partial, arrivals = split_space(grid, tiles * CHANNELS * config.block_m, out)
    arguments = (
        boxes(x, (m, k), (config.block_m, width), PANEL_BYTES),
        boxes(weight, (2 * n if silu else n, k), (CHANNELS, width), PANEL_BYTES),
        out, partial, arrivals, x_scale, weight_scale, bias, residual, m, n, k, chunk,
    )  # fmt: skip
    options = {
        "TILES": tiles, "SILU": silu, "SPLITS": grid[1], "BLOCK_M": config.block_m, "PANELS": config.block_k // width,
        "WIDTH": width, "STAGES": config.stages, "num_warps": 4, "maxnreg": registers(tiles, config.block_m),
    }  # fmt: skip
    options |= chained(out.device) if isinstance(out, torch.Tensor) else {"PDL": True, "launch_pdl": True}
    return hopper_gemm_kernel, grid, arguments, options


def registers(tiles: int, block_m: int) -> int:
    """A thread's at launch, between what the multiplying and the copying warps need: other kernels' CTAs shall find room."""
    accumulators = tiles * block_m // 2
    return max(64, -(-(accumulators * 13 // 8 + 112) // 16) * 8)


def split_space(grid: tuple[int, int], tile: int, out: Any) -> tuple[Any, Any]:
    """(partial, arrivals) for a grid of (tiles, splits) with so many sums a tile; None without splits, dtypes for a dtype."""
    if grid[1] == 1:
        return None, None
    if not isinstance(out, torch.Tensor):
        return torch.float32, torch.int32
    return torch.empty(grid[0] * grid[1] * tile, dtype=torch.float32, device=out.device), _arrivals(out.device)


def boxes(matrix: Any, shape: tuple[int, int], box: tuple[int, int], swizzle: int) -> TensorDescriptor:
    """The descriptor of a matrix [shape], rows apart as they are, in boxes whose bytes are swizzled within so many."""
    if not isinstance(matrix, torch.Tensor):
        matrix = torch.empty(shape, dtype=matrix, device="meta")
    layout = gl.NVMMASharedLayout(swizzle, matrix.element_size() * 8, 2)
    return TensorDescriptor(matrix, list(shape), [matrix.stride(0), 1], list(box), layout)


def _dtype(matrix: Any) -> torch.dtype:
    return matrix.dtype if isinstance(matrix, torch.Tensor) else matrix


@cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """Counters, zero between products; one stream uses them at a time."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
