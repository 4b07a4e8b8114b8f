"""Small matrix products: the twin against a naive oracle, and what the door refuses."""

from __future__ import annotations

import pytest
import torch
from gemm_checks import FP8, TOLERANCE, check_linear, check_partials, check_silu_mul, make_case, relative_error

from workstation.kernels import gemm
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.tuning import GemmConfig

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize(
    ("x", "weight"), [(BF16, BF16), (F16, F16), (F32, F32), (FP8, FP8), (BF16, FP8), (F16, FP8), (F32, FP8)]
)
ON_GPU = pytest.mark.parametrize(("x", "weight"), [(BF16, BF16), (F16, F16), (FP8, FP8), (BF16, FP8), (F16, FP8)])


@DTYPES
@pytest.mark.parametrize("m", [1, 3, 40])
def test_a_linear_layer_scales_adds_and_keeps_the_dtype(m: int, x: torch.dtype, weight: torch.dtype) -> None:
    case = make_case(m, 48, 80, x=x, weight=weight, bias=True)
    out = gemm.linear(case.x, case.weight, case.weight_scale, case.x_scale, case.bias)
    assert out.dtype == (BF16 if x == FP8 else x)
    assert relative_error(out, case.expected()) < TOLERANCE[out.dtype]


def test_a_residual_is_added_before_the_rounding() -> None:
    case = make_case(5, 48, 80, x=BF16, weight=BF16)
    residual = torch.randn(5, 48).to(BF16) * 30
    out = gemm.linear(case.x, case.weight, residual=residual)
    assert torch.equal(out, (case.expected() + residual).to(BF16))


@DTYPES
def test_gate_and_up_are_halves_of_the_channels(x: torch.dtype, weight: torch.dtype) -> None:
    case = make_case(7, 96, 80, x=x, weight=weight, bias=True)
    gate, up = case.expected().chunk(2, -1)
    out = gemm.linear_silu_mul(case.x, case.weight, case.weight_scale, case.x_scale, case.bias, out_dtype=F32)
    assert relative_error(out, gate * gate.sigmoid() * up) < TOLERANCE[F32]


def test_a_misshapen_operand_is_refused_by_name() -> None:
    x, weight, scale = torch.zeros(3, 32), torch.zeros(16, 32), torch.ones(16)
    with pytest.raises(ValueError, match=r"weight \(\[16, 48\].*K=32"):
        gemm.linear(x, torch.zeros(16, 48))
    with pytest.raises(ValueError, match=r"weight .*float32 like x"):
        gemm.linear(x, weight.to(BF16))
    with pytest.raises(ValueError, match=r"weight_scale \(None\).*FP8 weights"):
        gemm.linear(x, weight.to(FP8))
    with pytest.raises(ValueError, match=r"weight_scale .*else None"):
        gemm.linear(x, weight, scale)
    with pytest.raises(ValueError, match=r"weight_scale \(\[16\] torch.float16\)"):
        gemm.linear(x, weight.to(FP8), scale.half())
    with pytest.raises(ValueError, match=r"x_scale \(\[16\]"):
        gemm.linear(x.to(FP8), weight.to(FP8), scale, scale)
    with pytest.raises(ValueError, match=r"x .*contiguous rows"):
        gemm.linear(torch.zeros(32, 3).t(), weight)
    with pytest.raises(ValueError, match=r"bias \(\[15\]"):
        gemm.linear(x, weight, bias=torch.zeros(15))
    with pytest.raises(ValueError, match=r"residual \(\[3, 16\] torch.bfloat16\) must be dense torch.float32"):
        gemm.linear(x, weight, residual=torch.zeros(3, 16, dtype=BF16))
    with pytest.raises(ValueError, match=r"weight .*\[2F, K\]"):
        gemm.linear_silu_mul(x, weight)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("m", [1, 33, 130, 256])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (1056, 4112), (4096, 1024)])
def test_compiled_products_of_any_shape(m: int, n: int, k: int, x: torch.dtype, weight: torch.dtype) -> None:
    case = make_case(m, n, k, x=x, weight=weight, bias=True, device="cuda")
    block_m = min(128, max(16, 1 << (m - 1).bit_length()))
    for splits in (1, 3):
        config = GemmConfig("dot", 64, block_m, 128, splits, 4, 3, pdl=m == 33)
        check_linear(case, config, BF16 if x == FP8 else x)
        check_silu_mul(case, config, BF16 if x == FP8 else x)
    out = gemm.linear(case.x, case.weight, case.weight_scale, case.x_scale, case.bias)
    assert relative_error(out, case.expected()) < 2 * TOLERANCE[out.dtype]


@pytest.mark.gpu
@ON_GPU
def test_compiled_single_rows_on_the_cuda_cores(x: torch.dtype, weight: torch.dtype) -> None:
    case = make_case(1, 1040, 4112, x=x, weight=weight, bias=True, device="cuda")
    for config in (GemmConfig("gemv", 8, 1, 512, 1, 4, 2), GemmConfig("gemv", 4, 1, 1024, 3, 4, 4, True)):
        check_linear(case, config, BF16 if x == FP8 else x)
        check_partials(case, config)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU")
@pytest.mark.parametrize(("x", "weight"), [(BF16, BF16), (F16, F16), (FP8, FP8)])
@pytest.mark.parametrize("m", [1, 5, 16, 33, 130])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (96, 272), (1056, 4112), (4096, 1024)])
def test_rings_of_weights_give_products_of_any_shape(m: int, n: int, k: int, x: torch.dtype, weight: torch.dtype) -> None:
    """Twice each, since a product leaves its counters for the next; the last tiles of n and k may be partial."""
    case = make_case(m, n, k, x=x, weight=weight, bias=True, device="cuda")
    block_m = min(128, max(16, 1 << (m - 1).bit_length()))
    width = 128 // case.weight.element_size()
    for tiles, panels, splits in ((1, 2, 1), (2, 1, 3), (1, 1, 2)):
        config = GemmConfig("hopper", 64 * tiles, block_m, panels * width, splits, 4, 3, True)
        for _ in range(2):
            check_linear(case, config, BF16 if x == FP8 else x)
        if n % 32 == 0 and block_m * 2 <= 256:
            check_silu_mul(case, GemmConfig("hopper", 64, block_m, width, splits, 4, 3, True), BF16 if x == FP8 else x)
