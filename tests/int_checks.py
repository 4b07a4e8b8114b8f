"""Inputs and oracle for products with integer weights, interpreted or compiled."""

from __future__ import annotations

import torch
from gemm_checks import TOLERANCE, relative_error

from workstation.kernels import gemm_launch, launch_int, ops, reference_int
from workstation.kernels.gemm_launch import Operands
from workstation.kernels.int_weights import IntWeight, pack, pack_zeros
from workstation.kernels.tuning import GemmConfig

Case = tuple[torch.Tensor, IntWeight, torch.Tensor]


def make_case(m: int, n: int, k: int, *, bits: int, size: int, zeros: bool, dtype: torch.dtype, device: str = "cpu",
              scale: torch.dtype = torch.bfloat16) -> Case:
    """(x [m, k], weight [n, k], bias [n]), random."""
    gen = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=gen)
    zero = torch.randint(0, 1 << bits, (k // size, n), dtype=torch.uint8, generator=gen)
    scales = ((torch.rand(k // size, n, generator=gen) + 0.5) / (1 << bits) * k**-0.5).to(scale)
    weight = IntWeight(pack(codes, bits).to(device), scales.to(device), pack_zeros(zero, bits).to(device) if zeros else None,
                       bits, size, k)
    return torch.randn(m, k, generator=gen).to(device, dtype), weight, torch.randn(n, generator=gen).to(device, dtype)


def expected(case: Case) -> torch.Tensor:
    x, weight, bias = case
    return x.double() @ reference_int.widen(weight, torch.float32).double().t() + bias.double()


def check_product(case: Case, config: GemmConfig, out_dtype: torch.dtype) -> None:
    x, weight, bias = case
    fitted, y = launch_int.fitted(config, weight, x.dtype), expected(case)
    out = gemm_launch.run_linear(Operands(x, weight, bias=bias), fitted, out_dtype)
    assert relative_error(out, y) < TOLERANCE[out_dtype]
    gate, up = y.chunk(2, -1)
    out = gemm_launch.run_linear(Operands(x, weight, bias=bias), fitted, out_dtype, silu=True)
    assert relative_error(out, gate * gate.sigmoid() * up) < TOLERANCE[out_dtype]


def check_widening(case: Case, dtype: torch.dtype) -> None:
    _, weight, _ = case
    out = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    launch_int.widen_call(weight, out).launch()
    assert torch.equal(out, reference_int.widen(weight, dtype))


def check_door(case: Case) -> None:
    x, weight, bias = case
    y = expected(case)
    assert relative_error(ops.linear_int(x, weight, bias), y) < 2 * TOLERANCE[x.dtype]
    gate, up = y.chunk(2, -1)
    out = ops.silu_mul_int(x, weight, bias)
    assert isinstance(out, torch.Tensor) and relative_error(out, gate * gate.sigmoid() * up) < 3 * TOLERANCE[x.dtype]
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    ops.linear_int(x, weight, None, out)
    assert relative_error(out, y - bias.double()) < 2 * TOLERANCE[x.dtype]
