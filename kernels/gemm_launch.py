"""Launches of `gemm_small.py` and of the library's products. Called through `gemm.py`, which has checked the operands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch.nn import functional as F

from workstation.kernels import reference_gemm
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.dependent import chained
from workstation.kernels.gemm_small import gemm_kernel, gemv_kernel, reduce_kernel
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.tuning import (
    FP8_CAPABILITY,
    KIB,
    LIBRARY,
    MAX_ROWS,
    Device,
    GemmConfig,
    Output,
    Problem,
    Scheme,
    choose,
)

FP8 = torch.float8_e4m3fn
REDUCE_BLOCK = 1024
CHAINED_BYTES = 128 << 20  # of weights, above 64 rows: a 70B's gate-up and down took longer in a chain, an 8B's less long
INTERPRETER = Device("interpreter", 4, 227 * KIB, 90)


class Call(NamedTuple):
    """A kernel with all it is launched or compiled with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def launch(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


@dataclass(frozen=True)
class Operands:
    """One product's inputs; for compiling ahead, dtypes stand for the tensors. FP8 weights may come as uint8 codes, integers
    as an `IntWeight`, 4-bit codes as a `CodeWeight`."""

    x: Any
    weight: Any
    weight_scale: Any = None
    x_scale: Any = None
    bias: Any = None
    residual: Any = None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    config = _choose(x, weight, "linear")
    operands = Operands(x, _readable(weight), weight_scale, x_scale, bias, residual)
    if config.kind == "library":
        return library_linear(x, weight, weight_scale, x_scale, bias, residual, out_dtype, out)
    return run_linear(operands, config, out_dtype, out=out)


def linear_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    config = _choose(x, weight, "silu_mul")
    operands = Operands(x, _readable(weight), weight_scale, x_scale, bias)
    if config.kind == "library":
        gate_up = library_linear(x, weight, weight_scale, x_scale, bias, None, _wide(x.dtype))
        out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=out_dtype, device=x.device)
        if x.shape[0]:
            reduce_call(gate_up[None], out, None, silu=True, pdl=False).launch()
        return out
    return run_linear(operands, config, out_dtype, silu=True)


