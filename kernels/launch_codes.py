"""Products with 4-bit codes on a GPU: which kernel serves a layer. Called through `ops.py`, which checks the shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton

from workstation.kernels import gemm_codes, gemm_launch
from workstation.kernels.code_decode import decoder
from workstation.kernels.code_tables import CHUNK, ScaleKind
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.gemm_launch import Call, Operands
from workstation.kernels.launch import silu_mul
from workstation.kernels.launch_int import suits_groups, widened
from workstation.kernels.tuning import (
    CHANNELS,
    FEW_SPAN,
    LEAST_STEP,
    MAX_ROWS,
    MOST_STEP,
    WIDE_ABOVE,
    GemmConfig,
    Output,
    Problem,
    Scheme,
    is_few,
    most_rows,
)

WIDENED_ROWS = 32
SUMMED_ROWS = 16  # of a program with gate and up, at most, where every 32 columns have a sum; twice as many of one tile
RING_STEP = 256  # columns of 64 words, the least step of `gemm_grouped_hopper.py`
KINDS = {ScaleKind.F32: gemm_codes.F32, ScaleKind.E8M0: gemm_codes.E8M0, ScaleKind.E4M3: gemm_codes.E4M3}
_SCHEMES: dict[ScaleKind, Scheme] = {ScaleKind.F32: "nf4", ScaleKind.E8M0: "mxfp4", ScaleKind.E4M3: "nvfp4"}


def linear_codes(x: torch.Tensor, weight: CodeWeight, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    config = _choose(x, weight, "linear")
    if config is not None:
        return gemm_launch.run_linear(Operands(x, weight, bias=bias), config, x.dtype, out=out)
    return widened(x, weight, bias, out, widen_call)


def silu_mul_codes(x: torch.Tensor, weight: CodeWeight, bias: torch.Tensor | None) -> torch.Tensor:
    config = _choose(x, weight, "silu_mul")
    if config is not None:
        return gemm_launch.run_linear(Operands(x, weight, bias=bias), config, x.dtype, silu=True)
    made: torch.Tensor = silu_mul(linear_codes(x, weight, bias, None))
    return made


def scheme_of(weight: CodeWeight) -> Scheme:
    return _SCHEMES[weight.kind]


def _choose(x: torch.Tensor, weight: CodeWeight, output: Output) -> GemmConfig | None:
    """The configuration of `codes_gemm_kernel`; None where weights are widened for the library."""
    tokens = x.shape[0]
    if tokens == 0:
        return GemmConfig("dot", block_k=CHUNK)  # nothing will be launched
    scheme = scheme_of(weight)
    most = MAX_ROWS if _has_sums(weight, x.dtype) else most_rows(scheme)
    if tokens > most or not _reads(weight) or x.stride(0) % 16 or x.data_ptr() % 16:
        return None
    if x.is_cuda and x.dtype == torch.float32:
        return None
    rings = _rings(weight, output)
    config = _cached_choice(scheme, output, min(tokens, WIDE_ABOVE), weight.rows, weight.columns, x.device, rings)
    crowded = config.kind == "hopper" and output == "silu_mul" and tokens > SUMMED_ROWS and _has_sums(weight, x.dtype)
    return None if config.kind == "library" or crowded else fitted(config, weight, x.dtype)


def _rings(weight: CodeWeight, output: Output) -> bool:
    """Whether `gemm_grouped_hopper.py` can read the weight. A factor meets sums of weights that met their scales only."""
    whole = weight.rows % (2 * CHANNELS) == 0 if output == "silu_mul" else weight.rows % 8 == 0
    plain = weight.factor is None or weight.kind is ScaleKind.E4M3
    return whole and plain and suits_groups(weight, RING_STEP) and weight.scale.stride(0) % 4 == 0


def _has_sums(weight: CodeWeight, dtype: torch.dtype) -> bool:
    """Whether in a ring every 32 columns have a sum, which leaves registers for few rows: float16 may not hold their scales."""
    return weight.kind is ScaleKind.E8M0 and dtype != torch.bfloat16


def _reads(weight: CodeWeight) -> bool:
    """Whether the kernel has this weight's groups and widths."""
    groups = weight.kind is not ScaleKind.F32 or weight.size in (32, 64) or weight.size % CHUNK == 0
    return groups and weight.rows % 16 == 0 and weight.columns % 16 == 0


@cache
def _cached_choice(scheme: Scheme, output: Output, m: int, n: int, k: int, device: torch.device, rings: bool) -> GemmConfig:
    return gemm_launch.chosen(Problem(scheme, output, m, n, k), device, rings=rings)


