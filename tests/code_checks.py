"""Inputs and oracle for products with 4-bit codes, interpreted or compiled."""

from __future__ import annotations

import torch
from gemm_checks import TOLERANCE, relative_error

from workstation.kernels import gemm_launch, launch_codes, ops, reference_codes
from workstation.kernels.code_tables import E2M1, FP4, NF4, ScaleKind, Table, kept_groups
from workstation.kernels.code_weights import CodeWeight, pack, pack_scales
from workstation.kernels.gemm_launch import Operands
from workstation.kernels.tuning import GemmConfig

Case = tuple[torch.Tensor, CodeWeight, torch.Tensor]
# name: (table, columns of a group or 0 for a row's, kind of scale, factor, whether it divides)
FORMS: dict[str, tuple[Table, int, ScaleKind, bool, bool]] = {
    "nf4": (NF4, 64, ScaleKind.F32, False, False), "fp4_128": (FP4, 128, ScaleKind.F32, False, False),
    "nf4_32": (NF4, 32, ScaleKind.F32, False, False), "fp4_row": (FP4, 0, ScaleKind.F32, False, False),
    "mxfp4": (E2M1, 32, ScaleKind.E8M0, False, False),
    "nvfp4": (E2M1, 16, ScaleKind.E4M3, True, False), "nvfp4_divided": (E2M1, 16, ScaleKind.E4M3, True, True),
}  # fmt: skip


def make_weight(n: int, k: int, form: str, device: str = "cpu") -> CodeWeight:
    """Random codes, and scales that differ from group to group and make weights of variance 1 / k or so."""
    table, size, kind, has_factor, divides = FORMS[form]
    size = size or k
    gen = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=gen)
    groups, small = k // size, k**-0.5
    if kind is ScaleKind.F32:
        scale, kept = (torch.rand(n, groups, generator=gen) + 0.5) * small, torch.empty(kept_groups(size, k), n)
    else:
        kept = torch.empty(kept_groups(size, k) // 4, n, dtype=torch.int32)
        low, high = (112, 124) if kind is ScaleKind.E8M0 else (1, 0x7F)  # e4m3: subnormal ones too
        scale = torch.randint(low, high, (n, groups), dtype=torch.uint8, generator=gen)
    pack_scales(scale, kept)
    factor = (torch.rand(n, generator=gen) + 0.5) * small / 100 if has_factor else None
    factor = factor.reciprocal() if factor is not None and divides else factor
    return CodeWeight(pack(codes, kind).to(device), kept.to(device), None if factor is None else factor.to(device),
                      torch.tensor(table).to(device), table, kind, size, k, divides)


def make_case(m: int, n: int, k: int, form: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    """(x [m, k], weight [n, k], bias [n]), random."""
    gen = torch.Generator().manual_seed(0)
    x, bias = torch.randn(m, k, generator=gen), torch.randn(n, generator=gen)
    return x.to(device, dtype), make_weight(n, k, form, device), bias.to(device, dtype)


def expected(case: Case) -> torch.Tensor:
    x, weight, bias = case
    return x.double() @ reference_codes.widen(weight, torch.float32).double().t() + bias.double()


def check_product(case: Case, config: GemmConfig, out_dtype: torch.dtype, *, silu: bool | None = None) -> None:
    """Into buffers full of NaN. silu: with gate and up in one product; None: with and without."""
    x, weight, bias = case
    y = expected(case)
    # Weights are rounded to x's type in registers, a table's values before that.
    near = max(TOLERANCE[out_dtype], TOLERANCE[x.dtype])
    if not silu:
        out = torch.full(y.shape, torch.nan, dtype=out_dtype, device=x.device)
        assert relative_error(gemm_launch.run_linear(Operands(x, weight, bias=bias), config, out_dtype, out=out), y) < near
    if silu is False:
        return
    gate, up = y.chunk(2, -1)
    out = torch.full(gate.shape, torch.nan, dtype=out_dtype, device=x.device)
    gemm_launch.run_linear(Operands(x, weight, bias=bias), config, out_dtype, silu=True, out=out)
    assert relative_error(out, gate * gate.sigmoid() * up) < 2 * near


def check_widening(weight: CodeWeight, dtype: torch.dtype) -> None:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    launch_codes.widen_call(weight, out).launch()
    assert torch.equal(out, reference_codes.widen(weight, dtype))


def check_door(case: Case) -> None:
    x, weight, bias = case
    y = expected(case)
    assert relative_error(ops.linear_codes(x, weight, bias), y) < 2 * TOLERANCE[x.dtype]
    gate, up = y.chunk(2, -1)
    out = ops.silu_mul_codes(x, weight, bias)
    assert isinstance(out, torch.Tensor) and relative_error(out, gate * gate.sigmoid() * up) < 3 * TOLERANCE[x.dtype]
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    ops.linear_codes(x, weight, None, out)
    assert relative_error(out, y - bias.double()) < 2 * TOLERANCE[x.dtype]
