"""Small matrix products compiled ahead: which kernel a configuration needs, on a GPU that need not be here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from workstation.kernels.code_tables import E2M1, NF4, ScaleKind
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.gemm_launch import FP8, Call, Operands, gemm_call
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.offline import targeting
from workstation.kernels.quantized import Halves
from workstation.kernels.tuning import CODE_SCHEMES, FP8_CAPABILITY, INTEGER_BITS, GemmConfig, Problem, Scheme, fuses_silu

GROUP = 128


def call_of(problem: Problem, config: GemmConfig, capability: int) -> Call:
    """The product's launch for bfloat16 results without bias or residual; dtypes stand for the tensors.

    Integers are symmetric, with a bfloat16 scale a group of 128 columns; NF4 has one a group of 64.
    """
    x: Any = FP8 if problem.scheme == "fp8" else torch.bfloat16
    if problem.scheme == "int4_halves":
        x = halves_types(problem.m)
    weight: Any = torch.bfloat16
    if problem.scheme in INTEGER_BITS:
        weight = int_types(INTEGER_BITS[problem.scheme], GROUP, problem.k)
    elif problem.scheme in CODE_SCHEMES:
        weight = code_types(problem.scheme, problem.k)
    elif problem.scheme != "16bit":
        weight = FP8 if capability >= FP8_CAPABILITY else torch.uint8
    scale = torch.float32 if problem.scheme.startswith("fp8") else None
    x_scale = torch.float32 if problem.scheme == "fp8" else None
    silu = fuses_silu(problem, config)
    whole = config.splits == 1 or config.kind == "hopper"
    out = torch.bfloat16 if whole else torch.float32
    n = problem.n // 2 if silu else problem.n
    return gemm_call(Operands(x, weight, scale, x_scale), config, out, problem.m, n, problem.k, silu=silu)


def int_types(bits: int, size: int, columns: int, *, zeros: bool = False) -> Any:
    """An `IntWeight` of dtypes. size: of a group, at most the columns."""
    words: Any = torch.int16
    scale: Any = torch.bfloat16
    zero: Any = torch.uint8 if zeros else None
    return IntWeight(words, scale, zero, bits, min(size, columns), columns)


def halves_types(tokens: int) -> Any:
    """`Halves` of dtypes."""
    values: Any = FP8
    factors: Any = torch.float32
    return Halves(values, factors, tokens)


def code_types(scheme: Scheme, columns: int, *, divides: bool = False) -> Any:
    """A `CodeWeight` of dtypes."""
    words: Any = torch.int16
    number: Any = torch.float32
    byte: Any = torch.int32
    if scheme == "nf4":
        return CodeWeight(words, number, None, number, NF4, ScaleKind.F32, 64, columns)
    if scheme == "mxfp4":
        return CodeWeight(words, byte, None, number, E2M1, ScaleKind.E8M0, 32, columns)
    return CodeWeight(words, byte, number, number, E2M1, ScaleKind.E4M3, 16, columns, divides)


def fingerprint(problem: Problem, config: GemmConfig, capability: int) -> tuple[Any, ...]:
    """Equal for products that run the same compiled kernel on one kind of device. A ring's has its splits in it."""
    splits = config.splits if config.kind == "hopper" else min(config.splits, 2)
    call = call_of(problem, replace(config, splits=splits), capability)
    kinds = [_kind(value) for value in call.arguments[:9]]
    return capability, call.kernel.__name__, *kinds, *sorted(call.options.items())


def _kind(value: Any) -> str | None:
    """What a compiled kernel knows of an argument: a pointer's type, a descriptor's box."""
    if isinstance(value, torch.dtype):
        return str(value)
    return f"{value.base.dtype} {value.block_shape}" if hasattr(value, "block_shape") else None


def compile_for(problem: Problem, config: GemmConfig, capability: int) -> Any:
    """Triton's compiled kernel, with `asm` and `metadata`; it is in Triton's cache from then on."""
    return compile_call(call_of(problem, config, capability), capability)


def compile_call(call: Call, capability: int) -> Any:
    with targeting(capability):
        return call.kernel.warmup(*call.arguments, grid=call.grid, **call.options)