def fitted(config: GemmConfig, weight: CodeWeight, dtype: torch.dtype) -> GemmConfig:
    """The configuration with a step of one or two chunks of the layout; a ring's suits the groups. Few rows get another ring
    where theirs cannot read the weight, or activations of `dtype`."""
    if config.kind == "hopper":
        if is_few(config) and (dtype != torch.bfloat16 or weight.kind is ScaleKind.F32 or weight.columns % FEW_SPAN):
            config = replace(config, block_m=8)
        if config.block_m > SUMMED_ROWS and _has_sums(weight, dtype):
            return replace(config, block_n=CHANNELS, block_m=2 * SUMMED_ROWS, block_k=RING_STEP, warps=4)
        table = weight.kind is ScaleKind.F32
        return replace(config, block_k=RING_STEP) if table and not suits_groups(weight, config.block_k) else config
    return replace(config, block_k=min(max(config.block_k, LEAST_STEP["nf4"]), MOST_STEP["nf4"]))


def codes_call(operands: Operands, config: GemmConfig, out: Any, m: int, n: int, k: int, *, silu: bool) -> Call:
    """The kernel for a weight of n channels (2n with silu), writing out [splits, m, n]; `hopper` sums its splits: [m, n].

    Dtypes may stand for tensors.
    """
    weight: CodeWeight = operands.weight
    if config.kind == "hopper":
        from workstation.kernels.launch_few_hopper import few_rows_call  # Gluon, for one kind of GPU only
        from workstation.kernels.launch_grouped_hopper import grouped_call

        if is_few(config):
            return Call(*few_rows_call(operands.x, weight, operands.bias, out, config, m, n, k, silu=silu))
        return Call(*grouped_call(operands.x, weight, operands.bias, out, config, m, n, k, silu=silu))
    chunk = gemm_launch.chunk_size(k, config)
    kept = isinstance(weight.words, torch.Tensor)
    x_stride = operands.x.stride(0) if kept else k
    w_stride = weight.words.stride(0) if kept else triton.cdiv(k, CHUNK) * 32
    scale_stride = weight.scale.stride(0) if kept else n
    row_tiles = triton.cdiv(m, config.block_m)
    dtype: torch.dtype = operands.x.dtype if kept else operands.x
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages, "SILU": silu, "PDL": config.pdl}
    options |= {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "STAGES": config.stages}
    options |= {"EVEN_K": k % config.block_k == 0, "EVICT": "evict_first" if row_tiles == 1 else ""}
    options |= {"SIZE": weight.size, "KIND": KINDS[weight.kind].value, "DIVIDES": weight.divides}
    options |= decoding(weight, dtype)
    if config.pdl:
        options["launch_pdl"] = True
    arguments = (operands.x, weight.words, out, weight.scale, weight.factor, weight.table, operands.bias, m, n, k, chunk,
                 x_stride, w_stride, scale_stride)  # fmt: skip
    grid = (triton.cdiv(n, config.block_n) * row_tiles, triton.cdiv(k, chunk))
    return Call(gemm_codes.codes_gemm_kernel, grid, arguments, options)


def decoding(weight: CodeWeight, dtype: torch.dtype) -> dict[str, Any]:
    """Which decoder a kernel for activations of `dtype` runs, and whether its values come out smaller."""
    plain = weight.kind is ScaleKind.F32
    target = "fp16" if dtype == torch.float16 else "bf16"
    return {"DECODE": decoder(weight.values if plain else None, target), "SMALLER": not plain}


def widen_call(weight: CodeWeight, out: Any) -> Call:
    """`out[:] = weight` for out [N, K], contiguous."""
    kept = isinstance(weight.words, torch.Tensor)
    strides = [part.stride(0) if kept else weight.columns for part in (weight.words, weight.scale)]
    grid = (triton.cdiv(weight.rows, WIDENED_ROWS) if kept else 1, triton.cdiv(weight.columns, CHUNK))
    arguments = (weight.words, out, weight.scale, weight.factor, weight.table, weight.rows if kept else WIDENED_ROWS,
                 weight.columns, *strides)  # fmt: skip
    options = {"SIZE": weight.size, "KIND": KINDS[weight.kind].value, "DIVIDES": weight.divides, "ROWS": WIDENED_ROWS}
    return Call(gemm_codes.widen_codes_kernel, grid, arguments, {**options, "num_warps": 4})
