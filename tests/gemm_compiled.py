"""Small matrix products compiled for GPUs that are not here: which kernels a configuration needs, and what they take."""

from __future__ import annotations

from typing import Any

import torch

from workstation.kernels.gemm_launch import Call, Operands, gemm_call
from workstation.kernels.offline import Resources, resources, targeting
from workstation.kernels.tuning import FP8_CAPABILITY, Device, GemmConfig, Problem, fuses_silu

FP8 = torch.float8_e4m3fn


def call_of(problem: Problem, config: GemmConfig, capability: int) -> Call:
    """The product's launch with dtypes for tensors, as `Call.kernel.warmup` takes them."""
    x = FP8 if problem.scheme == "fp8" else torch.bfloat16
    weight: Any = torch.bfloat16
    if problem.scheme != "16bit":
        weight = FP8 if capability >= FP8_CAPABILITY else torch.uint8
    scale = None if problem.scheme == "16bit" else torch.float32
    x_scale = torch.float32 if problem.scheme == "fp8" else None
    silu = fuses_silu(problem, config)
    out = torch.bfloat16 if config.splits == 1 else torch.float32
    n = problem.n // 2 if silu else problem.n
    return gemm_call(Operands(x, weight, scale, x_scale), config, out, problem.m, n, problem.k, silu=silu)


def fingerprint(problem: Problem, config: GemmConfig, device: Device) -> tuple[Any, ...]:
    """Equal for products that run the same compiled kernel on the same device."""
    call = call_of(problem, config, device.capability)
    kinds = [value if isinstance(value, torch.dtype) else None for value in call.arguments[:6]]
    return device.capability, call.kernel.__name__, *kinds, *sorted(call.options.items())


def compile_for(problem: Problem, config: GemmConfig, device: Device) -> Any:
    """Triton's compiled kernel, `asm` and `metadata` included."""
    call = call_of(problem, config, device.capability)
    with targeting(device.capability):
        return call.kernel.warmup(*call.arguments, grid=call.grid, **call.options)


def resources_of(problem: Problem, config: GemmConfig, device: Device) -> Resources:
    return resources(compile_for(problem, config, device))
