"""What every small matrix product must hold, interpreted or compiled: inputs, naive oracles, one check a kind of output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workstation.kernels import gemm_launch
from workstation.kernels.gemm_launch import Operands
from workstation.kernels.tuning import GemmConfig

FP8 = torch.float8_e4m3fn
# Relative errors of whole results, ||out - ref|| / ||ref||: the rounding of the result, and of the sums inside.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@dataclass
class Case:
    """x [m, k] and weight [n, k], random, in one of the schemes; scales where FP8 is."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    x_scale: torch.Tensor | None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @property
    def operands(self) -> Operands:
        return Operands(self.x, self.weight, self.weight_scale, self.x_scale, self.bias, self.residual)

    def expected(self) -> torch.Tensor:
        """[m, n] float64, without the residual."""
        y = self.x.double() @ self.weight.double().t()
        if self.weight_scale is not None:
            y = y * self.weight_scale
        if self.x_scale is not None:
            y = y * self.x_scale[:, None]
        return y if self.bias is None else y + self.bias


def make_case(
    m: int, n: int, k: int, *, x: torch.dtype, weight: torch.dtype, bias: bool = False, device: str = "cpu", seed: int = 0
) -> Case:
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen)

    case = Case(draw(m, k).to(x), (draw(n, k) * k**-0.5).to(weight), None, None)
    if weight == FP8:
        case.weight_scale = torch.rand(n, generator=gen) + 0.5
    if x == FP8:
        case.x_scale = torch.rand(m, generator=gen) + 0.5
    if bias:
        case.bias = draw(n)
    for name, value in vars(case).items():
        setattr(case, name, value if value is None else value.to(device))
    return case


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN counts as infinite."""
    error = (out.double() - expected).norm() / expected.norm()
    return float(error.nan_to_num(torch.inf))


def check_linear(case: Case, config: GemmConfig, out_dtype: torch.dtype) -> None:
    expected = case.expected()
    if case.residual is not None:
        expected = expected + case.residual
    out = gemm_launch.run_linear(case.operands, config, out_dtype)
    assert out.dtype == out_dtype and out.shape == expected.shape
    assert relative_error(out, expected) < TOLERANCE[out_dtype]


def check_silu_mul(case: Case, config: GemmConfig, out_dtype: torch.dtype) -> None:
    gate, up = case.expected().chunk(2, -1)
    out = gemm_launch.run_linear(case.operands, config, out_dtype, silu=True)
    assert out.dtype == out_dtype and out.shape == gate.shape
    assert relative_error(out, gate * gate.sigmoid() * up) < TOLERANCE[out_dtype]


def check_partials(case: Case, config: GemmConfig) -> None:
    parts = gemm_launch.run_partials(case.operands, config)
    assert parts.shape[0] == gemm_launch.split_count(case.x.shape[1], config)
    assert relative_error(parts.sum(0), case.expected()) < TOLERANCE[torch.float32]