def run_linear(
    operands: Operands, config: GemmConfig, out_dtype: torch.dtype, *, silu: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The product with a given configuration, its split parts summed. [M, N], or [M, N / 2] with `silu`."""
    x, weight = operands.x, operands.weight
    m, n = x.shape[0], weight.shape[0] // (2 if silu else 1)
    out = torch.empty((m, n), dtype=out_dtype, device=x.device) if out is None else out
    if m == 0:
        return out
    if config.kind == "hopper":
        gemm_call(operands, config, out, m, n, x.shape[1], silu=silu).launch()
        return out
    if split_count(x.shape[1], config) == 1:
        gemm_call(operands, config, out, m, n, x.shape[1], silu=silu).launch()
        return out
    partial = run_partials(operands, config)
    reduce_call(partial, out, operands.residual, silu=silu, pdl=config.pdl).launch()
    return out


def run_partials(operands: Operands, config: GemmConfig) -> torch.Tensor:
    """The product's float32 parts, [S, M, N]."""
    x, weight = operands.x, operands.weight
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((split_count(k, config), m, n), dtype=torch.float32, device=x.device)
    if m:
        whole = Operands(x, weight, operands.weight_scale, operands.x_scale, operands.bias)
        gemm_call(whole, config, out, m, n, k, silu=False).launch()
    return out


def chunk_size(k: int, config: GemmConfig) -> int:
    """Elements of K a split takes: whole steps, spread evenly."""
    return -(-k // (config.block_k * config.splits)) * config.block_k


def split_count(k: int, config: GemmConfig) -> int:
    """Chunks of K there really are."""
    return -(-k // chunk_size(k, config))


def gemm_call(operands: Operands, config: GemmConfig, out: Any, m: int, n: int, k: int, *, silu: bool) -> Call:
    """The kernel for a weight of n channels (2n with silu), writing out [splits, m, n]; `hopper` sums its splits: [m, n].

    The residual belongs to the last sum, so the others take it here with one split only.
    """
    if isinstance(operands.weight, CodeWeight):
        from workstation.kernels.launch_codes import codes_call  # which builds on this file

        return codes_call(operands, config, out, m, n, k, silu=silu)
    if isinstance(operands.weight, IntWeight):
        from workstation.kernels.launch_int import int_call  # which builds on this file

        return int_call(operands, config, out, m, n, k, silu=silu)
    if config.kind == "hopper":
        from workstation.kernels.launch_gemm_hopper import hopper_call  # Gluon, for one kind of GPU only

        o = operands
        return Call(*hopper_call(o.x, o.weight, o.x_scale, o.weight_scale, o.bias, o.residual, out, config, m, n, k, silu=silu))
    chunk = chunk_size(k, config)
    splits = triton.cdiv(k, chunk)
    pointers = (operands.x, operands.weight, out, operands.x_scale, operands.weight_scale, operands.bias)
    residual = operands.residual if splits == 1 else None
    x_stride, w_stride = (t.stride(0) if isinstance(t, torch.Tensor) else k for t in (operands.x, operands.weight))
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages, "SILU": silu, "PDL": config.pdl}
    options |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "STAGES": config.stages}
    options["EVEN_K"] = k % config.block_k == 0
    if config.pdl:
        options["launch_pdl"] = True
    tiles = triton.cdiv(n, config.block_n)
    if config.kind == "gemv":
        return Call(gemv_kernel, (tiles, splits), (*pointers, residual, n, k, chunk, w_stride), options)
    row_tiles = triton.cdiv(m, config.block_m)
    options["BLOCK_M"] = config.block_m
    # Rows' tiles that share a weight tile find it in the L2, so only a single one lets go of it at once.
    options["EVICT"] = "evict_first" if row_tiles == 1 else ""
    arguments = (*pointers, residual, m, n, k, chunk, x_stride, w_stride)
    return Call(gemm_kernel, (tiles * row_tiles, splits), arguments, options)


def reduce_call(partial: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None, *, silu: bool, pdl: bool) -> Call:
    """The sum over partial [S, M, N] in the order of S, with SiLU·mul and the residual."""
    splits, m, _ = partial.shape
    n = out.shape[1]
    options: dict[str, Any] = {"SPLITS": splits, "BLOCK": REDUCE_BLOCK, "SILU": silu, "PDL": pdl, "num_warps": 4}
    if pdl:
        options["launch_pdl"] = True
    return Call(reduce_kernel, (m, triton.cdiv(n, REDUCE_BLOCK)), (partial, out, residual, m, n), options)


def library_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` by torch: cuBLAS or CUTLASS where they serve the dtypes, else on weights widened first."""
    if not x.is_cuda:
        y = reference_gemm.linear(x, weight, weight_scale, x_scale, bias, residual, out_dtype)
        return y if out is None else out.copy_(y)
    if out is not None and weight_scale is None and bias is None and residual is None:
        return torch.mm(x, weight.t(), out=out)
    if x_scale is not None and weight_scale is not None and _scaled_mm_serves(x, weight):
        fused = bias if bias is not None and bias.dtype == torch.bfloat16 else None
        bias = bias if fused is None else None
        y = torch._scaled_mm(
            x, weight.t(), scale_a=x_scale[:, None], scale_b=weight_scale[None], bias=fused, out_dtype=torch.bfloat16,
            use_fast_accum=True, out=out if out_dtype == torch.bfloat16 and residual is None else None,
        )  # fmt: skip
    elif weight_scale is None:
        y, bias = F.linear(x, weight, None if bias is None else bias.to(x.dtype)), None
    else:
        dtype = _wide(x.dtype)
        y = F.linear(x.to(dtype), weight.to(dtype)) * weight_scale.to(dtype)
        y = y if x_scale is None else y * x_scale[:, None].to(dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = y.to(out_dtype)
    y = y if residual is None else y + residual
    return y if out is None or y is out else out.copy_(y)


def _scaled_mm_serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return device_of(x.device).capability >= FP8_CAPABILITY and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == FP8 else dtype


def _readable(weight: torch.Tensor) -> torch.Tensor:
    """FP8 weights as bytes where the device has no such type."""
    old = weight.dtype == FP8 and device_of(weight.device).capability < FP8_CAPABILITY
    return weight.view(torch.uint8) if old else weight


def scheme_of(x: torch.dtype, weight: torch.dtype) -> Scheme:
    return "fp8" if x == FP8 else "fp8_weight" if weight == FP8 else "16bit"


def _choose(x: torch.Tensor, weight: torch.Tensor, output: Output) -> GemmConfig:
    """The library for what the kernels cannot read: float32, widths off 16, rows off 16 elements or bytes."""
    (m, k), n = x.shape, weight.shape[0]
    if m == 0:
        return GemmConfig("dot")  # nothing will be launched
    if m > MAX_ROWS or k % 16 or n % 16 or x.stride(0) % 16 or weight.stride(0) % 16 or _misplaced(x, weight):
        return LIBRARY
    if x.is_cuda and (x.dtype == torch.float32 or (x.dtype == FP8 and device_of(x.device).capability < FP8_CAPABILITY)):
        return LIBRARY
    return _cached_choice(scheme_of(x.dtype, weight.dtype), output, m, n, k, x.device)


def _misplaced(*tensors: torch.Tensor) -> bool:
    """A pointer's alignment is part of what is compiled, so kernels are launched on 16-byte starts only."""
    return any(tensor.data_ptr() % 16 for tensor in tensors)


@cache
def _cached_choice(scheme: Scheme, output: Output, m: int, n: int, k: int, device: torch.device) -> GemmConfig:
    return chosen(Problem(scheme, output, m, n, k), device)


def chosen(problem: Problem, device: torch.device, *, rings: bool = True) -> GemmConfig:
    """`tuning.choose` for a device that is here, in the chain of its kernels where that pays. rings: whether they can read
    the operands."""
    config = choose(problem, device_of(device), rings=rings and is_hopper(device))
    # Many rows of a large weight: the product outlasts by far what an early start hides, and its waiting successors cost more.
    short = problem.m <= 64 or problem.n * problem.k * problem.weight_bytes <= CHAINED_BYTES
    return replace(config, pdl=True) if chained(device)["PDL"] and short else config


@cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return Device(found.name, found.multi_processor_count, int(shared), found.major * 10 + found.minor)
